"""Tests of ``dcgan.data.digits`` and ``Batches``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from dcgan.data import Batches, digits


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_digits_shape_and_range(size: int) -> None:
    images = digits(size)
    assert images.shape == (1797, 1, size, size)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1


def test_digits_match_scikit_learn() -> None:
    grey = torch.from_numpy(load_digits().images).float()
    assert torch.equal((digits(8)[:, 0] + 1) * 8, grey)
    # Upscaled, each block of pixels averages to its source pixel within one of the 16 grey levels.
    blocks = torch.nn.functional.avg_pool2d(digits(32), 4)[:, 0]
    assert ((blocks + 1) * 8 - grey).abs().mean() < 1


def test_digits_are_deterministic() -> None:
    assert torch.equal(digits(32), digits(32))


@pytest.mark.parametrize("size", [7, 0, -32, 32.0, "32", True, None])
def test_digits_reject_other_sizes(size: object) -> None:
    with pytest.raises(ValueError, match=f"image_size must be an integer of at least 8, got {size!r}"):
        digits(size)


@given(n=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 2**32))
def test_each_epoch_contains_every_image_once(n: int, batch_size: int, seed: int) -> None:
    batches = Batches(torch.arange(n), batch_size, seed)
    for _ in range(2):
        epoch = list(batches)
        assert len(epoch) == len(batches)
        assert [len(b) for b in epoch[:-1]] == [batch_size] * (len(batches) - 1)
        assert 1 <= len(epoch[-1]) <= batch_size
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(n))


def test_order_depends_only_on_the_seed() -> None:
    images = torch.arange(1000)
    first, second = Batches(images, 100, seed=1), Batches(images, 30, seed=1)
    epochs = []
    for _ in range(2):
        torch.manual_seed(0)  # the global RNG is neither used nor changed
        state = torch.get_rng_state()
        epochs.append(torch.cat(list(first)))
        assert torch.equal(epochs[-1], torch.cat(list(second)))
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0], torch.cat(list(Batches(images, 100, seed=2))))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, None])
def test_batch_size_must_be_a_positive_integer(batch_size: object) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be a positive integer, got {batch_size!r}"):
        Batches(torch.zeros(4), batch_size)


@pytest.mark.parametrize("images", [torch.zeros(0, 1, 8, 8), torch.tensor(1.0)])
def test_no_images_is_an_error(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="images must hold at least one image, got shape"):
        Batches(images)
