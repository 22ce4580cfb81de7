"""Run the GPU tests in one process per core; tests/gpu/dealing.py distributes the tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.stages import jobs

TESTS = jobs.ROOT / "tests" / "gpu"
GRACE = 12.0  # no test begins in these last seconds
RESTARTS = 4  # per process on average, so that a broken GPU is not retried forever
POLL_INTERVAL = 0.05  # seconds
UNUSABLE = 70  # exit status of a process that cannot continue; those of pytest are below 10
ENDED = (0, 1, 5)  # exit statuses of pytest: all passed, some failed, no tests left


class Deal:
    """The folder in which parallel test processes claim groups of tests and record their outcomes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._claims = folder, folder / "claims"
        self._claims.mkdir(parents=True, exist_ok=True)

    def publish(self, tests: list[str]) -> None:
        """Write the list of all tests, in order, from which skipped tests are determined."""
        temporary = self._folder / f"collected-{os.getpid()}"
        temporary.write_text(json.dumps(tests))
        temporary.replace(self._folder / "collected.json")

    def collected(self) -> list[str]:
        """Return the published list of tests; empty if there is none."""
        with contextlib.suppress(FileNotFoundError):
            found: list[str] = json.loads((self._folder / "collected.json").read_text())
            return found
        return []

    def claim(self, number: int) -> bool:
        """Claim a group of tests. Return False if another process has claimed it."""
        with contextlib.suppress(FileExistsError), (self._claims / str(number)).open("x") as file:
            file.write(str(os.getpid()))
            return True
        return False

    def release(self, process: int) -> None:
        """Release all groups that a dead process had claimed; their completed tests stay completed."""
        for path in self._claims.iterdir():
            if path.read_text() == str(process):
                path.unlink()

    def write(self, process: int, **record: object) -> None:
        """Append the record of a test as one line to the process's file."""
        with (self._folder / f"outcomes-{process}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self, process: int | str = "*") -> Iterator[dict[str, Any]]:
        """Yield the records of all processes or of one, in order; an incomplete last line is skipped."""
        for path in self._folder.glob(f"outcomes-{process}.jsonl"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Return the final record of each test."""
        return {record["test"]: record for record in self.records() if record["outcome"] != "started"}

    def fail(self, process: int, why: str) -> bool:
        """Record the test that a dead process was running as failed. Return False if it ran none."""
        records = list(self.records(process))
        if records and records[-1]["outcome"] == "started":
            seconds = round(time.monotonic() - records[-1]["begun"], 3)
            self.write(process, test=records[-1]["test"], outcome="failed", seconds=seconds, reason=why)
        return bool(records)


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
    path = os.pathsep.join(filter(None, [str(jobs.ROOT), os.environ.get("PYTHONPATH")]))
    command = ["pytest", "-p", "tests.gpu.dealing", "-p", "no:cacheprovider", *options, str(tests)]
    command += ["--deal", str(folder), "--end", str(end), "--grace", str(grace)]
    problems: list[str] = []
    running: dict[Path, subprocess.Popen[bytes]] = {}
    count = 0

    def begin() -> None:
        nonlocal count
        log = folder / f"pytest-{count}.txt"
        running[log] = jobs.start(command, log, OMP_NUM_THREADS="1", PYTHONPATH=path)
        count += 1

    try:
        for _ in range(processes):
            begin()
        while running and time.monotonic() < end:
            time.sleep(POLL_INTERVAL)
            for log, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[log]
                jobs.end(process)  # kill its children
                if status in ENDED:
                    continue
                deal.release(process.pid)
                if not deal.fail(process.pid, f"the process {jobs.ending(status)}"):
                    problems.append(f"{log.name} {jobs.ending(status)}: {jobs.last_line(log)}")
                elif time.monotonic() < end - grace and count < (1 + RESTARTS) * processes:
                    begin()
    finally:
        for process in running.values():
            jobs.end(process)
            deal.fail(process.pid, "killed, as the time was up")
    outcomes, collected = deal.outcomes(), deal.collected()
    if not collected and not problems:
        problems.append("no tests were collected in time")
    started = [outcomes[test] for test in collected if test in outcomes]
    return Tested(started, [test for test in collected if test not in outcomes], problems)
