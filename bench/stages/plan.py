"""What each stage of ``make gpu`` consists of, what matters most first, and the seconds of each step."""

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
    fitted,
    kernel_lines,
    lines,
    race_lines,
    wrong_kernels,
)

SPARE = 12.0  # of a piece's seconds: until PyTorch is there, and to finish what has begun
LEAST = 5.0  # in less nothing is begun
STOPS = 3  # bench.stages.smoke's exit status where the machine itself does not work
MISSED = re.compile(r"not reached in time: (.*)")
BATCHES = ("64", "1024")
DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class Step:
    """A part of a stage."""

    name: str
    seconds: float
    """What it may take; besides, what the steps before it have left."""
    run: Callable[[float, float], Summary]
    """With its own seconds, and those that it has at most before it is killed."""


@dataclass(frozen=True)
class Context:
    """Of a stage: where its results go, and what it was told."""

    out: Path
    processes: int
    batch: Sequence[str] = BATCHES
    dtype: Sequence[str] = DTYPES
    races: Sequence[str] = field(default_factory=tuple)
    """Options of bench.stages.races that say who is raced."""


def run(args: argparse.Namespace) -> int:
    """Runs a stage. 1 if a test failed or a result was wrong."""
    races = []
    for name in ("providers", "ways"):
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
    """One step after the other, then all that they have found, and the archive of it."""
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
    print("\n".join(fitted([*summaries, last], str(whole), LINES - 1)))
    path, left_out = archive.write(out)
    unfit = f"; too large for it: {', '.join(left_out)}" if left_out else ""
    print(f"bring back {path} ({path.stat().st_size / 2**20:.1f} MiB){unfit}"[:1000])
    return int(any(summary.failures for summary in summaries))


def _summary_of(step: Step, seconds: float) -> Summary:
    if seconds < LEAST:
        return Summary(step.name, missed=["all of it"])
    try:
        return step.run(step.seconds, seconds)
    except Exception as error:  # the steps after it are not to be lost
        return Summary(step.name, failures=[f"{type(error).__name__}: {error}"])


# --- steps --------------------------------------------------------------------------------------------------

Reader = Callable[[Summary, Done, Path], None]
"""Adds what a piece's files and output say to its summary."""


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
    """A command with ``--out`` and ``--minutes``; an endless one takes no more than its own seconds."""
    out = context.out / folder

    def go(own: float, at_most: float) -> Summary:
        begins = max((min(own, at_most) if endless else at_most) - SPARE, 1.0)
        options = ["--out", str(out), "--minutes", f"{begins / 60:.4f}"]
        done = jobs.run([*arguments, *options], at_most, context.out / "logs" / f"{name}.txt")
        return told(name, done, read, out)

    return Step(name, seconds, go)


def told(name: str, done: Done, read: Reader, out: Path) -> Summary:
    """What a process has found, and how it ended where that is not told by what it found."""
    summary = Summary(name, f"{done.seconds:.0f} s")
    read(summary, done, out)
    if done.status is None or done.status > 1 or done.status < 0 or (done.status and not summary.failures):
        summary.failures.append(done.trouble)
    missed = MISSED.findall(done.log.read_text(errors="replace"))
    if missed and missed[-1] != "nothing":
        summary.missed.append(missed[-1])
    return summary


def tests(context: Context, seconds: float, chosen: str) -> Step:
    """The GPU tests that a marker expression chooses."""

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
    summary.ends = done.status == STOPS


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
    """What was wrong or failed, and the last line, but for what was not reached."""
    said = [line for line in done.log.read_text(errors="replace").splitlines() if line.strip()]
    summary.failures += [line for line in said if re.search(r"\b(WRONG|FAILED|ERRORS FOUND)\b", line)]
    summary.shown += [MISSED.sub("", line).rstrip("; ") for line in said[-1:]]


def _table(summary: Summary, done: Done, out: Path) -> None:
    """The table that it printed, and where a bar is missed, its row."""
    said = [line for line in done.log.read_text(errors="replace").splitlines() if line.strip()]
    summary.shown += said[-4:]
    summary.failures += said[-1:] if done.status == 1 else []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The results of a file; a line that a killed process has left half is none."""
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
    context: Context, seconds: float, batch: Sequence[str], contestants: Sequence[str], folder: str = ""
) -> Step:
    arguments = ["bench.stages", "races", "--batch", *batch, "--dtype", *context.dtype, *contestants]
    return piece(context, "bench", seconds, arguments, _races, folder=folder)


def kernels(
    context: Context, seconds: float, batch: Sequence[str], options: Sequence[str], folder: str = ""
) -> Step:
    arguments = ["bench", "kernels", "--batch", *batch, "--dtype", *context.dtype, *options]
    return piece(context, "kernels", seconds, arguments, _kernels, folder=folder)


def loop(context: Context, seconds: float) -> Step:
    """``dcgan train`` beside the step inside it."""

    def go(own: float, at_most: float) -> Summary:
        results = str(context.out / "loop.jsonl")
        options = ["--batch", *context.batch[:1], "--seconds", "1.5", "--rounds", "3", "--json", results]
        done = jobs.run(["bench", "loop", *options], at_most, context.out / "logs" / "loop.txt")
        return told("loop", done, _table, context.out)

    return Step("loop", seconds, go)


OURS_AND_CUDNN = ("--contestants", "ours", "cudnn")
ONE_ROW = ("--providers", "fast-graph", "cudnn-graph", "--ways", "train-step", "cudnn-graph")
SEARCHING = ("max-autotune", "max-autotune-channels_last")


def check(context: Context) -> list[Step]:
    """Three minutes: whether it works, and that every benchmark runs."""
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
    """Seven minutes; of what ``check`` runs its tests come first, and its rows are among the others."""
    return [
        smoke(context, 28),
        tests(context, 144, "gpu"),
        tune(context, 70, context.batch),
        races(context, 118, context.batch, context.races),
        loop(context, 14),
        kernels(context, 43, context.batch, OURS_AND_CUDNN),
    ]


def autotune(context: Context) -> list[Step]:
    """The contestants that search for minutes, in a folder of their own beside ours."""
    contestants = ["--providers", "fast-graph", SEARCHING[0], "--ways", "train-step", *SEARCHING]
    return [
        races(context, 330, context.batch, context.races or contestants, "autotune"),
        kernels(context, 210, context.batch, ["--contestants", "inductor"], "autotune"),
    ]


def native(context: Context) -> list[Step]:
    """The tests of the CPU's kernels, on the instruction sets of this machine."""

    def go(own: float, at_most: float) -> Summary:
        arguments = ["pytest", "-p", "no:cacheprovider", "-m", "not slow", "tests/kernels/cpu"]
        done = jobs.run(arguments, at_most, context.out / "logs" / "native.txt")
        return told("native", done, _output, context.out)

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
