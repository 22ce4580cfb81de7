"""The stage ``sanitize``, with stubs for compute-sanitizer and Python."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.timing import Budget
from tests.gpu.stages import sanitize


def sanitized(out: Path) -> int:
    out.mkdir(exist_ok=True)
    return sanitize.run(out, Budget(1))


def test_without_a_sanitizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitized(tmp_path) == 0
    assert "compute-sanitizer is not installed here" in capsys.readouterr().out


def test_the_sanitizer_is_found_in_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find_sanitizer() == str(tool)


@pytest.mark.parametrize(("status", "verdict"), [(0, "clean"), (9, "ERRORS FOUND"), (1, "FAILED (1)")])
def test_sanitize(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: int,
    verdict: str,
) -> None:
    """Every tool runs the same script; its output is kept and its status reported."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"; echo "$PYTORCH_NO_CUDA_MEMORY_CACHING"\nexit {status}\n')
    tool.chmod(0o755)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho done\n")
    python.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr("sys.executable", str(python))
    assert sanitized(tmp_path / "out") == int(status != 0)
    out = capsys.readouterr().out
    assert "plain: clean: done" in out
    for name in sanitize.SANITIZERS:
        assert f"{name}: {verdict}" in out
        text = (tmp_path / "out" / f"sanitize-{name}.txt").read_text()
        assert text == f"--tool {name} --error-exitcode 9 {python} -m tests.gpu.stages.sanitize\n1\n"


def test_a_script_that_fails_without_tools_ends_the_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no GPU >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: os.devnull)
    monkeypatch.setattr("sys.executable", str(python))
    assert sanitized(tmp_path / "out") == 1
    assert "plain: FAILED (1): no GPU" in capsys.readouterr().out
