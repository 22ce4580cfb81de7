"""Benchmark case of a training step: both networks, batches of images and noise, a dtype and a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bench.cases import INPUTS, Case
from bench.flops import Work, count
from dcgan.models import Discriminator, Generator, weights_init

# No bound on a gradient's error follows from the dtype alone: where rounding moves a value across the kink of
# a LeakyReLU, a factor of the gradient changes by 80%. The tolerance is therefore TIMES_EAGER times the error
# of the reference loop run eagerly in the same dtype on the same batches (float32, batch 64: ~1e-3). Sums
# rounded k times as coarsely move k times as many values across a kink, and their error is √k times as large.
# In small batches it is a matter of chance whether any value lies near a kink, so the tolerance is at least
# KINK_TOLERANCE: every implementation errs by 1e-6 to 3e-6 if no value crosses a kink and by 1e-3 to 9e-3 if
# one does (batches of 4 and 16). Losses are smooth.
TIMES_EAGER = 4.0
KINK_TOLERANCE = 2**-6
MIN_TOLERANCE = 1e-4
"""For losses, and for gradients of networks so small that no value lies near a kink."""


class Batch(NamedTuple):
    """The inputs of one step."""

    real: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Training(Case):
    """A case of training steps; ``command`` is ``train``. Weights are DCGAN's initial weights."""

    worker: ClassVar[str] = "bench.train_worker"

    @property
    def tolerance(self) -> float:
        return MIN_TOLERANCE

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast dtype, or None to train in float32. The parameters are float32 in both cases."""
        return None if self.torch_dtype == torch.float32 else self.torch_dtype

    def networks(self) -> tuple[Generator, Discriminator]:
        """Return the reference networks in training mode and float32, on the CPU."""
        sizes = {name: size for name, size in self.sizes.items() if name != "latent_dim"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            generator, discriminator = Generator(**self.sizes), Discriminator(**sizes)
            generator.apply(weights_init)
            discriminator.apply(weights_init)
        return generator, discriminator

    def batches(self) -> list[Batch]:
        """Return the batches that the steps cycle through: images in (-1, 1) and noise (float32, CPU)."""
        generator, discriminator = self.networks()
        random = torch.Generator().manual_seed(self.seed + 1)
        return [
            Batch(
                torch.rand(self.batch, *_image(discriminator), generator=random) * 2 - 1,
                torch.randn(self.batch, *_noise(generator), generator=random),
            )
            for _ in range(INPUTS)
        ]

    def work(self) -> Work:
        """Return the cost per image of a step of the reference recipe; each product moves its maps once.

        G runs one forward and one backward; D runs three of each: on the real images, on the generated images
        and on the generated images again in G's phase. A backward has two products per layer (dgrad and
        wgrad), but the noise, the real images and the detached generated images need no gradient. D's wgrad
        in G's phase is counted because the reference recipe computes it.
        """
        generator, discriminator = self.networks()
        noise, image = _noise(generator), _image(discriminator)
        g, d = count(generator, noise), count(discriminator, image)
        first_g, first_d = count(generator.main[:1], noise), count(discriminator.main[:1], image)

        def step(g: int, d: int, first_g: int, first_d: int) -> int:
            return 3 * g - first_g + 9 * d - 2 * first_d

        return Work(
            step(g.flops, d.flops, first_g.flops, first_d.flops),
            step(g.activations, d.activations, first_g.activations, first_d.activations),
            step(g.weights, d.weights, first_g.weights, first_d.weights),
        )


def _noise(generator: Generator) -> tuple[int, int, int]:
    return generator.latent_dim, 1, 1


def _image(discriminator: Discriminator) -> tuple[int, int, int]:
    return discriminator.channels, discriminator.image_size, discriminator.image_size
