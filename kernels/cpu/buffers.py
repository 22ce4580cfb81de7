"""A memory pool for the activations and gradients of training.

A step allocates some 300 MB of activations and gradients at batch 64. The system would back them with fresh
pages each time, and zero those. So when the last tensor that uses a block is gone, the block returns to this
pool, and the next tensor of that size reuses it.

Measured on two cores of an AVX-512 machine, against ``torch.empty``: a training step is 1.04 times as fast at
batch 64, 1.14 times at batch 128, and 0.99 times at batch 8. Huge pages gained one or two hundredths more,
within the noise, and are not requested.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 20  # bytes below which PyTorch's allocator is as good
KEPT = 512 << 20  # max unused bytes; the least recently used are returned to the system

_free: collections.OrderedDict[int, list[mmap.mmap]] = collections.OrderedDict()  # by size, LRU first
_unused = 0
_lock = threading.RLock()  # reentrant: garbage collection may end a lease within a call of this module


@functools.lru_cache(maxsize=256)
def _lease_type(size: int) -> type[Any]:
    """Return the type of buffers of ``size`` bytes that go back to the pool when their storage is freed."""

    class Lease(ctypes.c_char * size):  # type: ignore[misc]
        def __del__(self) -> None:
            _give_back(self.memory)

    return Lease


def _give_back(memory: mmap.mmap) -> None:
    global _unused
    with _lock:
        size = len(memory)
        _free.setdefault(size, []).append(memory)
        _free.move_to_end(size)
        _unused += size
        while _unused > KEPT:
            oldest = next(iter(_free))
            _free[oldest].pop()
            _unused -= oldest
            if not _free[oldest]:
                del _free[oldest]


def _take(size: int) -> mmap.mmap:
    global _unused
    with _lock:
        found = _free.get(size)
        if found:
            _unused -= size
            memory = found.pop()
            if not found:
                del _free[size]
            return memory
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)  # Windows, where anonymous memory is private to the process


def empty(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Allocate an uninitialized float32 tensor on the CPU; its strides must be dense, in any order."""
    count = math.prod(shape)
    if count * 4 < SMALL:
        return torch.empty_strided(shape, strides, dtype=torch.float32, device="cpu")
    memory = _take(-(-count * 4 // mmap.PAGESIZE) * mmap.PAGESIZE)
    lease = _lease_type(len(memory)).from_buffer(memory)
    lease.memory = memory
    whole = torch.frombuffer(lease, dtype=torch.float32)
    # getattr, as mypy does not know this property of the module.
    fill: bool = getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009
    if torch.are_deterministic_algorithms_enabled() and fill:
        whole.fill_(float("nan"))  # as torch.empty does
    # Not a view, which autograd would trace to a base tensor that nobody holds.
    return torch.empty(0).set_(whole.untyped_storage(), 0, shape, strides)


def empty_map(shape: Sequence[int], channels_last: bool) -> Tensor:
    """Allocate an :func:`empty` tensor [N, C, H, W] in a memory format."""
    _, c, h, w = shape
    return empty(shape, (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1))


def empty_like(t: Tensor) -> Tensor:
    """Allocate an :func:`empty` tensor of t's shape, with the strides of torch.empty_like."""
    like = torch.empty_like(t, device="meta")
    return empty(like.shape, like.stride())


def release() -> None:
    """Return all unused memory to the system."""
    global _unused
    with _lock:
        _free.clear()
        _unused = 0
