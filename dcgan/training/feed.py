"""What each step is given: a batch of real images and noise, functions of the seed and the step alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcgan.data import normalise
from dcgan.data.order import permutation
from dcgan.errors import InputError

NOISE, FIXED_NOISE, SCORE_NOISE = 1, 2, 3
"""Streams of random numbers that must not be each other's."""


class Share(NamedTuple):
    """Which part of every batch is this process's: ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1


ALONE = Share()


class Feed:
    """Batches of real images on the networks' device, gone through in an order that each epoch has anew.

    An epoch's order is a function of (seed, epoch), and a step's noise of (seed, step): training resumes
    anywhere without a state of its own, and on any number of processes, each of which takes its share of the
    same batch. The last batch of an epoch may be short; it is cut to a multiple of the processes, so that
    each image weighs the same.

    Images stay uint8 until they are in a batch: on a GPU, where they fit into half of its free memory, they
    are kept there.

    Args:
        pixels: uint8 [N, C, H, W], on the CPU.
        batch_size: images a step, on all processes together.
        seed: of order and noise.
        latent_dim: length of z.
        device: the networks'.
        share: this process's.

    Raises:
        InputError: a batch larger than the images there are, or too small for so many processes.
    """

    def __init__(
        self,
        pixels: Tensor,
        batch_size: int,
        seed: int,
        latent_dim: int,
        device: torch.device,
        share: Share = ALONE,
    ) -> None:
        if batch_size > len(pixels):
            raise InputError(
                f"batch_size must be at most the number of images, {len(pixels)}, got {batch_size}"
            )
        if batch_size % share.world:
            raise InputError(
                f"batch_size must be a multiple of the number of processes, {share.world}, got {batch_size}"
            )
        self._batch_size, self._seed, self._latent_dim = batch_size, seed, latent_dim
        self._device, self._share = device, share
        self._pixels = self._placed(pixels)
        self._transfers = device.type == "cuda" and not self._pixels.is_cuda
        short = len(pixels) % batch_size // share.world * share.world
        self._sizes = [batch_size] * (len(pixels) // batch_size)
        if short:
            self._sizes.append(short)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._sizes)

    @property
    def images(self) -> int:
        """Images that an epoch goes through."""
        return sum(self._sizes)

    def size(self, batch: int) -> int:
        """Images of a batch, on all processes together."""
        return self._sizes[batch]

    def real(self, epoch: int, batch: int) -> Tensor:
        """This process's share of a batch, float32 in [-1, 1]."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(len(self._pixels), self._seed, epoch).to(self._pixels.device)
        start = batch * self._batch_size
        mine = self._mine(self._order[start : start + self._sizes[batch]])
        chosen = self._pixels[mine]
        if self._transfers:
            chosen = chosen.pin_memory().to(self._device, non_blocking=True)
        return normalise(chosen)

    def noise(self, step: int, size: int) -> Tensor:
        """This process's share of the z of a step, [size / world, latent_dim, 1, 1], from N(0, 1)."""
        pinned = self._device.type == "cuda"  # or a copy to the device would wait until it is idle
        z = normal(self._seed, NOISE, step, (size, self._latent_dim, 1, 1), pinned)
        return self._mine(z).to(self._device, non_blocking=True)

    def _mine(self, batch: Tensor) -> Tensor:
        rank, world = self._share
        each = len(batch) // world
        return batch[rank * each : (rank + 1) * each]

    def _placed(self, pixels: Tensor) -> Tensor:
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if pixels.nbytes < free // 2:
                return pixels.to(self._device)
        return pixels


def normal(seed: int, stream: int, index: int, shape: tuple[int, ...], pinned: bool = False) -> Tensor:
    """float32 N(0, 1), a function of its arguments; drawn on the CPU, so that every device gets the same.

    ``pinned``: in memory from which a GPU can copy by itself.
    """
    state = np.random.SeedSequence((seed, stream, index)).generate_state(2, np.uint32)
    random = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
    return torch.randn(shape, generator=random, pin_memory=pinned)
