"""A piece of a stage as a process of its own, with its output in a file, ended when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """What became of a process."""

    status: int | None
    """Its exit status; None if its time was up and it was killed."""
    seconds: float
    log: Path

    @property
    def trouble(self) -> str:
        """How it ended, and the last that it said."""
        how = f"killed after {self.seconds:.0f} s" if self.status is None else ending(self.status)
        return f"{how}: {last_line(self.log)}"


def ending(status: int) -> str:
    """An exit status in words."""
    return f"killed by signal {-status}" if status < 0 else f"exited with status {status}"


def last_line(log: Path) -> str:
    """The last that a process has said."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1] if lines else "no output"


def start(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process in a group of its own, at the root of the checkout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env or {}),  # a killed process has said all
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all that it has started, if any of them still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block, nor do its children."""
    process = start(command, log, env)
    try:
        yield process
    finally:
        end(process)


def run(arguments: Sequence[str], seconds: float, log: Path) -> Done:
    """``python -m`` with the arguments, for so many seconds at most."""
    begun = time.monotonic()
    with started([sys.executable, "-m", *arguments], log) as process:
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
    return Done(status, time.monotonic() - begun, log)
