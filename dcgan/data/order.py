"""The order in which an epoch visits the images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dcgan.errors import InputError


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
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"{name} must be an integer of at least 0, got {value!r}")
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(state[0])))
