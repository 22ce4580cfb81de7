"""Code that Inductor generates for an H100 that is not there."""

from __future__ import annotations

import pytest
import torch

from bench import pretend
from dcgan import fast, models


@pytest.mark.parametrize("channels", [1, 3])
def test_fast_networks_are_five_kernels_and_the_folding(channels: int) -> None:
    """One graph; our five ops; one [C]-sized kernel a folded BatchNorm; no copy, no library call."""
    generator = fast.Generator(channels=channels).eval().to(torch.bfloat16)
    assert pretend.launches(generator, (64, 100)) == (1, 5, 4, 0)
    discriminator = fast.Discriminator(channels=channels).eval().to(torch.bfloat16)
    assert pretend.launches(discriminator, (64, channels, 64, 64)) == (1, 5, 3, 0)


def test_the_count_sees_what_stock_torch_launches() -> None:
    """The reference Generator: five convolutions, and passes of activation size between them."""
    counts = pretend.launches(models.Generator().eval().to(torch.bfloat16), (64, 100))
    assert counts.graphs == 1
    assert counts.ops == 0
    assert counts.aten == 5
    assert counts.kernels >= 5
