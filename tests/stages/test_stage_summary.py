"""The printed summary of at most sixty lines, and the archive with everything else."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path
from typing import Any

from tests.gpu.stages import summary
from tests.gpu.stages.summary import LINES, WIDTH, Summary, fit_lines


def test_failures_are_first() -> None:
    found = fit_lines(
        [
            Summary("smoke", "9 s", shown=["an H100"]),
            Summary("tests", "90 s; 250 passed", ["a: no", "b: no"], missed=list("cdefgh")),
            Summary("bench", "80 s", ["train 64: wrong"], ["a table"]),
        ],
        "all.txt",
    )
    assert found == [
        "FAILED tests: a: no",
        "FAILED tests: b: no",
        "FAILED bench: train 64: wrong",
        "== smoke: 9 s",
        "an H100",
        "== tests: 90 s; 250 passed; 2 FAILED; not reached in time: c, d, e, f and 2 more",
        "== bench: 80 s; 1 FAILED",
        "a table",
    ]


def test_no_more_lines_than_allowed() -> None:
    """Keeps every heading, the first failures and as many table lines as fit."""
    many = [
        Summary("tests", "90 s", [f"test {i}: {'x' * 500}" for i in range(200)]),
        Summary("bench", "80 s", ["train: wrong"], [f"row {i}" for i in range(20)]),
        Summary("kernels", "40 s", [], [f"layer {i}" for i in range(50)]),
    ]
    found = fit_lines(many, "all.txt")
    assert len(found) == LINES
    assert max(map(len, found)) == WIDTH
    assert [line.split(":")[0] for line in found if line.startswith("==")] == [
        "== tests",
        "== bench",
        "== kernels",
    ]
    assert sum(line.startswith("FAILED ") for line in found) == summary.FAILURES
    assert "row 19" in found
    assert found[-1] == f"({274 - LINES + 1} lines more in all.txt)"
    (first, *_) = fit_lines(many[:1], "all.txt", 10)
    assert first.startswith("FAILED tests: test 0: xxx")
    assert len(fit_lines(many[:1], "all.txt", 10)) == 10
    assert len(fit_lines(many[2:], "all.txt")) == 51


def race_row(provider: str, batch: int, images: float | None, **more: Any) -> dict[str, Any]:
    row = {
        "case": {"command": "train", "batch": batch, "dtype": "bfloat16"},
        "provider": provider,
        "ours": provider == "train-step",
        "status": "ok" if images else "failed",
        "reason": None if images else "RuntimeError: in torch",
        "images_per_s": images,
    }
    return row | more


def test_a_race() -> None:
    rows = [
        race_row("train-step", 64, 40_000.0),
        race_row("cudnn-graph", 64, 32_000.0),
        race_row("reduce-overhead", 64, None),
        race_row("train-step", 1024, 111_000.0),
        race_row("cudnn-graph", 1024, 74_000.0, status="wrong", reason="error 1 > 0", images_per_s=None),
        {"phase": "G fprop"},  # a record of another command
    ]
    title, heads, _, *lines = summary.race_lines(rows, "train")
    assert title.strip() == "train, images/s"
    assert heads.split() == ["provider", "64", "bfloat16", "1024", "bfloat16"]
    assert [line.split() for line in lines[:4]] == [
        ["train-step", "40,000", "111,000"],
        ["cudnn-graph", "32,000", "WRONG"],
        ["reduce-overhead", "FAILED", "–"],
        ["ours", "/", "best", "other", "1.25×", "–"],
    ]
    assert lines[4:] == ["train 64 bfloat16 reduce-overhead, a baseline: failed: RuntimeError: in torch"]
    assert summary.failures_of(rows) == ["train 1024 bfloat16 cudnn-graph: wrong: error 1 > 0"]
    assert summary.failures_of([race_row("train-step", 64, None)]) == [
        "train 64 bfloat16 train-step: failed: RuntimeError: in torch"
    ]
    assert summary.race_lines([], "train") == []


def test_kernels() -> None:
    def row(phase: str, who: str, us: float | None, batch: int = 64) -> dict[str, Any]:
        entry = {"network": "G", "layer": "512→256", "phase": phase, "batch": batch, "dtype": "bfloat16"}
        figures = {"status": "wrong", "error": 0.5} if us is None else {"status": "ok", "us": us}
        return entry | {"contestant": who} | figures

    rows = [
        row("forward", "ours", 17.0),
        row("forward", "cudnn", 12.0),
        row("dgrad", "ours", None),
        row("pack", "ours", 3.0),
        row("forward", "ours", 16.0),
        row("forward", "ours", 99.0, 1024),
    ]
    *_, first, second = summary.kernel_lines(rows)
    cells = ["16.0", "/", "12.0", "WRONG", "/", "–", "–", "/", "–", "3.0"]
    assert first.split() == ["G", "512→256", "64", "bfloat16", *cells]
    assert second.split()[2] == "1024"
    assert summary.wrong_kernels(rows) == ["G 512→256 dgrad 64 bfloat16: wrong: error 0.5"]


# --- the archive --------------------------------------------------------------------------------------------


def names(path: Path) -> list[str]:
    with tarfile.open(path) as file:
        return file.getnames()


def test_the_archive_has_everything_but_claims(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    for name in ("all.txt", "train.jsonl", "NVIDIA_H100.json", "logs/bench.txt", "tests/claims/3", "x.bin"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    for _ in range(2):  # the second archive does not contain the first
        path, left_out = summary.archive(out)
        assert path == out / "gpu.tar.gz"
        assert not left_out
        assert names(path) == [
            f"gpu/{name}"
            for name in ("train.jsonl", "NVIDIA_H100.json", "all.txt", "logs/bench.txt", "x.bin")
        ]
    with tarfile.open(path) as file:
        member = file.extractfile("gpu/logs/bench.txt")
        assert member is not None
        assert member.read() == b"logs/bench.txt"


def test_the_archive_respects_the_size_limit(tmp_path: Path) -> None:
    """Large, unimportant files are left out and named; long logs are truncated to their end."""
    out = tmp_path / "gpu"
    out.mkdir()
    noise = random.Random(0).randbytes
    (out / "train.jsonl").write_text(json.dumps({"figure": 1}))
    (out / "small.txt").write_bytes(noise(20_000))
    (out / "large.txt").write_bytes(noise(200_000))
    (out / "core").write_bytes(noise(40_000))
    (out / "repeats.txt").write_text("again\n" * summary.MAX_LOG + "the end")
    path, left_out = summary.archive(out, 100_000)
    assert left_out == ["large.txt"]
    assert path.stat().st_size <= 100_000
    with tarfile.open(path) as file:
        member = file.extractfile("gpu/repeats.txt")
        assert member is not None
        text = member.read()
    assert text.startswith(b"(the last 524288 bytes of ")
    assert text.endswith(b"the end")
