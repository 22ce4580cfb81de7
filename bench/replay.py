"""Measure the device time of short calls by CUDA graph replay, which excludes launch overhead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.stats import Spread, summarise
from bench.timing import FLUSH_BYTES

SECONDS = 0.03  # of replays per measurement
WARM_UP = 2  # calls before capture: compilation, cuDNN's algorithm search, launch plans
MIN_REPLAYS, MAX_REPLAYS = 7, 200


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Capture all calls, in order, in one CUDA graph after warming each of them up."""
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
    """Return the seconds per call, measured by replaying one graph of all calls.

    With ``cold``, L2 is overwritten before each replay, so every call that shares no tensors with the others
    runs from cold L2.
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

    replay()  # the first replay uploads the graph
    before, after = replay()
    torch.cuda.synchronize()
    once = max(before.elapsed_time(after) / 1e3, 1e-6)
    events = [replay() for _ in range(min(max(int(seconds / once), MIN_REPLAYS), MAX_REPLAYS))]
    torch.cuda.synchronize()
    return summarise([a.elapsed_time(b) / 1e3 / len(calls) for a, b in events])
