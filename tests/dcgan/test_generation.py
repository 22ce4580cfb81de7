"""Tests of noise, interpolation and generated images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torchvision.utils import save_image

from dcgan import fast, generation, models
from dcgan.errors import InputError, RunError
from tests.support.networks import randomise


class Echo(nn.Module):
    """A generator that returns z as the image."""

    def __init__(self, latent_dim: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.eval()

    def forward(self, z: Tensor) -> Tensor:
        assert z.dtype == self.weight.dtype
        return z[:, None, None, :] * self.weight


# --- noise --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    n=st.integers(1, 200),
    batch=st.integers(1, 150),
    world=st.integers(1, 5),
    seed=st.integers(0, 2**70),
    latent_dim=st.integers(1, 20),
    truncation=st.none() | st.floats(0.01, 4),
)
def test_noise_depends_only_on_seed_and_index(
    n: int, batch: int, world: int, seed: int, latent_dim: int, truncation: float | None
) -> None:
    expected = generation.latents(range(n), latent_dim, seed=seed, truncation=truncation)
    assert expected.shape == (n, latent_dim)
    for rank in range(world):
        batches = list(
            generation.images(
                Echo(latent_dim), n, seed=seed, batch=batch, truncation=truncation, shard=(rank, world)
            )
        )
        assert all(len(images) == batch for images in batches[:-1])
        mine = torch.cat(batches).flatten(1) if batches else torch.empty(0, latent_dim)
        assert torch.equal(mine, expected[rank::world])


def test_noise_matches_its_definition() -> None:
    indices = [0, 63, 64, 700, 3]
    found = generation.latents(indices, 7, seed=11)
    for row, index in zip(found, indices, strict=True):
        rng = np.random.default_rng(np.random.SeedSequence(11, spawn_key=(index // 64,)))
        block = rng.standard_normal((64, 7), dtype=np.float32)
        assert np.array_equal(row.numpy(), block[index % 64])


def test_noise_is_normal_and_seeds_are_independent() -> None:
    a, b = (generation.latents(range(4000), 10, seed=seed).flatten().numpy() for seed in (0, 1))
    assert stats.kstest(a, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert len(np.unique(a)) > 0.99 * len(a)


@pytest.mark.parametrize("t", [1e-3, 0.5, 1.0, 2.0])
def test_truncation(t: float) -> None:
    plain = generation.latents(range(2000), 10)
    cut = generation.latents(range(2000), 10, truncation=t)
    assert cut.abs().max() <= t
    inside = plain.abs() <= t
    assert torch.equal(cut[inside], plain[inside])
    assert stats.kstest(cut.flatten().double().numpy(), stats.truncnorm(-t, t).cdf).pvalue > 1e-3


def test_a_large_truncation_has_no_effect() -> None:
    assert torch.equal(generation.latents(range(500), 10, truncation=9), generation.latents(range(500), 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"truncation": 0}, "truncation must be a positive number, got 0"),
        ({"truncation": -1.0}, "truncation must be a positive number, got -1.0"),
        ({"truncation": math.nan}, "truncation must be a positive number, got nan"),
        ({"truncation": math.inf}, "truncation must be a positive number, got inf"),
        ({"truncation": True}, "truncation must be a positive number, got True"),
        ({"shard": (2, 2)}, "rank must be from 0 to 1 for a world of 2, got 2"),
        ({"shard": (0, 0)}, "world must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_of_images(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):  # raised by the call, not at the first batch
        generation.images(Echo(), **{"n": 3} | arguments)


def test_latents_reject_bad_arguments() -> None:
    with pytest.raises(InputError, match="index must be an integer of at least 0, got -3"):
        generation.latents([1, -3], 4)
    with pytest.raises(InputError, match="latent_dim must be an integer of at least 1, got 0"):
        generation.latents([1], 0)


# --- interpolation ------------------------------------------------------------------------------------------

vectors = st.lists(st.floats(-10, 10), min_size=2, max_size=6).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


@settings(max_examples=100)
@given(angle=st.floats(0, 3.1), start=st.floats(-4, 4), t=st.floats(0, 1))
def test_slerp_on_the_unit_circle(angle: float, start: float, t: float) -> None:
    def at(phi: float) -> Tensor:
        return torch.tensor([math.cos(phi), math.sin(phi)], dtype=torch.float64)

    found = generation.slerp(at(start), at(start + angle), t)
    torch.testing.assert_close(found, at(start + t * angle), rtol=0, atol=1e-13)


@settings(max_examples=100)
@given(
    a=vectors, scale=st.floats(0.1, 10), t=st.floats(0, 1), noise=st.sampled_from([0.0, 1e-12, 1e-9, 1e-7])
)
def test_slerp_of_parallel_vectors_is_a_straight_line(
    a: Tensor, scale: float, t: float, noise: float
) -> None:
    if a.norm() < 1e-3:
        a = torch.ones_like(a)
    b = scale * a + noise * torch.arange(len(a), dtype=torch.float64)
    expected = (1 - t) * a + t * b
    torch.testing.assert_close(generation.slerp(a, b, t), expected, rtol=1e-12, atol=1e-12)


def test_slerp_endpoints_lengths_and_vector_t() -> None:
    a, b = torch.randn(2, 50)
    b *= a.norm() / b.norm()
    t = torch.linspace(0, 1, 7)
    path = generation.slerp(a, b, t)
    assert path.shape == (7, 50)
    assert path.dtype == torch.float32
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path.norm(dim=1), a.norm().expand(7))
    steps = torch.arccos((path[1:] * path[:-1]).sum(1).double() / a.double().norm() ** 2)
    torch.testing.assert_close(steps, steps[:1].expand(6), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [-1.0, -2.0], "must not be opposite"),
        ([1.0, 2.0], [-10.0, -20.000001], "must not be opposite"),
        ([0.0, 0.0], [1.0, 2.0], "must be finite and not 0, got vectors of length 0 and"),
        ([1.0, 0.0], [math.nan, 2.0], "must be finite and not 0, got vectors of length 1 and nan"),
        ([1.0, 0.0], [1.0, 0.0, 0.0], r"vectors of the same length, got \[2\] and \[3\]"),
        ([[1.0]], [[1.0]], r"vectors of the same length, got \[1, 1\] and \[1, 1\]"),
    ],
)
def test_slerp_rejects_bad_vectors(a: list[Any], b: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generation.slerp(torch.tensor(a), torch.tensor(b), 0.5)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_interpolation(closed: bool, batch: int) -> None:
    points = generation.waypoints([3, 1, 4], 5)
    assert torch.equal(points[1], generation.latents([0], 5, seed=1)[0])
    batches = list(generation.interpolation(Echo(), points, 6, closed=closed, batch=batch))
    assert all(len(images) == batch for images in batches[:-1])
    z = torch.cat(batches).flatten(1)
    assert len(z) == (18 if closed else 13)
    torch.testing.assert_close(z[[0, 6, 12]], points)
    torch.testing.assert_close(z[9], generation.slerp(points[1], points[2], 0.5))
    if closed:
        torch.testing.assert_close(z[15], generation.slerp(points[2], points[0], 0.5))


def test_interpolation_rejects_bad_arguments() -> None:
    for shape in ([5], [1, 5], [3, 4]):
        with pytest.raises(InputError, match=r"points must be \[K, 5\] with K of at least 2, got "):
            generation.interpolation(Echo(), torch.ones(shape), 3)
    with pytest.raises(InputError, match="steps must be an integer of at least 1, got 0"):
        generation.interpolation(Echo(), torch.ones(3, 5), 0)


# --- images -------------------------------------------------------------------------------------------------


def test_images_match_the_network() -> None:
    reference = models.Generator(6, 3, 4, 32)
    randomise(reference)
    network = fast.convert(reference).eval()
    batches = list(generation.images(network, 10, seed=4, batch=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    expected = reference.double().eval()(generation.latents(range(10), 6, seed=4).double())
    torch.testing.assert_close(torch.cat(batches).double(), expected.detach(), rtol=0, atol=1e-5)


def test_images_have_the_networks_dtype_and_keep_the_grad_mode() -> None:
    batch = next(generation.images(Echo(dtype=torch.float64), 3))
    assert batch.dtype == torch.float64
    assert not batch.requires_grad
    assert torch.is_grad_enabled()


def test_a_generator_in_training_mode_is_rejected() -> None:
    with pytest.raises(InputError, match="must be in eval mode"):
        generation.images(Echo().train(), 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(error: RuntimeError) -> None:
    class Hungry(Echo):
        def forward(self, z: Tensor) -> Tensor:
            raise error

    with pytest.raises(RunError, match="a batch of 7 images does not fit into memory; use a smaller batch"):
        next(generation.images(Hungry(), 20, batch=7))


def test_rounding_matches_torchvision(tmp_path: Path) -> None:
    levels = torch.arange(-2, 259).div(127.5).sub(1)
    around = torch.stack([levels + d for d in (-1 / 255, -1e-6, 0, 1e-6, 1 / 255)])
    batch = around.view(1, 1, 5, -1)
    save_image(batch, tmp_path / "theirs.png", normalize=True, value_range=(-1, 1))
    theirs = np.asarray(Image.open(tmp_path / "theirs.png"))[..., 0]
    assert np.array_equal(generation.to_uint8(batch)[0, 0].numpy(), theirs)


def test_nan_is_an_error() -> None:
    with pytest.raises(RunError, match="output contains NaN"):
        generation.to_uint8(torch.tensor([0.0, math.nan]))
