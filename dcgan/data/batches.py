"""Shuffled batches of a tensor in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Shuffled batches of a tensor; each iteration is an epoch, in an order of its own.

    The orders depend on ``seed`` alone. Every image comes once an epoch, and the last batch is short where
    ``batch_size`` does not divide the images.

    Args:
        images: [N, …], on any device; batches are gathered there.
        batch_size: images a batch.
        seed: of the shuffling.

    Raises:
        ValueError: no images, or a ``batch_size`` that is no positive integer.
    """

    def __init__(self, images: Tensor, batch_size: int = 128, seed: int = 0) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        if images.ndim == 0 or len(images) == 0:
            raise ValueError(f"images must be at least one image, got shape {list(images.shape)}")
        self.images, self.batch_size = images, batch_size
        self._random = torch.Generator(images.device).manual_seed(seed)

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self._random, device=self.images.device)
        for chosen in order.split(self.batch_size):
            yield self.images[chosen]
