"""The tables of the README and docs/ are those of bench/results."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import __main__ as bench_main
from bench import docs, output
from bench.options import UsageError


def test_the_pages_have_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    status = bench_main.main(["docs", "--check"])
    assert capsys.readouterr().out == ""
    assert status == 0


def test_a_page_that_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/results").symlink_to(docs.ROOT / "bench/results")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- bench docs: generate -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "PAGES", ["README.md"])
    assert bench_main.main(["docs", "--check"]) == 1
    assert "old" in page.read_text()
    assert bench_main.main(["docs"]) == 0
    assert capsys.readouterr().out == "README.md: out of date\nREADME.md: written\n"
    text = page.read_text()
    assert text.startswith("before\n<!-- bench docs: generate -->\n2 cores of an ")
    assert text.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in text
    assert bench_main.main(["docs", "--check"]) == 0


def test_a_table_is_of_one_machine() -> None:
    rows = [{"hardware": {"cpu": "A", "isa": isa, "cores": 2}, "versions": {}} for isa in ("AVX2", "AVX512")]
    with pytest.raises(UsageError, match="one table must come from one machine"):
        docs.machine(rows)


def full_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str | None, *rows: docs.Row) -> str:
    """The table of examples/full_run.py's results."""
    hardware = {"cpu": "A Processor", "isa": "AVX2", "cores": 2, "gpu": gpu}
    header = {"hardware": hardware, "versions": {"torch": "2.9"}}
    header |= {"runs": {"dcgan": {"epochs": 50}, "reference": {"epochs": 50}}, "floor": {"frechet": 2.5}}
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    output.append(tmp_path / "bench/results/full-run.jsonl", [{"schema": 1} | row for row in (header, *rows)])
    return docs.filled("<!-- bench docs: full -->\nold\n<!-- end -->\n")


def test_a_full_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line per run and epoch, then the floor; an unknown figure is an empty cell."""
    times = {"seconds": 440.0, "images_per_second": 136.4}
    shares = {"precision": 0.5, "recall": 0.25, "density": 0.7512, "coverage": 1.0}
    scores = {"frechet": 498.9, "kernel": 147.93, "kernel_std": 7.34} | shares
    known = {"run": "dcgan", "epoch": 1} | times | scores
    unknown = {"run": "reference", "epoch": 2} | dict.fromkeys([*times, *scores])
    text = full_run(tmp_path, monkeypatch, None, known, unknown)
    assert text.splitlines() == [
        "<!-- bench docs: full -->",
        "2 cores of an A (AVX2); PyTorch 2.9. dcgan-kernels: 1 of 50 epochs, 7 minutes of training at "
        "136 images/s; reference engine: 2 of 50 epochs.",
        "",
        "|  | epoch | seconds | images/s | Fréchet | kernel | precision | recall | density | coverage |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| dcgan-kernels | 1 | 440 | 136 | 499 | 148 ± 7.3 | 0.500 | 0.250 | 0.751 | 1.000 |",
        "| reference engine | 2 |  |  |  |  |  |  |  |  |",
        "| real images |  |  |  | 2.5 |  |  |  |  |  |",
        "<!-- end -->",
    ]


def test_the_rate_of_a_full_run_is_of_its_timed_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"run": "dcgan", "epoch": epoch, "seconds": seconds, "images_per_second": seconds and 600 / seconds}
        for epoch, seconds in ((1, 2.0), (2, None), (3, 6.0))
    ]
    text = full_run(tmp_path, monkeypatch, "NVIDIA H200", *rows)
    assert "\nNVIDIA H200; 2 cores of an A (AVX2)" in text
    assert "dcgan-kernels: 3 of 50 epochs, 8 seconds of training for 2 of them at 150 images/s.\n" in text
