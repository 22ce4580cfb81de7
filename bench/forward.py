"""What ``generate`` and ``discriminate`` share: options, the cases they make, the races, the print-out."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import machine, results, table
from bench.cases import DTYPES, NETWORKS, Case, load_state
from bench.ceiling import Ceiling
from bench.flops import count
from bench.providers import PROVIDERS, Provider, find_all
from bench.race import Settings, measure_ceiling, race
from bench.results import Report
from bench.usage import UsageError, positive, seconds

NO_GPU = "no GPU here"
BUSY = 0.5  # load a core from which the figures are the neighbours' too


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """The options of a forward command; ``command`` is a key of NETWORKS."""
    add = parser.add_argument
    add("--batch", nargs="+", type=positive, default=[1, 64], metavar="N", help="batch sizes (1 64)")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="float32; tf32 is CUDA's")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    add(
        "--providers",
        nargs="+",
        default=list(PROVIDERS),
        metavar="NAME",
        help=f"of {', '.join(PROVIDERS)} (all), or MODULE:FUNCTION, a build function like theirs",
    )
    add("--seconds", type=seconds, default=3.0, help="measuring time of each provider and case (3)")
    add("--rounds", type=positive, default=6, help="bursts that time is divided into (6)")
    add("--threads", type=positive, default=machine.cores(), help="CPU threads of each provider (all cores)")
    add("--json", type=Path, metavar="FILE", help="append the results, one JSON object a line")
    add("--checkpoint", type=Path, metavar="FILE", help="a state dict; its sizes are read off it")
    add("--channels", type=positive, help="channels of the image (1)")
    add("--features", type=positive, help="channels of the map next to the image (64)")
    add("--image-size", type=positive, help="32, 64, 128 or 256 (64)")
    if command == "generate":
        add("--latent-dim", type=positive, help="length of z (100)")


def run(args: argparse.Namespace, command: str) -> int:
    """Races, prints, writes. Returns the exit status: 1 if a provider is wrong or one of ours failed."""
    providers = find_providers(args.providers)
    cases = make_cases(args, command)
    settings = Settings(args.seconds, args.rounds)
    out, progress = table.console(), table.console(stderr=True)
    load = machine.load()

    def log(line: str) -> None:
        progress.print(f"  {line}", style="dim", markup=False)

    ceilings: dict[str, Ceiling] = {}
    reports: list[Report] = []
    for case in cases:
        progress.print(case.title, style="dim", markup=False)
        log("measuring the machine's ceiling")
        ceilings[case.dtype] = measure_ceiling(case).or_better(ceilings.get(case.dtype))
        outcomes = race(case, providers, settings, log)
        report = Report(case, count(case.skeleton(), case.input_shape), ceilings[case.dtype], outcomes)
        reports.append(report)
        out.print(table.race_table(report))
        for line in [*table.failures(report), *table.ceiling_lines(report), ""]:
            out.print(line, markup=False, soft_wrap=True)
        if args.json is not None:
            results.append(args.json, results.rows([report], load))
    if len(reports) > 1:
        out.print(table.summary_table(reports))
    if load is not None and load > BUSY * machine.cores():
        out.print(
            f"busy: the load was {load:.1f} on {machine.cores()} cores before measuring; "
            "an idle machine gives other figures"
        )
    if not torch.cuda.is_available():
        out.print(f"cuda: {NO_GPU}")
    return status(reports)


def status(reports: list[Report]) -> int:
    """1 if any provider is wrong, or one of this project's failed; a rival's failure is its own."""
    outcomes = [outcome for report in reports for outcome in report.outcomes]
    return int(any(o.status == "wrong" or (o.status == "failed" and o.provider.ours) for o in outcomes))


def find_providers(names: list[str]) -> list[Provider]:
    try:
        return find_all(names)
    except ValueError as error:
        raise UsageError(f"argument --providers: {error}") from error


def make_cases(args: argparse.Namespace, command: str) -> list[Case]:
    """Every dtype with every batch. Raises UsageError for what can't be asked for."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"argument --device: cuda: {NO_GPU}")
    if device == "cpu" and "tf32" in args.dtype:
        raise UsageError("argument --dtype: tf32 is a setting of CUDA devices")
    sizes = _sizes(args, command)
    return [
        Case(
            command=command,
            batch=batch,
            dtype=dtype,
            device=device,
            threads=args.threads,
            sizes=sizes,
            checkpoint=None if args.checkpoint is None else str(args.checkpoint),
        )
        for dtype in dict.fromkeys(args.dtype)
        for batch in dict.fromkeys(args.batch)
    ]


def _sizes(args: argparse.Namespace, command: str) -> dict[str, int]:
    names = ("latent_dim", "channels", "features", "image_size")
    given = {name: vars(args)[name] for name in names if vars(args).get(name) is not None}
    network = NETWORKS[command]
    try:
        if args.checkpoint is None:
            network(**given)  # refuses sizes that are not allowed
            return given
        found = network.sizes_of(load_state(args.checkpoint))
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    wrong = [f"{name} {found[name]}, not {value}" for name, value in given.items() if found[name] != value]
    if wrong:
        raise UsageError(f"argument --checkpoint: {args.checkpoint} has {', '.join(wrong)}")
    return found
