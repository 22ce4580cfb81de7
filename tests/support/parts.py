"""Random images in place of a dataset's."""

from __future__ import annotations

import torch

from dcgan import evaluation

CPU = torch.device("cpu")


def silent(_: str) -> None:
    """Discard the message."""


def random_part(
    n: int = 40, dataset: str = "digits", size: int = 32, channels: int = 1, seed: int = 0
) -> evaluation.Part:
    """Return random images of two classes that differ in brightness."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=rng)
    pixels = torch.randint(0, 128, (n, channels, size, size), generator=rng) + 127 * labels.view(-1, 1, 1, 1)
    return evaluation.Part(dataset, "part", pixels.to(torch.uint8), labels, 2, torch.arange(n))
