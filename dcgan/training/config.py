"""Hyperparameters of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from dcgan.choices import Loss
from dcgan.errors import check_positive_integers


@dataclass(frozen=True)
class Config:
    """Hyperparameters of :func:`dcgan.training.train`; the defaults are those of the reference recipe.

    Args:
        epochs: number of passes over the images.
        latent_dim: length of z; must match the Generator.
        lr: Adam's learning rate for both networks.
        beta1: decay rate of Adam's first moment; that of the second is 0.999.
        real_label: D's target on real images, and the target of G's non-saturating loss. 1 disables one-sided
            label smoothing.
        loss: G's loss, see :func:`dcgan.training.train_step`.
        seed: RNG seed of the noise.

    Raises:
        ValueError: if a value is out of range. The message names the argument, the value and the range.
    """

    epochs: int = 50
    latent_dim: int = 100
    lr: float = 2e-4
    beta1: float = 0.5
    real_label: float = 0.9
    loss: Loss = "non-saturating"
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_integers(ValueError, epochs=self.epochs, latent_dim=self.latent_dim)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number, got {self.lr!r}")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1 must be in [0, 1), got {self.beta1!r}")
        if not 0 < self.real_label <= 1:
            raise ValueError(f"real_label must be in (0, 1], got {self.real_label!r}")
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {get_args(Loss)}, got {self.loss!r}")
