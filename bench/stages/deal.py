"""The folder in which processes that share tests take groups of them and write what became of each."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNUSABLE = 70  # exit status of a process that cannot go on; pytest's own are below 10


class Deal:
    """The folder that the processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._claims = folder, folder / "claims"
        self._claims.mkdir(parents=True, exist_ok=True)

    def publish(self, tests: list[str]) -> None:
        """All tests, in order, for whoever counts what was left out."""
        own = self._folder / f"collected-{os.getpid()}"
        own.write_text(json.dumps(tests))
        own.replace(self._folder / "collected.json")

    def collected(self) -> list[str]:
        """What was published; empty if nothing was."""
        try:
            found: list[str] = json.loads((self._folder / "collected.json").read_text())
        except FileNotFoundError:
            found = []
        return found

    def claim(self, number: int) -> bool:
        """Takes a group; False if another process has it."""
        try:
            with (self._claims / str(number)).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def release(self, number: int) -> None:
        """Puts a group back; the tests of it that are done stay done."""
        (self._claims / str(number)).unlink()

    def release_all(self, process: int) -> None:
        """Puts back what a process that has died had taken."""
        for path in self._claims.iterdir():
            if path.read_text() == str(process):
                path.unlink()

    def write(self, process: int, **record: object) -> None:
        """Appends what has become of a test; a line at a time, in a file of the process's own."""
        with (self._folder / f"outcomes-{process}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(process, record), those of a process in order; the end of a line that is not whole is left."""
        for path in sorted(self._folder.glob("outcomes-*.jsonl")):
            process = int(path.stem.partition("-")[2])
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    yield process, json.loads(line)

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """By test, the record of its end."""
        return {record["test"]: record for _, record in self.records() if record["outcome"] != "started"}

    def running(self, process: int) -> dict[str, Any] | None:
        """The record of the test that a process has begun and not ended."""
        last = None
        for own, record in self.records():
            if own == process:
                last = record
        return last if last is not None and last["outcome"] == "started" else None
