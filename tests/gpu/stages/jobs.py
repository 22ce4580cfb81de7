"""Run a piece of a stage in a separate process, with its output in a file and a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]


class Done(NamedTuple):
    """The outcome of a process."""

    status: int | None
    """Exit status; None if it was killed after its time limit."""
    seconds: float
    log: Path

    @property
    def trouble(self) -> str:
        """How the process ended, and its last line of output."""
        how = f"killed after {self.seconds:.0f} s" if self.status is None else ending(self.status)
        return f"{how}: {last_line(self.log)}"


def ending(status: int) -> str:
    """Describe an exit status."""
    return f"killed by signal {-status}" if status < 0 else f"exited with status {status}"


def output(log: Path) -> list[str]:
    """Return the lines of a process's output that are not blank."""
    try:
        return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def last_line(log: Path) -> str:
    """Return the last line of a process's output."""
    return (output(log) or ["no output"])[-1].strip()


def start(arguments: Sequence[str], log: Path, **env: str) -> subprocess.Popen[bytes]:
    """Start ``python -m`` with the arguments in a new process group, at the root of the checkout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Unbuffered, so that no output of a killed process is lost.
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | env,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(arguments: Sequence[str], seconds: float, log: Path) -> Done:
    """Run ``python -m`` with the arguments, for at most ``seconds``."""
    begun = time.monotonic()
    process = start(arguments, log)
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(seconds)
    finally:
        end(process)
    return Done(status, time.monotonic() - begun, log)
