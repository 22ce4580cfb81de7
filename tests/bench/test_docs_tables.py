"""The tables of the README and docs/ are those of bench/results."""

from __future__ import annotations

import pytest

from bench import __main__ as bench_main
from bench import docs
from bench.options import UsageError


def test_the_pages_have_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    status = bench_main.main(["docs", "--check"])
    assert capsys.readouterr().out == ""
    assert status == 0


def test_a_page_that_is_out_of_date(tmp_path, monkeypatch, capsys) -> None:
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
