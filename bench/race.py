"""Coordinate races: one process per provider, checked first, then timed in interleaved short bursts."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any

import torch

from bench.cases import Case
from bench.machine import Ceiling
from bench.providers import Provider
from bench.timing import Spread, summarise

PREPARE_SECONDS = 900.0  # covers torch.compile's longest search on a slow machine
SEARCH_SECONDS = 8.0  # of the building time, reserved per provider that searches and so is built last
SPARE_SECONDS = 120.0  # by which slow calls may prolong a burst


@dataclass(frozen=True)
class Settings:
    """How long to build and measure."""

    seconds: float
    """Measuring time per provider and case."""
    rounds: int
    """Number of bursts that the measuring time is divided into."""
    prepare_seconds: float = PREPARE_SECONDS
    """Timeout for building, compiling and checking a provider."""
    together: bool = False
    """Build providers in parallel, since compilers take a core each, except those that search: these follow,
    one at a time."""
    until: float = float("inf")
    """Deadline for building, on the monotonic clock; providers that miss it have failed. For those built in
    parallel, it is earlier by SEARCH_SECONDS per provider that searches."""


@dataclass
class Outcome:
    """The outcome of one provider in one case."""

    provider: Provider
    status: str
    """``ok``, ``wrong`` (error above the tolerance, so not timed), ``failed`` or ``skipped``."""
    reason: str = ""
    """Why there are no times."""
    error: float | None = None
    """‖out - ref‖₂/‖ref‖₂ against float64."""
    tolerance: float | None = None
    """Maximum allowed error."""
    spreads: dict[str, Spread] = field(default_factory=dict)
    """Times per call by column: ``warm``, on CUDA also ``cold`` and ``graph``."""
    peak_bytes: int | None = None
    """Peak memory use."""
    note: str = ""
    """What executed the calls, if known."""


class WorkerFailed(Exception):
    """The worker raised, died or timed out; the message says which."""


class Process:
    """A worker process and the pipe to it."""

    def __init__(self, threads: int, worker: str = Case.worker) -> None:
        self._pipe, theirs = Pipe()
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        root = str(Path(__file__).resolve().parent.parent)
        # OpenMP keeps its default wait policy: threads spin briefly between the parallel regions of a call,
        # and the worker makes sure that they sleep between bursts. PASSIVE cost 10% at batch 1.
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", str(theirs.fileno()), str(threads), worker],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            env=env,
        )
        theirs.close()

    def ask(self, timeout: float, method: str, *arguments: Any) -> Any:
        """Call a method of the worker and return its result. Raises WorkerFailed."""
        self.send(method, *arguments)
        return self.receive(timeout)

    def send(self, method: str, *arguments: Any) -> None:
        """Send a request without waiting; :meth:`receive` returns the result."""
        with suppress(OSError):  # the worker has ended; receive() reports how
            self._pipe.send((method, *arguments))

    def receive(self, timeout: float) -> Any:
        """Return the result of the last :meth:`send`. Raises WorkerFailed."""
        try:
            if not self._pipe.poll(timeout):
                raise WorkerFailed(f"timed out after {timeout:.0f} s")
            status, value = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerFailed(self._exit_reason()) from None
        if status == "error":
            raise WorkerFailed(value)
        return value

    def close(self) -> None:
        """Kill the process, busy or not."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _exit_reason(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"exited with status {code}"
        return f"{how}: {lines[-1]}" if lines else how


def measure_ceiling(case: Case, known: Ceiling | None = None) -> Ceiling:
    """Measure the machine's limits for the case's device and dtype in a separate process.

    Returns the elementwise maximum of them and ``known``, as noise can only lower a rate.
    """
    with closing(Process(case.threads)) as worker:
        ceiling: Ceiling = worker.ask(PREPARE_SECONDS, "ceiling", case.device, case.dtype)
    return ceiling.or_better(known)


Entry = tuple[Case, Provider]


def race(
    entries: Sequence[Entry],
    settings: Settings,
    log: Callable[[str], None],
    materials: Callable[[Case], Any] = lambda case: case.materials(),
) -> list[Outcome]:
    """Check every entry, then time the correct ones in interleaved bursts; returns one outcome per entry.

    Each entry has a separate process that lives until the end. ``log`` receives progress. ``materials`` is
    called once per run of consecutive entries of the same case.
    """
    contest = _Race(entries, settings, log)
    try:
        contest.start()
        with tempfile.TemporaryDirectory() as folder:
            contest.check(materials, Path(folder))
        contest.time()
    finally:
        for process in contest.processes.values():
            process.close()
    return [contest.outcomes[i] for i in range(len(entries))]


@dataclass
class _Race:
    """The state of a race: processes and outcomes by the position of their entry."""

    entries: Sequence[Entry]
    settings: Settings
    log: Callable[[str], None]
    processes: dict[int, Process] = field(default_factory=dict)
    """Those that have not failed."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    sent_at: dict[int, float] = field(default_factory=dict)
    """When a process was asked to build its provider, on the monotonic clock."""

    def start(self) -> None:
        """Start a process for every entry that can run; all import PyTorch in parallel."""
        for i, (case, provider) in enumerate(self.entries):
            if reason := provider.unavailable(case):
                self.outcomes[i] = Outcome(provider, "skipped", reason)
            else:
                self.processes[i] = Process(case.threads, case.worker)

    def check(self, materials: Callable[[Case], Any], folder: Path) -> None:
        """Build and check the entries that have a process; those that fail lose it."""
        case: Case | None = None
        path, tolerance = folder, 0.0
        alone: list[tuple[int, Path]] = []
        for i in self.processes:
            previous, (case, provider) = case, self.entries[i]
            if case != previous:
                made = materials(case)
                path, tolerance = folder / f"{i}.pt", made.tolerance
                torch.save(tuple(made), path)
            self.outcomes[i] = Outcome(provider, "ok", tolerance=tolerance)
            if self.settings.together and not provider.searches:
                self._request(i, path)
            else:
                alone.append((i, path))
        for i in list(self.sent_at):
            self._collect(i, self.settings.until - SEARCH_SECONDS * len(alone))
        for i, path in alone:
            self._request(i, path)
            self._collect(i, self.settings.until)

    def _request(self, i: int, path: Path) -> None:
        case, provider = self.entries[i]
        several = any(case != self.entries[0][0] for case, _ in self.entries)
        self.log(f"{f'{case.title}: ' if several else ''}{provider.name}: building and checking")
        self.processes[i].send("prepare", case, provider.name, str(path))
        self.sent_at[i] = time.monotonic()

    def _collect(self, i: int, until: float) -> None:
        """Wait for the result of the process's building and checking."""
        end, outcome = min(self.sent_at[i] + self.settings.prepare_seconds, until), self.outcomes[i]
        try:
            error, outcome.note, wrong = self.processes[i].receive(max(end - time.monotonic(), 0.0))
        except WorkerFailed as failure:
            self._drop(i, "failed", str(failure))  # or it might go on compiling and disturb the others
            return
        outcome.error = error
        if not error <= outcome.tolerance:
            wrong = f"error {error:.1e} > {outcome.tolerance:.0e}"
        if wrong:
            self._drop(i, "wrong", wrong)

    def time(self) -> None:
        """Time rounds of one burst per provider, reshuffled so that machine drift affects all equally."""
        seconds, rounds = self.settings.seconds, self.settings.rounds
        self.log(f"timing {len(self.processes)} of {len(self.entries)}, {seconds:g} s each")
        times: dict[int, dict[str, list[float]]] = {i: {} for i in self.processes}
        order = list(times)
        shuffle = random.Random(self.entries[0][0].seed if self.entries else 0).shuffle
        for _ in range(rounds):
            shuffle(order)
            for i in order:
                if i in self.processes:
                    self._burst(i, seconds / rounds, times[i])
        for i in self.processes:
            self.outcomes[i].spreads = {column: summarise(values) for column, values in times[i].items()}

    def _burst(self, i: int, seconds: float, times: dict[str, list[float]]) -> None:
        try:
            burst, peak = self.processes[i].ask(seconds + SPARE_SECONDS, "burst", seconds)
        except WorkerFailed as failure:
            self.outcomes[i].peak_bytes = None
            self._drop(i, "failed", str(failure))
            return
        self.outcomes[i].peak_bytes = peak
        for column, values in burst.items():
            times.setdefault(column, []).extend(values)

    def _drop(self, i: int, status: str, reason: str) -> None:
        self.outcomes[i].status, self.outcomes[i].reason = status, reason
        self.processes.pop(i).close()
