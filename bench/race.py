"""The coordinator: one process a provider, checked, then timed in short bursts taken in turn."""

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

PREPARE_SECONDS = 900.0  # torch.compile's longest search, on a slow machine
SEARCH_SECONDS = 8.0  # of the time in which all are built, kept for each that searches and so comes last
SPARE_SECONDS = 120.0  # beyond its length, for a burst of slow calls


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    seconds: float = 3.0
    """Of each provider, each case."""
    rounds: int = 6
    """Bursts that the seconds are divided into."""
    prepare_seconds: float = PREPARE_SECONDS
    """Until a provider that does not answer is given up: building, compiling and checking."""
    together: bool = False
    """Build all side by side, as compilers take a core each, but those that search: they are alone, later."""
    until: float = float("inf")
    """When building ends, by the monotonic clock: who is not ready by then is not waited for; who compiles
    beside others has to be ready SEARCH_SECONDS earlier for each that searches."""


@dataclass
class Outcome:
    """What became of one provider in one case."""

    provider: Provider[Any]
    status: str
    """``ok``, ``wrong`` (an error beyond the tolerance: not timed), ``failed`` or ``skipped``."""
    reason: str = ""
    """Why there are no times."""
    error: float | None = None
    """‖out - ref‖₂/‖ref‖₂ against float64."""
    tolerance: float | None = None
    """What the error may be."""
    spreads: dict[str, Spread] = field(default_factory=dict)
    """Times of a call, by column: ``warm``; on CUDA ``cold`` and ``graph``."""
    peak_bytes: int | None = None
    note: str = ""
    """What ran it, where there is something to say."""


class WorkerFailed(Exception):
    """The worker raised, died or did not answer in time; the message says which."""


class Process:
    """A worker process and the pipe to it."""

    def __init__(self, threads: int, worker: str = Case.worker) -> None:
        self._pipe, theirs = Pipe()
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        root = str(Path(__file__).resolve().parent.parent)
        # OpenMP's waiting policy is left at its default for all: threads spin a moment between the parallel
        # regions of a call, and sleep between bursts, as the worker makes sure. PASSIVE cost 10% at batch 1.
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
        """The worker's answer. Raises WorkerFailed."""
        self.tell(method, *arguments)
        return self.hear(timeout)

    def tell(self, method: str, *arguments: Any) -> None:
        """Asks, and does not wait; :meth:`hear` is the answer."""
        with suppress(OSError):  # it has ended, and hear() says how
            self._pipe.send((method, *arguments))

    def hear(self, timeout: float) -> Any:
        """The answer to the last :meth:`tell`. Raises WorkerFailed."""
        try:
            if not self._pipe.poll(timeout):
                raise WorkerFailed(f"no answer in {timeout:.0f} s")
            status, value = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerFailed(self._epitaph()) from None
        if status == "error":
            raise WorkerFailed(value)
        return value

    def close(self) -> None:
        """Ends the process, busy or not."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"exited with status {code}"
        return f"{how}: {lines[-1]}" if lines else how


@contextmanager
def started(case: Case) -> Iterator[Process]:
    """A worker for ``case``, ended after use."""
    process = Process(case.threads, case.worker)
    try:
        yield process
    finally:
        process.close()


def measure_ceiling(case: Case) -> Ceiling:
    """The machine's limits with the case's device and dtype, measured in a process of its own."""
    with started(case) as worker:
        ceiling: Ceiling = worker.ask(PREPARE_SECONDS, "ceiling", case.device, case.dtype)
    return ceiling


class Saved(Protocol):
    """What a case's providers are handed, and held against."""

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
    """Checks and times ``providers`` on ``case``: one outcome each, in their order. ``log`` gets progress."""
    return contest([(case, provider) for provider in providers], materials, settings, log)


def contest(
    entries: Sequence[Entry],
    materials: Callable[[Case], Saved],
    settings: Settings,
    log: Callable[[str], None],
) -> list[Outcome]:
    """Checks every entry, then times those that are right, in bursts taken in turn: one outcome each.

    Each has a process of its own, and all of them live until the end. ``materials`` is asked once for a
    run of entries of the same case.
    """
    outcomes: dict[int, Outcome] = {}
    processes: dict[int, Process] = {}
    try:
        for i, (case, provider) in enumerate(entries):
            if reason := provider.unavailable(case):
                outcomes[i] = Outcome(provider, "skipped", reason)
            else:
                processes[i] = Process(case.threads, case.worker)  # all import PyTorch at once
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
    """Builds and checks those that have a process; who is not right has none any more."""
    outcomes: dict[int, Outcome] = {}
    tolerances: dict[int, float] = {}
    told: dict[int, float] = {}
    written, path, tolerance = None, folder, 0.0
    several = any(case != entries[0][0] for case, _ in entries)
    alone: list[tuple[int, Path]] = []

    def tell(i: int, path: Path) -> None:
        case, provider = entries[i]
        log(f"{f'{case.title}: ' if several else ''}{provider.name}: building and checking")
        processes[i].tell("prepare", case, provider.name, str(path))
        told[i] = time.monotonic()

    def hear(i: int, until: float) -> None:
        end = min(told[i] + settings.prepare_seconds, until)
        outcomes[i] = _outcome(processes[i], entries[i][1], tolerances[i], max(end - time.monotonic(), 0.0))
        if outcomes[i].status != "ok":  # it may still compile, beside those that come after
            processes.pop(i).close()

    for i, (case, provider) in enumerate(entries):
        if i not in processes:
            continue
        if case != written:
            made = materials(case)
            written, path, tolerance = case, folder / f"{i}.pt", made.tolerance
            made.save(path)
        tolerances[i] = tolerance
        if settings.together and not provider.searches:
            tell(i, path)
        else:
            alone.append((i, path))
    for i in list(told):
        hear(i, settings.until - SEARCH_SECONDS * len(alone))
    for i, path in alone:
        tell(i, path)
        hear(i, settings.until)
    return outcomes


def _outcome(process: Process, provider: Provider[Any], tolerance: float, timeout: float) -> Outcome:
    """Of building and checking, which the process has been told to do."""
    try:
        error, note, wrong = process.hear(timeout)
    except WorkerFailed as failure:
        return Outcome(provider, "failed", str(failure))
    outcome = Outcome(provider, "ok", error=error, tolerance=tolerance, note=note)
    if not error <= tolerance:
        wrong = f"error {error:.1e} > {tolerance:.0e}"
    if wrong:
        outcome.status, outcome.reason = "wrong", wrong
    return outcome


def _time(running: dict[int, Process], outcomes: dict[int, Outcome], settings: Settings, seed: int) -> None:
    """Rounds of one burst each, in an order shuffled anew, so that drift of the machine is shared."""
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
        answer, outcome.peak_bytes = process.ask(seconds + SPARE_SECONDS, "burst", seconds)
    except WorkerFailed as failure:
        outcome.status, outcome.reason, outcome.peak_bytes = "failed", str(failure), None
        process.close()
        return
    for column, values in answer.items():
        times.setdefault(column, []).extend(values)
