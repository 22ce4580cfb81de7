"""The steps of each stage, most important first, and the seconds for each step."""

from __future__ import annotations

import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tests.gpu.stages import jobs, suite, summary
from tests.gpu.stages.jobs import Done
from tests.gpu.stages.summary import Summary, read_rows

RESERVED = 12.0  # seconds of each piece for importing PyTorch and finishing work that has begun
MIN_SECONDS = 5.0  # a step with less time left is skipped
MACHINE_BROKEN = 3  # exit status of the smoke test if the machine does not work
SKIPPED = re.compile(r"not reached in time: (.*)")


class Step(NamedTuple):
    """A step of a stage."""

    name: str
    seconds: float
    """Its time limit, in addition to any time left over by earlier steps."""
    run: Callable[[float, float], Summary]
    """Called with the step's own seconds, and the seconds after which it is killed."""


def perform(stage: str, steps: Sequence[Step], out: Path) -> int:
    """Run the steps in order, print their summaries and write the archive.

    Returns 1 if a test failed or a result was wrong.
    """
    begun = time.monotonic()
    whole = out / f"{stage}.txt"
    summaries: list[Summary] = []
    end = begun
    for step in steps:
        end += step.seconds
        summaries.append(_summary_of(step, end - time.monotonic()))
        whole.write_text("\n".join(summary.lines(summaries)) + "\n")
        print(f"{time.monotonic() - begun:4.0f} s  {summaries[-1].heading}", file=sys.stderr, flush=True)
        if summaries[-1].ends:
            break
    last = Summary(stage, f"{time.monotonic() - begun:.0f} s in all")
    print("\n".join(summary.fit_lines([*summaries, last], str(whole), summary.LINES - 1)))
    path, left_out = summary.archive(out)
    omitted = f"; too large: {', '.join(left_out)}" if left_out else ""
    print(f"archive: {path} ({path.stat().st_size / 2**20:.1f} MiB){omitted}"[:1000])
    return int(any(one.failures for one in summaries))


def _summary_of(step: Step, seconds: float) -> Summary:
    if seconds < MIN_SECONDS:
        return Summary(step.name, missed=["all of it"])
    try:
        return step.run(step.seconds, seconds)
    except Exception as error:  # the remaining steps still run
        return Summary(step.name, failures=[f"{type(error).__name__}: {error}"])


# --- reading a process's results ----------------------------------------------------------------------------

Reader = Callable[[Summary, Done, Path], None]
"""Adds the results in a process's files and output to its summary."""


def _smoke(found: Summary, done: Done, out: Path) -> None:
    found.shown += jobs.output(done.log)[:4]
    found.ends = done.status == MACHINE_BROKEN


def _races(found: Summary, done: Done, out: Path) -> None:
    for name in ("train", "generate"):
        rows = read_rows(out / f"{name}.jsonl")
        found.failures += summary.failures_of(rows)
        found.shown += summary.race_lines(rows, name)


def _kernels(found: Summary, done: Done, out: Path) -> None:
    rows = read_rows(out / "kernels.jsonl")
    found.failures += summary.wrong_kernels(rows)
    found.shown += summary.kernel_lines(rows)


def _output(found: Summary, done: Done, out: Path) -> None:
    """Add failures, and the last line of output without the skipped work."""
    lines = jobs.output(done.log)
    found.failures += [line for line in lines if re.search(r"\b(WRONG|FAILED|ERRORS FOUND)\b", line)]
    found.shown += [SKIPPED.sub("", line).rstrip("; ") for line in lines[-1:]]


def _table(found: Summary, done: Done, out: Path) -> None:
    """Add the printed table, and its last row as a failure if a target is missed."""
    lines = jobs.output(done.log)
    found.shown += lines[-4:]
    found.failures += lines[-1:] if done.status == 1 else []


# --- steps --------------------------------------------------------------------------------------------------


def process(
    args: Namespace,
    name: str,
    seconds: float,
    arguments: Sequence[str],
    read: Reader,
    *,
    folder: str = "",
    budget: bool = True,
    endless: bool = False,
) -> Step:
    """A step that runs ``python -m`` with the arguments, and summarizes its results in ``folder``.

    With ``budget``, ``--out`` and ``--minutes`` are added; an endless one gets only its own time.
    """
    out = args.out / folder

    def go(own: float, at_most: float) -> Summary:
        begin_seconds = max((min(own, at_most) if endless else at_most) - RESERVED, 1.0)
        options = ["--out", str(out), "--minutes", f"{begin_seconds / 60:.4f}"] if budget else []
        done = jobs.run([*arguments, *options], at_most, args.out / "logs" / f"{name}.txt")
        found = Summary(name, f"{done.seconds:.0f} s")
        read(found, done, out)
        # How it ended, if the results do not explain its exit status.
        if done.status not in (0, 1) or (done.status and not found.failures):
            found.failures.append(done.trouble)
        missed = SKIPPED.findall(done.log.read_text(errors="replace"))
        if missed and missed[-1] != "nothing":
            found.missed.append(missed[-1])
        return found

    return Step(name, seconds, go)


def smoke(args: Namespace, seconds: float) -> Step:
    return process(args, "smoke", seconds, ["tests.gpu.stages.smoke"], _smoke, budget=False)


def tests(args: Namespace, seconds: float, chosen: str) -> Step:
    """A step that runs the GPU tests selected by a marker expression."""

    def go(own: float, at_most: float) -> Summary:
        begun = time.monotonic()
        tested = suite.run(args.out / "tests", begun + at_most, args.processes, ["-m", chosen])
        records = [json.dumps(record) + "\n" for record in tested.outcomes]
        (args.out / "tests.jsonl").write_text("".join(records))
        counts = ", ".join(f"{tested.count(one)} {one}" for one in ("passed", "failed", "skipped"))
        line = f"{time.monotonic() - begun:.0f} s; {counts}"
        return Summary("tests", line, tested.failures, missed=tested.missed)

    return Step("tests", seconds, go)


def tune(args: Namespace, seconds: float, batch: Sequence[int], folder: str = "") -> Step:
    arguments = ["dcgan.kernels.gpu.tools.tune", "--batch", *map(str, batch)]
    return process(args, "tune", seconds, arguments, _output, folder=folder, endless=True)


def races(
    args: Namespace, seconds: float, batch: Sequence[int], default: Sequence[str] = (), folder: str = ""
) -> Step:
    """Generation and training steps; the options given select the providers, else those of ``default``."""
    given = {name: getattr(args, name) for name in ("providers", "variants")}
    options = [part for name, value in given.items() if value is not None for part in (f"--{name}", *value)]
    arguments = ["bench", "races", "--batch", *map(str, batch), "--dtype", *args.dtype, *(options or default)]
    return process(args, "bench", seconds, arguments, _races, folder=folder)


def kernels(
    args: Namespace, seconds: float, batch: Sequence[int], options: Sequence[str], folder: str = ""
) -> Step:
    arguments = ["bench", "kernels", "--batch", *map(str, batch), "--dtype", *args.dtype, *options]
    return process(args, "kernels", seconds, arguments, _kernels, folder=folder)


def loop(args: Namespace, seconds: float) -> Step:
    """``dcgan train`` compared with the training step alone."""
    if find_spec("pydantic") is None:  # of the extra `train`, which a machine for GPU tests may lack
        return Step("loop", seconds, lambda own, most: Summary("loop", missed=["pydantic is not installed"]))
    options = ["--seconds", "1.5", "--rounds", "3", "--json", str(args.out / "loop.jsonl")]
    arguments = ["bench", "loop", "--batch", str(args.batch[0]), *options]
    return process(args, "loop", seconds, arguments, _table, budget=False)


# --- stages -------------------------------------------------------------------------------------------------

OURS_AND_CUDNN = ("--providers", "ours", "cudnn")
ONE_ROW = ("--providers", "fast-graph", "cudnn-graph", "--variants", "train-step", "cudnn-graph")
SEARCHING = ("max-autotune", "max-autotune-channels_last")
SEARCHES = ("--providers", "fast-graph", SEARCHING[0], "--variants", "train-step", *SEARCHING)
NATIVE_TESTS = ("pytest", "-p", "no:cacheprovider", "-m", "not slow", "tests/kernels/cpu")


def check(args: Namespace) -> list[Step]:
    """Three minutes: check that everything works and that every benchmark runs."""
    first = args.batch[:1]
    return [
        smoke(args, 24),
        tests(args, 66, "gpu and check"),
        races(args, 38, first, ONE_ROW, "check"),
        loop(args, 14),
        tune(args, 20, first, "check"),
        kernels(args, 18, first, [*OURS_AND_CUDNN, "--layer", "3"], "check"),
    ]


def whole(args: Namespace) -> list[Step]:
    """Seven minutes, covering everything in ``check``; the tests of ``check`` come first."""
    return [
        smoke(args, 28),
        tests(args, 144, "gpu"),
        tune(args, 70, args.batch),
        races(args, 118, args.batch),
        loop(args, 14),
        kernels(args, 43, args.batch, OURS_AND_CUDNN),
    ]


def autotune(args: Namespace) -> list[Step]:
    """Providers that autotune for minutes, compared with ours, in a separate folder."""
    return [
        races(args, 330, args.batch, SEARCHES, "autotune"),
        kernels(args, 210, args.batch, ["--providers", "inductor"], "autotune"),
    ]


STAGES: dict[str, Callable[[Namespace], list[Step]]] = {
    "check": check,
    "test": lambda args: [tests(args, 150, "gpu and not check")],
    "tune": lambda args: [tune(args, 75, args.batch)],
    "bench": lambda args: [races(args, 120, args.batch)],
    "kernels": lambda args: [kernels(args, 45, args.batch, OURS_AND_CUDNN)],
    "all": whole,
    "autotune": autotune,
    "sanitize": lambda args: [process(args, "sanitize", 540, ["tests.gpu.stages.sanitize"], _output)],
    # The tests of the CPU kernels, on the instruction sets of this machine.
    "native": lambda args: [process(args, "native", 540, NATIVE_TESTS, _output, budget=False)],
}
