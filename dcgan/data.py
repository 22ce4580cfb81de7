"""Real images to train on, as one tensor, and shuffled batches of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

DIGIT_SIZE = 8


def digits(image_size: int = 64) -> Tensor:
    """scikit-learn's handwritten digits, 1,797 real 8×8 images that come with the package.

    Grey levels 0…16 are mapped to [-1, 1], then resized once, bicubically; the overshoot is clamped.

    Returns:
        float32 [1797, 1, image_size, image_size], ink at 1 and paper at -1.

    Raises:
        ValueError: ``image_size`` is no integer of at least 8.

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998 (its test set).
    """
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < DIGIT_SIZE:
        raise ValueError(f"image_size must be an integer of at least {DIGIT_SIZE}, got {image_size!r}")
    grey = torch.from_numpy(load_digits().images).float().unsqueeze(1)
    return F.interpolate(grey / 8 - 1, size=(image_size, image_size), mode="bicubic").clamp_(-1, 1)


class Batches:
    """Shuffled batches of a tensor; each iteration is an epoch, in an order of its own.

    The orders depend on ``seed`` alone. Every image comes once an epoch, and the last batch is short where
    ``batch_size`` does not divide the images.

    Args:
        images: [N, …], on any device; batches are gathered there.
        batch_size: images a batch.
        seed: of the shuffling.

    Raises:
        ValueError: no images, or a ``batch_size`` that is no positive integer.
    """

    def __init__(self, images: Tensor, batch_size: int = 128, seed: int = 0) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        if images.ndim == 0 or len(images) == 0:
            raise ValueError(f"images must be at least one image, got shape {list(images.shape)}")
        self.images, self.batch_size = images, batch_size
        self._random = torch.Generator(images.device).manual_seed(seed)

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self._random, device=self.images.device)
        for chosen in order.split(self.batch_size):
            yield self.images[chosen]
