"""``examples/mnist.py`` on a small dataset, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples import mnist

TINY = [
    "--batch-size=40",
    "--limit=80",
    "--image-size=32",
    "--ngf=4",
    "--ndf=4",
    "--nz=6",
    "--no-tensorboard",
]


def test_runs_are_trained_scored_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {name: spec._replace(epochs=1) for name, spec in mnist.RUNS.items()}
    monkeypatch.setattr(mnist, "RUNS", small)
    calls: list[tuple[str, ...]] = []
    original = mnist.dcgan

    def counted(*arguments: str) -> None:
        calls.append(arguments)
        extra = ["--features=pixels"] if arguments[0] == "eval" else ["--device=cpu"]
        original(*arguments, *extra)

    monkeypatch.setattr(mnist, "dcgan", counted)
    given = ["--dataset=digits", f"--out={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]
    given += ["--num=20", "--runs", "dcgan", "reference"]
    mnist.main([*given, "--options", *TINY])
    assert "DCGAN, reference engine" in capsys.readouterr().out
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "results" / "mnist.jsonl").read_text().splitlines()
    ]
    assert [(row["run"], row["epoch"]) for row in rows] == [("dcgan", 1), ("reference", 1)]
    assert all(row["scores"]["generated"]["frechet"] > row["scores"]["floor"]["frechet"] for row in rows)
    # Both runs use the same RNG seed, so the first steps on the two engines differ only by rounding.
    assert rows[0]["means"] == pytest.approx(rows[1]["means"], rel=0.02)
    for name in ("mnist.png", "mnist-losses.png"):
        assert Image.open(tmp_path / "results" / name).size[0] == 1500

    # Existing runs are resumed, with no epochs left to train.
    monkeypatch.setattr(mnist, "scores", lambda name, *_: [row for row in rows if row["run"] == name])
    before = len(calls)
    mnist.main(given[:-1])
    assert [call[:2] for call in calls[before:]] == [("train", "--resume")]
