"""``python -m bench scale`` and ``profile`` on tiny networks: measurements, tables, records and plots."""

import argparse
from pathlib import Path

import pytest

from bench import blocks, output, scale
from bench.__main__ import main
from bench.cases import Case
from bench.machine import Ceiling
from tests.support.native import NEEDED

pytestmark = NEEDED

TINY = ["--features", "4", "--image-size", "32", "--seconds", "0.01", "--rounds", "1"]


def test_workspace_is_that_of_one_block() -> None:
    """The workspace stops growing at some batch size, unlike the batch's activations."""
    sizes = [
        (scale.chain(case).workspace, scale.layerwise_bytes(case))
        for case in (Case("generate", batch, "float32", "cpu", 2) for batch in (1, 1024, 16384))
    ]
    assert sizes[0][0] < sizes[1][0] == pytest.approx(sizes[2][0], rel=0.1)
    assert [layerwise / sizes[0][1] for _, layerwise in sizes] == [1, 1024, 16384]
    assert sizes[0][1] == 4 * (128 * 16 * 16 + 64 * 32 * 32)


def test_default_points(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    monkeypatch.setattr(scale.machine, "cores", lambda: 6)
    assert scale.default_threads() == [1, 2, 4, 6]
    monkeypatch.setattr(scale.machine, "cores", lambda: 2)
    scale.add_arguments(parser)
    args = parser.parse_args([])
    assert args.threads == [1, 2]
    assert args.batch[0] == 1
    assert args.batch[-1] == 1024


def test_scale_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scale.jsonl"
    monkeypatch.setattr(scale, "measure_ceiling", lambda *_: Ceiling(2e9, 3e9, "a GEMM peak"))
    options = ["--network", "discriminate", "--batch", "3", "1", "--threads", "1", *TINY, "--json", str(file)]
    assert main(["scale", *options]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:5] == ["discriminate", "·", "features", "4", "·"]
    points = [line for line in lines if line and line[0] in ("1", "3")]
    assert [(line[0], line[3]) for line in points] == [("1", "1.00×"), ("3", "1.00×")]
    assert "workspace: " in out
    rows = output.read(file)
    assert [(row["kind"], row["case"]["batch"]) for row in rows] == [("scale", 1), ("scale", 3)]
    assert all(row["error"] < row["tolerance"] for row in rows)
    assert all(row["workspace_bytes"] > 0 for row in rows)
    assert all(0 < row["peak_bytes"] < 1 << 30 for row in rows)
    assert all(row["note"].startswith("native ") for row in rows)

    pytest.importorskip("matplotlib")
    assert main(["plot", str(file), "--out", str(tmp_path / "scale.png")]) == 0
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_profile_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "profile.jsonl"
    options = ["--batch", "2", "--threads", "1", *TINY, "--json", str(file)]
    assert main(["profile", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("generate · features 4 · image_size 32 · batch 2 · float32 · cpu, 1 thread")
    names = ["100→16 @1→4", "16→8 @4→8", "8→4 @8→16", "4→1 @16→32", blocks.TOGETHER, blocks.WHOLE]
    at = [out.index(name) for name in names]
    assert at == sorted(at)
    rows = output.read(file)
    assert [row["layer"] for row in rows] == [name for name in names if name != blocks.TOGETHER]
    assert rows[0]["algorithm"] == "dense"
    assert rows[-1]["flops"] == sum(row["flops"] for row in rows[:-1])
    assert sum(row["share"] for row in rows[:-1]) == pytest.approx(1)


def test_plot_rejects_unsupported_and_mixed_results(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    output.append(file, [output.common("profile")])
    with pytest.raises(SystemExit):
        main(["plot", str(file)])
    assert "cannot plot profile results, only those of race, scale, " in capsys.readouterr().err
    output.append(file, [output.common("scale")])
    with pytest.raises(SystemExit):
        main(["plot", str(file)])
    assert "cannot plot the results of several commands together: profile, scale" in capsys.readouterr().err
