"""``examples/ladder.py``: its C++ code, steps, table and plot."""

import ctypes
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, output
from bench.blocks import Block, blocks
from bench.cases import Case, float64, relative_error
from examples import ladder
from tests.support.native import NEEDED

pytestmark = NEEDED

SIZES = {"features": 9, "image_size": 32}
CASES = {
    "generate": Case("generate", 5, "float32", "cpu", 1, SIZES | {"channels": 3}),
    "discriminate": Case("discriminate", 5, "float32", "cpu", 1, SIZES),
}
QUICK = ["--features", "8", "--image-size", "32", "--batch", "5", "--seconds", "0.01", "--rounds", "1"]


@pytest.fixture(autouse=True)
def short_peak_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.01)


@pytest.fixture(scope="module")
def compiled() -> ctypes.CDLL:
    return ladder.build()


def layer(command: str, index: int) -> Block:
    return blocks(CASES[command].network().requires_grad_(False))[index]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("command", CASES)
def test_every_step_computes_the_layer(compiled: ctypes.CDLL, command: str, index: int) -> None:
    """Dense, narrow and spatial layers with channel counts that do not fill a vector."""
    block = layer(command, index)
    steps = ladder.steps(block, 5, 1, compiled)
    with torch.no_grad():
        expected = float64(block.convolution, steps[-1].x)
        errors = {step.name: relative_error(step.run(step.x), expected[: len(step.x)]) for step in steps}
    assert all(error < ladder.TOLERANCE for error in errors.values()), errors
    assert [len(step.x) for step in steps] == [ladder.NAIVE_IMAGES, *(len(steps) - 1) * [5]]
    assert [step.products is None for step in steps] == [*(len(steps) - 2) * [False], True, True]


def test_products() -> None:
    """Zero insertion quadruples the work of a transposed convolution; Winograd needs 9/16 and 25/64 of it."""
    layers = blocks(Case("generate", 1, "float32", "cpu", 1).network())
    g = layers[2].geometry
    assert [ladder.products(g, step) for step in ("im2col", "direct", "f2", "f4")] == [4, 1, 9 / 16, 25 / 64]
    ragged = g._replace(height=5, width=4)
    assert ladder.products(ragged, "f4") == 25 / 64 * 8 / 5
    down = blocks(Case("discriminate", 1, "float32", "cpu", 1).network())[2].geometry
    assert [ladder.products(down, step) for step in ("im2col", "direct", "f2", "f4")] == [
        1,
        1,
        9 / 16,
        25 / 64,
    ]


def test_all_threads_are_a_separate_step(compiled: ctypes.CDLL) -> None:
    steps = ladder.steps(layer("generate", 1), 5, 3, compiled)
    assert [step.threads for step in steps] == [1, 1, 1, 1, 1, 3, 1, 1, 3, 3]
    assert steps[5].name in {step.name for step in steps[2:5]}, "the algorithm that the engine chooses"


def test_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "ladder.jsonl"
    assert ladder.main(["--layer", "2", *QUICK, "--threads", "2", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.strip()]
    heading = "32→16 @4→8 transposed convolution · generate · features 8 · image_size 32 · batch 5"
    assert lines[0].startswith(heading)
    numbered = [line.split()[0] for line in lines if line.split()[0].isdigit()]
    assert numbered == ["1", "2", "3", "4", "5", "6"]
    assert "GFLOP/s on 1 thread and " in out
    assert "the seven loops ran on 4 of the 5 images" in out
    rows = output.read(file)
    assert [row["mark"] for row in rows] == [*6 * [False], *4 * [True]]
    assert all(row["error"] < ladder.TOLERANCE for row in rows)
    assert rows[0]["times"]["median"] * rows[0]["flops_per_s"] == pytest.approx(2 * 16 * 32 * 16 * 16 * 4)

    image = tmp_path / "ladder.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    image.unlink()
    assert ladder.main(["--draw", str(file)]) == 0
    assert image.exists()


def test_the_last_of_repeated_measurements_is_drawn() -> None:
    row: dict[str, Any] = {
        "case": asdict(CASES["generate"]),
        "hardware": {"cpu": "a"},
        "isa": "avx2",
        "layer": "8→4 @4→8",
        "step": "seven loops",
        "threads": 1,
    }
    (bars,) = ladder.panels([row | {"flops_per_s": 1.0}, row | {"flops_per_s": 2.0}]).values()
    assert [bar["flops_per_s"] for bar in bars.values()] == [2.0]


def test_a_wrong_step_is_not_timed(compiled: ctypes.CDLL) -> None:
    block = layer("generate", 1)
    correct, *_ = ladder.steps(block, 5, 1, compiled)
    wrong = ladder.Step("wrong", lambda x: correct.run(x) * 1.001, correct.x, 1, 1.0)
    with torch.no_grad():
        rows, messages = ladder.measure(block, [wrong, correct], 0.01, 1)
    assert [row["step"] for row in rows] == [correct.name]
    assert messages == ["wrong: error 1.0e-03 > 5e-06"]


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        ladder.main([*QUICK, *arguments])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_an_invalid_layer(capsys: pytest.CaptureFixture[str]) -> None:
    error = usage_error(capsys, "--layer", "9")
    assert "the generate network has 1 100→32 @1→4, 2 32→16 @4→8, 3 16→8 @8→16, 4 8→1 @16→32; got 9" in error


def test_without_a_compiler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "ladder.cpp needs a C++ compiler; CXX is 'no-such-compiler'" in usage_error(capsys)


def test_a_failing_compiler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "FLAGS", ("--no-such-flag",))
    assert "no-such-flag" in usage_error(capsys)
