"""Run a piece of a stage in a separate process, with its output in a file and a time limit."""

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


def last_line(log: Path) -> str:
    """Return the last line of a process's output."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1] if lines else "no output"


def start(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a new process group, at the root of the checkout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Unbuffered, so that no output of a killed process is lost.
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env or {}),
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Context manager for a process that is killed on exit together with its children."""
    process = start(command, log, env)
    try:
        yield process
    finally:
        end(process)


def run(arguments: Sequence[str], seconds: float, log: Path) -> Done:
    """Run ``python -m`` with the arguments, for at most ``seconds``."""
    begun = time.monotonic()
    with started([sys.executable, "-m", *arguments], log) as process:
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
    return Done(status, time.monotonic() - begun, log)
