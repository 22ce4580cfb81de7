"""Whole networks through the Triton kernels, against the reference networks in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan import fast, models
from dcgan.kernels import ops
from tests.support import networks
from tests.support.tolerance import relative


def randomized(network: torch.nn.Module) -> torch.nn.Module:
    network.apply(models.weights_init)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        (1, torch.float32),
        (3, torch.float16),
        *(
            pytest.param(channels, dtype, marks=pytest.mark.slow)
            for channels, dtype in ((3, torch.float32), (1, torch.float16))
        ),
        *(pytest.param(channels, torch.bfloat16, marks=pytest.mark.slow) for channels in (1, 3)),
    ],
    ids=str,
)
def test_generator_and_discriminator(channels: int, dtype: torch.dtype) -> None:
    generator = randomized(fast.Generator(20, channels, features=8, image_size=32)).to(dtype)
    discriminator = randomized(fast.Discriminator(channels, features=8, image_size=32)).to(dtype)
    z = torch.randn(3, 20).to(dtype)
    with torch.no_grad(), ops.use_engine("triton"), ops.recording() as choices:
        image = generator(z)
        probability = discriminator(image)
    assert [choice.engine for choice in choices] == ["triton"] * 8
    with torch.no_grad():
        wide_g = models.Generator(20, channels, features=8, image_size=32).double().eval()
        wide_g.load_state_dict(generator.state_dict())
        wide_d = models.Discriminator(channels, features=8, image_size=32).double().eval()
        wide_d.load_state_dict(discriminator.state_dict())
        wide_image = wide_g(z.double())
        wide_probability = wide_d(image.double())
    assert image.stride() == wide_image.stride()
    # Each of four layers rounds once to the dtype: about √4 = 2 unit roundoffs in total; allow 4.
    bound = 4 * torch.finfo(dtype).eps
    assert (image.double() - wide_image).norm() / wide_image.norm() <= bound
    assert (probability.double() - wide_probability).norm() / wide_probability.norm() <= bound


def test_a_fused_optimizer_step_invalidates_packed_weights() -> None:
    """Packed weights are cached in eval; a fused optimizer's step bumps no version, yet invalidates them."""
    network = randomized(fast.Generator(8, 1, features=4, image_size=32))
    z = torch.randn(2, 8)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05, fused=True)
    with ops.use_engine("triton"):
        before = network(z).detach()
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        after = network(z).detach()
    reference = models.Generator(**network.sizes()).eval()
    reference.load_state_dict(network.state_dict())
    wanted = reference(z).detach()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-6)


def loss(probability: Tensor) -> Tensor:
    return F.binary_cross_entropy(probability.float(), torch.full_like(probability.float(), 0.9))


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        (1, torch.float32),
        pytest.param(3, torch.float32, marks=pytest.mark.slow),
        pytest.param(1, torch.float16, marks=pytest.mark.slow),
        pytest.param(3, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_step(channels: int, dtype: torch.dtype) -> None:
    """The Generator's loss through the Discriminator: all gradients and running statistics."""
    wide = torch.nn.Sequential(
        networks.reference("G", channels, features=8), networks.reference("D", channels, features=8)
    )
    narrow = torch.nn.Sequential(*(networks.drop_in(model).float() for model in wide))
    state = {name: t.clone() for name, t in narrow.state_dict().items()}
    z = networks.sample(wide[0], 2)
    expected = networks.results(wide, z, lambda p: F.binary_cross_entropy(p, torch.full_like(p, 0.9)))

    def found(engine: str) -> dict[str, Tensor]:
        narrow.load_state_dict(state)
        casting = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
        with ops.use_engine(engine), casting:
            return networks.results(narrow, z.float(), loss)

    with ops.recording() as choices:
        actual = found("triton")
    assert [(choice.op.endswith("_backward"), choice.engine) for choice in choices] == (
        [(False, "triton")] * 8 + [(True, "triton")] * 8
    )
    reference = found("reference")
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        if not want.dtype.is_floating_point:
            assert torch.equal(actual[name], want), name
            continue
        # The rounding errors of two networks and their backwards, amplified by BatchNorm, are of equal size
        # in both engines: about 1e-6 in float32 and 1e-1 in bfloat16.
        error, reference_error = (relative(t[name], want) for t in (actual, reference))
        assert error <= 2 * reference_error + 4 * torch.finfo(dtype).eps, (
            f"{name}: {error:.2e}, reference {reference_error:.2e}"
        )
