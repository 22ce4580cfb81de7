"""The order in which an epoch visits the images, and shuffled batches of a tensor that is in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dcgan.errors import check_integers, check_positive_integers


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order of one epoch. It depends only on (n, seed, epoch), so resuming needs no stored state.

    Orders of different seeds or epochs are independent because seed and epoch are hashed together, not added.

    Args:
        n: number of images.
        seed: RNG seed of the run.
        epoch: epoch number, from 0.

    Returns:
        A permutation of 0 … n-1, int64 [n], on the CPU.

    Raises:
        InputError: an argument is not an integer of at least 0.

    Source: O'Neill's hash, as implemented in :class:`numpy.random.SeedSequence`.
    """
    check_integers(0, n=n, seed=seed, epoch=epoch)
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(state[0])))


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
        check_positive_integers(ValueError, batch_size=batch_size)
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
