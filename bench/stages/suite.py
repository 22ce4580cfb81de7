"""The GPU tests in as many processes as there are cores, which share them by tests/gpu/dealing.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.stages import jobs
from bench.stages.deal import UNUSABLE, Deal

TESTS = jobs.ROOT / "tests" / "gpu"
GRACE = 12.0  # seconds before the end in which no test begins
RESTARTS = 4  # of a process, on average: a GPU on which nothing works is not tried for ever
LOOK = 0.05  # seconds between two looks at the processes


@dataclass
class Tested:
    """What became of the tests."""

    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """Of every test that was begun: test, outcome, seconds, reason."""
    missed: list[str] = field(default_factory=list)
    """Tests that were not begun in time."""
    problems: list[str] = field(default_factory=list)
    """Of processes in which no test could be run."""

    def count(self, outcome: str) -> int:
        return Counter(record["outcome"] for record in self.outcomes)[outcome]

    @property
    def failures(self) -> list[str]:
        failed = [record for record in self.outcomes if record["outcome"] == "failed"]
        return [*self.problems, *(f"{record['test']}: {record['reason']}" for record in failed)]


def run(
    folder: Path,
    end: float,
    processes: int,
    options: Sequence[str] = ("-m", "gpu"),
    tests: Path = TESTS,
    grace: float = GRACE,
) -> Tested:
    """Runs the tests that pytest's options choose; ``end`` is when all is over, by the monotonic clock."""
    shutil.rmtree(folder, ignore_errors=True)
    deal = Deal(folder)
    paths = [str(jobs.ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    plain = [sys.executable, "-m", "pytest", "-p", "dealing", "-p", "no:cacheprovider", *options, str(tests)]
    command = [*plain, "--deal", str(folder), "--end", str(end), "--grace", str(grace)]
    tested = Tested()
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    count = 0

    def begin() -> None:
        nonlocal count
        log = folder / f"pytest-{count}.txt"
        running.append((jobs.start(command, log, env), log))
        count += 1

    try:
        for _ in range(processes):
            begin()
        while running and time.monotonic() < end:
            time.sleep(LOOK)
            for process, log in list(running):
                status = process.poll()
                if status is None:
                    continue
                running.remove((process, log))
                jobs.end(process)  # what it may have started
                if status in (0, 1, 5):  # all passed, some failed, none was left
                    continue
                if not _settled(deal, process.pid, status, status == UNUSABLE):
                    tested.problems.append(f"{log.name} {jobs.ending(status)}: {jobs.last_line(log)}")
                elif time.monotonic() < end - grace and count < (1 + RESTARTS) * processes:
                    begin()
    finally:
        for process, _ in running:
            jobs.end(process)
            _blame(deal, process.pid, "cut off, as the time was up")
    outcomes = deal.outcomes()
    collected = deal.collected()
    tested.outcomes = [outcomes[test] for test in collected if test in outcomes]
    tested.missed = [test for test in collected if test not in outcomes]
    if not collected and not tested.problems:
        tested.problems.append("no tests were collected in time")
    return tested


def _settled(deal: Deal, process: int, status: int, unusable: bool) -> bool:
    """After a process that has ended early: blames its test, puts its group back. False if it ran nothing."""
    if unusable:
        return True
    blamed = _blame(deal, process, f"the process {jobs.ending(status)}")
    deal.release_all(process)
    return blamed or any(own == process for own, _ in deal.records())


def _blame(deal: Deal, process: int, why: str) -> bool:
    """Counts the test that a process had begun as failed; False if there is none."""
    record = deal.running(process)
    if record is None:
        return False
    seconds = round(time.monotonic() - record["begun"], 3)
    deal.write(process, test=record["test"], outcome="failed", seconds=seconds, reason=why)
    return True
