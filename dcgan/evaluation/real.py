"""Two disjoint sets of real images: one to compare with, and one that gives the floor of the distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dcgan import data
from dcgan.choices import MIN_IMAGES
from dcgan.errors import InputError

SPLIT_SEED = 0
"""RNG seed of the split into halves; it is fixed so that a classifier's training images never change."""


@dataclass(frozen=True)
class Part:
    """A subset of a dataset's images, gathered only on demand.

    Args:
        dataset: name of the dataset.
        what: description of the subset.
        pixels: pixels of all images of the dataset, uint8 [N, C, H, W].
        labels: labels of all images of the dataset, int64 [N], or None if it has none.
        classes: number of different labels.
        index: indices of the subset's images, int64 [n].
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
        """Return ``n`` of these images, or all if there are fewer; depends on ``seed`` and their number."""
        rng = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self), generator=rng)[:n].sort().values
        return replace(self, index=self.index[chosen])

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the pixels in order, uint8 [size, C, H, W]; the last batch may be smaller."""
        for chosen in self.index.split(size):
            yield self.pixels[chosen]


def parts(
    name: str,
    root: Path,
    *,
    image_size: int,
    channels: int,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    workers: int = 4,
    say: Callable[[str], None],
) -> tuple[Part, Part]:
    """Return a dataset's train and test splits, or two halves of it if it has no test split.

    Args:
        name, root, image_size, channels, classes, workers, say: as for :func:`dcgan.data.load`.
        limit: maximum number of images of the train split, as for :func:`dcgan.data.load`, or of both halves
            together. A test split is not limited.

    Raises:
        InputError: as for :func:`dcgan.data.load`, or either part has fewer than 10 images.
    """

    def part(images: data.Images, what: str, index: Tensor | None = None) -> Part:
        every = torch.arange(len(images)) if index is None else index
        return Part(name, what, images.pixels, images.labels, len(images.classes), every)

    def load(split: data.Split, limit: int | None) -> data.Images:
        return data.load(
            name,
            root,
            image_size=image_size,
            channels=channels,
            classes=classes,
            limit=limit,
            workers=workers,
            split=split,
            say=say,
        )

    train = load("train", limit)
    if name in data.TEST_SPLITS:
        result = part(train, "train split"), part(load("test", None), "test split")
    else:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
        first, second = order.tensor_split(2)
        result = part(train, "one half", first), part(train, "the other half", second)
    for one in result:
        if len(one) < MIN_IMAGES:
            raise InputError(
                f"the dataset {name} has {len(one)} images in {one.what}; "
                f"at least {MIN_IMAGES} are needed in each of the two parts that are compared"
            )
    return result
