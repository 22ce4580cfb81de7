"""The settings of a run: defaults, files and rejected values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dcgan.errors import InputError
from dcgan.settings import RESUMABLE, Settings, keys_of, of_run, read_file, write_file


def test_defaults_are_those_of_the_reference_recipe() -> None:
    config = Settings().config()
    assert (config.epochs, config.latent_dim, config.lr, config.beta1) == (50, 100, 2e-4, 0.5)
    assert config.real_label == 0.9
    assert Settings().batch_size == 128
    assert Settings().architecture(1).image_size == 64


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("batch_size", 0, "at least 1"),
        ("batch_size", "64", "an integer"),
        ("batch_size", True, "an integer"),
        ("epochs", 1.5, "an integer"),
        ("image_size", 48, "32, 64, 128, 256"),
        ("channels", 2, "1 or 3"),
        ("channels", True, "1 or 3"),
        ("image_size", 64.0, "32, 64, 128, 256"),
        ("nz", 8.0, "an integer of at least 1"),
        ("seed", -1, "an integer of at least 0"),
        ("limit", 0, "an integer of at least 1"),
        ("dataset", None, "one of mnist, fashion-mnist, cifar10"),
        ("dataset", "imagenet", "one of mnist, fashion-mnist, cifar10"),
        ("dataroot", None, "a valid string"),
        ("netG", 3, "a valid string"),
        ("model", "vae", "'dcgan' or 'mlp'"),
        ("engine", "cudnn", "'auto', 'reference', 'triton' or 'native'"),
        ("loss", "hinge", "'non-saturating' or 'minimax'"),
        ("lr", 0, "positive"),
        ("lr", float("inf"), "positive"),
        ("lr", float("nan"), "positive"),
        ("lr", "1e-4", "a positive number"),
        ("lr", True, "a positive number"),
        ("beta1", 1.0, "[0, 1)"),
        ("label_smoothing", 1.0, "[0, 1)"),
        ("ema", 1.0, "[0, 1)"),
        ("clip", 0.0, "positive"),
        ("classes", "cat", "a list of strings"),
        ("classes", ("cat",), "a list of strings"),
        ("classes", ["cat", 1], "a list of strings"),
        ("classes", [], "at least one class"),
        ("flip", 1, "true or false"),
        ("diffaugment", [], "a list of color, translation, cutout, each at most once"),
        ("diffaugment", ["color", "color"], "a list of color, translation, cutout, each at most once"),
        ("diffaugment", ["blur"], "a list of color, translation, cutout, each at most once"),
        ("diffaugment", "color", "a list of color, translation, cutout, each at most once"),
        ("eval_every", -1, "an integer of at least 0"),
        ("eval_num", 9, "an integer of at least 10"),
        ("keep", 0, "at least 1"),
        ("compile", "yes", "true or false"),
        ("compile", 1, "true or false"),
    ],
)
def test_invalid_values(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InputError) as error:
        Settings(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} must be ")
    assert allowed in message
    assert message.endswith(f", got {value!r}")
    assert "\n" not in message
    with pytest.raises(InputError, match=f"^run.yaml: {re.escape(message)}$"):
        Settings.of({name: value}, "run.yaml")


@pytest.mark.parametrize("name", ["batchsize", "self", "batch size"])
def test_an_unknown_setting_is_named(name: str) -> None:
    with pytest.raises(InputError, match=rf"here: unknown setting '{name}'; .*`dcgan train --help`"):
        Settings.of({name: 3}, "here")


def test_an_integer_is_a_number() -> None:
    assert Settings(lr=1, clip=2, ema=0).to_dict() == {**Settings().to_dict(), "lr": 1, "clip": 2, "ema": 0}


def test_settings_are_immutable() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.lr = 1.0
    assert settings == Settings()
    assert hash(settings) == hash(Settings())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.toml", 'dataset = "folder"\nlr = 1e-4\nbatch-size = 32\nclasses = ["a", "b"]\n'),
        ("run.yaml", "dataset: folder\nlr: 1e-4\nbatch-size: 32\nclasses: [a, b]\n"),
        ("run.yml", json.dumps({"dataset": "folder", "lr": 1e-4, "batch_size": 32, "classes": ["a", "b"]})),
    ],
)
def test_settings_files(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    expected = Settings(dataset="folder", lr=1e-4, batch_size=32, classes=["a", "b"])
    assert Settings.of(read_file(path)) == expected
    keys = {"dataset": "dataset", "lr": "lr", "batch_size": "batch-size", "classes": "classes"}
    if name == "run.yml":
        keys["batch_size"] = "batch_size"
    assert keys_of(path) == keys


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.toml", "dataset = ", "not valid TOML"),
        ("run.yaml", "a: [", "not valid YAML"),
        ("run.yaml", "!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("run.yaml", "- a\n- b\n", "table of settings"),
        ("run.yaml", "1: a\n", "table of settings"),
        ("run.ini", "", ".toml, .yaml or .yml"),
        ("none.toml", None, "cannot read"),
    ],
)
def test_invalid_settings_files(name: str, text: str | None, expected: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        read_file(tmp_path / name)
    assert expected in str(error.value)
    assert name in str(error.value)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert Settings.of(read_file(tmp_path / "run.yaml")) == Settings()


@given(
    lr=st.floats(1e-12, 1e6),
    label_smoothing=st.floats(0, 0.999),
    ema=st.none() | st.floats(0, 0.9999),
    seed=st.integers(0, 2**63),
    dataroot=st.text(st.characters(exclude_categories=["Cs"])),
    classes=st.none() | st.lists(st.text(), min_size=1),
)
def test_written_settings_are_read_back(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    settings = Settings.of(values)
    path = tmp_path_factory.mktemp("settings") / "config.yaml"
    write_file(settings, path)
    assert Settings.of(read_file(path)) == settings
    assert yaml.safe_load(path.read_text())["seed"] == values["seed"]


def test_settings_that_may_change_on_resume() -> None:
    run = Settings(epochs=2)
    assert run.resumed({"epochs": 5, "engine": "reference", "ngf": 64}) == Settings(
        epochs=5, engine="reference"
    )
    for name, value in {"ngf": 32, "seed": 1, "batch_size": 64, "dataset": "fake", "lr": 1e-3}.items():
        with pytest.raises(InputError, match=f"{name} is .* in the run to be resumed, got {value!r}"):
            run.resumed({name: value})


def test_settings_named_as_resumable_exist() -> None:
    assert set(Settings.model_fields) > RESUMABLE


@pytest.mark.parametrize("network", ["netG", "netD"])
def test_arguments_without_a_network_of_ones_own(network: str) -> None:
    with pytest.raises(InputError, match=f"^{network}_args requires {network}_module, got {{'width': 3}}$"):
        Settings(**{f"{network}_args": {"width": 3}})


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/last.pt", "checkpoints/step-000000006.pt"])
def test_the_settings_of_the_run_that_a_path_belongs_to(below: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.pt").touch()
    assert of_run(run / below) is None
    settings = Settings(dataset="digits", ngf=8)
    write_file(settings, run / "config.yaml")
    assert of_run(run / below) == settings
    assert of_run(tmp_path / "run" / "checkpoints" / "deeper" / "file.pt") is None
    assert of_run(tmp_path) is None


def test_a_settings_file_beside_a_model_file_belongs_to_no_run(tmp_path: Path) -> None:
    write_file(Settings(), tmp_path / "config.yaml")
    (tmp_path / "g.pth").touch()
    assert of_run(tmp_path / "g.pth") is None
