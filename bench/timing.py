"""Time callables in short bursts: wall clock on the CPU, device events on CUDA."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from bench.stats import Spread, summarise
from dcgan.capturing import capturing

Runner = Callable[[Tensor], Tensor]
Times = dict[str, list[float]]
T = TypeVar("T")

MIN_CALLS = 3
MAX_CALLS = 2000  # per CUDA burst
GRAPH_BATCH = 64  # above this batch, launch overhead is hidden behind the kernels
GRAPH_CALLS = 8  # per captured graph
FLUSH_BYTES = 256 << 20  # several times any L2


class Sampler(Protocol):
    """Times calls in bursts."""

    overhead: int
    """Bytes of device memory used by the measurement itself."""

    def burst(self, seconds: float) -> Times:
        """Call for about ``seconds``.

        Returns the seconds of each call by column: ``warm``, on CUDA also ``cold`` and ``graph``.
        """
        ...


class CpuSampler(Generic[T]):
    """Measure the wall clock time of each call, cycling through the inputs.

    With ``long``, for calls that take a good part of a second, a burst may be a single call and is not
    preceded by a warm-up call.
    """

    overhead = 0

    def __init__(self, run: Callable[[T], object], inputs: Sequence[T], long: bool = False) -> None:
        self._run, self._inputs, self._long = run, inputs, long

    def burst(self, seconds: float) -> Times:
        if not self._long:
            self._run(self._inputs[0])  # warm-up: wakes the threads and reloads the weights into cache
        times: list[float] = []
        now = time.perf_counter()
        end = now + seconds
        while now < end or len(times) < (1 if self._long else MIN_CALLS):
            x = self._inputs[len(times) % len(self._inputs)]
            start = time.perf_counter()
            self._run(x)
            now = time.perf_counter()
            times.append(now - start)
        return {"warm": times}


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

    run: Runner
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


class CudaSampler:
    """Measure each call with device events.

    ``warm`` times back-to-back calls, including launch gaps. ``cold`` overwrites L2 before each call.
    ``graph``, for batches up to GRAPH_BATCH, replays GRAPH_CALLS calls captured in one CUDA graph, which
    excludes launch overhead. It is absent if ``capture`` is false, as for a provider that already replays
    graphs, and where capturing fails.
    """

    overhead = FLUSH_BYTES

    def __init__(self, run: Runner, inputs: Sequence[Tensor], capture: bool) -> None:
        self._run, self._inputs = run, inputs
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=inputs[0].device)
        small = inputs[0].shape[0] <= GRAPH_BATCH
        self._graph = self._captured() if capture and small else None

    def burst(self, seconds: float) -> Times:
        share = seconds / (2 if self._graph is None else 3)
        times = {
            "warm": events(self._call, share),
            "cold": events(self._call, share, self._flush),
        }
        if self._graph is not None:
            replay = self._graph.replay
            times["graph"] = [t / GRAPH_CALLS for t in events(lambda i: replay(), share)]
        return times

    def _call(self, i: int) -> None:
        self._run(self._inputs[i % len(self._inputs)])

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, torch.cuda.Stream()):
                for i in range(GRAPH_CALLS):
                    self._call(i)
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph


class CudaSteps(Generic[T]):
    """Measure long, stateful calls, such as training steps, back to back with device events."""

    overhead = 0

    def __init__(self, run: Callable[[T], object], inputs: Sequence[T]) -> None:
        self._run, self._inputs = run, inputs

    def burst(self, seconds: float) -> Times:
        return {"warm": events(lambda i: self._run(self._inputs[i % len(self._inputs)]), seconds)}


def events(call: Callable[[int], object], seconds: float, flush: Tensor | None = None) -> list[float]:
    """Return the device seconds of each call; overwrites ``flush`` before each."""
    for i in range(MIN_CALLS):
        call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(0)
    if flush is not None:
        flush.zero_()
    torch.cuda.synchronize()
    count = int(seconds / (time.perf_counter() - start))
    count = min(max(count, MIN_CALLS), MAX_CALLS)
    before = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    after = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    for i in range(count):
        if flush is not None:
            flush.zero_()
        before[i].record()
        call(i)
        after[i].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(before, after, strict=True)]
