"""Whether tensors still hold the values they held before, by samples of their memory: csrc/samples.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library

LINES = 32
"""Lines of 64 bytes that are compared of each tensor: an edit of a share f of them is missed with probability
(1 - f)^32, or where single elements are edited at random, a share f of those, in float32 with (1 - f)^512."""


class _Pair(ctypes.Structure):
    """``dcgan_pair``."""

    _fields_ = (("now", ctypes.c_void_p), ("before", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class Pairs:
    """Tensors, and copies of them from before with the same strides, which the caller keeps alive."""

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._pairs = (_Pair * len(tensors))()
        for pair, (now, before) in zip(self._pairs, tensors, strict=True):
            pair.now, pair.before = now.data_ptr(), before.data_ptr()
            pair.bytes = now.numel() * now.element_size()
        self._count, self._address = len(tensors), ctypes.addressof(self._pairs)

    def differ(self) -> bool:
        """Whether one of the samples taken, which are others at every call, differs."""
        return library.checked(library.library().dcgan_differ(self._address, self._count, LINES)) > 0


def copied(t: Tensor) -> Tensor:
    """A copy of a :func:`dense` tensor in the same strides.

    Not ``clone()``: in a process forked from one that has used PyTorch's threads, it waits for them for ever.
    """
    copy = torch.empty_like(t, device="cpu", memory_format=torch.preserve_format)
    ctypes.memmove(copy.data_ptr(), t.data_ptr(), t.numel() * t.element_size())
    return copy


def dense(t: Tensor) -> bool:
    """Whether its elements lie next to each other, in any order, so that they can be compared as bytes."""
    size = 1
    for stride, length in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= length
    return t.numel() > 0 and t.layout == torch.strided
