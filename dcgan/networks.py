"""Construction of a pair of networks from model name, sizes and engine."""

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
    """The model and sizes that a checkpoint and the networks it is loaded into must agree on.

    Args:
        model: 'dcgan', or 'mlp', the fully connected GAN it is compared with.
        latent_dim: length of z.
        channels: channels of an image, usually 1 or 3.
        features_g: the Generator's ``features``; unused for 'mlp'.
        features_d: the Discriminator's ``features``; unused for 'mlp'.
        image_size: height and width of an image, one of ``models.IMAGE_SIZES``.

    Raises:
        InputError: a value is not allowed; the message names it and what is allowed.
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
        """Return a new Generator with PyTorch's default initialization.

        ``engine`` 'reference' selects :mod:`dcgan.models`, any other :mod:`dcgan.fast`, to be run under
        :func:`dcgan.kernels.ops.use_engine`. An 'mlp' is always a network of :mod:`dcgan.models`.

        Raises:
            InputError: ``engine`` is unknown, or has no kernels for the model.
        """
        if self._is_reference(engine):
            if self.model == "mlp":
                return models.MLPGenerator(self.latent_dim, self.channels, self.image_size)
            return models.Generator(self.latent_dim, self.channels, self.features_g, self.image_size)
        return fast.Generator(self.latent_dim, self.channels, self.features_g, self.image_size)

    def discriminator(self, engine: Engine = "auto") -> nn.Module:
        """Return a new Discriminator; ``engine`` and errors as in :meth:`generator`."""
        if self._is_reference(engine):
            if self.model == "mlp":
                return models.MLPDiscriminator(self.channels, self.image_size)
            return models.Discriminator(self.channels, self.features_d, self.image_size)
        return fast.Discriminator(self.channels, self.features_d, self.image_size)

    def _is_reference(self, engine: Engine) -> bool:
        if engine not in ops.ENGINES:
            raise InputError(f"engine must be one of {', '.join(ops.ENGINES)}, got {engine!r}")
        if self.model == "mlp" and engine not in ("auto", "reference"):
            raise InputError(f"engine must be auto or reference for the model mlp, got {engine!r}")
        return self.model == "mlp" or engine == "reference"
