"""``examples/few_images.py`` on noise, end to end with ``dcgan train`` in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from dcgan import evaluation
from dcgan.cli.app import app
from dcgan.errors import InputError
from dcgan.evaluation import features
from dcgan.settings import of_run
from examples import few_images

TINY = ["--batch-size=10", "--ngf=4", "--ndf=4", "--nz=6", "--device=cpu"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Run ``dcgan`` in this process, record its arguments, and hide Inception's weights."""
    made: list[tuple[str, ...]] = []

    def dcgan(*arguments: str) -> None:
        made.append(arguments)
        result = CliRunner().invoke(app, arguments)
        if result.exit_code:
            raise InputError(result.output)

    monkeypatch.setattr(few_images, "dcgan", dcgan)
    monkeypatch.setattr(features, "inception_weights", lambda: tmp_path / "none")
    return made


def given(folder: Path) -> list[str]:
    found = ["--dataset=fake", "--limit=20", "--epochs=2", "--every=1", "--num=30"]
    return [*found, f"--out={folder / 'runs'}", f"--results={folder / 'results'}", "--options", *TINY]


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results" / "few-images.jsonl").read_text().splitlines()]


def test_both_runs_are_trained_scored_and_drawn(
    tmp_path: Path,
    calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second call scores nothing and only checks the options, with which it fails if they differ."""
    few_images.main(given(tmp_path))
    assert ["--resume" in call for call in calls] == [False, True, False, True]
    plain, augmented = (of_run(tmp_path / "runs" / name) for name in ("plain", "diffaugment"))
    assert plain is not None
    assert augmented is not None
    assert augmented == plain.updated({"diffaugment": ["color", "translation", "cutout"]})
    assert (plain.limit, plain.ema, plain.epochs, plain.eval_every) == (20, 0.999, 2, 1)

    header, *rows = results(tmp_path)
    expected = [("plain", 1, 2), ("plain", 2, 4), ("diffaugment", 1, 2), ("diffaugment", 2, 4)]
    assert [(row["run"], row["epoch"], row["step"]) for row in rows] == expected
    assert header["limit"] == 20
    assert header["floor"].keys() > set(few_images.SCORES)
    for row in rows:
        assert (row["features"], row["images"]) == ("pixels", 30)
        assert row["training"].keys() == row["held_out"].keys() == set(few_images.SCORES)
        assert row["training"] != row["held_out"]
    assert rows[1]["training"] != rows[3]["training"]
    assert Image.open(tmp_path / "results" / "few-images.png").size[0] == 1500
    out = capsys.readouterr().out
    assert out.count("DiffAugment ") == 2
    assert "30 images against 20 unseen ones" in out
    assert "real images" in out

    with pytest.raises(InputError, match="ngf"):
        few_images.main([*given(tmp_path), "--ngf=8"])
    resumed = []
    monkeypatch.setattr(
        few_images, "train", lambda run, folder, epoch, args: resumed.append((folder.name, epoch))
    )
    few_images.main(given(tmp_path))
    assert resumed == [("plain", 2), ("diffaugment", 2)]
    assert results(tmp_path)[1:] == rows


def test_what_images_are_scored_against(
    calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many images of the test split as there are training images; the floor is the training split's."""
    found = []
    original = evaluation.Evaluator

    def recorded(*arguments: Any) -> evaluation.Evaluator:
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(evaluation, "Evaluator", recorded)
    monkeypatch.setattr(few_images, "train", lambda *_: pytest.fail("nothing to train"))
    monkeypatch.setattr(few_images, "scores", lambda *_: [])
    monkeypatch.setattr(few_images, "print_table", lambda *_: None)
    few_images.main(["--dataset=fake", "--limit=20", "--num=30"])
    (evaluator,) = found
    assert (evaluator.real.what, len(evaluator.real)) == ("test split", 20)
    assert (evaluator.held_out.what, len(evaluator.held_out)) == ("train split", 30)
    assert calls == []


def test_epochs_that_are_not_scored(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        few_images.main(["--epochs=10", "--every=4"])
    assert stop.value.code == 2
    assert "--epochs must be a multiple of --every, got 10 and 4" in capsys.readouterr().err
