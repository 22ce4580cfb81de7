"""The loop over epochs and batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcgan.training.config import Config
from dcgan.training.step import Result, optimizers, train_step


class Step(NamedTuple):
    """Where the loop is, and what the step just taken measured."""

    epoch: int
    batch: int
    images: int
    """Real images in this batch; the last of an epoch may be short."""
    result: Result


def train(
    generator: nn.Module, discriminator: nn.Module, batches: Iterable[Tensor], config: Config
) -> Iterator[Step]:
    """Train both networks in place, yielding after each step: who drives the loop draws the progress bar.

    Stopping early is leaving the iteration. Both networks are put into training mode at the start and are
    expected to be in it at each step. Noise is drawn from a random generator of the loop's own, seeded with
    ``config.seed``, so a run repeats whatever else draws random numbers meanwhile; weights are as given.

    Args:
        generator: on the batches' device, of their dtype.
        discriminator: likewise.
        batches: real images, [N, channels, size, size] each; gone through anew for each epoch.
        config: everything else.
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
