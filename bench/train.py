"""``python -m bench train``: training steps of both networks, every way, and where their time goes.

A call is one step as :func:`dcgan.training.train_step` writes it: D on real and on generated images, its
optimizer, G through D, its optimizer. Every way's gradients and losses are first held against the seed's loop
in float64, and its parameters' movement against its optimizers' state; then it is timed in a process of its
own, in bursts that all take in turn. Then each of this project's eager ways is taken apart: the time of every
convolution and gradient by layer, beside what a direct convolution could do at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from bench import forward, machine, options, results, table
from bench.answers import Materials
from bench.cases import Case
from bench.ceiling import Ceiling
from bench.phases import PHASES, Profile
from bench.providers import Provider
from bench.race import PREPARE_SECONDS, Outcome, Settings, WorkerFailed, measure_ceiling, race, started
from bench.results import Report
from bench.table import NOTHING, percent, rate, times
from bench.train_case import Training
from bench.usage import positive
from bench.ways import PROFILED, WAYS

HELP = "training steps by every way, and where their time goes"
DTYPES = ("float32", "tf32", "bfloat16")
BATCHES = {"cpu": [64, 128], "cuda": [64, 256, 1024]}
CASE_DTYPES = {"cpu": ["float32"], "cuda": ["tf32", "bfloat16"]}
BASELINE = "eager"
"""Whose memory the others' is a share of."""
PROFILE_ROUNDS = 5
COLUMNS = ["images/s", "±", "steps", "GFLOP/s", "× best", "ceiling", "peak MB", "memory", "error"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", nargs="+", type=positive, metavar="N", help="(64 128; on a GPU 64 256 1024)")
    add("--dtype", nargs="+", choices=DTYPES, help="(float32; on a GPU tf32 bfloat16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    add(
        "--providers",
        nargs="+",
        default=list(WAYS),
        metavar="NAME",
        help=f"of {', '.join(WAYS)} (all), or MODULE:FUNCTION, a build function like theirs",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--profile", action="store_true", help="only where the time goes, no race")
    only.add_argument("--no-profile", action="store_true", help="only the race")
    options.add_timing(parser, "each provider and case", 12.0, rounds=10)
    options.add_threads(parser)
    options.add_json(parser)
    options.add_sizes(parser)


def run(args: argparse.Namespace) -> int:
    """Races, prints, writes. Returns the exit status: 1 if a way is wrong or one of ours failed."""
    providers = forward.find_providers(args.providers, WAYS)
    cases = make_cases(args)
    out, progress = table.console(), table.console(stderr=True)
    load = machine.load()

    def log(line: str) -> None:
        progress.print(f"  {line}", style="dim", markup=False)

    reports: list[Report] = []
    ceilings: dict[str, Ceiling] = {}
    failed = False
    for case in cases:
        progress.print(case.title, style="dim", markup=False)
        log("measuring the machine's ceiling")
        ceilings[case.dtype] = measure_ceiling(case).or_better(ceilings.get(case.dtype))
        rows: list[dict[str, Any]] = []
        if not args.profile:
            settings = Settings(args.seconds, args.rounds, together=case.device == "cuda")
            report = raced(case, providers, settings, ceilings[case.dtype], log)
            ceilings[case.dtype] = report.ceiling
            reports.append(report)
            out.print(race_table(report))
            for line in [*table.failures(report), *ceiling_lines(report), ""]:
                out.print(line, markup=False, soft_wrap=True)
            rows += results.rows([report], load, "train")
        for name in [] if args.no_profile else profiled(case, providers):
            log(f"{name}: where the time goes")
            try:
                profile = measure_profile(case, name, min(args.rounds, PROFILE_ROUNDS))
            except WorkerFailed as failure:
                failed = True
                out.print(f"{name}: where the time goes: FAILED: {failure}\n", markup=False, soft_wrap=True)
                continue
            out.print(profile_table(case, name, profile, ceilings[case.dtype]))
            out.print(profile_line(ceilings[case.dtype]), soft_wrap=True)
            rows += profile_rows(case, name, profile, ceilings[case.dtype], load)
        if args.json is not None:
            results.append(args.json, rows)
    if len(reports) > 1:
        out.print(table.summary_table(reports))
    forward.print_remarks(out, load)
    return max(forward.status(reports), int(failed))


def raced(
    case: Training,
    providers: Sequence[Provider[Any]],
    settings: Settings,
    ceiling: Ceiling,
    log: Callable[[str], None],
) -> Report:
    """The race, with the better of two ceilings, before and after: what disturbs can only lower one."""
    log("computing the answers in float64")
    materials = Materials.of(case)
    if case.device == "cuda":
        torch.cuda.empty_cache()
    outcomes = race(case, providers, settings, log, lambda _: materials)
    log("measuring the ceiling again")
    return Report(case, case.work(), measure_ceiling(case).or_better(ceiling), outcomes)


def profiled(case: Training, providers: Sequence[Provider[Any]]) -> list[str]:
    """Those that can be taken apart."""
    return [p.name for p in providers if case.device in PROFILED.get(p.name, ())]


def make_cases(args: argparse.Namespace) -> list[Training]:
    """Every dtype with every batch. Raises UsageError for what can't be asked for."""
    device = forward.find_device(args.device, args.dtype or ())
    sizes = options.sizes(args, "generate")  # a Generator has all sizes that a Discriminator has
    return [
        Training("train", batch, dtype, device, args.threads, sizes)
        for dtype in dict.fromkeys(args.dtype or CASE_DTYPES[device])
        for batch in dict.fromkeys(args.batch or BATCHES[device])
    ]


def memory_share(report: Report, outcome: Outcome) -> float | None:
    """The outcome's peak memory over eager's."""
    base = next((o.peak_bytes for o in report.outcomes if o.provider.name == BASELINE), None)
    return outcome.peak_bytes / base if base and outcome.peak_bytes is not None else None


def race_table(report: Report) -> Table:
    """One case: fastest first; who was not timed says why."""
    shown = table.start(report.case.title, ["provider"], COLUMNS)
    shown.add_column("", no_wrap=True, max_width=table.NOTE_WIDTH)
    baseline = report.fastest_baseline()
    for outcome in report.ranked():
        cells = _cells(report, outcome, baseline)
        cells += [NOTHING] * (len(COLUMNS) - len(cells))
        name = Text(outcome.provider.name, style="bold" if outcome.provider.ours else "")
        shown.add_row(name, *cells, Text(table.explanation(outcome), overflow="ellipsis"))
    return shown


def _cells(report: Report, outcome: Outcome, baseline: float | None) -> list[str]:
    images = report.images_per_s(outcome)
    if images is None:
        return []
    warm = outcome.spreads["warm"]
    return [
        rate(images),
        percent(warm.relative),
        str(warm.count),
        f"{images * report.work.flops / 1e9:,.0f}",
        times(None if baseline is None else images / baseline),
        percent(images / report.ceiling_images_per_s),
        NOTHING if outcome.peak_bytes is None else f"{outcome.peak_bytes / 1e6:,.0f}",
        percent(memory_share(report, outcome)),
        NOTHING if outcome.error is None else f"{outcome.error:.1e}",
    ]


def ceiling_lines(report: Report) -> list[str]:
    """What the shares are shares of."""
    tolerance = next((o.tolerance for o in report.outcomes if o.tolerance is not None), report.case.tolerance)
    return [
        table.ceiling_lines(report)[0],
        "memory:  peak during steps, beyond what importing PyTorch took, and its share of eager's; "
        "what compiling took is not counted",
        f"error:   of a network's gradient against float64; {tolerance:.0e} is allowed",
    ]


def measure_profile(case: Training, name: str, rounds: int) -> Profile:
    """In a process of its own. Raises WorkerFailed."""
    with started(case) as worker:
        profile: Profile = worker.ask(PREPARE_SECONDS, "profile", case, name, rounds)
    return profile


def profile_table(case: Case, name: str, profile: Profile, ceiling: Ceiling) -> Table:
    """A row a layer and phase, then what each phase, the optimizers and everything else come to."""
    columns = ["calls", "ms", "share", "GFLOP", "GFLOP/s", "ceiling"]
    shown = table.start(f"{name} · {case.title}", ["phase", "layer", "engine"], columns)

    def add(phase: str, layer: str, engine: str, calls: int | None, seconds: float, flops: int) -> None:
        work = [rate(flops / 1e9), rate(flops / seconds / 1e9), percent(flops / seconds / ceiling.flops)]
        shown.add_row(
            *(phase, layer, engine, "" if calls is None else str(calls)),
            *(_milliseconds(seconds), percent(seconds / profile.step)),
            *(work if flops else []),
        )

    for phase in PHASES:
        for part in (part for part in profile.parts if part.phase == phase):
            add(*part)
        shown.add_section()
    for phase in PHASES:
        own = [part for part in profile.parts if part.phase == phase]
        if own:
            calls = sum(part.calls for part in own)
            add(phase, "", "", calls, sum(part.seconds for part in own), sum(part.flops for part in own))
    add("optimizers", "", "", None, profile.optimizers, 0)
    add("everything else", "", "", None, profile.other, 0)
    shown.add_section()
    add("a step", "", "", None, profile.step, sum(part.flops for part in profile.parts))
    return shown


def _milliseconds(seconds: float) -> str:
    return rate(1e3 * seconds) if seconds >= 0 else f"-{rate(-1e3 * seconds)}"


def profile_line(ceiling: Ceiling) -> str:
    return (
        f"ceiling: {ceiling.flops / 1e9:,.0f} GFLOP/s, {ceiling.measure}; GFLOP are those of direct "
        "convolutions, and Winograd may exceed it\n"
    )


def profile_rows(
    case: Case, name: str, profile: Profile, ceiling: Ceiling, load: float | None
) -> list[dict[str, Any]]:
    """The JSON objects: times in seconds, rates in FLOP/s of the direct convolution."""
    shared = results.common("train", load) | {
        "case": case.to_json(),
        "provider": name,
        "ceiling": ceiling.to_json(),
        "step": profile.step,
    }

    def row(phase: str, seconds: float, **more: Any) -> dict[str, Any]:
        return shared | {"phase": phase, "seconds": seconds, "share": seconds / profile.step} | more

    return [
        *(
            row(
                part.phase,
                part.seconds,
                layer=part.layer,
                engine=part.engine,
                calls=part.calls,
                flops=part.flops,
                flops_per_s=part.flops / part.seconds,
            )
            for part in profile.parts
        ),
        row("optimizers", profile.optimizers),
        row("other", profile.other),
    ]
