"""``python -m bench gpu``: what is tuned first and kept, compute-sanitizer; with stand-ins for the GPU."""

from __future__ import annotations

import argparse
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from bench import gpu, pretend, shortlist, warm
from bench.budget import Budget
from bench.layers import Layer
from dcgan.kernels.gpu import tiles

SHARED = tiles.SHARED_LIMIT[90]


def test_training_at_batch_64_is_tuned_first() -> None:
    order = list(gpu.groups(gpu.TUNED_BATCHES))
    assert order[:2] == [(64, "bfloat16"), (64, "tf32")]
    assert {dtype for _, dtype in order[-len(gpu.TUNED_BATCHES) :]} == {"float32"}
    phases = [task.layer.phase for task in gpu.tasks(64, "bfloat16", {}, 132, SHARED)]
    assert phases.index("eval") == len(phases) - phases.count("eval")
    assert set(phases) == {"forward", "dgrad", "wgrad", "eval"}


def test_a_shortlist_has_both_ways_and_the_models_choice() -> None:
    tasks = gpu.tasks(64, "bfloat16", {}, 132, SHARED)
    assert all(0 < len(task.tiles) <= shortlist.KEEP for task in tasks)
    assert len({task.layer.problem.key() for task in tasks}) == len(tasks)
    for task in tasks:
        every = shortlist.every(task.layer, SHARED)
        assert set(task.tiles) <= set(every)
        plain = task.layer.problem.fusion.split("+")[0] == "none" and task.layer.phase != "wgrad"
        assert not plain or all(tile.fused for tile in every)
        assert tiles.estimate(task.layer.problem, 132) in every


def test_what_is_tuned_is_not_tuned_again() -> None:
    tasks = gpu.tasks(64, "bfloat16", {}, 132, SHARED)
    key = tasks[0].layer.problem.key()
    rest = gpu.tasks(64, "bfloat16", {key: tasks[0].tiles[0]}, 132, SHARED)
    assert len(rest) == len(tasks) - 1


def test_float32_and_tf32_are_told_apart() -> None:
    (tf32, *_), (ieee, *_) = (gpu.tasks(8, dtype, {}, 132, SHARED) for dtype in ("tf32", "float32"))
    assert (tf32.layer.problem.precision, ieee.layer.problem.precision) == ("tf32", "ieee")


class _Pool:
    """Compiles nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, *arguments: Any) -> Any:
        return types.SimpleNamespace(exception=lambda: None)


@pytest.fixture
def tuned_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """tune() where a tile's time is what a function says of it; returns the file's tiles."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: pretend.H100.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: pretend.H100)
    monkeypatch.setattr(warm, "Compilers", _Pool)
    listed = warm.listed
    monkeypatch.setattr(warm, "listed", lambda *where: listed(*where[:4], "meta"))

    def run(times: Any, budget: Budget) -> dict[str, tiles.Tile]:
        monkeypatch.setattr(gpu, "time_tile", lambda layer, tile, processors: times(layer, tile))
        args = argparse.Namespace(out=tmp_path / "out", batch=[64])
        args.out.mkdir(exist_ok=True)
        assert gpu.tune(args, budget) == 0
        name = tiles.gpu_file(pretend.H100.name)
        here, cached = tiles.read(args.out / name), tiles.read(tiles.cache_file(pretend.H100.name))
        assert here == cached
        return here

    return run


def ticking(minutes: float) -> Budget:
    """A second passes with every look at the clock."""
    now = iter(range(10**9))
    return Budget(minutes, clock=lambda: float(next(now)))


def test_tune_keeps_the_fastest_with_its_flag(tuned_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = tuned_with(lambda layer, tile: tile.fused + 1 / tile.block_m, ticking(0.3))
    assert 0 < len(found) < 40
    assert {key.split("/")[1] for key in found} == {"16bit"}, "bfloat16 is first"
    assert not any(tile.fused for key, tile in found.items() if "+statistics" in key and "affine+" in key)
    apart = {key for key, tile in found.items() if not tile.fused}
    assert apart
    for key in apart:  # the product after the pass takes the same tile
        first, second = key.split("/")[-1].split("+")
        plain = "none+none" if key.startswith("wgrad") else f"none+{second}"
        assert key.removesuffix(f"{first}+{second}") + plain in found
    out = capsys.readouterr().out
    assert "the model's choice" in out
    assert "not reached in time: up/" in out.splitlines()[-1] or "wgrad" in out.splitlines()[-1]
    more = tuned_with(lambda layer, tile: 1.0, ticking(0.3))
    assert found.items() <= more.items(), "the second run goes on"
    assert len(more) > len(found)


def test_tune_passes_over_what_the_gpu_refuses(tuned_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def times(layer: Layer, tile: tiles.Tile) -> float:
        if layer.phase == "dgrad" or tile.num_warps == 8:
            raise OutOfResources(250000, 232448, "shared memory")
        return 1.0

    found = tuned_with(times, ticking(0.5))
    assert found
    assert all(tile.num_warps < 8 for tile in found.values())
    out = capsys.readouterr().out
    assert "refused: out of resource: shared memory" in out
    assert "(no tile runs)" in out


def test_tuned_tiles_are_read_with_and_without_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tiles.write(path, {"a": tiles.Tile(64, 64, 32, 4, 3, False), "b": tiles.Tile(16, 64, 32, 4, 3)})
    assert '"a": [64, 64, 32, 4, 3, false]' in path.read_text()
    assert tiles.read(path) == {"a": tiles.Tile(64, 64, 32, 4, 3, False), "b": tiles.Tile(16, 64, 32, 4, 3)}
    path.write_text('{"old": [64, 64, 32, 4, 3]}')
    assert tiles.read(path)["old"].fused


def test_compiling_ahead_is_what_the_launch_then_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same code as the launch itself would have compiled, by Triton's own key."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layer = warm.listed("D", 1, 2, "bfloat16", "cpu")[0]
    tile = tiles.estimate(layer.problem, 132)
    with warm.Compilers(1) as compilers:
        where = warm.Where("D", 1, 2, "bfloat16", 0)
        assert compilers.submit(where, tile, 132).result() is None
    before = {path.name for path in tmp_path.iterdir()}
    assert before
    active: Any = triton.runtime.driver
    previous = active._active
    active.set_active(pretend.Driver())
    try:
        launch = layer.launches(tile, 132).product
        compiled = launch.kernel.warmup(
            **launch.arguments,
            **launch.constants,
            grid=(launch.programs,),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    finally:
        active._active = previous
    assert compiled.metadata.shared > 0
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing compiled anew"


# --- sanitize ----------------------------------------------------------------------------------------------


def sanitize(out: Path) -> int:
    out.mkdir(exist_ok=True)
    return gpu.sanitize(argparse.Namespace(out=out), Budget(1))


def test_no_sanitizer_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    assert sanitize(tmp_path) == 0
    assert "compute-sanitizer is not installed here" in capsys.readouterr().out


def test_the_sanitizer_is_found_in_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.find_sanitizer() == str(tool)


@pytest.mark.parametrize(("status", "verdict"), [(0, "clean"), (9, "ERRORS FOUND"), (1, "FAILED (1)")])
def test_sanitize(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: int,
    verdict: str,
) -> None:
    """Every tool runs on the same script, its output is kept, its status told."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"; echo "$PYTORCH_NO_CUDA_MEMORY_CACHING"\nexit {status}\n')
    tool.chmod(0o755)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho done\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr("sys.executable", str(python))
    assert sanitize(tmp_path / "out") == int(status != 0)
    out = capsys.readouterr().out
    assert "plain: clean: done" in out
    for name in gpu.SANITIZERS:
        assert f"{name}: {verdict}" in out
        text = (tmp_path / "out" / f"sanitize-{name}.txt").read_text()
        assert text == f"--tool {name} --error-exitcode 9 {python} -m bench.sanitized\n1\n"


def test_a_script_that_fails_by_itself_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no GPU >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: os.devnull)
    monkeypatch.setattr("sys.executable", str(python))
    assert sanitize(tmp_path / "out") == 1
    assert "plain: FAILED (1): no GPU" in capsys.readouterr().out
