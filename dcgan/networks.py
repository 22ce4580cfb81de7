"""A pair of networks by name, size and engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from torch import nn

from dcgan import fast, models
from dcgan.errors import InputError
from dcgan.kernels import ops

Model = Literal["dcgan", "mlp"]
Engine = Literal["auto", "reference", "triton", "native"]


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint must agree on with the networks it is loaded into.

    Args:
        model: 'dcgan', or 'mlp', the fully connected GAN it is compared with.
        latent_dim: length of z.
        channels: of an image; 1 or 3 as a rule.
        features_g: the Generator's ``features``; of no meaning for 'mlp'.
        features_d: the Discriminator's.
        image_size: height and width.

    Raises:
        InputError: a value that is not allowed; names it, what was given and what is allowed.
    """

    model: Model = "dcgan"
    latent_dim: int = 100
    channels: int = 1
    features_g: int = 64
    features_d: int = 64
    image_size: int = 64

    def __post_init__(self) -> None:
        if self.model not in get_args(Model):
            raise InputError(f"model must be one of {', '.join(get_args(Model))}, got {self.model!r}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{field.name} must be a positive integer, got {value!r}")
        if self.image_size not in models.IMAGE_SIZES:
            allowed = ", ".join(map(str, models.IMAGE_SIZES))
            raise InputError(f"image_size must be one of {allowed}, got {self.image_size!r}")

    def generator(self, engine: Engine = "auto") -> nn.Module:
        """A new Generator, its weights as the layers' constructors leave them.

        ``engine`` 'reference' is the network of :mod:`dcgan.models`, any other that of :mod:`dcgan.fast`,
        which is to be run under :func:`dcgan.kernels.ops.use_engine`.

        Raises:
            InputError: an engine that the model has no kernels for.
        """
        if self._plain(engine):
            if self.model == "mlp":
                return models.MLPGenerator(self.latent_dim, self.channels, self.image_size)
            return models.Generator(self.latent_dim, self.channels, self.features_g, self.image_size)
        return fast.Generator(self.latent_dim, self.channels, self.features_g, self.image_size)

    def discriminator(self, engine: Engine = "auto") -> nn.Module:
        """Likewise."""
        if self._plain(engine):
            if self.model == "mlp":
                return models.MLPDiscriminator(self.channels, self.image_size)
            return models.Discriminator(self.channels, self.features_d, self.image_size)
        return fast.Discriminator(self.channels, self.features_d, self.image_size)

    def _plain(self, engine: Engine) -> bool:
        if engine not in ops.ENGINES:
            raise InputError(f"engine must be one of {', '.join(ops.ENGINES)}, got {engine!r}")
        if self.model == "mlp" and engine not in ("auto", "reference"):
            raise InputError(f"engine must be auto or reference for the model mlp, got {engine!r}")
        return self.model == "mlp" or engine == "reference"
