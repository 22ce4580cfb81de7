"""Shuffled batches of a tensor that is in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Iterate over shuffled batches of a tensor; each iteration is one epoch and is shuffled again.

    The orders depend only on ``seed``. Every image appears once per epoch; the last batch is smaller if
    ``batch_size`` does not divide the number of images.

    Args:
        images: [N, …], on any device; batches are gathered on that device.
        batch_size: images per batch.
        seed: RNG seed for shuffling.

    Raises:
        ValueError: there are no images, or ``batch_size`` is not a positive integer.
    """

    def __init__(self, images: Tensor, batch_size: int = 128, seed: int = 0) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        if images.ndim == 0 or len(images) == 0:
            raise ValueError(f"images must hold at least one image, got shape {list(images.shape)}")
        self.images, self.batch_size = images, batch_size
        self._rng = torch.Generator(images.device).manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self._rng, device=self.images.device)
        for chosen in order.split(self.batch_size):
            yield self.images[chosen]
