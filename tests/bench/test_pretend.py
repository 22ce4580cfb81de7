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
    assert pretend.launches(generator, (64, 100)) == (1, 5, 4, 0, 512)
    discriminator = fast.Discriminator(channels=channels).eval().to(torch.bfloat16)
    assert pretend.launches(discriminator, (64, channels, 64, 64)) == (1, 5, 3, 0, 512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_is_our_ops_and_per_channel_arithmetic(dtype: torch.dtype) -> None:
    """Forward and backward: one graph, an op a layer, and nothing else larger than a vector of channels.

    A BatchNorm is at most 3 kernels and its counter forward, and 2 backward; G has four, D three.
    """
    generator = fast.Generator().to(dtype)
    phases = pretend.training_launches(generator, (64, 100))
    for phase, norms, kernels in (("forward", 4, 4), ("backward", 4, 2)):
        counts = phases[phase]
        assert (counts.graphs, counts.ops, counts.aten) == (1, 5, 0)
        assert counts.kernels <= kernels * norms
        assert counts.largest <= 512
    discriminator = fast.Discriminator().to(dtype)
    phases = pretend.training_launches(discriminator, (64, 1, 64, 64), input_gradient=True)
    for phase, norms, kernels in (("forward", 3, 4), ("backward", 3, 2)):
        counts = phases[phase]
        assert (counts.graphs, counts.ops, counts.aten) == (1, 5, 0)
        assert counts.kernels <= kernels * norms
        assert counts.largest <= 512


def test_the_count_sees_what_stock_torch_launches() -> None:
    """The reference Generator: five convolutions, and passes of activation size between them."""
    counts = pretend.launches(models.Generator().eval().to(torch.bfloat16), (64, 100))
    assert counts.graphs == 1
    assert counts.ops == 0
    assert counts.aten == 5
    assert counts.kernels >= 5
    assert counts.largest >= 64 * 64 * 32 * 32
    phases = pretend.training_launches(models.Generator().to(torch.bfloat16), (64, 100))
    assert [phases[phase].aten for phase in ("forward", "backward")] == [5, 5]
    assert phases["backward"].largest >= 64 * 64 * 32 * 32
