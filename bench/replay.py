"""Device time of short calls: replays of a CUDA graph, so that kernels are timed and not their launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.stats import Spread, summarise
from bench.timing import FLUSH_BYTES

SECONDS = 0.03
WARM_UP = 2  # calls before the capture: compilers, cuDNN's search, plans
LEAST, MOST = 7, 200  # replays


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """One graph of all the calls, in order; each has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def measure(calls: Sequence[Callable[[], Any]], *, cold: bool, seconds: float = SECONDS) -> Spread:
    """Seconds of one call, from replays of a graph of all of them.

    ``cold``: L2 is overwritten before each replay, and so every call is cold whose tensors are its own.
    """
    graph = capture(calls)
    flush = torch.empty(FLUSH_BYTES if cold else 0, dtype=torch.uint8, device="cuda")

    def replay() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        graph.replay()
        after.record()
        return before, after

    replay()  # the first uploads the graph
    before, after = replay()
    torch.cuda.synchronize()
    once = max(before.elapsed_time(after) / 1e3, 1e-6)
    events = [replay() for _ in range(min(max(int(seconds / once), LEAST), MOST))]
    torch.cuda.synchronize()
    return summarise([a.elapsed_time(b) / 1e3 / len(calls) for a, b in events])
