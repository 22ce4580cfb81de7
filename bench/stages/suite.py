"""Run the GPU tests in one process per core; tests/gpu/dealing.py distributes the tests."""

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
GRACE = 12.0  # no test begins in these last seconds
RESTARTS = 4  # per process on average, so that a broken GPU is not retried forever
POLL_INTERVAL = 0.05  # seconds


@dataclass
class Tested:
    """The outcomes of the tests."""

    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """Test, outcome, seconds and reason of every test that was started."""
    missed: list[str] = field(default_factory=list)
    """Tests that were not started in time."""
    problems: list[str] = field(default_factory=list)
    """Processes that could not run any test."""

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
    """Run the tests that pytest's options select, until ``end`` by the monotonic clock."""
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
            time.sleep(POLL_INTERVAL)
            for process, log in list(running):
                status = process.poll()
                if status is None:
                    continue
                running.remove((process, log))
                jobs.end(process)  # kill its children
                if status in (0, 1, 5):  # all passed, some failed, no tests left
                    continue
                if not _recover(deal, process.pid, status, status == UNUSABLE):
                    tested.problems.append(f"{log.name} {jobs.ending(status)}: {jobs.last_line(log)}")
                elif time.monotonic() < end - grace and count < (1 + RESTARTS) * processes:
                    begin()
    finally:
        for process, _ in running:
            jobs.end(process)
            _fail_running(deal, process.pid, "killed, as the time was up")
    outcomes = deal.outcomes()
    collected = deal.collected()
    tested.outcomes = [outcomes[test] for test in collected if test in outcomes]
    tested.missed = [test for test in collected if test not in outcomes]
    if not collected and not tested.problems:
        tested.problems.append("no tests were collected in time")
    return tested


def _recover(deal: Deal, process: int, status: int, unusable: bool) -> bool:
    """Fail the test of a process that ended early and release its groups. False if it ran no test."""
    if unusable:
        return True
    failed_one = _fail_running(deal, process, f"the process {jobs.ending(status)}")
    deal.release_all(process)
    return failed_one or any(owner == process for owner, _ in deal.records())


def _fail_running(deal: Deal, process: int, why: str) -> bool:
    """Record the running test of a process as failed. Return False if there is none."""
    record = deal.running(process)
    if record is None:
        return False
    seconds = round(time.monotonic() - record["begun"], 3)
    deal.write(process, test=record["test"], outcome="failed", seconds=seconds, reason=why)
    return True
