"""``python -m bench loop``: a whole run compared with its step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loop
from bench.__main__ import main

FIGURES = {"step_images_s", "run_images_s", "ratio", "noise_us", "guards_us", "telling_us"}
TINY = {"image_size": 32, "ngf": 4, "ndf": 4, "nz": 8, "sample_interval": 0}


def test_measures_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "IMAGES", 64)
    monkeypatch.setattr(loop, "OVERHEAD_STEPS", 20)
    figures = loop.measure(8, "float32", torch.device("cpu"), 0.2, 2, **TINY)
    assert figures.keys() == FIGURES
    assert all(0 < value < float("inf") for value in figures.values())


@pytest.mark.parametrize(
    ("device", "ratio", "status"), [("cpu", 0.5, 0), ("cuda", 0.5, 1), ("cuda", 0.95, 0)]
)
def test_prints_and_writes(
    device: str,
    ratio: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(batch: int, *_: Any) -> dict[str, float]:
        return dict.fromkeys(FIGURES, 100.0) | {"ratio": ratio, "run_images_s": 1000.0 * batch}

    monkeypatch.setattr(loop, "measure", measure)
    monkeypatch.setattr(loop.options, "find_device", lambda name, dtypes: device)
    monkeypatch.setattr(loop, "resolve", torch.device)
    path = tmp_path / "loop.jsonl"
    assert main(["loop", "--batch", "8", "64", "--json", str(path)]) == status
    out = capsys.readouterr().out
    assert "64,000" in out
    assert f"{ratio:.3f}" in out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["batch"] for row in rows] == [8, 64]
    assert {row["kind"] for row in rows} == {"loop"}
    assert rows[0]["dtype"] == ("float32" if device == "cpu" else "bfloat16")
