"""``python -m bench races`` with tiny networks on the CPU."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pytest

from bench import compare, output
from bench.compare import RACED, Races
from bench.machine import Ceiling
from bench.timing import Budget
from tests.gpu.stages.summary import race_lines, read_rows

SIZES = {"features": 4, "image_size": 32, "latent_dim": 8}
FOLDER = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", FOLDER)
    monkeypatch.setattr(compare, "SECONDS", 0.02)
    monkeypatch.setattr("bench.machine.measure", lambda device, dtype: Ceiling(1e12, 1e11, "a stub"))


def arguments(out: Path, **options: list[Any]) -> argparse.Namespace:
    """Return the arguments of a tiny race."""
    parser = argparse.ArgumentParser()
    Races().add_arguments(parser)
    args = parser.parse_args(["--out", str(out), "--minutes", "3"])
    vars(args).update(options)
    return args


def test_entries(tmp_path: Path) -> None:
    listed = Races().entries(arguments(tmp_path))
    assert [(case.command, case.batch) for case, _ in listed[::3]] == [
        ("train", 64),
        ("train", 1024),
        ("generate", 64),
        ("generate", 1024),
    ]
    assert [provider.name for _, provider in listed[:3]] == ["train-step", "cudnn-graph", "reduce-overhead"]
    assert {provider.name for _, provider in listed[6:] if provider.searches} == {"cudnn-graph"}
    assert {provider.name for _, provider in listed if provider.ours} == {"train-step", "fast-graph"}


def test_building_ends_when_timing_must_begin(tmp_path: Path) -> None:
    args = arguments(tmp_path, batch=[2], dtype=["float32"], variants=["eager"], providers=["eager"])
    listed = Races("cpu", SIZES).entries(args)
    end = compare.until(listed, Budget(1))
    assert 50 < end - time.monotonic() < 60 - compare.CEILING_SECONDS
    assert compare.until(listed, Budget(0.01)) <= time.monotonic() + 0.1


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training and generation write a file each; a wrong baseline sets the status, a failed one does not."""
    stale = tmp_path / "train.jsonl"
    stale.write_text("from an earlier run\n")
    args = arguments(
        tmp_path,
        batch=[2],
        dtype=["float32"],
        variants=["train-step", "cudnn-graph"],
        providers=["fast", "rogue:raises"],
    )
    assert Races("cpu", SIZES).run(args) == 0
    trained, generated = (output.read(tmp_path / f"{name}.jsonl") for name in RACED)
    assert {row["provider"]: row["status"] for row in trained} == {
        "train-step": "ok",
        "cudnn-graph": "skipped",
    }
    assert {row["provider"]: row["status"] for row in generated} == {"fast": "ok", "rogue:raises": "failed"}
    assert [rows[0]["kind"] for rows in (trained, generated)] == ["train", "race"]
    assert all(row["images_per_s"] > 0 for row in (*trained, *generated) if row["status"] == "ok")
    assert trained[0]["work"]["flops"] > 3 * generated[0]["work"]["flops"]
    out = capsys.readouterr().out
    assert "train · latent_dim 8" not in out.splitlines()[0]
    assert "rogue:raises: FAILED: RuntimeError: no kernel" in out
    assert read_rows(tmp_path / "generate.jsonl") == generated
    assert race_lines(generated, "generate")[-1].endswith("a baseline: failed: RuntimeError: no kernel")

    args.providers, args.variants = ["rogue:wrong"], []
    assert Races("cpu", SIZES).run(args) == 1
    assert not stale.exists()
