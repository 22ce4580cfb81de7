"""The shared folder in which parallel test processes claim groups of tests and record their outcomes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNUSABLE = 70  # exit status of a process that cannot continue; those of pytest are below 10


class Deal:
    """The shared folder."""

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
        try:
            found: list[str] = json.loads((self._folder / "collected.json").read_text())
        except FileNotFoundError:
            found = []
        return found

    def claim(self, number: int) -> bool:
        """Claim a group of tests. Return False if another process has claimed it."""
        try:
            with (self._claims / str(number)).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def release(self, number: int) -> None:
        """Release a group; its completed tests stay completed."""
        (self._claims / str(number)).unlink()

    def release_all(self, process: int) -> None:
        """Release all groups that a dead process had claimed."""
        for path in self._claims.iterdir():
            if path.read_text() == str(process):
                path.unlink()

    def write(self, process: int, **record: object) -> None:
        """Append the record of a test as one line to the process's file."""
        with (self._folder / f"outcomes-{process}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (process, record), in order within a process; an incomplete last line is skipped."""
        for path in sorted(self._folder.glob("outcomes-*.jsonl")):
            process = int(path.stem.partition("-")[2])
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    yield process, json.loads(line)

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Return the final record of each test."""
        return {record["test"]: record for _, record in self.records() if record["outcome"] != "started"}

    def running(self, process: int) -> dict[str, Any] | None:
        """Return the record of the test that a process has started but not finished."""
        last = None
        for owner, record in self.records():
            if owner == process:
                last = record
        return last if last is not None and last["outcome"] == "started" else None
