"""The reference step matches the original recipe, and the loop is reproducible for an RNG seed."""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn, optim

from dcgan.data import Batches
from dcgan.models import Discriminator, Generator, MLPDiscriminator, MLPGenerator, weights_init
from dcgan.training import Config, Result, Step, optimizers, train, train_step
from tests.support.reference_loop import reference_step
from tests.support.steps import LOSSES


def dcgan_pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    pair = Generator(latent_dim=6, features=2, image_size=32), Discriminator(features=2, image_size=32)
    return tuple(model.apply(weights_init).to(dtype) for model in pair)


def mlp_pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    pair = MLPGenerator(latent_dim=6, image_size=32), MLPDiscriminator(image_size=32)
    return tuple(model.to(dtype) for model in pair)


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, buffers and gradients by name."""
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **gradients}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pair", [dcgan_pair, mlp_pair])
def test_the_step_matches_the_original_recipe(pair, loss: str) -> None:
    networks = pair(torch.float64)
    reference = copy.deepcopy(networks)
    adams = optimizers(*networks, Config())
    reference_adams = [optim.Adam(model.parameters(), lr=0.0002, betas=(0.5, 0.999)) for model in reference]
    for size in (5, 5, 3):
        real = torch.rand(size, 1, 32, 32, dtype=torch.float64) * 2 - 1
        noise = torch.randn(size, 6, 1, 1, dtype=torch.float64)
        result = train_step(*networks, *adams, real, noise, loss=loss)
        expected = reference_step(*reference, *reference_adams, real, noise, minimax=loss == "minimax")
        torch.testing.assert_close(tuple(result), expected, rtol=1e-12, atol=0.0)
        for ours, theirs in zip(networks, reference, strict=True):
            want = everything(theirs)
            got = everything(ours)
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=name)


def test_results_have_no_gradient_and_d_means_precede_ds_update() -> None:
    generator, discriminator = dcgan_pair()
    before = copy.deepcopy((generator, discriminator))
    real, noise = torch.rand(4, 1, 32, 32), torch.randn(4, 6, 1, 1)
    result = train_step(
        generator, discriminator, *optimizers(generator, discriminator, Config()), real, noise
    )
    for value in result:
        assert value.shape == ()
        assert not value.requires_grad
    old_generator, old_discriminator = before
    d_x, d_g_z = old_discriminator(real), old_discriminator(old_generator(noise))
    torch.testing.assert_close(result.d_x, d_x.detach().mean())
    torch.testing.assert_close(result.d_g_z, d_g_z.detach().mean())
    want = -(0.9 * d_x.log() + 0.1 * (1 - d_x).log()).mean() - (1 - d_g_z).log().mean()
    torch.testing.assert_close(result.loss_d, want.detach())


@pytest.mark.parametrize("real_label", [0.9, 1.0])
def test_losses_match_their_formulas(real_label: float) -> None:
    real, noise = torch.rand(4, 1, 32, 32), torch.randn(4, 6, 1, 1)
    got = {}
    for loss in LOSSES:
        generator, discriminator = dcgan_pair()
        adams = optimizers(generator, discriminator, Config())
        fake = copy.deepcopy(generator)(noise)
        got[loss] = train_step(
            generator, discriminator, *adams, real, noise, real_label=real_label, loss=loss
        ).loss_g
        # G's loss uses the D just updated; in training mode its BatchNorm does not depend on earlier batches.
        p = discriminator(fake.detach()).detach()
    torch.testing.assert_close(
        got["non-saturating"], -(real_label * p.log() + (1 - real_label) * (1 - p).log()).mean()
    )
    torch.testing.assert_close(got["minimax"], (1 - p).log().mean())


def test_an_unknown_loss_is_rejected_before_any_update() -> None:
    networks = dcgan_pair()
    before = copy.deepcopy([model.state_dict() for model in networks])
    adams = optimizers(*networks, Config())
    with pytest.raises(ValueError, match="loss must be 'non-saturating' or 'minimax', got 'wasserstein'"):
        train_step(*networks, *adams, torch.zeros(2, 1, 32, 32), torch.zeros(2, 6), loss="wasserstein")
    for model, state in zip(networks, before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", [dcgan_pair, mlp_pair])
def test_every_parameter_is_updated_in_any_dtype(pair, dtype: torch.dtype) -> None:
    networks = pair(dtype)
    before = [[p.clone() for p in model.parameters()] for model in networks]
    config = Config(epochs=1, latent_dim=6, lr=0.05)
    images = torch.rand(4, 1, 32, 32).to(dtype)
    (step,) = train(*networks, Batches(images, 4), config)
    assert all(value.isfinite() and value.dtype == dtype for value in step.result)
    for model, parameters in zip(networks, before, strict=True):
        for p, old in zip(model.parameters(), parameters, strict=True):
            assert not torch.equal(p, old)


def run(seed: int = 0, batches_seed: int = 0) -> tuple[list[Step], dict[str, Tensor]]:
    networks = dcgan_pair()
    images = torch.rand(10, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    steps = list(
        train(*networks, Batches(images, 4, batches_seed), Config(epochs=2, latent_dim=6, seed=seed))
    )
    return steps, networks[0].state_dict()


def test_the_loop_includes_the_short_last_batch() -> None:
    steps, _ = run()
    assert [(s.epoch, s.batch, s.images) for s in steps] == [
        (epoch, batch, images) for epoch in range(2) for batch, images in enumerate((4, 4, 2))
    ]
    assert all(isinstance(s.result, Result) for s in steps)


def test_a_last_batch_of_one_image() -> None:
    images = torch.rand(5, 1, 32, 32)
    steps = list(train(*dcgan_pair(), Batches(images, 4), Config(epochs=1, latent_dim=6)))
    assert [s.images for s in steps] == [4, 1]
    assert all(value.isfinite() for value in steps[-1].result)


def test_the_loop_is_reproducible_independently_of_the_global_rng() -> None:
    first_steps, first = run()
    torch.manual_seed(99)
    second_steps, second = run()
    for a, b in zip(first_steps, second_steps, strict=True):
        assert a == b
    for name, value in first.items():
        assert torch.equal(value, second[name])


@pytest.mark.parametrize("seeds", [{"seed": 1}, {"batches_seed": 1}])
def test_different_seeds_give_different_runs(seeds: dict[str, int]) -> None:
    assert run()[0][-1].result.loss_d != run(**seeds)[0][-1].result.loss_d


def test_the_loop_runs_the_step_with_private_noise() -> None:
    networks = dcgan_pair()
    by_hand = copy.deepcopy(networks)
    images = torch.rand(6, 1, 32, 32)
    config = Config(epochs=2, latent_dim=6, seed=3, real_label=1.0, loss="minimax", lr=1e-3, beta1=0.9)
    steps = list(train(*networks, Batches(images, 4, seed=5), config))

    adams = [optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999)) for model in by_hand]
    batches, random = Batches(images, 4, seed=5), torch.Generator().manual_seed(3)
    for step, real in zip(steps, itertools.chain(batches, batches), strict=True):
        noise = torch.randn(len(real), 6, 1, 1, generator=random)
        assert step.result == train_step(*by_hand, *adams, real, noise, real_label=1.0, loss="minimax")
    for ours, theirs in zip(networks, by_hand, strict=True):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)


def test_the_loop_sets_training_mode_and_can_be_stopped() -> None:
    networks = dcgan_pair()
    for model in networks:
        model.eval()
    steps = train(*networks, Batches(torch.rand(8, 1, 32, 32), 2), Config(latent_dim=6))
    next(steps)
    assert all(model.training for model in networks)
    assert networks[0].main[1].num_batches_tracked == 1
    assert networks[1].main[3].num_batches_tracked == 3  # real, fake detached, fake


@pytest.mark.parametrize("loss", LOSSES)
def test_d_learns_to_separate_real_from_generated(loss: str) -> None:
    """On constant images D separates real from generated ones within a few steps."""
    images = torch.full((32, 1, 32, 32), 0.8)
    steps = list(
        train(*dcgan_pair(), Batches(images, 16), Config(epochs=10, latent_dim=6, lr=2e-3, loss=loss))
    )
    last = steps[-1].result
    assert last.d_x - last.d_g_z > 0.2


def test_defaults_are_those_of_the_reference_recipe() -> None:
    assert asdict(Config()) == {
        "epochs": 50,
        "latent_dim": 100,
        "lr": 0.0002,
        "beta1": 0.5,
        "real_label": 0.9,
        "loss": "non-saturating",
        "seed": 0,
    }
    assert Batches(torch.zeros(300)).batch_size == 128
    for adam in optimizers(*dcgan_pair(), Config()):
        assert adam.defaults["lr"] == 0.0002
        assert adam.defaults["betas"] == (0.5, 0.999)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "a positive integer"),
        ("epochs", 1.5, "a positive integer"),
        ("latent_dim", True, "a positive integer"),
        ("lr", 0.0, "a positive number"),
        ("lr", float("nan"), "a positive number"),
        ("lr", float("inf"), "a positive number"),
        ("beta1", 1.0, r"in \[0, 1\)"),
        ("beta1", -0.1, r"in \[0, 1\)"),
        ("real_label", 0, r"in \(0, 1\]"),
        ("real_label", 1.1, r"in \(0, 1\]"),
        ("loss", "hinge", r"one of \('non-saturating', 'minimax'\)"),
    ],
)
def test_config_rejects(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {value!r}"):
        Config(**{name: value})


def test_a_latent_dim_other_than_the_generators() -> None:
    with pytest.raises(ValueError, match=r"z must be \[N, 6\].*got \[4, 100, 1, 1\]"):
        next(train(*dcgan_pair(), Batches(torch.zeros(4, 1, 32, 32)), Config()))
