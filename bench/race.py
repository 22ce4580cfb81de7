"""Coordinate races: one process per provider, checked first, then timed in interleaved short bursts."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any, Protocol

from bench.cases import Case, Materials
from bench.ceiling import Ceiling
from bench.providers import Provider
from bench.stats import Spread, summarise

PREPARE_SECONDS = 900.0  # covers torch.compile's longest search on a slow machine
SEARCH_SECONDS = 8.0  # of the building time, reserved per provider that searches and so is built last
SPARE_SECONDS = 120.0  # by which slow calls may prolong a burst


@dataclass(frozen=True)
class Settings:
    """How long to build and measure."""

    seconds: float = 3.0
    """Measuring time per provider and case."""
    rounds: int = 6
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

    provider: Provider[Any]
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
            [sys.executable, "-m", worker, str(theirs.fileno()), str(threads)],
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


@contextmanager
def started(case: Case) -> Iterator[Process]:
    """Start a worker for ``case`` and kill it on exit."""
    process = Process(case.threads, case.worker)
    try:
        yield process
    finally:
        process.close()


def measure_ceiling(case: Case) -> Ceiling:
    """Measure the machine's limits for the case's device and dtype in a separate process."""
    with started(case) as worker:
        ceiling: Ceiling = worker.ask(PREPARE_SECONDS, "ceiling", case.device, case.dtype)
    return ceiling


class Saved(Protocol):
    """The inputs and reference results that a case's providers load from a file."""

    @property
    def tolerance(self) -> float: ...

    def save(self, path: Path) -> None: ...


Entry = tuple[Case, Provider[Any]]


def race(
    case: Case,
    providers: Sequence[Provider[Any]],
    settings: Settings,
    log: Callable[[str], None],
    materials: Callable[[Case], Saved] = Materials.of,
) -> list[Outcome]:
    """Check and time ``providers`` on ``case``; returns outcomes in order. ``log`` receives progress."""
    return race_entries([(case, provider) for provider in providers], materials, settings, log)


def race_entries(
    entries: Sequence[Entry],
    materials: Callable[[Case], Saved],
    settings: Settings,
    log: Callable[[str], None],
) -> list[Outcome]:
    """Check every entry, then time the correct ones in interleaved bursts; returns one outcome per entry.

    Each entry has a separate process that lives until the end. ``materials`` is called once per run of
    consecutive entries of the same case.
    """
    outcomes: dict[int, Outcome] = {}
    processes: dict[int, Process] = {}
    try:
        for i, (case, provider) in enumerate(entries):
            if reason := provider.unavailable(case):
                outcomes[i] = Outcome(provider, "skipped", reason)
            else:
                processes[i] = Process(case.threads, case.worker)  # all import PyTorch in parallel
        with tempfile.TemporaryDirectory() as folder:
            outcomes |= _checked(entries, processes, materials, settings, log, Path(folder))
        running = {i: p for i, p in processes.items() if outcomes[i].status == "ok"}
        log(f"timing {len(running)} of {len(entries)}, {settings.seconds:g} s each")
        _time(running, outcomes, settings, seed=entries[0][0].seed if entries else 0)
    finally:
        for process in processes.values():
            process.close()
    return [outcomes[i] for i in range(len(entries))]


def _checked(
    entries: Sequence[Entry],
    processes: dict[int, Process],
    materials: Callable[[Case], Saved],
    settings: Settings,
    log: Callable[[str], None],
    folder: Path,
) -> dict[int, Outcome]:
    """Build and check the entries that have a process; those that fail lose it."""
    outcomes: dict[int, Outcome] = {}
    tolerances: dict[int, float] = {}
    sent_at: dict[int, float] = {}
    saved_case, path, tolerance = None, folder, 0.0
    several = any(case != entries[0][0] for case, _ in entries)
    alone: list[tuple[int, Path]] = []

    def request(i: int, path: Path) -> None:
        case, provider = entries[i]
        log(f"{f'{case.title}: ' if several else ''}{provider.name}: building and checking")
        processes[i].send("prepare", case, provider.name, str(path))
        sent_at[i] = time.monotonic()

    def collect(i: int, until: float) -> None:
        end = min(sent_at[i] + settings.prepare_seconds, until)
        outcomes[i] = _outcome(processes[i], entries[i][1], tolerances[i], max(end - time.monotonic(), 0.0))
        if outcomes[i].status != "ok":  # or it might go on compiling and disturb the others
            processes.pop(i).close()

    for i, (case, provider) in enumerate(entries):
        if i not in processes:
            continue
        if case != saved_case:
            made = materials(case)
            saved_case, path, tolerance = case, folder / f"{i}.pt", made.tolerance
            made.save(path)
        tolerances[i] = tolerance
        if settings.together and not provider.searches:
            request(i, path)
        else:
            alone.append((i, path))
    for i in list(sent_at):
        collect(i, settings.until - SEARCH_SECONDS * len(alone))
    for i, path in alone:
        request(i, path)
        collect(i, settings.until)
    return outcomes


def _outcome(process: Process, provider: Provider[Any], tolerance: float, timeout: float) -> Outcome:
    """Wait for the result of the process's building and checking."""
    try:
        error, note, wrong = process.receive(timeout)
    except WorkerFailed as failure:
        return Outcome(provider, "failed", str(failure))
    outcome = Outcome(provider, "ok", error=error, tolerance=tolerance, note=note)
    if not error <= tolerance:
        wrong = f"error {error:.1e} > {tolerance:.0e}"
    if wrong:
        outcome.status, outcome.reason = "wrong", wrong
    return outcome


def _time(running: dict[int, Process], outcomes: dict[int, Outcome], settings: Settings, seed: int) -> None:
    """Time rounds of one burst per provider, reshuffled so that machine drift affects all equally."""
    times: dict[int, dict[str, list[float]]] = {i: {} for i in running}
    burst = settings.seconds / settings.rounds
    order = list(running)
    shuffle = random.Random(seed).shuffle
    for _ in range(settings.rounds):
        shuffle(order)
        for i in order:
            if outcomes[i].status == "ok":
                _burst(running[i], outcomes[i], burst, times[i])
    for i, outcome in outcomes.items():
        if outcome.status == "ok":
            outcome.spreads = {column: summarise(values) for column, values in times[i].items()}


def _burst(process: Process, outcome: Outcome, seconds: float, times: dict[str, list[float]]) -> None:
    try:
        burst, outcome.peak_bytes = process.ask(seconds + SPARE_SECONDS, "burst", seconds)
    except WorkerFailed as failure:
        outcome.status, outcome.reason, outcome.peak_bytes = "failed", str(failure), None
        process.close()
        return
    for column, values in burst.items():
        times.setdefault(column, []).extend(values)
