"""The order in which an epoch goes through the images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dcgan.errors import InputError


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch: a function of (n, seed, epoch) alone, so that resuming needs no state.

    Orders of different seeds or epochs are independent of each other: the two are hashed together, not added.

    Args:
        n: how many images there are.
        seed: of the run.
        epoch: counted from 0.

    Returns:
        int64 [n], each of 0 … n-1 once, on the CPU.

    Raises:
        InputError: an argument that is no integer of at least 0.

    Source: O'Neill's hash, as :class:`numpy.random.SeedSequence` has it.
    """
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"{name} must be an integer of at least 0, got {value!r}")
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(state[0])))
