"""Loading of networks from every supported kind of file, and the errors for all others."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from dcgan import checkpoint, fast, models, pretrained
from dcgan.checkpoint import CheckpointError
from dcgan.errors import InputError
from dcgan.networks import Architecture
from tests.support.networks import randomise

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Architecture(latent_dim=6, channels=3, features_g=4, features_d=5, image_size=32)
SMALL_MLP = Architecture("mlp", latent_dim=6, channels=1, image_size=32)


def example_generator(nz: int, ngf: int, nc: int) -> nn.Module:
    """Build netG of pytorch/examples layer by layer; the keys of its state dict begin with main."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(nz, 8 * ngf), (8 * ngf, 4 * ngf), (4 * ngf, 2 * ngf), (2 * ngf, ngf)]):
        up = nn.ConvTranspose2d(a, b, 4, 2 if i else 1, 1 if i else 0, bias=False)
        layers += [up, nn.BatchNorm2d(b), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(OrderedDict(main=nn.Sequential(*layers)))


def example_discriminator(ndf: int, nc: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for a, b in [(ndf, 2 * ndf), (2 * ndf, 4 * ndf), (4 * ndf, 8 * ndf)]:
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True)]
    layers += [nn.Conv2d(8 * ndf, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    return nn.Sequential(OrderedDict(main=nn.Sequential(*layers)))


def prefixed(prefix: str) -> Any:
    return lambda state: OrderedDict((prefix + key, value) for key, value in state.items())


def untracked(state: Any) -> Any:
    return OrderedDict((k, v) for k, v in state.items() if not k.endswith("num_batches_tracked"))


SAVED = {
    "plain": lambda state: state,
    "DataParallel": prefixed("module."),
    "DistributedDataParallel of a compiled network": prefixed("module._orig_mod."),
    "before num_batches_tracked": untracked,
    "both": lambda state: prefixed("module.")(untracked(state)),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_files_of_pytorch_examples(saved: Any, zipped: bool, tmp_path: Path) -> None:
    g, d = example_generator(nz=7, ngf=3, nc=3), example_discriminator(ndf=3, nc=3)
    for name, network in (("netG", g), ("netD", d)):
        randomise(network)
        state = saved(network.state_dict())
        path = tmp_path / f"{name}_epoch_24.pth"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    g.double().eval()
    d.double().eval()
    z, x = torch.randn(5, 7), torch.rand(5, 3, 64, 64)
    ours_g = pretrained.generator(tmp_path / "netG_epoch_24.pth")
    ours_d = pretrained.discriminator(str(tmp_path / "netD_epoch_24.pth"))
    assert not ours_g.training
    assert not ours_d.training
    with torch.no_grad():
        torch.testing.assert_close(ours_g(z).double(), g(z[..., None, None].double()), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours_d(x).double(), d(x.double()).flatten(), rtol=0, atol=1e-5)


def test_a_half_precision_file_is_loaded_as_float32(tmp_path: Path) -> None:
    network = SMALL.generator("reference").half()
    torch.save(network.state_dict(), tmp_path / "g.pth")
    ours = pretrained.generator(tmp_path / "g.pth")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(next(ours.parameters()), next(network.parameters()).float())


@settings(max_examples=15)
@given(
    latent_dim=st.integers(1, 9),
    channels=st.integers(1, 4),
    features=st.integers(1, 3),
    image_size=st.sampled_from([32, 64]),
)
def test_sizes_are_inferred(
    tmp_path_factory: pytest.TempPathFactory, latent_dim: int, channels: int, features: int, image_size: int
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    g = models.Generator(latent_dim, channels, features, image_size)
    d = models.Discriminator(channels, features, image_size)
    torch.save(g.state_dict(), folder / "g.pth")
    torch.save(d.state_dict(), folder / "d.pth")
    ours_g: Any = pretrained.generator(folder / "g.pth")
    ours_d: Any = pretrained.discriminator(folder / "d.pth")
    assert ours_g.sizes() == g.sizes()
    assert ours_d.sizes() == d.sizes()


def write(path: Path, architecture: Architecture = SMALL, **values: Any) -> checkpoint.Checkpoint:
    content = checkpoint.Checkpoint(
        architecture,
        architecture.generator("reference").state_dict(),
        architecture.discriminator("reference").state_dict(),
        **values,
    )
    checkpoint.write(content, path)
    return content


def same(network: nn.Module, state: Any) -> bool:
    found = network.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("architecture", [SMALL, SMALL_MLP], ids=["dcgan", "mlp"])
def test_checkpoints(architecture: Architecture, engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    ema = architecture.generator("reference").state_dict()
    content = write(path, architecture, ema=ema)
    g = pretrained.generator(path, engine=engine)
    d = pretrained.discriminator(path, engine=engine)
    assert same(g, ema)
    assert same(pretrained.generator(path, ema=False, engine=engine), content.generator)
    assert same(d, content.discriminator)
    for network in (g, d):
        assert isinstance(network, fast.Generator | fast.Discriminator) == (
            engine == "auto" and architecture.model == "dcgan"
        )
    found = pretrained.read(path, "generator")
    assert (found.file, found.averaged, found.architecture) == (path, True, architecture)
    write(path, architecture)
    assert not pretrained.read(path, "generator").averaged


@pytest.mark.parametrize(
    ("batch", "epoch", "config", "decay"),
    [(0, 2, {"ema": 0.999}, 0.999), (3, 3, {"ema": 0.5}, 0.5), (0, 2, {}, None), (0, 2, {"ema": [1]}, None)],
)
def test_what_a_checkpoint_says_about_its_weights(
    batch: int, epoch: int, config: dict[str, Any], decay: float | None, tmp_path: Path
) -> None:
    """Its epoch counts from 1 and includes one that has begun; only the Generator has an average."""
    path = tmp_path / "run.pt"
    content = write(path, epoch=2, batch=batch, step=938, config=config, ema=SMALL.generator().state_dict())
    for network in ("generator", "discriminator"):
        for ema in (True, False):
            found = pretrained.read(path, network, ema=ema)
            assert (found.epoch, found.step, found.config) == (epoch, 938, None)
            average = network == "generator"
            assert (found.has_average, found.averaged) == (average, average and ema)
            assert found.decay == (decay if average else None)
    torch.save(content.generator, tmp_path / "g.pth")
    found = pretrained.read(tmp_path / "g.pth", "generator")
    assert (found.epoch, found.step, found.decay, found.has_average) == (None, None, None, False)


def test_the_settings_of_a_run_are_not_needed_for_networks_of_this_project(tmp_path: Path) -> None:
    content = checkpoint.Checkpoint(
        SMALL, SMALL.generator("reference").state_dict(), SMALL.discriminator("reference").state_dict()
    )
    checkpoint.Folder(tmp_path / "checkpoints").save(content)
    (tmp_path / "config.yaml").write_text("netG_module: [")
    found = pretrained.read(tmp_path, "generator")
    assert (found.config, found.foreign) == (None, None)
    assert same(found.module(), content.generator)


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_run_folder(below: str, tmp_path: Path) -> None:
    folder = checkpoint.Folder(tmp_path / "checkpoints")
    states = []
    for step, score in ((1, 2.0), (2, 1.0), (3, 3.0)):
        content = checkpoint.Checkpoint(
            SMALL,
            SMALL.generator("reference").state_dict(),
            SMALL.discriminator("reference").state_dict(),
            step=step,
            score=score,
        )
        folder.save(content)
        states.append(content.generator)
    run = tmp_path / below
    assert same(pretrained.generator(run), states[2])
    assert same(pretrained.generator(run, which="best"), states[1])
    assert pretrained.read(run, "generator").file.name == "step-000000003.pt"


def test_best_without_a_score(tmp_path: Path) -> None:
    state = SMALL.generator("reference").state_dict(), SMALL.discriminator("reference").state_dict()
    checkpoint.Folder(tmp_path / "checkpoints").save(checkpoint.Checkpoint(SMALL, *state))
    pretrained.generator(tmp_path)
    with pytest.raises(CheckpointError, match="has no best checkpoint because the run measured no score"):
        pretrained.generator(tmp_path, which="best")


def test_folders_that_are_not_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))} has no checkpoint of a run$"):
        pretrained.generator(tmp_path)
    torch.save({}, tmp_path / "netG_epoch_3.pth")
    with pytest.raises(CheckpointError, match=r"pass one of its files, for example netG_epoch_3\.pth"):
        pretrained.generator(tmp_path)


def test_the_wrong_network(tmp_path: Path) -> None:
    for name in ("generator", "discriminator"):
        torch.save(getattr(SMALL, name)("reference").state_dict(), tmp_path / name)
    with pytest.raises(
        CheckpointError, match="discriminator holds the weights of a Discriminator, not of a Gen"
    ):
        pretrained.generator(tmp_path / "discriminator")
    with pytest.raises(
        CheckpointError, match="generator holds the weights of a Generator, not of a Discriminator"
    ):
        pretrained.discriminator(tmp_path / "generator")


def generator_state(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = dict(SMALL.generator("reference").state_dict())
    return state | changes


FOREIGN: dict[str, tuple[Any, str]] = {
    "list": ([torch.zeros(2)], "holds no network, but a list"),
    "tensor": (torch.zeros(2), "holds no network, but a Tensor"),
    "numbered": ({0: torch.zeros(2)}, "holds no network, but a dict"),
    "empty": ({}, "its keys are none"),
    "another network": (
        {f"conv{i}.weight": torch.zeros(2) for i in range(5)},
        "no tensor main.0.weight; its keys are conv0.weight, conv1.weight, conv2.weight, conv3.weight, …",
    ),
    "fully connected": (
        models.MLPGenerator(6, 1, 32).state_dict(),
        "a fully connected layer, from which the image size cannot be inferred; pass the run's checkpoint",
    ),
    "16×16": (
        {f"main.{3 * i}.weight": torch.zeros(2, 2, 4, 4) for i in range(3)},
        "found 3 convolution weights",
    ),
    "512×512": (
        {f"main.{3 * i}.weight": torch.zeros(2, 2, 4, 4) for i in range(8)},
        "image_size must be one of 32, 64, 128, 256, got 512",
    ),
    "missing key": (
        {k: v for k, v in generator_state().items() if k != "main.1.bias"},
        'does not hold a complete Generator: .*Missing key.*"main.1.bias"',
    ),
    "extra key": (
        generator_state(extra=torch.zeros(1)),
        'does not hold a complete Generator: .*Unexpected.*"extra"',
    ),
    "another width": (
        generator_state(**{"main.3.weight": torch.zeros(9, 9, 4, 4)}),
        "does not hold a complete Generator: .*main.3.weight is",
    ),
    "number instead of tensor": (
        generator_state(**{"main.1.bias": 3}),
        "does not hold a complete Generator",
    ),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
def test_other_content(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=message) as raised:
        pretrained.generator(tmp_path / "some.pth")
    assert str(tmp_path / "some.pth") in str(raised.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated(share: float, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "g.pth"
    torch.save(generator_state(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        pretrained.generator(path)


@pytest.mark.parametrize("kind", ["checkpoint", "state"])
def test_a_flipped_bit_is_detected(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "g.pt"
    if kind == "checkpoint":
        write(path)
    else:
        torch.save(generator_state(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        pretrained.generator(path)


class Malicious:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


@pytest.mark.parametrize("writer", ["pickle", "zip", "legacy"])
def test_code_in_a_pickle_is_not_executed(writer: str, tmp_path: Path) -> None:
    path, trap = tmp_path / "g.pth", tmp_path / "trap"
    content = generator_state(extra=Malicious(trap))
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        pretrained.generator(path)
    assert not trap.exists()
    if writer == "pickle":  # make sure that the trap itself works
        pickle.loads(path.read_bytes())
        assert trap.exists()


def test_a_whole_module_is_not_trusted(tmp_path: Path) -> None:
    torch.save(SMALL.generator("reference"), tmp_path / "g.pth")
    with pytest.raises(CheckpointError, match="not trusted to run code"):
        pretrained.generator(tmp_path / "g.pth")


def test_missing_and_other_files(tmp_path: Path) -> None:
    for name in ("missing.pth", "missing.safetensors"):
        with pytest.raises(CheckpointError, match=rf"cannot read .*{name}.*No such file"):
            pretrained.generator(tmp_path / name)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pth is not a loadable checkpoint"):
        pretrained.generator(tmp_path / "text.pth")


def test_bad_arguments(tmp_path: Path) -> None:
    write(tmp_path / "run.pt", SMALL_MLP)
    path: Any = tmp_path / "run.pt"
    bad: Any
    for bad, message in (
        ({"which": "first"}, "which must be one of last, best, got 'first'"),
        ({"which": "best"}, "which must be last for a single file, got 'best'"),
        ({"engine": "fast"}, "engine must be one of auto, reference, triton, native, got 'fast'"),
        ({"engine": "native"}, "engine must be auto or reference for the model mlp"),
    ):
        with pytest.raises(InputError, match=message):
            pretrained.generator(path, **bad)
    with pytest.raises(InputError, match="network must be one of generator, discriminator, got 'netG'"):
        pretrained.read(path, "netG")  # type: ignore[arg-type]


def test_safetensors_of_other_programs(tmp_path: Path) -> None:
    state = generator_state()
    save_file(state, tmp_path / "g.safetensors")
    assert same(pretrained.generator(tmp_path / "g.safetensors"), state)

    whole = (tmp_path / "g.safetensors").read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        (tmp_path / "half.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"half\.safetensors"):
            pretrained.generator(tmp_path / "half.safetensors")
    for about in (
        {"network": "netG", "model": "dcgan"},
        {"network": "generator"},
        {"network": "generator", "model": "dcgan", "channels": "few"},
        {"network": "generator", "model": "vae"},
    ):
        save_file(state, tmp_path / "odd.safetensors", metadata=about)
        with pytest.raises(CheckpointError, match=r"odd\.safetensors holds no network of this project"):
            pretrained.generator(tmp_path / "odd.safetensors")
