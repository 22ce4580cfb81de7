"""Tests of the code that Inductor generates for a simulated H100."""

from __future__ import annotations

import pytest
import torch

from dcgan import fast, models, training_layers
from tests.support import generated_code


@pytest.mark.parametrize("channels", [1, 3])
def test_inference_launches_only_our_operator(channels: int) -> None:
    """One graph has one operator, which folds BatchNorms and packs weights itself, and nothing else."""
    generator = fast.Generator(channels=channels).eval().to(torch.bfloat16)
    assert generated_code.launches(generator, (64, 100)) == (1, 1, 0, 0, 0)
    discriminator = fast.Discriminator(channels=channels).eval().to(torch.bfloat16)
    assert generated_code.launches(discriminator, (64, channels, 64, 64)) == (1, 1, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_launches_only_our_operators(dtype: torch.dtype) -> None:
    """Forward and backward are one graph: the network, its running statistics, and its backward."""
    for network, shape in (
        (fast.Generator().to(dtype), (64, 100)),
        (fast.Discriminator().to(dtype), (64, 1, 64, 64)),
    ):
        phases = generated_code.training_launches(network, shape, input_gradient=len(shape) == 4)
        assert phases == {"forward": (1, 2, 0, 0, 0), "backward": (1, 1, 0, 0, 0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_layer_by_layer_launches_only_our_ops_and_per_channel_kernels(dtype: torch.dtype) -> None:
    """Forward and backward are one graph with one op per layer; other kernels process at most [C] elements.

    Each BatchNorm takes at most 3 kernels plus its counter forward, and 2 backward; G has four, D three.
    """
    generator, discriminator = fast.Generator().to(dtype), fast.Discriminator().to(dtype)
    with training_layers.layer_by_layer():
        of_g = generated_code.training_launches(generator, (64, 100))
        of_d = generated_code.training_launches(discriminator, (64, 1, 64, 64), input_gradient=True)
    for phases, norms in ((of_g, 4), (of_d, 3)):
        for phase, kernels in (("forward", 4), ("backward", 2)):
            counts = phases[phase]
            assert (counts.graphs, counts.ops, counts.aten) == (1, 5, 0)
            assert counts.kernels <= kernels * norms
            assert counts.largest <= 512


def test_count_covers_the_launches_of_stock_pytorch() -> None:
    """The reference Generator launches five convolutions and activation-sized kernels between them."""
    counts = generated_code.launches(models.Generator().eval().to(torch.bfloat16), (64, 100))
    assert counts.graphs == 1
    assert counts.ops == 0
    assert counts.aten == 5
    assert counts.kernels >= 5
    assert counts.largest >= 64 * 64 * 32 * 32
    phases = generated_code.training_launches(models.Generator().to(torch.bfloat16), (64, 100))
    assert [phases[phase].aten for phase in ("forward", "backward")] == [5, 5]
    assert phases["backward"].largest >= 64 * 64 * 32 * 32
