"""Tiles as data: the default choice, tuned files, and their cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcgan.kernels.gpu import tiles
from dcgan.kernels.gpu.tiles import Problem, Tile

UP = Problem("up", "16bit", rows=64 * 16, columns=256, depth=2048, channels_in=512, copies=4)


def test_every_kernel_and_precision_has_candidates() -> None:
    for kernel in tiles.KERNELS:
        for precision in tiles.PRECISIONS:
            listed = tiles.candidates(kernel, precision)
            assert listed
            for tile in listed:
                sizes = tile[:3] if kernel != "dense_narrow" else tile[2:3]
                assert all(tiles.power_of_two(size) == size and size >= 16 for size in sizes)


def test_the_estimate_fills_the_chip() -> None:
    """512→256 at batch 64: 128×128 tiles would be 64 programs for 132 multiprocessors."""
    tile = tiles.estimate(UP, 132)
    assert (tile.block_m, tile.block_n) == (128, 64)
    assert tiles.programs(tile, UP) == 128


def test_large_problems_take_large_tiles() -> None:
    tile = tiles.estimate(UP._replace(rows=4096 * 16), 132)
    assert tile.block_m == 128
    assert tile.block_n >= 128


@pytest.mark.parametrize(("channels", "columns"), [(3, 5), (20, 24), (512, 256)])
def test_tiles_fit_the_problem(channels: int, columns: int) -> None:
    problem = UP._replace(channels_in=channels, columns=columns)
    tile = tiles.fit(Tile(128, 128, 64, 8, 3), problem)
    assert tile.block_n == min(128, max(16, tiles.power_of_two(columns)))
    assert tile.block_k == min(64, max(16, tiles.power_of_two(channels)))


def test_tuned_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    assert tiles.read(path) == {}
    tuned = {UP.key(): Tile(64, 64, 32, 4, 5), UP._replace(rows=1).key(): Tile(16, 64, 64, 4, 4)}
    tiles.write(path, tuned)
    assert tiles.read(path) == tuned
    assert json.loads(path.read_text())
    assert list(path.parent.iterdir()) == [path]


def test_whether_prologues_are_fused_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tuned = {UP.key(): Tile(64, 64, 32, 4, 5, fused=False), UP._replace(rows=1).key(): Tile(16, 64, 64, 4, 4)}
    tiles.write(path, tuned)
    found = tiles.read(path)
    assert found == tuned
    assert [found[key].fused for key in tuned] == [False, True]


def test_tuned_files_of_five_numbers_a_tile_still_read(tmp_path: Path) -> None:
    """From before prologues could be apart: fused, as all were."""
    path = tmp_path / "gpu.json"
    path.write_text('{"up/16bit/1024/256/2048/512/4": [64, 64, 32, 4, 5]}')
    assert tiles.read(path) == {"up/16bit/1024/256/2048/512/4": Tile(64, 64, 32, 4, 5, fused=True)}


@pytest.mark.parametrize("text", ["{", "[1]", '{"up": 3}', '{"up": [1, 2]}'])
def test_a_damaged_tuned_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json is not a file of tuned tiles"):
        tiles.read(path)


def test_the_cache_is_by_gpu_and_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton

    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    path = tiles.cache_file("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / f"triton-{triton.__version__}" / "NVIDIA_H100_80GB_HBM3.json"


def test_tuning_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    ran: list[Tile] = []

    def timed(run: Callable[[], object], return_mode: str) -> float:
        run()
        return float(ran[-1].block_m * 7 % 5)

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", timed)
    chosen = tiles.tune(UP, ran.append)
    assert chosen == min(ran, key=lambda tile: tile.block_m * 7 % 5)
    assert len(ran) == len(set(ran)) == len(tiles.candidates("up", "16bit"))


def test_tuning_tries_passes_and_skips_what_the_chip_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.runtime.errors import OutOfResources

    ran: list[Tile] = []

    def timed(run: Callable[[], object], return_mode: str) -> float:
        run()
        if ran[-1].block_m != 64:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0 if ran[-1].fused else 0.5

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", timed)
    chosen = tiles.tune(UP._replace(fusion="affine+statistics"), ran.append)
    assert chosen.block_m == 64
    assert not chosen.fused
    assert any(tile.fused for tile in ran)


def test_off_a_gpu_the_choice_is_the_estimate() -> None:
    assert tiles.choose(UP, torch.device("cpu"), lambda tile: None) == tiles.estimate(UP, 132)
