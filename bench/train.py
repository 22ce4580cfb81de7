"""``python -m bench train``: full training steps by every implementation, and a profile of their time.

One call is one step as defined by :func:`dcgan.training.train_step`: D on real and on generated images, D's
optimizer, G through D, G's optimizer. Gradients and losses of every implementation are first compared with
the reference loop in float64, and its parameter updates with its optimizers' state. It is then timed in a
separate process, in bursts interleaved with those of the others. Finally, each of this project's eager
implementations is profiled: the time of every fprop, dgrad and wgrad by layer, next to the ceiling of a
direct convolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from bench import forward, machine, options, records, table
from bench.cases import Case
from bench.ceiling import Ceiling
from bench.expected_results import Materials
from bench.phases import PHASES, Profile
from bench.providers import Provider
from bench.race import PREPARE_SECONDS, Outcome, Settings, WorkerFailed, measure_ceiling, race, started
from bench.records import Report
from bench.table import NOTHING, percent, rate, times
from bench.train_case import Training
from bench.training_variants import PROFILED, VARIANTS
from bench.usage import positive

HELP = "time training steps by every implementation and profile them by layer"
DTYPES = ("float32", "tf32", "bfloat16")
BATCHES = {"cpu": [64, 128], "cuda": [64, 256, 1024]}
CASE_DTYPES = {"cpu": ["float32"], "cuda": ["tf32", "bfloat16"]}
BASELINE = "eager"
"""The provider that peak memory is reported relative to."""
PROFILE_ROUNDS = 5
COLUMNS = ["images/s", "±", "steps", "GFLOP/s", "× baseline", "ceiling", "peak MB", "memory", "error"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--batch",
        nargs="+",
        type=positive,
        metavar="N",
        help="batch sizes (default: 64 128; on a GPU 64 256 1024)",
    )
    add("--dtype", nargs="+", choices=DTYPES, help="dtypes (default: float32; on a GPU tf32 bfloat16)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda if there is a GPU, else cpu",
    )
    add(
        "--providers",
        nargs="+",
        default=list(VARIANTS),
        metavar="NAME",
        help=f"any of {', '.join(VARIANTS)} (default: all), or MODULE:FUNCTION for a custom build function",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--profile", action="store_true", help="only profile, without the comparison")
    only.add_argument("--no-profile", action="store_true", help="only compare, without profiling")
    options.add_timing(parser, "each provider and case", 12.0, rounds=10)
    options.add_threads(parser)
    options.add_json(parser)
    options.add_sizes(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command. Return 1 if a provider is wrong or one of this project's failed, else 0."""
    providers = forward.find_providers(args.providers, VARIANTS)
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
            report = run_race(case, providers, settings, ceilings[case.dtype], log)
            ceilings[case.dtype] = report.ceiling
            reports.append(report)
            out.print(race_table(report))
            for line in [*table.failures(report), *ceiling_lines(report), ""]:
                out.print(line, markup=False, soft_wrap=True)
            rows += records.rows([report], load, "train")
        for name in [] if args.no_profile else profilable(case, providers):
            log(f"{name}: profiling")
            try:
                profile = measure_profile(case, name, min(args.rounds, PROFILE_ROUNDS))
            except WorkerFailed as failure:
                failed = True
                out.print(f"{name}: profiling: FAILED: {failure}\n", markup=False, soft_wrap=True)
                continue
            out.print(profile_table(case, name, profile, ceilings[case.dtype]))
            out.print(profile_line(ceilings[case.dtype]), soft_wrap=True)
            rows += profile_rows(case, name, profile, ceilings[case.dtype], load)
        if args.json is not None:
            records.append(args.json, rows)
    if len(reports) > 1:
        out.print(table.summary_table(reports))
    forward.print_remarks(out, load)
    return max(forward.status(reports), int(failed))


def run_race(
    case: Training,
    providers: Sequence[Provider[Any]],
    settings: Settings,
    ceiling: Ceiling,
    log: Callable[[str], None],
) -> Report:
    """Run the race; measure the ceiling before and after and keep the higher: disturbances only lower it."""
    log("computing the reference results in float64")
    materials = Materials.of(case)
    if case.device == "cuda":
        torch.cuda.empty_cache()
    outcomes = race(case, providers, settings, log, lambda _: materials)
    log("measuring the ceiling again")
    return Report(case, case.work(), measure_ceiling(case).or_better(ceiling), outcomes)


def profilable(case: Training, providers: Sequence[Provider[Any]]) -> list[str]:
    """Return the names of the providers whose operators can be timed one by one."""
    return [p.name for p in providers if case.device in PROFILED.get(p.name, ())]


def make_cases(args: argparse.Namespace) -> list[Training]:
    """Return a case for every dtype and batch size. Raises UsageError for an unsupported combination."""
    device = forward.find_device(args.device, args.dtype or ())
    sizes = options.sizes(args, "generate")  # a Generator has all sizes that a Discriminator has
    return [
        Training("train", batch, dtype, device, args.threads, sizes)
        for dtype in dict.fromkeys(args.dtype or CASE_DTYPES[device])
        for batch in dict.fromkeys(args.batch or BATCHES[device])
    ]


def memory_share(report: Report, outcome: Outcome) -> float | None:
    """Return the outcome's peak memory relative to eager's."""
    base = next((o.peak_bytes for o in report.outcomes if o.provider.name == BASELINE), None)
    return outcome.peak_bytes / base if base and outcome.peak_bytes is not None else None


def race_table(report: Report) -> Table:
    """Return the table of one case, fastest first; providers without times show the reason."""
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
    """Return the legend of the ceiling, memory and error columns."""
    tolerance = next((o.tolerance for o in report.outcomes if o.tolerance is not None), report.case.tolerance)
    return [
        table.ceiling_lines(report)[0],
        "memory:  peak during steps minus the memory after importing PyTorch, and its ratio to eager's; "
        "memory used while compiling is not counted",
        f"error:   relative error of a network's gradient against float64; {tolerance:.0e} is allowed",
    ]


def measure_profile(case: Training, name: str, rounds: int) -> Profile:
    """Profile a provider in a separate process. Raises WorkerFailed."""
    with started(case) as worker:
        profile: Profile = worker.ask(PREPARE_SECONDS, "profile", case, name, rounds)
    return profile


def profile_table(case: Case, name: str, profile: Profile, ceiling: Ceiling) -> Table:
    """Return one row per layer and phase, then the totals of the phases, the optimizers and the rest."""
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
    add("total", "", "", None, profile.step, sum(part.flops for part in profile.parts))
    return shown


def _milliseconds(seconds: float) -> str:
    return rate(1e3 * seconds) if seconds >= 0 else f"-{rate(-1e3 * seconds)}"


def profile_line(ceiling: Ceiling) -> str:
    return (
        f"ceiling: {ceiling.flops / 1e9:,.0f} GFLOP/s, {ceiling.measure}; GFLOP are counted as direct "
        "convolutions, so Winograd may exceed it\n"
    )


def profile_rows(
    case: Case, name: str, profile: Profile, ceiling: Ceiling, load: float | None
) -> list[dict[str, Any]]:
    """Return the JSON objects: times in seconds, rates in FLOP/s of the direct convolution."""
    shared = records.common("train", load) | {
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
