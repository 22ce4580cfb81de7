"""The reference networks: layers, names, initialization, shapes, and invalid arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcgan.models import (
    IMAGE_SIZES,
    Discriminator,
    Generator,
    MLPDiscriminator,
    MLPGenerator,
    weights_init,
)


def recipe_generator(latent_dim: int = 100) -> nn.Sequential:
    """The reference recipe's MNIST generator, layer by layer."""
    return nn.Sequential(
        nn.ConvTranspose2d(latent_dim, 512, 4, 1, 0, bias=False),
        nn.BatchNorm2d(512),
        nn.ReLU(True),
        nn.ConvTranspose2d(512, 256, 4, 2, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(True),
        nn.ConvTranspose2d(256, 128, 4, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(True),
        nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(True),
        nn.ConvTranspose2d(64, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def recipe_discriminator() -> nn.Sequential:
    """The reference recipe's MNIST discriminator, layer by layer."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(128, 256, 4, 2, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(256, 512, 4, 2, 1, bias=False),
        nn.BatchNorm2d(512),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(512, 1, 4, 1, 0, bias=False),
        nn.Sigmoid(),
    )


@pytest.mark.parametrize(
    ("model", "recipe", "batch"),
    [
        (Generator(), recipe_generator(), torch.randn(2, 100, 1, 1)),
        (Discriminator(), recipe_discriminator(), torch.rand(2, 1, 64, 64) * 2 - 1),
    ],
    ids=["generator", "discriminator"],
)
def test_defaults_match_the_reference_recipe(
    model: nn.Module, recipe: nn.Sequential, batch: torch.Tensor
) -> None:
    assert repr(model.main) == repr(recipe)
    model.main.load_state_dict(recipe.state_dict())
    want = recipe(batch)
    if isinstance(model, Discriminator):
        want = want.view(-1, 1).squeeze(1)
    got = model(batch)
    assert got.shape == want.shape
    assert torch.equal(got, want)


def test_state_dict_keys_match_the_reference_recipe() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    generator = [
        name
        for i in (0, 3, 6, 9)
        for name in [f"main.{i}.weight", *(f"main.{i + 1}.{buffer}" for buffer in norm)]
    ]
    assert list(Generator(features=2).state_dict()) == [*generator, "main.12.weight"]
    discriminator = [
        name
        for i in (2, 5, 8)
        for name in [f"main.{i}.weight", *(f"main.{i + 1}.{buffer}" for buffer in norm)]
    ]
    assert list(Discriminator(features=2).state_dict()) == ["main.0.weight", *discriminator, "main.11.weight"]


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(size: int, channels: int) -> None:
    generator = Generator(latent_dim=7, channels=channels, features=2, image_size=size)
    discriminator = Discriminator(channels=channels, features=2, image_size=size)
    z = torch.randn(3, 7)
    images = generator(z)
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() < 1
    probability = discriminator(images)
    assert probability.shape == (3,)
    assert ((probability > 0) & (probability < 1)).all()
    first, last = generator.main[0], generator.main[-2]
    assert (first.out_channels, last.in_channels, last.out_channels) == (2 * size // 8, 2, channels)
    assert discriminator.main[-2].in_channels == 2 * size // 8


@pytest.mark.parametrize("build", [Generator, MLPGenerator])
def test_both_ranks_of_z_give_the_same_images(build: type[nn.Module]) -> None:
    generator = build(latent_dim=5).eval()
    z = torch.randn(4, 5)
    assert torch.equal(generator(z), generator(z[:, :, None, None]))


@pytest.mark.parametrize("build", [Generator, MLPGenerator])
@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 1), (4, 5, 2, 2), (4, 1, 5, 1), (5,)])
def test_other_shapes_of_z_are_rejected(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z must be \[N, 5\] or \[N, 5, 1, 1\], got \["):
        build(latent_dim=5)(torch.zeros(shape))


@pytest.mark.parametrize("build", [Discriminator, MLPDiscriminator])
@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (2, 3, 32, 32), (1, 32, 32), (2, 1, 32, 33)])
def test_other_image_shapes_are_rejected(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must be \[N, 1, 32, 32\], got \["):
        build(channels=1, image_size=32)(torch.zeros(shape))


@pytest.mark.parametrize("build", [Generator, Discriminator])
@pytest.mark.parametrize("size", [0, 16, 48, 512, -64, 64.5, "64"])
def test_other_image_sizes_are_rejected(build: type[nn.Module], size: object) -> None:
    with pytest.raises(ValueError, match=r"image_size must be one of \(32, 64, 128, 256\), got"):
        build(image_size=size)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *((Generator, name) for name in ("latent_dim", "channels", "features")),
        *((Discriminator, name) for name in ("channels", "features")),
        *((MLPGenerator, name) for name in ("latent_dim", "channels", "image_size")),
        *((MLPDiscriminator, name) for name in ("channels", "image_size")),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_sizes_must_be_positive_integers(build: type[nn.Module], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value!r}"):
        build(**{name: value})


@pytest.mark.parametrize("build", [Generator, Discriminator])
def test_weights_init_distribution(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build(features=64, image_size=64).apply(weights_init)
    convolutions = [m.weight for m in model.main if "Conv" in type(m).__name__]
    norms = [m for m in model.main if isinstance(m, nn.BatchNorm2d)]
    for weight in convolutions:
        n = weight.numel()
        # Five standard errors of a normal sample's mean and standard deviation.
        assert abs(weight.mean()) < 5 * 0.02 / n**0.5
        assert abs(weight.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
    for norm in norms:
        n = norm.weight.numel()
        assert abs(norm.weight.mean() - 1) < 5 * 0.02 / n**0.5
        assert abs(norm.weight.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
        assert not norm.bias.any()


def test_weights_init_reaches_subclasses_by_name_and_leaves_linear_alone() -> None:
    class QuantConv2d(nn.Conv2d):
        pass

    convolution, linear = QuantConv2d(8, 8, 4, bias=False), nn.Linear(8, 8)
    before = linear.weight.clone()
    nn.Sequential(convolution, linear).apply(weights_init)
    assert 0.01 < convolution.weight.std() < 0.03
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize(
    ("model", "other"),
    [
        (
            Generator(features=4),
            {"latent_dim": 100, "channels": 1, "features": 8, "image_size": 64},
        ),
        (Generator(features=4), {"latent_dim": 9, "channels": 1, "features": 4, "image_size": 64}),
        (Generator(features=4), {"latent_dim": 100, "channels": 3, "features": 4, "image_size": 64}),
        (Generator(features=4), {"latent_dim": 100, "channels": 1, "features": 4, "image_size": 32}),
        (Discriminator(features=4), {"channels": 1, "features": 8, "image_size": 64}),
        (Discriminator(features=4), {"channels": 3, "features": 4, "image_size": 64}),
        (Discriminator(features=4), {"channels": 1, "features": 4, "image_size": 128}),
    ],
)
def test_a_checkpoint_of_other_sizes_changes_nothing(model: nn.Module, other: dict[str, int]) -> None:
    build = type(model)
    checkpoint = build(**other).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="Nothing was loaded") as error:
        model.load_state_dict(checkpoint)
    for sizes in (other, model.sizes()):
        arguments = ", ".join(f"{name}={value}" for name, value in sizes.items())
        assert f"{build.__name__}({arguments})" in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("key", ["main.4.weight", "main.4.bias", "main.7.running_mean"])
def test_a_mismatch_in_a_checkpoint_of_the_same_sizes_is_named(key: str) -> None:
    model = Generator(features=4)
    checkpoint = model.state_dict()
    checkpoint[key] = torch.zeros(3, *checkpoint[key].shape[1:])
    with pytest.raises(RuntimeError, match="Nothing was loaded") as error:
        model.load_state_dict(checkpoint)
    message = str(error.value)
    assert message.count("Generator(") == 1
    assert f"{key} is {[3, *model.state_dict()[key].shape[1:]]} in the checkpoint and" in message
    checkpoint["main.4.running_var"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="; 2 tensors differ"):
        model.load_state_dict(checkpoint)


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_sizes_are_read_off_a_state_dict(size: int) -> None:
    generator = Generator(latent_dim=5, channels=3, features=2, image_size=size)
    assert Generator.sizes_of(generator.state_dict()) == generator.sizes()
    discriminator = Discriminator(channels=3, features=2, image_size=size)
    assert Discriminator.sizes_of(discriminator.state_dict()) == discriminator.sizes()


@pytest.mark.parametrize("build", [Generator, Discriminator])
@pytest.mark.parametrize("state", [{}, {"main.0.weight": torch.zeros(2, 3)}, {0: torch.zeros(1)}])
def test_sizes_of_another_state_is_an_error(build: type[nn.Module], state: dict) -> None:
    with pytest.raises(ValueError, match=f"not a {build.__name__}'s state dict"):
        build.sizes_of(state)


def test_missing_and_unknown_keys_raise_pytorchs_error() -> None:
    model = Discriminator(features=2)
    state = model.state_dict()
    del state["main.0.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*main\.0\.weight.*Unexpected key.*extra"):
        model.load_state_dict(state)


@pytest.mark.parametrize("channels", [1, 3])
def test_mlp_pair(channels: int) -> None:
    generator = MLPGenerator(latent_dim=10, channels=channels, image_size=28)
    discriminator = MLPDiscriminator(channels=channels, image_size=28)
    linear = [(m.in_features, m.out_features) for m in generator.main if isinstance(m, nn.Linear)]
    assert linear == [(10, 256), (256, 512), (512, 1024), (1024, channels * 28**2)]
    linear = [(m.in_features, m.out_features) for m in discriminator.main if isinstance(m, nn.Linear)]
    assert linear == [(channels * 28**2, 512), (512, 256), (256, 1)]
    images = generator(torch.randn(3, 10))
    assert images.shape == (3, channels, 28, 28)
    assert images.abs().max() < 1
    probability = discriminator(images)
    assert probability.shape == (3,)
    assert ((probability > 0) & (probability < 1)).all()
