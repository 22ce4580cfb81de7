"""``python -m tests.learning``: tiny end-to-end runs, their result file and their plot."""

import json
from pathlib import Path

import pytest

from bench import output
from tests.learning import criterion, plot, soak
from tests.learning.__main__ import Outcome, main
from tests.learning.criterion import Settings

TINY = ["--features", "2", "--image-size", "32", "--batch", "4", "--threads", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criterion, "START", 2)
    options = ["--steps", "4", "--seeds", "3", "5", "--channels-last", *TINY, "--out", str(tmp_path)]
    assert main(options) in (0, 1)
    out = capsys.readouterr().out
    assert out.startswith("4 steps on real digits · features 2 · image_size 32 · batch 4 · cpu, 1 thread")
    assert "\nPASS\n" in out or "\nFAIL\n" in out
    rows = output.read(tmp_path / "learn.jsonl")
    variants = [(row["way"], row.get("seed")) for row in rows if "way" in row]
    runs = [(variant, seed) for variant in ("reference", "fast", "channels_last") for seed in (3, 5)]
    assert variants == [*runs, ("real digits", None)]
    assert {len(curve) for row in rows[:6] for curve in row["curves"].values()} == {4}
    verdicts = {row["verdict"]: row["findings"] for row in rows if "verdict" in row}
    assert list(verdicts) == ["fast", "channels_last"]
    starts = [finding for finding in verdicts["fast"] if "start" in finding["quantity"]]
    assert [finding["ok"] for finding in starts] == [True, True]

    image = tmp_path / "learn.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    image.unlink()
    assert main(["--draw", str(tmp_path / "learn.jsonl")]) == 0
    assert image.exists()
    older = [row | {"date": "2000-01-01"} for row in rows]
    assert plot.last([*older, *rows]) == plot.last(rows)


def test_status_follows_the_verdict_on_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {ok: [criterion.Finding("a", 1.0, 2.0), criterion.Finding("b", 1.0, float(ok))] for ok in (0, 1)}
    assert [Outcome(Settings(), {}, {"fast": found[ok]}, {}).ok for ok in (0, 1)] == [False, True]
    rounding = {"fast": found[1], "channels_last": found[0]}
    assert Outcome(Settings(), {}, rounding, {}).ok, "channels_last is shown but does not affect the verdict"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--seeds", "1", "1"], "at least two"), (["--image-size", "33"], "invalid choice: 33")],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_soak(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = main(["--soak", "--steps", "3", *TINY, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "soak.json").read_text())
    assert [run["batches"] for run in report["runs"]] == [[4], [4, 1, 2, 8, 1]]
    assert status == int(any(run["problems"] for run in report["runs"]))
    assert all(run["finite"] for run in report["runs"])
    assert capsys.readouterr().out.startswith("3 steps of fast networks")
    assert soak.SETTINGS.steps == 2000
