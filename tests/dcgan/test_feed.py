"""The inputs of each step: images and noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcgan.data import normalise
from dcgan.errors import InputError
from dcgan.training.feed import Feed, Share, normal

CPU = torch.device("cpu")


def numbered(n: int) -> torch.Tensor:
    """Return n images of two pixels that encode their index."""
    indices = torch.arange(n)
    return torch.stack([indices // 256, indices % 256], 1).to(torch.uint8).view(n, 1, 1, 2)


@given(
    n=st.integers(1, 600),
    batch=st.integers(1, 64),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10),
    world=st.integers(1, 4),
)
def test_an_epoch_uses_every_image_once(n: int, batch: int, seed: int, epoch: int, world: int) -> None:
    batch = batch * world
    if batch > n:
        return
    pixels = numbered(n)
    feeds = [Feed(pixels, batch, seed, 3, CPU, Share(rank, world)) for rank in range(world)]
    alone = Feed(pixels, batch, seed, 3, CPU)
    seen = []
    for i in range(len(feeds[0])):
        parts = [feed.real(epoch, i) for feed in feeds]
        assert {len(part) for part in parts} == {feeds[0].size(i) // world}
        together = torch.cat(parts)
        assert torch.equal(together, alone.real(epoch, i)[: len(together)])
        seen.append(together)
        noises = torch.cat([feed.noise(i, feed.size(i)) for feed in feeds])
        assert torch.equal(noises, alone.noise(i, feeds[0].size(i)))
    found = torch.cat(seen)
    assert len(found) == feeds[0].images == n - n % batch % world
    keys = {tuple(row.flatten().tolist()) for row in found}
    assert len(keys) == len(found)
    assert keys <= {tuple(row.flatten().tolist()) for row in normalise(pixels)}


def test_order_and_noise_depend_only_on_seed_and_step() -> None:
    pixels = numbered(50)
    a, b, other = (Feed(pixels, 8, seed, 5, CPU) for seed in (1, 1, 2))
    b.real(3, 1)  # earlier calls must not matter
    assert torch.equal(a.real(0, 2), b.real(0, 2))
    assert not torch.equal(a.real(0, 2), a.real(1, 2))
    assert not torch.equal(a.real(0, 2), other.real(0, 2))
    assert torch.equal(a.noise(4, 8), b.noise(4, 8))
    assert not torch.equal(a.noise(4, 8), a.noise(5, 8))
    assert not torch.equal(a.noise(4, 8), other.noise(4, 8))
    state = torch.get_rng_state()
    a.noise(4, 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_normal() -> None:
    z = torch.cat([normal(0, 1, i, (1000,)) for i in range(100)]).double()
    assert abs(float(z.mean())) < 4 / 100_000**0.5
    assert abs(float(z.std()) - 1) < 4 / 200_000**0.5
    assert not torch.equal(normal(0, 1, 0, (8,)), normal(0, 2, 0, (8,)))


def test_values_match_the_reference_transform() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = (pixels.double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(Feed(pixels, 1, 0, 1, CPU).real(0, 0).double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("images", "world", "size"), [(5, 1, 5), (5, 2, 4), (6, 1, 6), (7, 1, 6), (2, 2, 2)], ids=str
)
def test_a_batch_larger_than_the_dataset(images: int, world: int, size: int) -> None:
    """It is cut to the images there are, in equal shares."""
    feed = Feed(numbered(images), 6, 0, 1, CPU, Share(0, world))
    assert feed.batch_size == size
    assert feed.size(0) == size
    assert len(feed.real(0, 0)) == size // world


def test_fewer_images_than_processes() -> None:
    with pytest.raises(InputError, match="at least one image per process, 3, got 2"):
        Feed(numbered(2), 6, 0, 1, CPU, Share(0, 3))
