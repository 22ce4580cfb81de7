"""The options of pytorch/examples' dcgan: each is accepted, or the error says what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dcgan import checkpoint as checkpoints
from dcgan.cli import train
from dcgan.cli.app import app
from dcgan.settings import Settings, read_file


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings that the command passes on, which then does not train."""
    settings: dict[str, Any] = {}
    monkeypatch.setattr(train, "train", lambda given, *rest: settings.update(given))
    return settings


def test_a_command_line_of_pytorch_examples(tmp_path: Path) -> None:
    """All options that both have, in a run; ``config.yaml`` holds settings only."""
    out = tmp_path / "run"
    result = invoke(
        *("--dataset", "fake", "--batchSize", "1024", "--imageSize", "32", "--nz", "6", "--ngf", "4"),
        *("--ndf", "4", "--niter", "1", "--lr", "1e-4", "--beta1", "0.4", "--manualSeed", "7"),
        *("--dataroot", "unused", "--workers", "1", "--ngpu", "0", "--accel", "--outf", str(out)),
        *("--nc", "3", "--no-tensorboard"),
    )
    assert result.exit_code == 0, result.output
    config = read_file(out / "config.yaml")
    assert set(config) == set(Settings.model_fields)
    settings = Settings.of(config)
    assert (settings.batch_size, settings.image_size, settings.epochs, settings.seed) == (1024, 32, 1, 7)
    assert (settings.lr, settings.beta1, settings.channels, settings.device) == (1e-4, 0.4, 3, "cpu")
    assert checkpoints.read(out / "checkpoints" / "last.pt").step == 1


@pytest.mark.parametrize(
    ("typed", "device"),
    [
        ("", None),
        ("--cuda", "cuda"),
        ("--accel", "auto"),
        ("--ngpu 1", None),
        ("--ngpu 0", "cpu"),
        ("--cuda --ngpu 1", "cuda"),
        ("--accel --ngpu 0", "cpu"),
        ("--cuda --accel", "cuda"),
        ("--cuda --device cuda", "cuda"),
        ("--accel --device cpu", "cpu"),
    ],
)
def test_devices(typed: str, device: str | None, given: dict[str, Any]) -> None:
    result = invoke(*typed.split())
    assert result.exit_code == 0, result.output
    assert given.get("device") == device
    assert set(given) <= {"device"}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--mps", "--mps: GPUs of Apple are not supported; write --device cpu instead"),
        (
            "--ngpu 4",
            "--ngpu must be 0 or 1, got 4; for 4 GPUs, start one process each: "
            "torchrun --nproc-per-node 4 -m dcgan train …",
        ),
        ("--ngpu -1", "--ngpu must be an integer of at least 0, got '-1'"),
        (
            "--cuda --ngpu 0",
            "--cuda and --ngpu contradict each other: --cuda means --device cuda, --ngpu means --device cpu",
        ),
        (
            "--device cpu --cuda",
            "--device and --cuda contradict each other: --device cpu, --cuda means --device cuda",
        ),
    ],
)
def test_devices_that_are_not_supported(typed: str, expected: str, given: dict[str, Any]) -> None:
    result = invoke(*typed.split())
    assert result.exit_code == 2
    assert result.stderr == f"Error: {expected}\n"
    assert not given


@pytest.mark.parametrize("name", ["lsun", "lfw", "imagenet"])
def test_datasets_that_are_folders_of_images(name: str, given: dict[str, Any]) -> None:
    result = invoke("--dataset", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: --dataset must be one of mnist, ")
    assert f"got {name!r}; " in result.stderr
    assert "write --dataset folder --dataroot FOLDER" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["cifar10", "mnist", "folder", "fake"])
def test_datasets_that_both_have(name: str, given: dict[str, Any]) -> None:
    assert invoke("--dataset", name, "--dataroot", "x").exit_code == 0
    assert given == {"dataset": name, "dataroot": "x"}
