"""The loss in float32: one call of the library forward, and one backward (csrc/loss.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library


def bce(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (loss, probability) [k], as defined in :mod:`..loss`."""
    k = len(targets)
    loss, probability = (torch.empty(k, dtype=torch.float32, device="cpu") for _ in range(2))
    values = (ctypes.c_double * k)(*targets)
    library.checked(
        library.library().dcgan_bce(
            *(logits.data_ptr(), logits.stride(0), logits.shape[0] // k, k, ctypes.addressof(values)),
            *(loss.data_ptr(), probability.data_ptr()),
        )
    )
    return loss, probability


def bce_backward(
    logits: Tensor, targets: Sequence[float], dloss: Tensor | None, dprobability: Tensor | None
) -> Tensor:
    """Return dlogits."""
    k = len(targets)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    values = (ctypes.c_double * k)(*targets)
    given = [None if d is None else d.contiguous() for d in (dloss, dprobability)]
    library.checked(
        library.library().dcgan_bce_backward(
            *(logits.data_ptr(), logits.stride(0), logits.shape[0] // k, k, ctypes.addressof(values)),
            *(None if d is None else d.data_ptr() for d in given),
            dlogits.data_ptr(),
        )
    )
    return dlogits
