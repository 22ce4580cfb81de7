"""Construction of a pair of networks from model name, sizes and engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import nn

from dcgan import fast, models
from dcgan.choices import IMAGE_SIZES, Engine, Model
from dcgan.errors import InputError, check_choice, check_positive_integers
from dcgan.foreign import Foreign
from dcgan.kernels import ops


@dataclass(frozen=True)
class Architecture:
    """The model and sizes that a checkpoint and the networks it is loaded into must agree on.

    Args:
        model: 'dcgan', or 'mlp', the fully connected GAN it is compared with.
        latent_dim: length of z.
        channels: channels of an image, usually 1 or 3.
        features_g: the Generator's ``features``; unused for 'mlp'.
        features_d: the Discriminator's ``features``; unused for 'mlp'.
        image_size: height and width of an image, one of ``dcgan.choices.IMAGE_SIZES``, or any if a network is
            foreign.
        foreign_g, foreign_d: the classes of networks that the user has written; None for those of ``model``.

    Raises:
        InputError: a value is not allowed; the message names it and what is allowed.
    """

    model: Model = "dcgan"
    latent_dim: int = 100
    channels: int = 1
    features_g: int = 64
    features_d: int = 64
    image_size: int = 64
    foreign_g: Foreign | None = None
    foreign_d: Foreign | None = None

    def __post_init__(self) -> None:
        check_choice("model", self.model, get_args(Model))
        sizes = ("latent_dim", "channels", "features_g", "features_d", "image_size")
        check_positive_integers(**{name: getattr(self, name) for name in sizes})
        if self.foreign_g is None and self.foreign_d is None:
            check_choice("image_size", self.image_size, IMAGE_SIZES)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Architecture:
        """Return what :meth:`to_dict` was called on. Raises TypeError or ValueError for other values."""
        foreign = {name: Foreign(**values[name]) for name in ("foreign_g", "foreign_d") if name in values}
        return Architecture(**{**values, **foreign})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, without those that are None: earlier versions have no others."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, [channels, height, width]."""
        return self.channels, self.image_size, self.image_size

    def generator(self, engine: Engine = "auto") -> nn.Module:
        """Return a new Generator with PyTorch's default initialization.

        ``engine`` 'reference' selects :mod:`dcgan.models`, any other :mod:`dcgan.fast`, to be run under
        :func:`dcgan.kernels.ops.use_engine`. An 'mlp' is always a network of :mod:`dcgan.models`. A foreign
        network initializes itself, and is fused by :func:`dcgan.fast.fuse` unless ``engine`` is 'reference'.

        Raises:
            InputError: ``engine`` is unknown, or has no kernels for the model; or as
                :meth:`dcgan.foreign.Foreign.generator`.
        """
        if self.foreign_g is not None:
            network = self.foreign_g.generator("--netG-module", self.latent_dim, self.image_shape)
            return _fused(network, engine)
        kind = models.Generator if self._is_reference(engine) else fast.Generator
        if self.model == "mlp":
            return models.MLPGenerator(self.latent_dim, self.channels, self.image_size)
        return kind(self.latent_dim, self.channels, self.features_g, self.image_size)

    def discriminator(self, engine: Engine = "auto") -> nn.Module:
        """Return a new Discriminator; ``engine`` and errors as in :meth:`generator`."""
        if self.foreign_d is not None:
            return _fused(self.foreign_d.discriminator("--netD-module", self.image_shape), engine)
        kind = models.Discriminator if self._is_reference(engine) else fast.Discriminator
        if self.model == "mlp":
            return models.MLPDiscriminator(self.channels, self.image_size)
        return kind(self.channels, self.features_d, self.image_size)

    def _is_reference(self, engine: Engine) -> bool:
        check_choice("engine", engine, ops.ENGINES)
        if self.model == "mlp" and engine not in ("auto", "reference"):
            raise InputError(f"engine must be auto or reference for the model mlp, got {engine!r}")
        if self.model == "dcgan":
            check_choice("image_size", self.image_size, IMAGE_SIZES)
        return self.model == "mlp" or engine == "reference"


def _fused(network: nn.Module, engine: Engine) -> nn.Module:
    check_choice("engine", engine, ops.ENGINES)
    return network if engine == "reference" else fast.fuse(network, inplace=True)
