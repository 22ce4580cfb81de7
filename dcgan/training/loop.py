"""The training loop over epochs and batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcgan.training.config import Config
from dcgan.training.reference_step import Result, optimizers, train_step


class Step(NamedTuple):
    """The position of the loop and the result of the step just taken."""

    epoch: int
    batch: int
    images: int
    """Number of real images in this batch; the last batch of an epoch may be short."""
    result: Result


def train(
    generator: nn.Module, discriminator: nn.Module, batches: Iterable[Tensor], config: Config
) -> Iterator[Step]:
    """Train both networks in place, and yield after each step so that the caller can report progress.

    To stop early, stop iterating. Both networks are put into training mode at the start and are expected to
    be in it at each step. Noise is drawn from a private random generator seeded with ``config.seed``, so a
    run is reproducible whatever else draws random numbers meanwhile. Initial weights are the caller's.

    Args:
        generator: the generator, with the batches' device and dtype.
        discriminator: the discriminator, with the same device and dtype.
        batches: real images, [N, channels, size, size] each; iterated once per epoch.
        config: the hyperparameters.
    """
    optimizer_g, optimizer_d = optimizers(generator, discriminator, config)
    generator.train()
    discriminator.train()
    random: torch.Generator | None = None
    for epoch in range(config.epochs):
        for batch, real in enumerate(batches):
            if random is None:
                random = torch.Generator(real.device).manual_seed(config.seed)
            noise = torch.randn(
                len(real), config.latent_dim, 1, 1, generator=random, device=real.device, dtype=real.dtype
            )
            result = train_step(
                generator,
                discriminator,
                optimizer_g,
                optimizer_d,
                real,
                noise,
                real_label=config.real_label,
                loss=config.loss,
            )
            yield Step(epoch, batch, len(real), result)
