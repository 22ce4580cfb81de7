"""Capturing a CUDA graph, after which the process is as it was, whether the capture succeeds or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_failed: list[torch.cuda.CUDAGraph] = []
"""Of captures that failed: torch's allocators may still refer to them."""


@contextlib.contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None, error_mode: str = "global"
) -> Iterator[None]:
    """:class:`torch.cuda.graph` that leaves nothing behind where it fails.

    Where CUDA gives a capture up, torch's own end of it raises before it has ended anything: the stream that
    was captured stays the current one, memory is still allocated as if for the graph, and the generator of
    random numbers refuses to draw any outside of a capture.

    Args:
        graph: a new one.
        stream: what is captured, on the current device.
        pool: of memory, to be shared with other graphs; its own by default.
        error_mode: of :class:`torch.cuda.graph`.
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
        with contextlib.suppress(RuntimeError):  # what was captured raised, and torch has ended it
            torch._C._cuda_endAllocateToPool(index, pool)
        random.graphsafe_set_state(before)
        _failed.append(graph)
        raise
