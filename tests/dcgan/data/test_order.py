"""The order of an epoch: ``permutation`` and ``Batches``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcgan.data import Batches
from dcgan.data.order import permutation
from dcgan.errors import InputError


@given(n=st.integers(0, 300), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
def test_an_epoch_contains_every_image_once(n: int, seed: int, epoch: int) -> None:
    state = torch.get_rng_state()
    order = permutation(n, seed, epoch)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(n, seed, epoch))
    assert torch.equal(torch.get_rng_state(), state)


def test_epochs_and_seeds_are_independent() -> None:
    n = 1000
    pairs = [(seed, epoch) for seed in (0, 1, 2, 3, 2**32, 2**32 + 1) for epoch in (0, 1, 2, 2**32)]
    orders = torch.stack([permutation(n, *pair) for pair in pairs])
    for i in range(len(pairs)):
        # Independent orders agree in one place on average (Poisson); 12 or more has probability 1e-9.
        agree = (orders == orders[i]).sum(1)
        agree[i] = 0
        assert agree.max() < 12, pairs[i]


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (4, -1, 0), (4, 0, -1), (4.0, 0, 0), (4, True, 0)])
def test_permutation_rejects_bad_arguments(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="must be an integer of at least 0, got"):
        permutation(*arguments)


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
