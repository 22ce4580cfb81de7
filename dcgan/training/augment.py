"""Augmentation of batches on their device: horizontal flips, and DiffAugment in front of the discriminator.

Random numbers come from the default generator of the images' device, as float32 in [0, 1). No shape and no
launch depends on a value, so that both can be captured in a CUDA graph; a replay draws new numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from dcgan.choices import AugmentationName
from dcgan.errors import InputError

POLICIES: tuple[AugmentationName, ...] = get_args(AugmentationName)
"""The augmentations, in the order in which they are applied."""
_DRAWS = {"color": 3, "translation": 2, "cutout": 2}
"""Random numbers per image."""


def flipped(images: Tensor) -> Tensor:
    """Mirror each image horizontally with probability 1/2, independently of the others.

    Args:
        images: [N, C, H, W] of any dtype and memory format, which the result has too.

    Raises:
        InputError: if ``images`` does not have four dimensions.
    """
    _check(images)
    mirror = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirror, images.flip(3), images)


class DiffAugment:
    """Differentiable augmentation: ``augment(images)`` for everything that the discriminator sees.

    With few real images D memorizes them. DiffAugment replaces D(x) by D(T(x)) and D(G(z)) by D(T(G(z))) in
    both networks' losses, where T is random and differentiable, so that G's gradient passes through it.
    Unlike an augmentation of the real images alone, it does not teach G to generate augmented images.

    T is the composition of those of the following that ``policies`` names, in this order whatever theirs is.
    Every u is drawn uniformly from [0, 1), independently for each image.

    color: with ``mean_c`` the mean over the channels of a pixel and ``mean`` that over an image, brightness,
    saturation and contrast are the maps::

        x ← x + (u₁ - 1/2)
        x ← 2·u₂·(x - mean_c(x)) + mean_c(x)
        x ← (u₃ + 1/2)·(x - mean(x)) + mean(x)

    The second preserves ``mean_c``, and is the identity for one channel; the third preserves ``mean``.

    translation: the image is moved down by a number of pixels uniform over -s, …, s with s = ⌊H/8⌋, and to
    the right by another with ⌊W/8⌋. What moves in from outside is 0.

    cutout: a rectangle of ⌈H/2⌉ × ⌈W/2⌉ pixels becomes 0. Its center is uniform over the image, so that at a
    border only part of it lies inside. Along an axis of n pixels, an even length has n + 1 possible centers,
    between pixels; an odd one has n, on pixels.

    Images are [N, C, H, W] of any floating-point dtype and memory format, and may require a gradient, of any
    order. The result has the same dtype and memory format. Arithmetic is in that dtype.

    Args:
        policies: at least one of 'color', 'translation' and 'cutout', each at most once.

    Raises:
        InputError: if ``policies`` is anything else; by a call, if the images are not as described.

    Source: Zhao et al., *Differentiable Augmentation for Data-Efficient GAN Training*, NeurIPS 2020.
    """

    def __init__(self, policies: Sequence[AugmentationName]) -> None:
        given = [] if isinstance(policies, str) or not isinstance(policies, Sequence) else list(policies)
        if not given or any(one not in POLICIES or given.count(one) > 1 for one in given):
            names = ", ".join(POLICIES)
            raise InputError(f"policies must be a list of {names}, each at most once, got {policies!r}")
        self.policies = tuple(name for name in POLICIES if name in given)

    def __repr__(self) -> str:
        return f"DiffAugment({list(self.policies)})"

    def __call__(self, images: Tensor) -> Tensor:
        _check(images)
        if not images.is_floating_point():
            raise InputError(f"images must be of a floating-point dtype, got {images.dtype}")
        counts = [_DRAWS[name] for name in self.policies]
        draws = torch.rand(sum(counts), len(images), device=images.device)
        for name, u in zip(self.policies, draws.split(counts), strict=True):
            images = _APPLY[name](images, u)
        return images


def _check(images: Tensor) -> None:
    if images.dim() != 4:
        raise InputError(f"images must have shape [N, C, H, W], got {list(images.shape)}")


def _color(images: Tensor, u: Tensor) -> Tensor:
    """Apply brightness b, saturation s and contrast k, merged into k·s·x + k·(1-s)·mean_c + (1-k)·mean + b.

    They merge because a pixel's mean_c, and hence the image's mean, is preserved by the saturation.
    """
    u = u.to(images.dtype)[:, :, None, None, None]
    b, s, k = u[0] - 0.5, 2 * u[1], u[2] + 0.5
    mean_c = images.mean(1, keepdim=True)
    mean = mean_c.mean((2, 3), keepdim=True)
    if images.shape[1] == 1:
        return k * images + ((1 - k) * mean + b)
    return k * s * images + (k * (1 - s) * mean_c + ((1 - k) * mean + b))


def _translation(images: Tensor, u: Tensor) -> Tensor:
    furthest = [size // 8 for size in images.shape[2:]]
    # At most 2s, as u·(2s + 1) does not round up to 2s + 1 in float32.
    down, right = ((draw * (2 * s + 1)).long() - s for draw, s in zip(u, furthest, strict=True))
    moved: Tensor = _Shift.apply(images, down, right, *furthest)
    return moved


class _Shift(torch.autograd.Function):
    """Move each image down and to the right by its own number of pixels, with zeros outside.

    The windows of the padded images are a view, of which one per image is copied. Autograd's derivative would
    be a sum over all windows; as the adjoint of a shift is the opposite shift, it is another copy.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, down: Tensor, right: Tensor, max_down: int, max_right: int
    ) -> Tensor:
        ctx.save_for_backward(down, right)
        ctx.furthest = max_down, max_right
        padded = pad(images, (max_right, max_right, max_down, max_down))
        height, width = images.shape[2:]
        windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
        image = torch.arange(len(images), device=images.device)
        return windows[image, max_down - down, max_right - right]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        down, right = ctx.saved_tensors
        return _Shift.apply(gradient, -down, -right, *ctx.furthest), None, None, None, None


def _cutout(images: Tensor, u: Tensor) -> Tensor:
    rows, columns = (_outside(draw, size) for draw, size in zip(u, images.shape[2:], strict=True))
    return torch.where((rows[:, :, None] | columns[:, None, :])[:, None], images, 0)  # keeps the format


def _outside(u: Tensor, size: int) -> Tensor:
    """Return which positions along an axis lie outside each image's rectangle, bool [N, size]."""
    length = (size + 1) // 2
    even = 1 - length % 2
    center = (u * (size + even)).floor() - 0.5 * even
    positions = torch.arange(size, device=u.device)
    return (positions - center[:, None]).abs() >= length / 2


_APPLY = {"color": _color, "translation": _translation, "cutout": _cutout}
