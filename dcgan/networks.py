"""Construction of a pair of networks from model name, sizes and engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from torch import nn

from dcgan import fast, models
from dcgan.errors import InputError, check_choice, check_positive_integers
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
        check_choice("model", self.model, get_args(Model))
        check_positive_integers(**{field.name: getattr(self, field.name) for field in fields(self)[1:]})
        check_choice("image_size", self.image_size, models.IMAGE_SIZES)

    def generator(self, engine: Engine = "auto") -> nn.Module:
        """Return a new Generator with PyTorch's default initialization.

        ``engine`` 'reference' selects :mod:`dcgan.models`, any other :mod:`dcgan.fast`, to be run under
        :func:`dcgan.kernels.ops.use_engine`. An 'mlp' is always a network of :mod:`dcgan.models`.

        Raises:
            InputError: ``engine`` is unknown, or has no kernels for the model.
        """
        kind = models.Generator if self._is_reference(engine) else fast.Generator
        if self.model == "mlp":
            return models.MLPGenerator(self.latent_dim, self.channels, self.image_size)
        return kind(self.latent_dim, self.channels, self.features_g, self.image_size)

    def discriminator(self, engine: Engine = "auto") -> nn.Module:
        """Return a new Discriminator; ``engine`` and errors as in :meth:`generator`."""
        kind = models.Discriminator if self._is_reference(engine) else fast.Discriminator
        if self.model == "mlp":
            return models.MLPDiscriminator(self.channels, self.image_size)
        return kind(self.channels, self.features_d, self.image_size)

    def _is_reference(self, engine: Engine) -> bool:
        check_choice("engine", engine, ops.ENGINES)
        if self.model == "mlp" and engine not in ("auto", "reference"):
            raise InputError(f"engine must be auto or reference for the model mlp, got {engine!r}")
        return self.model == "mlp" or engine == "reference"
