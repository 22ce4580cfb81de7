"""The value guard: detect changed tensors by sampling their memory (csrc/value_guard.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library

LINES = 32
"""Cache lines of 64 bytes compared per tensor. An edit of a fraction f of the lines is missed with
probability (1 - f)^32, an edit of a fraction f of float32 elements at random places with (1 - f)^512."""


class _Pair(ctypes.Structure):
    """The struct ``dcgan_pair``."""

    _fields_ = (("now", ctypes.c_void_p), ("before", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class Pairs:
    """Pairs of a tensor and an earlier copy with the same strides; the caller keeps both alive."""

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._pairs = (_Pair * len(tensors))()
        for pair, (now, before) in zip(self._pairs, tensors, strict=True):
            pair.now, pair.before = now.data_ptr(), before.data_ptr()
            pair.bytes = now.numel() * now.element_size()
        self._count, self._address = len(tensors), ctypes.addressof(self._pairs)

    def differ(self) -> bool:
        """Compare samples, taken at different places in every call; return whether any differs."""
        return library.checked(library.library().dcgan_differ(self._address, self._count, LINES)) > 0


def copied(t: Tensor) -> Tensor:
    """Copy a :func:`dense` tensor with the same strides.

    Not with ``clone()``, which deadlocks in a process forked from one that has used PyTorch's threads.
    """
    copy = torch.empty_like(t, device="cpu", memory_format=torch.preserve_format)
    ctypes.memmove(copy.data_ptr(), t.data_ptr(), t.numel() * t.element_size())
    return copy


def dense(t: Tensor) -> bool:
    """Return whether the elements are contiguous in memory, in any order, and so comparable as bytes."""
    size = 1
    for stride, length in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= length
    return t.numel() > 0 and t.layout == torch.strided
