"""Timing callables in short bursts: wall clock on the CPU, device events on CUDA."""

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
MAX_CALLS = 2000  # events of one CUDA burst
GRAPH_BATCH = 64  # above it launches hide behind the kernels
GRAPH_CALLS = 8
FLUSH_BYTES = 256 << 20  # several times any L2


class Sampler(Protocol):
    """Times calls."""

    overhead: int
    """Bytes of device memory that measuring takes for itself."""

    def burst(self, seconds: float) -> Times:
        """Calls for about ``seconds``: seconds a call, by column (``warm``; on CUDA ``cold``, ``graph``)."""
        ...


class CpuSampler(Generic[T]):
    """Wall clock around each call, inputs in turn.

    ``long`` calls, of a good part of a second, may be one a burst, and none goes before to wake threads and
    fill caches.
    """

    overhead = 0

    def __init__(self, run: Callable[[T], object], inputs: Sequence[T], long: bool = False) -> None:
        self._run, self._inputs, self._long = run, inputs, long

    def burst(self, seconds: float) -> Times:
        if not self._long:
            self._run(self._inputs[0])  # its threads sleep and its weights left the cache while others ran
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
    """PyTorch's threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Timed(NamedTuple):
    """Something to be timed by :func:`in_turn`."""

    run: Runner
    x: Tensor
    threads: int


def in_turn(
    contestants: Sequence[Timed],
    seconds: float,
    rounds: int,
    between: Callable[[], None] = lambda: None,
    long: bool = False,
) -> list[Spread]:
    """Times of a call of each, on the CPU, in this process; ``long`` as for :class:`CpuSampler`.

    Rounds of one burst each, in an order shuffled anew, so that drift of the machine is shared; ``between``
    is called after every round. For what shares one pool of threads: rivals' would spin beside each other.
    """
    times: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for i in order:
            run, x, threads = contestants[i]
            with torch_threads(threads):
                times[i] += CpuSampler(run, [x], long).burst(seconds / rounds)["warm"]
        between()
    return [summarise(own) for own in times]


class CudaSampler:
    """Device events around each call.

    ``warm``: calls back to back, as a loop of them runs, launch gaps included. ``cold``: L2 is overwritten
    before each call. ``graph``, for batches up to GRAPH_BATCH: GRAPH_CALLS calls captured in one CUDA graph,
    so that kernels are timed and not launches; absent if ``capture`` is false, as for a provider that replays
    graphs of its own, and where capturing fails.
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
    """Device events around each call, back to back, of what takes long and changes what it works on."""

    overhead = 0

    def __init__(self, run: Callable[[T], object], inputs: Sequence[T]) -> None:
        self._run, self._inputs = run, inputs

    def burst(self, seconds: float) -> Times:
        return {"warm": events(lambda i: self._run(self._inputs[i % len(self._inputs)]), seconds)}


def events(call: Callable[[int], object], seconds: float, flush: Tensor | None = None) -> list[float]:
    """Seconds of each call on the device; before each, ``flush`` is overwritten."""
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
