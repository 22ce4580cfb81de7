"""A race of training steps: two networks, batches of images and noise, a dtype and a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bench.cases import INPUTS, Case
from bench.flops import Work, count
from dcgan.models import Discriminator, Generator, weights_init

# A gradient's error has no bound that follows from the dtype alone: where rounding takes a value to the other
# side of a LeakyReLU's kink, a factor of the gradient changes by 80%. So the bound is this times the error of
# the seed's own loop, run eagerly in the same dtype on the same batches (float32, batch 64: some 1e-3). Sums
# rounded k times as coarsely put k times as many values on the wrong side, and their error is √k times as
# large. In small batches it is chance whose value lies near a kink, and a floor counts: without one on its
# other side every way errs by 1e-6 to 3e-6, with one by 1e-3 to 9e-3 (batches of 4 and 16). Losses are
# smooth.
TIMES_EAGER = 4.0
ONE_KINK = 2**-6
FLOOR = 1e-4
"""For losses, and for gradients of networks so small that no value lies near a kink."""


class Batch(NamedTuple):
    """What a step takes."""

    real: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Training(Case):
    """One race of training steps; ``command`` is ``train``. Weights are DCGAN's initial ones."""

    worker: ClassVar[str] = "bench.train_worker"

    @property
    def tolerance(self) -> float:
        return FLOOR

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that autocast rounds to, if it is to: the networks themselves are float32."""
        return None if self.torch_dtype == torch.float32 else self.torch_dtype

    def networks(self) -> tuple[Generator, Discriminator]:
        """The reference networks in training mode and float32, on the CPU."""
        sizes = {name: size for name, size in self.sizes.items() if name != "latent_dim"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            generator, discriminator = Generator(**self.sizes), Discriminator(**sizes)
            generator.apply(weights_init)
            discriminator.apply(weights_init)
        return generator, discriminator

    def batches(self) -> list[Batch]:
        """What the steps take in turn: images in (-1, 1) and noise; float32, on the CPU."""
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
        """What a step as the seed writes it costs, an image: each product reads and writes its maps once.

        G runs forward once and back once; D three times each: on the real images, on the generated ones, and
        on those again in G's phase. Back are two products a layer, but no gradient goes to noise, to real
        images and to detached ones. That D's weights take one in G's phase is the seed's doing.
        """
        generator, discriminator = self.networks()
        noise, image = _noise(generator), _image(discriminator)
        g, d = count(generator, noise), count(discriminator, image)
        first_g, first_d = count(generator.main[:1], noise), count(discriminator.main[:1], image)

        def step(of_g: int, of_d: int, of_first_g: int, of_first_d: int) -> int:
            return 3 * of_g - of_first_g + 9 * of_d - 2 * of_first_d

        return Work(
            step(g.flops, d.flops, first_g.flops, first_d.flops),
            step(g.activations, d.activations, first_g.activations, first_d.activations),
            step(g.weights, d.weights, first_g.weights, first_d.weights),
        )


def _noise(generator: Generator) -> tuple[int, int, int]:
    return generator.latent_dim, 1, 1


def _image(discriminator: Discriminator) -> tuple[int, int, int]:
    return discriminator.channels, discriminator.image_size, discriminator.image_size
