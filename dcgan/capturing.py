"""CUDA graph capture that restores the process's CUDA state if the capture fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_failed: list[torch.cuda.CUDAGraph] = []
"""The graphs of failed captures, kept alive because torch's allocators may still refer to them."""


@contextlib.contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None, error_mode: str = "global"
) -> Iterator[None]:
    """Capture into ``graph`` as :class:`torch.cuda.graph` does, but clean up if the capture fails.

    When CUDA invalidates a capture, ``torch.cuda.graph.__exit__`` raises before it has cleaned up: the
    captured stream stays the current one, allocations still go to the graph's memory pool, and the random
    number generator refuses to draw outside of a capture.

    Args:
        graph: a new graph.
        stream: the stream to capture, on the current device.
        pool: the memory pool, if shared with other graphs; a new one by default.
        error_mode: ``capture_error_mode`` of :class:`torch.cuda.graph`.
    """
    outside = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    index = stream.device.index
    random = torch.cuda.default_generators[index]
    before = random.clone_state()
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode=error_mode):
            yield
    except BaseException:
        torch.cuda.set_stream(outside)
        with contextlib.suppress(RuntimeError):  # torch has already ended it if the captured code raised
            torch._C._cuda_endAllocateToPool(index, pool)
        random.graphsafe_set_state(before)
        _failed.append(graph)
        raise
