"""Time callables in short bursts (wall clock on the CPU, device events on CUDA), within a time budget.

Times are summarised by medians and quartiles, which other load on the machine skews less than means.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcgan.kernels.capturing import capturing

Times = dict[str, list[float]]

MIN_CALLS = 3
MAX_CALLS = 2000  # per CUDA burst
GRAPH_BATCH = 64  # above this batch, launch overhead is hidden behind the kernels
GRAPH_CALLS = 8  # per captured graph
AHEAD = 32  # calls enqueued while the device waits: the launches of a few hundred fit its queue
CLOCK = 2e9  # cycles per second of a fast GPU
FLUSH_BYTES = 256 << 20  # several times any L2

REPLAY_SECONDS = 0.03  # of replays per measurement
WARM_UP = 2  # calls before capture: compilation, cuDNN's algorithm search, launch plans
MIN_REPLAYS, MAX_REPLAYS = 7, 200

MAX_NAMED = 8  # skipped items that the report of a budget names


@dataclass(frozen=True)
class Spread:
    """The quartiles of ``count`` call times, in seconds."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Spread:
        """Return the spread in a JSON object, which may have further fields."""
        return cls(*(row[field.name] for field in fields(cls)))

    @property
    def relative(self) -> float:
        """Half the interquartile range divided by the median: the ± column of the tables, as a fraction."""
        return (self.q3 - self.q1) / 2 / self.median


def summarise(times: Sequence[float]) -> Spread:
    """Return the quartiles of ``times``. Raises ValueError if it is empty."""
    if not times:
        raise ValueError("no times to summarise")
    if len(times) == 1:
        return Spread(times[0], times[0], times[0], 1)
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, q1, q3, len(times))


class Budget:
    """Time in which work may begin; work that has begun is finished, and skipped work is reported."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + 60 * minutes
        self.left: list[str] = []

    @property
    def seconds(self) -> float:
        """Remaining seconds in which work may begin; 0 once the budget is used up."""
        return max(self._end - self._clock(), 0.0)

    def allows(self, what: str) -> bool:
        """Return whether ``what`` may begin; if not, record it as skipped."""
        if self.seconds > 0:
            return True
        self.left.append(what)
        return False

    def report(self) -> str:
        """Return a line that names the skipped work."""
        more = f" and {len(self.left) - MAX_NAMED} more" if len(self.left) > MAX_NAMED else ""
        return f"not reached in time: {', '.join(self.left[:MAX_NAMED]) or 'nothing'}{more}"


class Sampler:
    """Time calls in bursts, cycling through the inputs: on CUDA, back to back with device events."""

    overhead = 0
    """Bytes of device memory used by the measurement itself."""

    def __init__(self, run: Callable[[Any], object], inputs: Sequence[Any]) -> None:
        self._run, self._inputs = run, inputs

    def burst(self, seconds: float) -> Times:
        """Call for about ``seconds``.

        Returns the seconds of each call by column: ``warm``, on CUDA also ``cold`` and ``graph``.
        """
        return {"warm": events(self._call, seconds)}

    def _call(self, i: int) -> None:
        self._run(self._inputs[i % len(self._inputs)])


class CpuSampler(Sampler):
    """Measure the wall clock time of each call.

    With ``long``, for calls that take a good part of a second, a burst may be a single call and is not
    preceded by a warm-up call.
    """

    def __init__(self, run: Callable[[Any], object], inputs: Sequence[Any], long: bool = False) -> None:
        super().__init__(run, inputs)
        self._long = long

    def burst(self, seconds: float) -> Times:
        if not self._long:
            self._call(0)  # warm-up: wakes the threads and reloads the weights into cache
        times: list[float] = []
        now = time.perf_counter()
        end = now + seconds
        while now < end or len(times) < (1 if self._long else MIN_CALLS):
            start = time.perf_counter()
            self._call(len(times))
            now = time.perf_counter()
            times.append(now - start)
        return {"warm": times}


class CudaSampler(Sampler):
    """Measure short, stateless calls with device events.

    ``warm`` times back-to-back calls, including launch gaps and, where the host is slower, waiting for it.
    ``cold`` overwrites L2 before each call. ``graph``, for batches up to GRAPH_BATCH, excludes launch
    overhead: it replays GRAPH_CALLS calls captured in one CUDA graph, and is absent where capturing fails. If
    ``capture`` is false, as for a provider that already replays graphs, its calls are enqueued while the
    device is busy instead (:func:`ahead`).
    """

    overhead = FLUSH_BYTES

    def __init__(self, run: Callable[[Tensor], object], inputs: Sequence[Tensor], capture: bool) -> None:
        super().__init__(run, inputs)
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=inputs[0].device)
        self._graph = None
        small = inputs[0].shape[0] <= GRAPH_BATCH
        self._ahead = small and not capture
        if capture and small:
            try:
                self._graph = _captured([partial(self._call, i) for i in range(GRAPH_CALLS)])
            except RuntimeError:
                torch.cuda.synchronize()

    def burst(self, seconds: float) -> Times:
        share = seconds / (3 if self._graph is not None or self._ahead else 2)
        times = {"warm": events(self._call, share), "cold": events(self._call, share, self._flush)}
        if self._graph is not None:
            replay = self._graph.replay
            times["graph"] = [t / GRAPH_CALLS for t in events(lambda i: replay(), share)]
        elif self._ahead:
            times["graph"] = ahead(self._call, share)
        return times


def events(
    call: Callable[[int], object],
    seconds: float,
    flush: Tensor | None = None,
    limits: tuple[int, int] = (MIN_CALLS, MAX_CALLS),
) -> list[float]:
    """Return the device seconds of each call, ``limits`` of them; overwrites ``flush`` before each."""
    for i in range(MIN_CALLS):
        call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(0)
    if flush is not None:
        flush.zero_()
    torch.cuda.synchronize()
    count = min(max(int(seconds / (time.perf_counter() - start)), limits[0]), limits[1])
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for i, (before, after) in enumerate(marks):
        if flush is not None:
            flush.zero_()
        before.record()
        call(i)
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


def ahead(call: Callable[[int], object], seconds: float) -> list[float]:
    """Return the device seconds of each call, none of which waits for the host.

    A kernel that only waits keeps the device busy while the host enqueues the next AHEAD calls.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(AHEAD):
        call(i)
    wait = int(3 * (time.perf_counter() - start) * CLOCK)
    torch.cuda.synchronize()
    times: list[float] = []
    while not times or time.perf_counter() < start + seconds:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(AHEAD)]
        torch.cuda._sleep(wait)
        for i, (before, after) in enumerate(marks):
            before.record()
            call(i)
            after.record()
        torch.cuda.synchronize()
        times += [before.elapsed_time(after) / 1e3 for before, after in marks]
    return times


def replay(calls: Sequence[Callable[[], Any]], *, cold: bool, seconds: float = REPLAY_SECONDS) -> Spread:
    """Return the device seconds per call, measured by replaying one CUDA graph of all calls.

    This excludes launch overhead. With ``cold``, L2 is overwritten before each replay, so every call that
    shares no tensors with the others runs from cold L2.
    """
    # triton.testing.do_bench_cudagraph cannot overwrite L2, nor count the calls that its quantiles are of.
    for call in WARM_UP * list(calls):
        call()
    graph = _captured(calls)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if cold else None
    times = events(lambda i: graph.replay(), seconds, flush, (MIN_REPLAYS, MAX_REPLAYS))
    return summarise([time / len(calls) for time in times])


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Capture all calls, in order, in one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.Stream()):
        for call in calls:
            call()
    return graph


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set PyTorch's thread count inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Timed(NamedTuple):
    """A call to be timed by :func:`interleaved`."""

    run: Callable[[Tensor], object]
    x: Tensor
    threads: int


def interleaved(
    calls: Sequence[Timed],
    seconds: float,
    rounds: int,
    between: Callable[[], None] = lambda: None,
    long: bool = False,
) -> list[Spread]:
    """Time several calls on the CPU, in this process, in interleaved bursts.

    Each round has one burst per call, reshuffled so that machine drift affects all equally; ``between`` is
    called after every round. ``long`` is that of :class:`CpuSampler`. The calls must share one thread pool,
    because the threads of separate pools would spin and disturb each other.
    """
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for i in order:
            run, x, threads = calls[i]
            with torch_threads(threads):
                times[i] += CpuSampler(run, [x], long).burst(seconds / rounds)["warm"]
        between()
    return [summarise(values) for values in times]
