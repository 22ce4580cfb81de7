"""Guarded memory: every new tensor starts as NaN and lies between margins of NaN."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

MARGIN = 512  # elements on each side: a row of the tests' widest tensors, and a multiple of 16 bytes


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Guard all memory that is allocated inside; at the end no margin may have been written to.

    An element that is not written, or one that is read out of bounds, makes a result NaN.
    """
    allocated: list[tuple[Tensor, int]] = []
    empty = torch.empty

    def guard(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*arguments: Any, **options: Any) -> Tensor:
            wanted = make(*arguments, **(options | {"device": "meta"}))
            on_meta = options.get("device") == "meta"
            if on_meta or not wanted.numel() or not wanted.is_floating_point():
                return make(*arguments, **options)
            size = 1 + sum((n - 1) * step for n, step in zip(wanted.shape, wanted.stride(), strict=True))
            memory = empty(size + 2 * MARGIN, dtype=wanted.dtype).fill_(math.nan)
            allocated.append((memory, size))
            first = memory.storage_offset() + MARGIN
            storage, layout = memory.untyped_storage(), (wanted.shape, wanted.stride())
            return empty(0, dtype=wanted.dtype).set_(storage, first, *layout)

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, guard(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(Tensor, name, guard(getattr(Tensor, name)))
        yield
    for memory, size in allocated:
        margins = torch.cat([memory[:MARGIN], memory[MARGIN + size :]])
        assert bool(margins.isnan().all()), f"written outside of a tensor of {size} elements"
