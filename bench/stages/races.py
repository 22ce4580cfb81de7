"""Generation and whole training steps, ours beside cuDNN in one CUDA graph and torch.compile, in one race.

Every contestant of every case is built at the same time, as compiling takes a core each; those that search
among algorithms come after, one by one; then all are timed in turn. Who is not ready when what is left is
needed for timing is left out.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence

import torch

from bench import answers, cases, ceiling, forward, machine, results, table, train, worker
from bench.budget import Budget
from bench.flops import count
from bench.race import Entry, Saved, Settings, contest
from bench.results import Report
from bench.train_case import Training
from bench.ways import WAYS

BATCHES = (64, 1024)
DTYPES = ("bfloat16",)
CONTESTANTS = {
    "train": ("train-step", "cudnn-graph", "reduce-overhead"),
    "generate": ("fast-graph", "cudnn-graph", "reduce-overhead"),
}
FILES = {"train": "train.jsonl", "generate": "generate.jsonl"}
THREADS = 2  # of a contestant on the CPU, where as many compile as there are cores
SECONDS, ROUNDS = 0.9, 3  # of each contestant
OVERHEAD = 0.3  # seconds of a burst that are not measured: warming up, and waiting until all is quiet
CEILING_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is raced, where not all that is by default."""
    add = parser.add_argument
    add("--providers", nargs="*", default=CONTESTANTS["generate"], metavar="NAME", help="of bench generate")
    add("--ways", nargs="*", default=CONTESTANTS["train"], metavar="NAME", help="of bench train")


def entries(
    batches: Sequence[int],
    dtypes: Sequence[str],
    ways: Sequence[str],
    providers: Sequence[str],
    device: str = "cuda",
    sizes: dict[str, int] | None = None,
) -> list[Entry]:
    """Training first, as it compiles longest. Raises UsageError for a name that there is not."""
    listed = forward.find_providers(list(ways), WAYS), forward.find_providers(list(providers))
    found: list[Entry] = []
    for batch, dtype in itertools.product(dict.fromkeys(batches), dict.fromkeys(dtypes)):
        common = batch, dtype, device, THREADS, sizes or {}
        both = Training("train", *common), cases.Case("generate", *common)
        for case, contestants in zip(both, listed, strict=True):
            found += [(case, contestant) for contestant in contestants]
    return sorted(found, key=lambda entry: entry[0].command != "train")


def materials(case: cases.Case) -> Saved:
    """What a case's contestants are handed and held against."""
    if not isinstance(case, Training):
        return cases.Materials.of(case)
    made = answers.Materials.of(case)
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return made


def race(listed: Sequence[Entry], settings: Settings, log: Callable[[str], None]) -> list[Report]:
    """One report a case."""
    outcomes = contest(listed, materials, settings, log)
    ceilings: dict[str, ceiling.Ceiling] = {}
    reports = []
    for case, own in itertools.groupby(zip(listed, outcomes, strict=True), key=lambda pair: pair[0][0]):
        if case.dtype not in ceilings:
            worker.set_precision(case.device, case.dtype)
            ceilings[case.dtype] = ceiling.measure(case.device, case.dtype)
        work = case.work() if isinstance(case, Training) else count(case.skeleton(), case.input_shape)
        reports.append(Report(case, work, ceilings[case.dtype], [outcome for _, outcome in own]))
    return reports


def until(listed: Sequence[Entry], budget: Budget) -> float:
    """When building must end, by the monotonic clock, if all are then timed."""
    timing = len(listed) * (SECONDS + ROUNDS * OVERHEAD) + CEILING_SECONDS
    return time.monotonic() + max(budget.seconds - timing, 0.0)


def run(
    args: argparse.Namespace, budget: Budget, device: str = "cuda", sizes: dict[str, int] | None = None
) -> int:
    """Races, prints, writes. 1 if a contestant is wrong or one of ours failed."""
    listed = entries(args.batch or BATCHES, args.dtype or DTYPES, args.ways, args.providers, device, sizes)
    for name in FILES.values():
        (args.out / name).unlink(missing_ok=True)  # its rows are those of this race
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
        results.append(args.out / FILES[report.case.command], results.rows([report], load, kind))
        out.print(train.race_table(report) if training else table.race_table(report))
        for line in table.failures(report):
            out.print(line, markup=False, soft_wrap=True)
    return forward.status(reports)
