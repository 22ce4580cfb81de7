"""Commands that race networks: ``python -m bench generate``, ``discriminate`` and, on a GPU, ``races``."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from bench import machine, options, output
from bench.cases import DTYPES, Case
from bench.machine import Ceiling
from bench.options import NO_GPU, SIZES
from bench.output import Row
from bench.providers import PROVIDERS, Provider, find_all
from bench.race import Entry, Settings, measure_ceiling, race
from bench.timing import Budget
from bench.training import VARIANTS, Training

BUSY = 0.5  # load per core above which other processes visibly affect the timings


class Inference:
    """Race a network in eval mode across all providers."""

    def __init__(self, command: str, of: str) -> None:
        self.command = command  # a key of NETWORKS
        self.HELP = f"race {of} across providers"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        sizes = [name for name in SIZES if name != "latent_dim" or self.command == "generate"]
        options.add(parser, "device", *sizes, "threads", "json")
        options.add_batches(parser, [1, 64])
        options.add_timing(parser, "each provider and case", 3.0)
        add = parser.add_argument
        text = "dtypes (float32); tf32 needs CUDA"
        add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help=text)
        text = f"any of {', '.join(PROVIDERS)} (all), or MODULE:FUNCTION with the same signature"
        add("--providers", nargs="+", default=list(PROVIDERS), metavar="NAME", help=text)
        text = "state dict to load; determines the sizes (random weights)"
        add("--checkpoint", type=Path, metavar="FILE", help=text)

    def cases(self, args: argparse.Namespace) -> list[Case]:
        """Return one case per dtype and batch. Raises UsageError if the options contradict each other."""
        device = options.find_device(args.device, args.dtype)
        sizes = options.sizes(args, self.command, args.checkpoint)
        checkpoint = None if args.checkpoint is None else str(args.checkpoint)
        return [
            Case(self.command, batch, dtype, device, args.threads, sizes, checkpoint)
            for dtype in dict.fromkeys(args.dtype)
            for batch in dict.fromkeys(args.batch)
        ]

    def run(self, args: argparse.Namespace) -> int:
        """Run the command. Return 1 if a provider is wrong or one of ours failed."""
        return compare(args, self.cases(args), find_all(args.providers))


GENERATE = Inference("generate", "Generator inference (images from noise)")
DISCRIMINATE = Inference("discriminate", "Discriminator inference (probabilities from images)")


def compare(
    args: argparse.Namespace,
    cases: Sequence[Case],
    providers: Sequence[Provider],
    then: Callable[[Case, Ceiling], list[Row]] = lambda *_: [],
) -> int:
    """Race the providers on each case, if there are any; print and write the results.

    ``then`` may measure and print more about a case; it returns JSON objects to write.

    Returns the exit status: 1 if a provider is wrong or one of ours failed.
    """
    settings = Settings(args.seconds, args.rounds, together=cases[0].device == "cuda")
    out, load = output.console(), machine.load()
    ceilings: dict[str, Ceiling] = {}
    races: list[list[Row]] = []
    for case in cases:
        output.log(case.title, indent="")
        output.log("measuring the machine's ceiling")
        ceilings[case.dtype] = measure_ceiling(case, ceilings.get(case.dtype))
        rows: list[Row] = []
        if providers:
            outcomes = race([(case, provider) for provider in providers], settings, output.log)
            output.log("measuring the ceiling again")  # the maximum counts
            ceilings[case.dtype] = measure_ceiling(case, ceilings[case.dtype])
            rows = output.race_rows(case, case.work(), ceilings[case.dtype], outcomes)
            output.print_race(case.title, rows)
            races.append(rows)
        rows = rows + then(case, ceilings[case.dtype])
        shared = output.common(case.kind, load)
        output.append(args.json, [shared | row for row in rows])
    if len(races) > 1:
        out.print(output.summary_table(races))
    if load is not None and load > BUSY * machine.cores():
        out.print(
            f"busy: the load average was {load:.1f} on {machine.cores()} cores before measuring; "
            "an idle machine would give different results"
        )
    if not torch.cuda.is_available():
        out.print(f"cuda: {NO_GPU}")
    return status(itertools.chain(*races))


def status(rows: Iterable[Row]) -> int:
    """Return 1 if any provider is wrong or one of ours failed; a failing baseline is not an error."""
    return int(any(row["status"] == "wrong" or (row["status"] == "failed" and row["ours"]) for row in rows))


# --- generation and training together, within a time budget -------------------------------------------------

RACED = {
    "train": ("train-step", "cudnn-graph", "reduce-overhead"),
    "generate": ("fast-graph", "cudnn-graph", "reduce-overhead"),
}
"""The default providers. The results of a command are written to ``COMMAND.jsonl``."""
THREADS = 2  # CPU threads per provider, as one provider per core compiles
SECONDS, ROUNDS = 0.9, 3  # per provider
OVERHEAD = 0.3  # untimed seconds per burst: warm-up and synchronization
CEILING_SECONDS = 3.0


class Races:
    """Race generation and training steps with cuDNN and torch.compile on a GPU, within a time budget.

    All providers of all cases are built in parallel, one core each; those that search for algorithms are
    built afterwards, one at a time. Then all are timed in interleaved bursts. Providers that are not ready
    when the remaining time is needed for timing are left out.
    """

    HELP = "race generation and training steps on a GPU (make gpu)"

    def __init__(self, device: str = "cuda", sizes: dict[str, int] | None = None) -> None:
        self.device, self.sizes = device, sizes or {}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        options.add(parser, "out", "minutes")
        options.add_batches(parser, [64, 1024])
        add = parser.add_argument
        add("--dtype", nargs="+", default=["bfloat16"], help="dtypes (bfloat16)")
        add("--providers", nargs="*", default=RACED["generate"], help="providers of bench generate")
        add("--variants", nargs="*", default=RACED["train"], help="training variants of bench train")

    def run(self, args: argparse.Namespace) -> int:
        """Race, print and write results. Return 1 if a result is wrong or one of ours failed."""
        if self.device == "cuda":
            options.need_gpu(args.out)
        budget, begun, load = Budget(args.minutes), time.monotonic(), machine.load()
        listed = self.entries(args)
        for name in RACED:
            (args.out / f"{name}.jsonl").unlink(missing_ok=True)  # keep only the rows of this run

        def log(line: str) -> None:
            print(f"{time.monotonic() - begun:5.0f} s  {line}", flush=True)

        settings = Settings(SECONDS, ROUNDS, together=True, until=until(listed, budget))
        outcomes = race(listed, settings, log)
        log("measured")
        ceilings: dict[str, Ceiling] = {}
        failed = 0
        for case, pairs in itertools.groupby(zip(listed, outcomes, strict=True), lambda pair: pair[0][0]):
            if case.dtype not in ceilings:
                ceilings[case.dtype] = machine.measure(case.device, case.dtype)
            own = [outcome for _, outcome in pairs]
            rows = output.race_rows(case, case.work(), ceilings[case.dtype], own)
            shared = output.common(case.kind, load)
            output.append(args.out / f"{case.command}.jsonl", [shared | row for row in rows])
            output.print_race(case.title, rows)
            failed |= status(rows)
        return failed

    def entries(self, args: argparse.Namespace) -> list[Entry]:
        """Return the (case, provider) pairs, training first, as it compiles longest.

        Raises:
            UsageError: a provider or variant is unknown.
        """
        listed = find_all(args.variants, VARIANTS), find_all(args.providers)
        return [
            (kind(command, batch, dtype, self.device, THREADS, self.sizes), provider)
            for kind, command, providers in zip((Training, Case), RACED, listed, strict=True)
            for batch in dict.fromkeys(args.batch)
            for dtype in dict.fromkeys(args.dtype)
            for provider in providers
        ]


def until(listed: Sequence[Entry], budget: Budget) -> float:
    """Return the time (monotonic clock) by which building must end so that all can be timed."""
    timing = len(listed) * (SECONDS + ROUNDS * OVERHEAD) + CEILING_SECONDS
    return time.monotonic() + max(budget.seconds - timing, 0.0)


RACES = Races()
