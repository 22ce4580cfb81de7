"""The inputs of each step: real images and noise, as pure functions of the RNG seed and the step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcgan.data import normalise
from dcgan.data.order import permutation
from dcgan.errors import InputError

NOISE, FIXED_NOISE = 1, 2
"""Identifiers of independent random streams."""


class Share(NamedTuple):
    """This process's part of every batch: number ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1


SINGLE_PROCESS = Share()


class Feed:
    """Batches of real images on the networks' device, reshuffled every epoch, and noise.

    An epoch's order is a function of (seed, epoch), and a step's noise of (seed, step). Training therefore
    resumes anywhere without saved state, and on any number of processes, each of which takes its share of the
    same batch. The last batch of an epoch may be short; it is cut to a multiple of the number of processes,
    so that every image has the same weight.

    Images stay uint8 until they are in a batch. They are kept in GPU memory if they fit into half of what is
    free.

    Args:
        pixels: uint8 [N, C, H, W], on the CPU.
        batch_size: images per step, over all processes; at most all images are used, see
            :attr:`batch_size`.
        seed: RNG seed of order and noise.
        latent_dim: length of z.
        device: the networks' device.
        share: this process's share of each batch.

    Raises:
        InputError: if the batch is not a multiple of the number of processes, or there are fewer images than
            processes.
    """

    def __init__(
        self,
        pixels: Tensor,
        batch_size: int,
        seed: int,
        latent_dim: int,
        device: torch.device,
        share: Share = SINGLE_PROCESS,
    ) -> None:
        if len(pixels) < share.world:
            raise InputError(
                f"the dataset must have at least one image per process, {share.world}, got {len(pixels)}"
            )
        if batch_size % share.world:
            raise InputError(
                f"batch_size must be a multiple of the number of processes, {share.world}, got {batch_size}"
            )
        batch_size = min(batch_size, len(pixels) // share.world * share.world)
        self.batch_size, self._seed, self._latent_dim = batch_size, seed, latent_dim
        self._device, self._share = device, share
        self._pixels = self._place(pixels)
        self._transfers = device.type == "cuda" and not self._pixels.is_cuda
        short = len(pixels) % batch_size // share.world * share.world
        self._sizes = [batch_size] * (len(pixels) // batch_size)
        if short:
            self._sizes.append(short)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return len(self._sizes)

    @property
    def images(self) -> int:
        """Number of images per epoch."""
        return sum(self._sizes)

    def size(self, batch: int) -> int:
        """Return the number of images in a batch, over all processes."""
        return self._sizes[batch]

    def real(self, epoch: int, batch: int) -> Tensor:
        """Return this process's share of a batch, float32 in [-1, 1]."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(len(self._pixels), self._seed, epoch).to(self._pixels.device)
        start = batch * self.batch_size
        indices = self._share_of(self._order[start : start + self._sizes[batch]])
        images = self._pixels[indices]
        if self._transfers:
            images = images.pin_memory().to(self._device, non_blocking=True)
        return normalise(images)

    def noise(self, step: int, size: int) -> Tensor:
        """Return this process's share of a step's z, [size / world, latent_dim, 1, 1], from N(0, 1)."""
        pinned = self._device.type == "cuda"  # a copy from pageable memory would wait for the device
        z = normal(self._seed, NOISE, step, (size, self._latent_dim, 1, 1), pinned)
        return self._share_of(z).to(self._device, non_blocking=True)

    def _share_of(self, batch: Tensor) -> Tensor:
        rank, world = self._share
        each = len(batch) // world
        return batch[rank * each : (rank + 1) * each]

    def _place(self, pixels: Tensor) -> Tensor:
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if pixels.nbytes < free // 2:
                return pixels.to(self._device)
        return pixels


def normal(seed: int, stream: int, index: int, shape: tuple[int, ...], pinned: bool = False) -> Tensor:
    """Return float32 N(0, 1) samples that depend only on the arguments.

    They are drawn on the CPU, so that they are the same for every device; ``pinned`` allocates pinned memory.
    """
    state = np.random.SeedSequence((seed, stream, index)).generate_state(2, np.uint32)
    random = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
    return torch.randn(shape, generator=random, pin_memory=pinned)
