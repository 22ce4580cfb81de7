"""The benchmarks of the stage ``bench`` with tiny networks on the CPU, and the smoke test."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest

from bench import records
from bench.budget import Budget
from bench.ceiling import Ceiling
from bench.stages import plan, races, smoke
from bench.stages.summary import race_lines

SIZES = {"features": 4, "image_size": 32, "latent_dim": 8}
FOLDER = str(Path(__file__).parents[1])


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", FOLDER)
    monkeypatch.setattr(races, "SECONDS", 0.02)
    monkeypatch.setattr("bench.ceiling.measure", lambda device, dtype: Ceiling(1e12, 1e11, "a stub"))


def test_entries() -> None:
    listed = races.entries([64, 1024], ["bfloat16"], races.PROVIDERS["train"], races.PROVIDERS["generate"])
    assert [(case.command, case.batch) for case, _ in listed[::3]] == [
        ("train", 64),
        ("train", 1024),
        ("generate", 64),
        ("generate", 1024),
    ]
    assert [provider.name for _, provider in listed[:3]] == ["train-step", "cudnn-graph", "reduce-overhead"]
    assert {provider.name for _, provider in listed[6:] if provider.searches} == {"cudnn-graph"}
    assert {provider.name for _, provider in listed if provider.ours} == {"train-step", "fast-graph"}


def test_building_ends_when_timing_must_begin() -> None:
    listed = races.entries([2], ["float32"], ["eager"], ["eager"], "cpu", SIZES)
    end = races.until(listed, Budget(1))
    assert 50 < end - time.monotonic() < 60 - races.CEILING_SECONDS
    assert races.until(listed, Budget(0.01)) <= time.monotonic() + 0.1


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training and generation write a file each; a wrong baseline sets the status, a failed one does not."""
    stale = tmp_path / "train.jsonl"
    stale.write_text("from an earlier run\n")
    args = argparse.Namespace(
        out=tmp_path,
        batch=[2],
        dtype=["float32"],
        variants=["train-step", "cudnn-graph"],
        providers=["fast", "rogue:raises"],
    )
    assert races.run(args, Budget(3), "cpu", SIZES) == 0
    trained, generated = (records.read(tmp_path / name) for name in races.FILES.values())
    assert {row["provider"]: row["status"] for row in trained} == {
        "train-step": "ok",
        "cudnn-graph": "skipped",
    }
    assert {row["provider"]: row["status"] for row in generated} == {"fast": "ok", "rogue:raises": "failed"}
    assert [records.kind(rows[0]) for rows in (trained, generated)] == ["train", "race"]
    assert all(row["images_per_s"] > 0 for row in (*trained, *generated) if row["status"] == "ok")
    assert trained[0]["work"]["flops"] > 3 * generated[0]["work"]["flops"]
    out = capsys.readouterr().out
    assert "train · latent_dim 8" not in out.splitlines()[0]
    assert "rogue:raises: FAILED: RuntimeError: no kernel" in out
    assert plan.read_rows(tmp_path / "generate.jsonl") == generated
    assert race_lines(generated, "generate")[-1].endswith("a baseline: failed: RuntimeError: no kernel")

    args.providers, args.variants = ["rogue:wrong"], []
    assert races.run(args, Budget(3), "cpu", SIZES) == 1
    assert not stale.exists()


# --- the smoke test -----------------------------------------------------------------------------------------


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.run(argparse.Namespace(), Budget(1), "cpu") == 0
    machine, software, product, step = capsys.readouterr().out.splitlines()
    assert machine.startswith("no GPU; ")
    assert "torch 2" in software
    assert product.startswith("product: ok (")
    assert step.startswith("step: ok (")


def test_smoke_continues_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke, "PRODUCT", 0.0)
    monkeypatch.setattr(smoke, "TrainStep", None)
    assert smoke.run(argparse.Namespace(), Budget(1), "cpu") == 1
    _, _, product, step = capsys.readouterr().out.splitlines()
    assert product.startswith("product: error ")
    assert step.startswith("step: TypeError: ")


def test_a_broken_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def describe(device: str) -> str:
        raise RuntimeError("no driver")

    monkeypatch.setattr(smoke, "describe", describe)
    assert smoke.run(argparse.Namespace(), Budget(1), "cpu") == plan.MACHINE_BROKEN
    assert capsys.readouterr().out == "the machine does not work: RuntimeError: no driver\n"
