"""Scores during training: the same as those of ``dcgan eval``, when they are due, and the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dcgan import checkpoint
from dcgan.checkpoint import Checkpoint, Folder
from dcgan.cli.app import app
from dcgan.errors import RunError
from dcgan.training import scoring

TINY = (
    *("train", "--dataset", "fake", "--channels", "1", "--limit", "40", "--image-size", "32"),
    *("--batch-size", "16", "--ngf", "4", "--ndf", "4", "--nz", "6", "--no-tensorboard", "--device", "cpu"),
)
SCORES = {"frechet", "kernel", "kernel_std", "precision", "recall", "density", "coverage"}


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def evaluations(out: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "frechet" in row]


@pytest.mark.parametrize("average", [(), ("--ema", "0.9")], ids=["last weights", "moving average"])
def test_an_evaluation_is_that_of_the_command(average: tuple[str, ...], tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "scores.json"
    options = ("--epochs", 1, "--eval-every", 1, "--eval-num", 30, *average)
    printed = invoke(*TINY, *options, "--out", out)
    (row,) = evaluations(out)
    assert row.keys() == {"step", "epoch", "features", "images"} | SCORES
    assert (row["step"], row["epoch"], row["features"], row["images"]) == (3, 1, "pixels", 30)
    assert f"{row['frechet']:.4g}"[:4] in printed
    invoke("eval", out, "--num", 30, "--json", file)
    generated = json.loads(file.read_text())["scores"]["generated"]
    for name in SCORES:
        assert row[name] == pytest.approx(generated[name], rel=1e-9, abs=1e-12), name


def test_when_evaluations_are_due(tmp_path: Path) -> None:
    """Every second epoch and at the end; between them the pixel score is not measured either."""
    out = tmp_path / "run"
    invoke(*TINY, "--epochs", 5, "--eval-every", 2, "--eval-num", 20, "--keep", 9, "--out", out)
    assert [row["epoch"] for row in evaluations(out)] == [2, 4, 5]
    assert "pixel_frechet_distance" not in (out / "metrics.jsonl").read_text()
    files = sorted((out / "checkpoints").glob("step-*.pt"))
    saved = {found.step: found for found in map(checkpoint.read, files) if found.batch == 0}
    scores = {step: found.score for step, found in saved.items()}
    assert scores == {3: None, 9: None} | {row["step"]: row["frechet"] for row in evaluations(out)}
    assert {found.score_name for found in saved.values() if found.score} == {
        "Fréchet distance, 8×8 pixel features, 20 images"
    }
    best = Folder(out / "checkpoints").best()
    assert best is not None
    assert checkpoint.read(best).score == min(row["frechet"] for row in evaluations(out))


def test_a_run_that_begins_to_evaluate(tmp_path: Path) -> None:
    """Scores of another kind are not compared: the first evaluation replaces the best pixel score."""
    out = tmp_path / "run"
    invoke(*TINY, "--epochs", 1, "--out", out)
    folder = Folder(out / "checkpoints")
    first = folder.best()
    assert first is not None
    assert checkpoint.read(first).score_name == Checkpoint.score_name
    invoke("train", "--resume", "--epochs", 2, "--eval-every", 1, "--eval-num", 20, "--out", out)
    second = folder.best()
    assert second is not None
    assert second != first
    assert checkpoint.read(second).score == evaluations(out)[-1]["frechet"]


@pytest.mark.parametrize("score", [(), ("--score", "none")], ids=["pixels", "none"])
def test_without_evaluations(score: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    invoke(*TINY, "--epochs", 1, *score, "--out", out)
    assert not evaluations(out)
    assert ("pixel_frechet_distance" in (out / "metrics.jsonl").read_text()) == (not score)
    assert (Folder(out / "checkpoints").best() is None) == bool(score)


def test_images_that_cannot_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, says that the epoch has no score, and evaluates the next one."""
    of, calls = scoring.evaluation.Evaluator.of, []

    def failing_first(self: Any, generator: Any) -> Any:
        calls.append(generator)
        if len(calls) == 1:
            raise RunError("an image contains a NaN")
        return of(self, generator)

    monkeypatch.setattr(scoring.evaluation.Evaluator, "of", failing_first)
    out = tmp_path / "run"
    printed = invoke(*TINY, "--epochs", 2, "--eval-every", 1, "--eval-num", 20, "--out", out)
    assert "Epoch 1 is not evaluated: an image contains a NaN" in printed
    assert [row["epoch"] for row in evaluations(out)] == [2]


def test_evaluations_do_not_change_training(tmp_path: Path) -> None:
    """The weights have the same bits with and without scores, with random augmentation too."""
    states = []
    for name, options in (("with", ("--eval-every", 1, "--eval-num", 20)), ("without", ("--score", "none"))):
        out = tmp_path / name
        invoke(*TINY, "--epochs", 2, "--diffaugment", "color,cutout", "--flip", *options, "--out", out)
        last = Folder(out / "checkpoints").last()
        assert last is not None
        states.append(checkpoint.read(last).generator)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
