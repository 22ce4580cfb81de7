"""Benchmark generation and training steps: ours compared with cuDNN in a CUDA graph and torch.compile.

All providers of all cases are built in parallel, one core each; those that search for algorithms are built
afterwards, one at a time. Then all are timed in interleaved bursts. Providers that are not ready when the
remaining time is needed for timing are left out.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence

import torch

from bench import cases, ceiling, expected_results, forward, machine, records, table, train, worker
from bench.budget import Budget
from bench.flops import count
from bench.race import Entry, Saved, Settings, race_entries
from bench.records import Report
from bench.train_case import Training
from bench.training_variants import VARIANTS

BATCHES = (64, 1024)
DTYPES = ("bfloat16",)
PROVIDERS = {
    "train": ("train-step", "cudnn-graph", "reduce-overhead"),
    "generate": ("fast-graph", "cudnn-graph", "reduce-overhead"),
}
FILES = {"train": "train.jsonl", "generate": "generate.jsonl"}
THREADS = 2  # CPU threads per provider, as one provider per core compiles
SECONDS, ROUNDS = 0.9, 3  # per provider
OVERHEAD = 0.3  # untimed seconds per burst: warm-up and synchronization
CEILING_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select providers and training variants."""
    add = parser.add_argument
    add(
        "--providers",
        nargs="*",
        default=PROVIDERS["generate"],
        metavar="NAME",
        help="providers of bench generate",
    )
    add(
        "--variants",
        nargs="*",
        default=PROVIDERS["train"],
        metavar="NAME",
        help="training variants of bench train",
    )


def entries(
    batches: Sequence[int],
    dtypes: Sequence[str],
    variants: Sequence[str],
    providers: Sequence[str],
    device: str = "cuda",
    sizes: dict[str, int] | None = None,
) -> list[Entry]:
    """Return the (case, provider) pairs, training first, as it compiles longest.

    Raises:
        UsageError: a provider or variant is unknown.
    """
    listed = forward.find_providers(list(variants), VARIANTS), forward.find_providers(list(providers))
    found: list[Entry] = []
    for batch, dtype in itertools.product(dict.fromkeys(batches), dict.fromkeys(dtypes)):
        common = batch, dtype, device, THREADS, sizes or {}
        both = Training("train", *common), cases.Case("generate", *common)
        for case, selected in zip(both, listed, strict=True):
            found += [(case, provider) for provider in selected]
    return sorted(found, key=lambda entry: entry[0].command != "train")


def materials(case: cases.Case) -> Saved:
    """Return the inputs and expected results of a case."""
    if not isinstance(case, Training):
        return cases.Materials.of(case)
    result = expected_results.Materials.of(case)
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return result


def race(listed: Sequence[Entry], settings: Settings, log: Callable[[str], None]) -> list[Report]:
    """Build and time all entries. Return one report per case."""
    outcomes = race_entries(listed, materials, settings, log)
    ceilings: dict[str, ceiling.Ceiling] = {}
    reports = []
    for case, pairs in itertools.groupby(zip(listed, outcomes, strict=True), key=lambda pair: pair[0][0]):
        if case.dtype not in ceilings:
            worker.set_precision(case.device, case.dtype)
            ceilings[case.dtype] = ceiling.measure(case.device, case.dtype)
        work = case.work() if isinstance(case, Training) else count(case.skeleton(), case.input_shape)
        reports.append(Report(case, work, ceilings[case.dtype], [outcome for _, outcome in pairs]))
    return reports


def until(listed: Sequence[Entry], budget: Budget) -> float:
    """Return the time (monotonic clock) by which building must end so that all can be timed."""
    timing = len(listed) * (SECONDS + ROUNDS * OVERHEAD) + CEILING_SECONDS
    return time.monotonic() + max(budget.seconds - timing, 0.0)


def run(
    args: argparse.Namespace, budget: Budget, device: str = "cuda", sizes: dict[str, int] | None = None
) -> int:
    """Run the benchmark, print and write results. Return 1 if a result is wrong or one of ours failed."""
    listed = entries(
        args.batch or BATCHES, args.dtype or DTYPES, args.variants, args.providers, device, sizes
    )
    for name in FILES.values():
        (args.out / name).unlink(missing_ok=True)  # keep only the rows of this run
    settings = Settings(SECONDS, ROUNDS, together=True, until=until(listed, budget))
    load, begun = machine.load(), time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {line}", flush=True)

    reports = race(listed, settings, log)
    log("measured")
    out = table.console()
    for report in reports:
        training = report.case.command == "train"
        kind = "train" if training else "race"
        records.append(args.out / FILES[report.case.command], records.rows([report], load, kind))
        out.print(train.race_table(report) if training else table.race_table(report))
        for line in table.failures(report):
            out.print(line, markup=False, soft_wrap=True)
    return forward.status(reports)
