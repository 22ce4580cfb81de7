"""The steps of each stage of ``make gpu``, most important first, and the seconds for each step."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.stages import archive, jobs, suite
from bench.stages.jobs import Done
from bench.stages.summary import (
    LINES,
    Summary,
    failures_of,
    fit_lines,
    kernel_lines,
    lines,
    race_lines,
    wrong_kernels,
)

RESERVED = 12.0  # seconds of each piece for importing PyTorch and finishing work that has begun
MIN_SECONDS = 5.0  # a step with less time left is skipped
MACHINE_BROKEN = 3  # exit status of bench.stages.smoke if the machine does not work
SKIPPED = re.compile(r"not reached in time: (.*)")
BATCHES = ("64", "1024")
DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class Step:
    """A step of a stage."""

    name: str
    seconds: float
    """Its time limit, in addition to any time left over by earlier steps."""
    run: Callable[[float, float], Summary]
    """Called with the step's own seconds, and the seconds after which it is killed."""


@dataclass(frozen=True)
class Context:
    """Output directory and options of a stage."""

    out: Path
    processes: int
    batch: Sequence[str] = BATCHES
    dtype: Sequence[str] = DTYPES
    races: Sequence[str] = field(default_factory=tuple)
    """Options of bench.stages.races that select the providers."""


def run(args: argparse.Namespace) -> int:
    """Run a stage. Return 1 if a test failed or a result was wrong."""
    races = []
    for name in ("providers", "variants"):
        given = getattr(args, name)
        races += [] if given is None else [f"--{name}", *given]
    context = Context(
        args.out.resolve(),
        args.processes,
        tuple(map(str, args.batch or BATCHES)),
        tuple(args.dtype or DTYPES),
        tuple(races),
    )
    return perform(args.stage, STAGES[args.stage](context), context.out)


def perform(stage: str, steps: Sequence[Step], out: Path) -> int:
    """Run the steps in order, print their summaries and write the archive."""
    begun = time.monotonic()
    whole = out / f"{stage}.txt"
    summaries: list[Summary] = []
    end = begun
    for step in steps:
        end += step.seconds
        summaries.append(_summary_of(step, end - time.monotonic()))
        whole.write_text("\n".join(lines(summaries)) + "\n")
        print(f"{time.monotonic() - begun:4.0f} s  {summaries[-1].heading}", file=sys.stderr, flush=True)
        if summaries[-1].ends:
            break
    last = Summary(stage, f"{time.monotonic() - begun:.0f} s in all")
    print("\n".join(fit_lines([*summaries, last], str(whole), LINES - 1)))
    path, left_out = archive.write(out)
    omitted = f"; too large: {', '.join(left_out)}" if left_out else ""
    print(f"archive: {path} ({path.stat().st_size / 2**20:.1f} MiB){omitted}"[:1000])
    return int(any(summary.failures for summary in summaries))


def _summary_of(step: Step, seconds: float) -> Summary:
    if seconds < MIN_SECONDS:
        return Summary(step.name, missed=["all of it"])
    try:
        return step.run(step.seconds, seconds)
    except Exception as error:  # the remaining steps still run
        return Summary(step.name, failures=[f"{type(error).__name__}: {error}"])


# --- steps --------------------------------------------------------------------------------------------------

Reader = Callable[[Summary, Done, Path], None]
"""Adds the results in a piece's files and output to its summary."""


def piece(
    context: Context,
    name: str,
    seconds: float,
    arguments: Sequence[str],
    read: Reader,
    *,
    folder: str = "",
    endless: bool = False,
) -> Step:
    """A step that runs a command with ``--out`` and ``--minutes``; an endless one gets only its own time."""
    out = context.out / folder

    def go(own: float, at_most: float) -> Summary:
        begin_seconds = max((min(own, at_most) if endless else at_most) - RESERVED, 1.0)
        options = ["--out", str(out), "--minutes", f"{begin_seconds / 60:.4f}"]
        done = jobs.run([*arguments, *options], at_most, context.out / "logs" / f"{name}.txt")
        return summarize(name, done, read, out)

    return Step(name, seconds, go)


def summarize(name: str, done: Done, read: Reader, out: Path) -> Summary:
    """Summarize a process's results, and how it ended if the results do not explain its exit status."""
    summary = Summary(name, f"{done.seconds:.0f} s")
    read(summary, done, out)
    if done.status is None or done.status > 1 or done.status < 0 or (done.status and not summary.failures):
        summary.failures.append(done.trouble)
    missed = SKIPPED.findall(done.log.read_text(errors="replace"))
    if missed and missed[-1] != "nothing":
        summary.missed.append(missed[-1])
    return summary


def tests(context: Context, seconds: float, chosen: str) -> Step:
    """A step that runs the GPU tests selected by a marker expression."""

    def go(own: float, at_most: float) -> Summary:
        begun = time.monotonic()
        tested = suite.run(context.out / "tests", begun + at_most, context.processes, ["-m", chosen])
        with (context.out / "tests.jsonl").open("w") as file:
            for record in tested.outcomes:
                file.write(json.dumps(record) + "\n")
        counts = ", ".join(
            f"{tested.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")
        )
        line = f"{time.monotonic() - begun:.0f} s; {counts}"
        return Summary("tests", line, tested.failures, missed=tested.missed)

    return Step("tests", seconds, go)


def _smoke(summary: Summary, done: Done, out: Path) -> None:
    summary.shown += [line for line in done.log.read_text(errors="replace").splitlines() if line.strip()][:4]
    summary.ends = done.status == MACHINE_BROKEN


def _races(summary: Summary, done: Done, out: Path) -> None:
    for name in ("train", "generate"):
        rows = read_rows(out / f"{name}.jsonl")
        summary.failures += failures_of(rows)
        summary.shown += race_lines(rows, name)


def _kernels(summary: Summary, done: Done, out: Path) -> None:
    rows = read_rows(out / "kernels.jsonl")
    summary.failures += wrong_kernels(rows)
    summary.shown += kernel_lines(rows)


def _output(summary: Summary, done: Done, out: Path) -> None:
    """Add failures, and the last line of output without the skipped work."""
    lines_of_log = [line for line in done.log.read_text(errors="replace").splitlines() if line.strip()]
    summary.failures += [line for line in lines_of_log if re.search(r"\b(WRONG|FAILED|ERRORS FOUND)\b", line)]
    summary.shown += [SKIPPED.sub("", line).rstrip("; ") for line in lines_of_log[-1:]]


def _table(summary: Summary, done: Done, out: Path) -> None:
    """Add the printed table, and its last row as a failure if a target is missed."""
    lines_of_log = [line for line in done.log.read_text(errors="replace").splitlines() if line.strip()]
    summary.shown += lines_of_log[-4:]
    summary.failures += lines_of_log[-1:] if done.status == 1 else []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; an incomplete line of a killed process is skipped."""
    found = []
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


# --- stages -------------------------------------------------------------------------------------------------


def smoke(context: Context, seconds: float) -> Step:
    return piece(context, "smoke", seconds, ["bench.stages", "smoke"], _smoke)


def tune(context: Context, seconds: float, batch: Sequence[str], folder: str = "") -> Step:
    arguments = ["bench.stages", "tune", "--batch", *batch]
    return piece(context, "tune", seconds, arguments, _output, folder=folder, endless=True)


def races(
    context: Context, seconds: float, batch: Sequence[str], providers: Sequence[str], folder: str = ""
) -> Step:
    arguments = ["bench.stages", "races", "--batch", *batch, "--dtype", *context.dtype, *providers]
    return piece(context, "bench", seconds, arguments, _races, folder=folder)


def kernels(
    context: Context, seconds: float, batch: Sequence[str], options: Sequence[str], folder: str = ""
) -> Step:
    arguments = ["bench", "kernels", "--batch", *batch, "--dtype", *context.dtype, *options]
    return piece(context, "kernels", seconds, arguments, _kernels, folder=folder)


def loop(context: Context, seconds: float) -> Step:
    """``dcgan train`` compared with the training step alone."""

    def go(own: float, at_most: float) -> Summary:
        results = str(context.out / "loop.jsonl")
        options = ["--batch", *context.batch[:1], "--seconds", "1.5", "--rounds", "3", "--json", results]
        done = jobs.run(["bench", "loop", *options], at_most, context.out / "logs" / "loop.txt")
        return summarize("loop", done, _table, context.out)

    return Step("loop", seconds, go)


OURS_AND_CUDNN = ("--providers", "ours", "cudnn")
ONE_ROW = ("--providers", "fast-graph", "cudnn-graph", "--variants", "train-step", "cudnn-graph")
AUTOTUNED = ("max-autotune", "max-autotune-channels_last")


def check(context: Context) -> list[Step]:
    """Three minutes: check that everything works and that every benchmark runs."""
    first = context.batch[:1]
    return [
        smoke(context, 24),
        tests(context, 66, "gpu and check"),
        races(context, 38, first, context.races or ONE_ROW, "check"),
        loop(context, 14),
        tune(context, 20, first, "check"),
        kernels(context, 18, first, [*OURS_AND_CUDNN, "--layer", "3"], "check"),
    ]


def whole(context: Context) -> list[Step]:
    """Seven minutes, covering everything in ``check``; the tests of ``check`` come first."""
    return [
        smoke(context, 28),
        tests(context, 144, "gpu"),
        tune(context, 70, context.batch),
        races(context, 118, context.batch, context.races),
        loop(context, 14),
        kernels(context, 43, context.batch, OURS_AND_CUDNN),
    ]


def autotune(context: Context) -> list[Step]:
    """Providers that autotune for minutes, compared with ours, in a separate folder."""
    providers = ["--providers", "fast-graph", AUTOTUNED[0], "--variants", "train-step", *AUTOTUNED]
    return [
        races(context, 330, context.batch, context.races or providers, "autotune"),
        kernels(context, 210, context.batch, ["--providers", "inductor"], "autotune"),
    ]


def native(context: Context) -> list[Step]:
    """The CPU kernel tests, on the instruction sets of this machine."""

    def go(own: float, at_most: float) -> Summary:
        arguments = ["pytest", "-p", "no:cacheprovider", "-m", "not slow", "tests/kernels/cpu"]
        done = jobs.run(arguments, at_most, context.out / "logs" / "native.txt")
        return summarize("native", done, _output, context.out)

    return [Step("native", 540, go)]


STAGES: dict[str, Callable[[Context], list[Step]]] = {
    "check": check,
    "test": lambda context: [tests(context, 150, "gpu and not check")],
    "tune": lambda context: [tune(context, 75, context.batch)],
    "bench": lambda context: [races(context, 120, context.batch, context.races)],
    "kernels": lambda context: [kernels(context, 45, context.batch, OURS_AND_CUDNN)],
    "all": whole,
    "autotune": autotune,
    "sanitize": lambda context: [piece(context, "sanitize", 540, ["bench.stages", "sanitize"], _output)],
    "native": native,
}
