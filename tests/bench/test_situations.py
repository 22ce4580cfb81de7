"""``python -m bench situations``: edited networks still match, verdicts, and the command."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from bench import situations
from bench.__main__ import main
from bench.options import UsageError
from bench.situations import EDITS, Situation
from tests.support.native import NEEDED

pytestmark = NEEDED


@pytest.mark.parametrize("network", ["G", "D"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("edit", EDITS)
def test_edited_networks_match(network: str, training: bool, edit: str) -> None:
    situation = Situation(network, "float32", "training" if training else "inference", edit, 8, 32, 3)
    eager, ours, x = situations.networks(situation)
    assert eager.training is training
    assert situations.error(eager, ours, x, contextlib.nullcontext) < situations.TOLERANCES[torch.float32]
    expected, actual = (situations.MODES[situation.mode][0](model, x) for model in (eager, ours))
    assert float((actual - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(
    ("fast", "error", "verdict"),
    [
        (1.0, 0.0, ""),
        (1 / 0.97 - 1e-6, 0.0, ""),
        (1.05, 0.0, "slower"),
        (0.5, 1.0, "wrong"),
        (0.5, float("nan"), "wrong"),
    ],
)
def test_verdicts(fast: float, error: float, verdict: str) -> None:
    situation = Situation("G", "float32", "inference")
    assert situations.verdict(situation, {"ratio": 1 / fast, "error": error}) == verdict


@pytest.mark.parametrize(
    ("ratios", "last", "seconds"),
    [([1.0], 1.0, [2.0]), ([0.9, 1.2], 1.2, [2.0, 8.0]), ([0.9, 0.8], 0.8, [2.0, 8.0])],
)
def test_slower_rows_are_measured_again_for_longer(
    ratios: list[float], last: float, seconds: list[float]
) -> None:
    given, remaining = [], list(ratios)

    def measure(seconds: float, rounds: int) -> dict[str, float]:
        given.append((seconds, rounds))
        return {"ratio": remaining.pop(0)}

    row = situations.measured_twice(measure, lambda row: situations.judge(row["ratio"], 0, 0), 2.0, 3)
    assert row == {"ratio": last}
    assert given == [(s, int(3 * s / 2)) for s in seconds]


def test_situations_cover_every_dtype_mode_and_edit() -> None:
    listed = situations.situations(16)
    assert len(listed) == len(set(listed))
    for network in ("G", "D"):
        own = [s for s in listed if s.network == network]
        assert {(s.dtype, s.mode) for s in own} >= {
            (d, m) for d in situations.DTYPES for m in situations.MODES
        }
        assert {s.edit for s in own} == {"", *EDITS}
        assert any(s.busy for s in own)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    options = ["--batch", "2", "--seconds", "0.02", "--rounds", "1", "--threads", "1"]
    status = main(["situations", *options, "--only", "D inference 32", "--json", str(file)])
    printed = capsys.readouterr().out
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert (row["network"], row["mode"], row["image_size"], row["batch"]) == ("D", "inference", 32, 2)
    assert row["ratio"] == pytest.approx(row["eager_s"] / row["fast_s"])
    assert row["error"] < 1e-4
    assert "image size 32" in printed
    assert status == int(row["ratio"] < situations.MIN_RATIO)


def test_only_with_unmatched_words_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, UsageError)):
        main(["situations", "--only", "nonsense"])
    assert "argument --only: no situation has all of the words 'nonsense'" in capsys.readouterr().err
