"""``dcgan eval``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dcgan.checkpoint import Checkpoint, Folder
from dcgan.cli.app import app
from dcgan.models import Discriminator, Generator
from dcgan.networks import Architecture

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "generator.pth"
    torch.save(Generator(features=4, image_size=32).state_dict(), path)
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(
        app, ["eval", *map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )


@pytest.mark.parametrize("chosen", ["pixels", "digits"])
def test_command(chosen: str, generator: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    arguments = (generator, "--dataset", "digits", "--num", 100, "--device", "cpu", "--json", out)
    result = invoke(*arguments, "--features", chosen)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["features"] == chosen
    assert (found["generator"], found["moving_average"]) == (str(generator), False)
    assert found["frechet"] in result.output
    assert found["kernel"] in result.output
    assert ("classifier_accuracy" in found) == (chosen == "digits")
    generated, floor = found["scores"]["generated"], found["scores"]["floor"]
    assert generated["images"] == floor["images"] == [100, 100]
    assert generated["frechet"] > 2 * floor["frechet"] >= 0  # an untrained Generator's images are plain grey
    assert f"{generated['frechet']:.4g}" in result.output
    assert "100 real (the other half)" in result.output
    before = out.read_text()
    assert invoke(*arguments, "--features", chosen).exit_code == 0
    assert out.read_text() == before
    assert invoke(*arguments, "--features", chosen, "--seed", 1, "--batch-size", 33).exit_code == 0
    assert out.read_text() != before


def test_a_runs_folder_and_its_moving_average(tmp_path: Path, cache: Path) -> None:
    """Use a colour network: grey datasets then have three equal channels, which the classifier supports."""
    sizes = {"features": 4, "channels": 3, "image_size": 32}
    torch.manual_seed(0)
    states = [Generator(**sizes).state_dict() for _ in range(2)]
    architecture = Architecture(channels=3, features_g=4, features_d=4, image_size=32)
    saved = Checkpoint(architecture, states[0], Discriminator(**sizes).state_dict(), ema=states[1])
    Folder(tmp_path / "run" / "checkpoints").save(saved)
    found = []
    for option in ("--ema", "--no-ema"):
        out = tmp_path / f"{option}.json"
        arguments = ("--dataset", "digits", "--num", 20, "--device", "cpu", "--json", out, option)
        result = invoke(tmp_path / "run", *arguments)
        assert result.exit_code == 0, result.output
        found.append(json.loads(out.read_text()))
    assert [one["moving_average"] for one in found] == [True, False]
    generated, floors = ([one["scores"][row]["frechet"] for one in found] for row in ("generated", "floor"))
    assert generated[0] != generated[1]
    assert floors[0] == floors[1]


def test_command_reports_the_number_of_real_images(generator: Path, cache: Path) -> None:
    result = invoke(
        generator, "--dataset", "digits", "--num", 1000, "--features", "pixels", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "Distance to 899 real images (digits, one half) of:" in result.output
    assert "1,000 generated" in result.output
    assert "898 real (the other half)" in result.output


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--num", "9", "integer of at least 10"),
        ("--num", "x", "integer of at least 10"),
        ("--features", "vgg", "'auto', 'inception', 'digits', 'pixels'"),
        ("--seed", "-1", "integer of at least 0"),
        ("--batch-size", "0", "integer of at least 1"),
        ("--device", "tpu", "'auto', 'cpu', 'cuda'"),
        ("--engine", "fast", "'auto', 'reference', 'triton', 'native'"),
        ("--which", "first", "'last', 'best'"),
        ("--dataset", "imagenet", "digits"),
        ("--json", "/dev/null/scores.json", "cannot make the folder"),
    ],
)
def test_usage_errors(option: str, value: str, allowed: str, generator: Path, cache: Path) -> None:
    arguments = {"--dataset": "digits", "--device": "cpu", option: value}
    result = invoke(generator, *(word for pair in arguments.items() for word in pair))
    assert result.exit_code == 2
    for words in (option.removeprefix("--"), Path(value).parent.name or value, allowed):
        assert words in result.output


def test_missing_arguments(generator: Path) -> None:
    for arguments, name in (((generator,), "--dataset"), (("--dataset", "digits"), "FROM")):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert name in result.output


def test_a_file_that_is_not_a_generator(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "discriminator.pth"
    torch.save(Discriminator(features=4, image_size=32).state_dict(), path)
    for source in (path, tmp_path / "none.pth"):
        result = invoke(source, "--dataset", "digits", "--device", "cpu")
        assert result.exit_code == 2
        assert source.name in result.output


def test_json_that_is_a_folder(tmp_path: Path, generator: Path) -> None:
    result = invoke(generator, "--dataset", "digits", "--json", tmp_path)
    assert result.exit_code == 2
    assert "--json" in result.output
    assert "is a directory" in result.output


def test_a_missing_dataset(tmp_path: Path, generator: Path, cache: Path) -> None:
    result = invoke(generator, "--dataset", "folder", "--dataroot", tmp_path / "nowhere", "--device", "cpu")
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_a_generator_of_nans_exits_with_1(tmp_path: Path, cache: Path) -> None:
    model = Generator(features=4, image_size=32)
    torch.nn.init.constant_(model.main[0].weight, math.nan)
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    result = invoke(
        tmp_path / "nan.pth", "--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu"
    )
    assert result.exit_code == 1
    assert "NaN" in result.output


def test_an_unsupported_engine_is_a_usage_error(generator: Path, cache: Path) -> None:
    arguments = ("--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu")
    result = invoke(generator, *arguments, "--engine", "triton")
    assert result.exit_code == 2
    assert "--engine: engine 'triton' is forced" in result.output
