"""Printed tables, JSON records and plots."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from bench import output, plot
from bench.__main__ import main
from bench.cases import Case, Work
from bench.compare import status
from bench.machine import Ceiling
from bench.providers import PROVIDERS
from bench.race import Outcome
from bench.timing import Spread

WORK = Work(flops=200_000_000, activations=200_000, weights=3_000_000)
CEILING = Ceiling(flops=200e9, bandwidth=20e9, measure="float32 FMA peak")


def timed(name: str, seconds: float, columns: tuple[str, ...] = ("warm",)) -> Outcome:
    spread = Spread(seconds, 0.9 * seconds, 1.1 * seconds, 100)
    return Outcome(PROVIDERS[name], "ok", "", 6e-7, 1e-5, dict.fromkeys(columns, spread), 50_000_000)


def case(device: str = "cpu", batch: int = 64) -> Case:
    return Case("generate", batch, "float32", device, 2)


def raced(*outcomes: Outcome, device: str = "cpu", batch: int = 64) -> list[output.Row]:
    shared = output.common("race")
    rows = output.race_rows(case(device, batch), WORK, CEILING, outcomes)
    return [shared | row for row in rows]


MIXED = raced(
    timed("eager", 0.128),
    Outcome(PROVIDERS["onnxruntime"], "skipped", "not installed"),
    timed("openvino", 0.08),
    Outcome(PROVIDERS["compile"], "wrong", "error 3.0e-02 > 1e-05", 3e-2),
    Outcome(PROVIDERS["zentorch"], "failed", "RuntimeError: " + 60 * "long "),
    timed("fast", 0.04),
    Outcome(PROVIDERS["fast-graph"], "skipped", "no GPU here"),
)


def printed(renderable: object) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=output.PIPED_WIDTH).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_race_table() -> None:
    lines = printed(output.race_table(case().title, MIXED))
    assert lines[0].strip() == "generate · batch 64 · float32 · cpu, 2 threads"
    rows = [line.split() for line in lines if line.strip() and line.split()[0] in PROVIDERS]
    assert rows[0] == ["fast", "1,600", "10%", "320", "2.00×", "160%", "50", "6.0e-07"]
    assert rows[1] == ["openvino", "800", "10%", "160", "1.00×", "80%", "50", "6.0e-07"]
    assert rows[2][:5] == ["eager", "500", "10%", "100", "0.62×"]
    rest = {row[0]: " ".join(row[1:]).lstrip("– ") for row in rows[3:]}
    assert rest["onnxruntime"] == "not installed"
    assert rest["compile"] == "WRONG: error 3.0e-02 > 1e-05"
    assert rest["zentorch"].startswith("FAILED: RuntimeError: long")
    assert rest["fast-graph"] == "no GPU here"
    assert len(rows) == 7, "one row each, not wrapped"


def test_heading_names_the_sizes_and_is_not_wrapped() -> None:
    sizes = {"channels": 3, "features": 128, "image_size": 128}
    wide = Case("generate", 1, "float32", "cpu", 1, sizes)
    lines = printed(output.race_table(wide.title, raced(timed("eager", 1))))
    assert (
        lines[0]
        == "generate · channels 3 · features 128 · image_size 128 · batch 1 · float32 · cpu, 1 thread"
    )


def test_race_table_shows_notes() -> None:
    noted = timed("fast", 0.04)
    noted.note = "native avx2"
    assert any(
        line.endswith("6.0e-07   native avx2") for line in printed(output.race_table("", raced(noted)))
    )


def test_failure_reasons_are_printed_in_full() -> None:
    assert output.failures(MIXED) == ["zentorch: FAILED: RuntimeError: " + 60 * "long "]


def test_ceiling_legend() -> None:
    direct, memory = output.ceiling_lines(MIXED[0])
    assert direct.startswith("ceiling: 1,000 images/s by direct convolution (200 GFLOP/s, float32 FMA peak")
    assert "0.2 GFLOP per image" in direct
    assert memory.startswith("memory:  20,253 images/s (20.0 GB/s, copy)")


def test_race_table_on_a_gpu() -> None:
    rows = raced(timed("eager", 0.1, ("warm", "cold", "graph")), device="cuda")
    lines = printed(output.race_table("", rows))
    assert any("cold L2   CUDA graph" in line for line in lines)
    assert any(line.split() == ["eager", "640", "10%", "640", "640", *line.split()[5:]] for line in lines)


def test_no_ratio_without_a_baseline() -> None:
    lone = raced(timed("fast", 0.04))
    assert lone[0]["ratio_to_fastest_baseline"] is None
    assert any(" – " in line for line in printed(output.race_table("", lone)) if "fast" in line)


def test_summary_table() -> None:
    lines = printed(
        output.summary_table([raced(timed("eager", 0.01), batch=1), raced(timed("eager", 0.128))])
    )
    assert any(line.split() == ["provider", "1", "float32", "64", "float32"] for line in lines)
    assert any(line.split() == ["eager", "100", "500"] for line in lines)
    assert any(line.split() == ["ceiling", "1,000", "1,000"] for line in lines)


def test_exit_status() -> None:
    assert status(MIXED) == 1, "compile is wrong"
    failed = Outcome(PROVIDERS["zentorch"], "failed", "x")
    assert status(raced(timed("eager", 1), failed)) == 0, "a baseline may fail"
    assert status(raced(timed("eager", 1), Outcome(PROVIDERS["fast"], "failed", "x"))) == 1


def test_json_rows(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.jsonl"
    output.append(file, MIXED)
    output.append(file, MIXED)
    rows = output.read(file)
    assert len(rows) == 14
    best = rows[0]
    assert best["provider"] == "fast"
    assert best["schema"] == output.SCHEMA
    assert best["images_per_s"] == pytest.approx(1600)
    assert best["flops_per_s"] == pytest.approx(320e9)
    assert best["ratio_to_fastest_baseline"] == pytest.approx(2)
    assert best["share_of_ceiling"] == pytest.approx(1.6)
    assert best["peak_bytes"] == 50_000_000
    assert best["times"]["warm"]["count"] == 100
    assert best["case"] == asdict(case())
    assert best["hardware"]["cores"] >= 1
    assert best["versions"]["torch"]
    assert {tuple(sorted(row)) for row in rows} == {tuple(sorted(best))}, "all rows have the same keys"
    wrong = next(row for row in rows if row["status"] == "wrong")
    assert wrong["images_per_s"] is None
    assert wrong["error"] == 3e-2
    assert wrong["reason"] == "error 3.0e-02 > 1e-05"


def test_an_infinite_error_is_recorded_as_none(tmp_path: Path) -> None:
    row = raced(Outcome(PROVIDERS["eager"], "wrong", "error inf", float("inf")))[0]
    assert row["error"] is None
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("line", ["{", "[]", '{"schema": 99}'])
def test_reading_an_invalid_file_fails(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:1 is not"):
        output.read(file)


def test_plot_has_one_panel_per_network() -> None:
    rows = raced(timed("eager", 1))
    wide = [row | {"case": row["case"] | {"sizes": {"features": 128}}} for row in rows]
    panels = plot.arrange([*rows, *wide])
    assert [network for network, _, _ in panels] == ["generate", "generate · features 128"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [*MIXED, *raced(timed("eager", 0.01), batch=1)]
    panels = plot.arrange(rows)
    ((_, batches),) = panels.items()
    assert {batch: sorted(found) for batch, found in batches.items()} == {
        64: ["eager", "fast", "openvino"],
        1: ["eager"],
    }
    plot.draw(rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["ladder", "learn"])
def test_plots_of_moved_commands(command: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = Path(__file__).parents[2] / "bench/results"
    assert main(["plot", f"{results / command}.jsonl", "--out", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
