"""Shared code of ``generate`` and ``discriminate``: options, cases, races and reports."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import machine, options, records, table
from bench.cases import DTYPES, Case
from bench.ceiling import Ceiling
from bench.flops import count
from bench.providers import PROVIDERS, Provider, find_all
from bench.race import Settings, measure_ceiling, race
from bench.records import Report
from bench.usage import UsageError, positive

NO_GPU = "no GPU here"
BUSY = 0.5  # load per core above which other processes visibly affect the timings


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of an inference command; ``command`` is a key of NETWORKS."""
    add = parser.add_argument
    add("--batch", nargs="+", type=positive, default=[1, 64], metavar="N", help="batch sizes (1 64)")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="dtypes (float32); tf32 needs CUDA")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto selects CUDA if there is a GPU (auto)",
    )
    add(
        "--providers",
        nargs="+",
        default=list(PROVIDERS),
        metavar="NAME",
        help=f"any of {', '.join(PROVIDERS)} (all), or MODULE:FUNCTION with the same signature",
    )
    options.add_timing(parser, "each provider and case", 3.0)
    options.add_threads(parser)
    options.add_json(parser)
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="state dict to load; determines the sizes (random weights)",
    )
    options.add_sizes(parser, latent_dim=command == "generate")


def run(args: argparse.Namespace, command: str) -> int:
    """Run the races, print and write the results.

    Returns the exit status: 1 if a provider is wrong or one of ours failed.
    """
    providers = find_providers(args.providers)
    cases = make_cases(args, command)
    settings = Settings(args.seconds, args.rounds, together=cases[0].device == "cuda")
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
        log("measuring the ceiling again")  # the maximum counts, as noise can only lower a rate
        ceilings[case.dtype] = measure_ceiling(case).or_better(ceilings[case.dtype])
        report = Report(case, count(case.skeleton(), case.input_shape), ceilings[case.dtype], outcomes)
        reports.append(report)
        out.print(table.race_table(report))
        for line in [*table.failures(report), *table.ceiling_lines(report), ""]:
            out.print(line, markup=False, soft_wrap=True)
        if args.json is not None:
            records.append(args.json, records.rows([report], load))
    if len(reports) > 1:
        out.print(table.summary_table(reports))
    print_remarks(out, load)
    return status(reports)


def print_remarks(out: Console, load: float | None) -> None:
    """Print what readers must know about the machine."""
    if load is not None and load > BUSY * machine.cores():
        out.print(
            f"busy: the load average was {load:.1f} on {machine.cores()} cores before measuring; "
            "an idle machine would give different results"
        )
    if not torch.cuda.is_available():
        out.print(f"cuda: {NO_GPU}")


def status(reports: list[Report]) -> int:
    """Return 1 if any provider is wrong or one of ours failed; a failing baseline is not an error."""
    outcomes = [outcome for report in reports for outcome in report.outcomes]
    return int(any(o.status == "wrong" or (o.status == "failed" and o.provider.ours) for o in outcomes))


def find_providers(
    names: list[str], registry: Mapping[str, Provider[Any]] = PROVIDERS
) -> list[Provider[Any]]:
    """Look up providers by name. Raises UsageError for an unknown name."""
    try:
        return find_all(names, registry)
    except ValueError as error:
        raise UsageError(f"argument --providers: {error}") from error


def find_device(requested: str, dtypes: Collection[str]) -> str:
    """Resolve ``requested``; ``auto`` prefers CUDA.

    Raises:
        UsageError: the device is absent, or a dtype is not available on it.
    """
    device = requested
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"argument --device: cuda: {NO_GPU}")
    if device == "cpu" and "tf32" in dtypes:
        raise UsageError("argument --dtype: tf32 is a setting of CUDA devices")
    return device


def make_cases(args: argparse.Namespace, command: str) -> list[Case]:
    """Return one case per dtype and batch. Raises UsageError if the options contradict each other."""
    device = find_device(args.device, args.dtype)
    sizes = options.sizes(args, command, args.checkpoint)
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
