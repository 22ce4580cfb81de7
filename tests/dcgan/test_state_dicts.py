"""State dicts with any prefixes in any containers; ambiguous files are reported with all candidates."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dcgan import pretrained
from dcgan.checkpoint import CheckpointError
from dcgan.networks import Architecture
from tests.support.networks import randomise

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Architecture(latent_dim=6, channels=3, features_g=4, features_d=5, image_size=32)
State = dict[str, Any]


def state_of(network: str, seed: int = 0) -> State:
    torch.manual_seed(seed)
    module = getattr(SMALL, network)("reference")
    randomise(module)
    return dict(module.state_dict())


G, D, AVERAGE = state_of("generator"), state_of("discriminator"), state_of("generator", 1)


def prefixed(prefix: str, state: State) -> State:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def same(path: Path, network: str, state: State, **arguments: Any) -> bool:
    found = getattr(pretrained, network)(path, engine="reference", **arguments).state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def averaged(network: nn.Module) -> State:
    """Return the state dict of an AveragedModel that holds AVERAGE."""
    average = AveragedModel(network)
    average.module.load_state_dict(AVERAGE)
    return dict(average.state_dict())


ONE: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state},
    "model": lambda state: {"model": state, "epoch": 3, "best": 1.5, "args": ["--lr", "1e-3"]},
    "nested": lambda state: {"a": {"b": [{"model_state_dict": state}]}, "rng": torch.get_rng_state()},
    "tuple": lambda state: (3, state),
    "numbered": lambda state: {7: state},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
    "AveragedModel in DistributedDataParallel": lambda state: prefixed(
        "module.", {"n_averaged": torch.tensor(3), **prefixed("module.", state)}
    ),
    "AveragedModel without its prefix": lambda state: {"n_averaged": torch.tensor(3), **state},
    "compiled in part": lambda state: {
        key.replace("main.", "main._orig_mod."): value for key, value in state.items()
    },
    "compiled layer by layer": lambda state: {
        re.sub(r"(main\.\d+)", r"\1._orig_mod", key): value for key, value in state.items()
    },
    "parameters that require gradients": lambda state: {
        key: nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()
    },
}

BOTH: dict[str, Any] = {
    "netG": {"netG": G, "netD": D},
    "names": {"generator": G, "discriminator": D, "optimizer_g": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "letters": {"G": {"state_dict": G}, "D": {"state_dict": D}},
    "pair": (G, D),
    "one dict": prefixed("generator.", G) | prefixed("discriminator.", D),
    "wrapped": prefixed("module.netG.", G) | prefixed("netD._orig_mod.module.", D),
    "Lightning": {
        "epoch": 1,
        "global_step": 4,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed("generator.", G) | prefixed("discriminator.", D) | {"fid.x": torch.ones(3)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}},
                "param_groups": [{"lr": 0.1}],
            }
        ],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"latent_dim": 6},
    },
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("network", ["generator", "discriminator"])
@pytest.mark.parametrize("kind", ONE)
def test_one_network(kind: str, network: str, zipped: bool, tmp_path: Path) -> None:
    state = state_of(network)
    torch.save(ONE[kind](state), tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    assert same(tmp_path / "file.pth", network, state)
    assert pretrained.read(tmp_path / "file.pth", network).averaged == kind.startswith("Averaged")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", BOTH)
def test_both_networks(kind: str, tmp_path: Path) -> None:
    torch.save(BOTH[kind], tmp_path / "file.ckpt")
    assert same(tmp_path / "file.ckpt", "generator", G)
    assert same(tmp_path / "file.ckpt", "discriminator", D)


WORDS = [
    "module.",
    "_orig_mod.",
    "generator.",
    "discriminator.",
    "netG.",
    "model.",
    "net.",
    "main.",
    "0.",
    "e.",
]


@settings(max_examples=40)
@given(
    first=st.lists(st.sampled_from(WORDS), max_size=4),
    second=st.lists(st.sampled_from(WORDS), max_size=4),
    suffix=st.sampled_from([".pth", ".safetensors"]),
)
def test_any_prefixes(
    tmp_path_factory: pytest.TempPathFactory, first: list[str], second: list[str], suffix: str
) -> None:
    """Each network is found, whatever the prefixes, as long as they differ."""
    path = tmp_path_factory.getbasetemp() / f"prefixes{suffix}"
    prefix_g, prefix_d = "".join(first), "".join(second)
    state = prefixed(prefix_g, G) if prefix_g == prefix_d else prefixed(prefix_g, G) | prefixed(prefix_d, D)
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert same(path, "generator", G)
    if prefix_g != prefix_d:
        assert same(path, "discriminator", D)


AVERAGES: dict[str, Any] = {
    "ema": {"generator": G, "ema": AVERAGE},
    "model_ema": {"state_dict": {"model": G, "model_ema": AVERAGE}},
    "state_dict_ema": {"state_dict": G, "state_dict_ema": AVERAGE},
    "netG_ema": {"netG": G, "netD": D, "netG_ema": AVERAGE},
    "G_ema": prefixed("G.", G) | prefixed("D.", D) | prefixed("G_ema.", AVERAGE),
    "ema_pytorch": prefixed("online_model.", G) | prefixed("ema_model.", AVERAGE) | {"step": torch.tensor(1)},
    "AveragedModel": {"netG": G, "netD": D, "second": averaged(SMALL.generator("reference"))},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_choice_between_the_average_and_the_other(kind: str, tmp_path: Path) -> None:
    torch.save(AVERAGES[kind], tmp_path / "file.pth")
    assert same(tmp_path / "file.pth", "generator", AVERAGE)
    assert same(tmp_path / "file.pth", "generator", G, ema=False)
    assert pretrained.read(tmp_path / "file.pth", "generator").averaged
    assert not pretrained.read(tmp_path / "file.pth", "generator", ema=False).averaged


def test_an_only_average_is_used_even_without_ema(tmp_path: Path) -> None:
    torch.save({"ema": AVERAGE}, tmp_path / "file.pth")
    assert same(tmp_path / "file.pth", "generator", AVERAGE, ema=False)


@pytest.mark.parametrize("named", ["netG", "generator", "G", "gen_v2"])
def test_a_name_selects_one_of_two(named: str, tmp_path: Path) -> None:
    torch.save({"teacher": AVERAGE, named: G}, tmp_path / "file.pth")
    assert same(tmp_path / "file.pth", "generator", G)


def test_identical_copies_of_a_network_count_once(tmp_path: Path) -> None:
    torch.save(prefixed("first.", G) | prefixed("second.", G), tmp_path / "file.pth")
    assert same(tmp_path / "file.pth", "generator", G)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ({"student": G, "teacher": AVERAGE}, ".pth"),
        ({"models": [prefixed("module.", G), AVERAGE]}, ".pth"),
        (prefixed("student.", G) | prefixed("teacher.", AVERAGE), ".pth"),
        (prefixed("student.", G) | prefixed("teacher.", AVERAGE), ".safetensors"),
    ],
    ids=["names", "list", "prefixes", "safetensors"],
)
def test_ambiguous_networks_are_listed_with_working_code(
    content: Any, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"two{suffix}"
    safetensors.torch.save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    with pytest.raises(CheckpointError, match="holds 2 different Generators") as raised:
        pretrained.generator(path)
    lines = str(raised.value).split("save one of them to its own file: ")[1].split("; or ")
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    for line, state in zip(lines, (G, AVERAGE), strict=True):
        exec(line, {"torch": torch, "safetensors": safetensors})
        assert same(tmp_path / "generator.pth", "generator", state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": {"conv.weight": torch.ones(2)}},
            r'\["state_dict"\] has no tensor main.0.weight; its keys',
        ),
        ({"state_dict": {}}, "no tensor main.0.weight; its keys are none"),
        ({"netD": D}, "holds the weights of a Discriminator, not of a Generator"),
        (prefixed("netG.", {k: v for k, v in G.items() if k != "main.4.bias"}), r'Missing.*"main\.4\.bias"'),
        (prefixed("netG.", G | {"extra": torch.ones(1)}), 'Unexpected.*"extra"'),
    ],
    ids=["unrelated", "empty", "other network", "missing key", "extra key"],
)
def test_containers_without_the_network(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        pretrained.generator(tmp_path / "file.pth")


def test_a_dict_that_contains_itself(tmp_path: Path) -> None:
    content: State = {"generator": G}
    content["self"] = [content]
    torch.save(content, tmp_path / "file.pth")
    assert same(tmp_path / "file.pth", "generator", G)
