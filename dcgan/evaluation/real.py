"""Two disjoint sets of real images: one to compare with, one that says how small a distance can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dcgan import data
from dcgan.errors import InputError

MINIMUM = 10
"""Images in a set, at the least: below, neither covariance nor subsets mean anything."""

HALVING_SEED = 0
"""Which half an image is in depends on nothing else: a classifier's training images stay what they are."""


@dataclass(frozen=True)
class Part:
    """Some of a dataset's images, read only when asked for.

    Args:
        dataset: its name.
        what: which part of it, in words.
        pixels: of all its images, uint8 [N, C, H, W].
        labels: likewise, int64 [N], or None where it has none.
        classes: how many different labels there are.
        index: which images, int64 [n].
    """

    dataset: str
    what: str
    pixels: Tensor
    labels: Tensor | None
    classes: int
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def choose(self, n: int, seed: int) -> Part:
        """``n`` of these images, or all where there are not as many; depends on ``seed`` and their number."""
        random = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self), generator=random)[:n].sort().values
        return replace(self, index=self.index[chosen])

    def batches(self, size: int) -> Iterator[Tensor]:
        """Their pixels in order, uint8 [size, C, H, W]; the last batch may be short."""
        for chosen in self.index.split(size):
            yield self.pixels[chosen]


def parts(
    name: str, root: Path, *, image_size: int, channels: int, say: Callable[[str], None]
) -> tuple[Part, Part]:
    """A dataset's train split and test split, or where it has only one, the two halves of it.

    Args:
        name, root, image_size, channels, say: as for :func:`dcgan.data.load`.

    Raises:
        InputError: what :func:`dcgan.data.load` refuses, or fewer than 10 images in either part.
    """

    def part(images: data.Images, what: str, index: Tensor) -> Part:
        return Part(name, what, images.pixels, images.labels, len(images.classes), index)

    train = data.load(name, root, image_size=image_size, channels=channels, split="train", say=say)
    if name in data.TEST_SPLITS:
        test = data.load(name, root, image_size=image_size, channels=channels, split="test", say=say)
        result = (
            part(train, "train split", torch.arange(len(train))),
            part(test, "test split", torch.arange(len(test))),
        )
    else:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(HALVING_SEED))
        first, second = order.tensor_split(2)
        result = part(train, "one half", first), part(train, "the other half", second)
    for found in result:
        if len(found) < MINIMUM:
            raise InputError(
                f"the dataset {name} has {len(found)} images in {found.what}; "
                f"at least {MINIMUM} are needed in each of the two parts that are compared"
            )
    return result
