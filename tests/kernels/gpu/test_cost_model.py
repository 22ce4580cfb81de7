"""The cost model that ranks tiles: properties of its predictions that hold whatever its constants are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dcgan.kernels.gpu import cost_model, tiles, tuning
from dcgan.kernels.gpu.tiles import Problem, Tile
from dcgan.kernels.gpu.tools.layers import SM_COUNTS, evaluation, networks, training

BATCHES = (1, 3, 16, 64, 200, 1024, 4096)
UP = Problem("up", "16bit", 64 * 16, 256, 2048, 512, 4, "affine+statistics", (64 * 16 * 512,))
WGRAD = Problem("wgrad", "16bit", 128, 1024, 64 * 256, 64 * 256, 1, "affine+statistics", (2**21, 2**22))
NARROW = Problem("dense_narrow", "16bit", 64, 1, 8192, 512, 1, "affine+affine", (64 * 8192,))


def problems(dtype: str, *batches: int, channels: int = 1) -> list[Problem]:
    """Return the problems of both networks, in eval and in training."""
    found = [
        layer.problem
        for batch in batches
        for shapes in networks(channels).values()
        for layer in (*evaluation(shapes, batch, dtype), *training(shapes, batch, dtype, input_gradient=True))
    ]
    return list(dict.fromkeys(found))


def fitting(problem: Problem, arch: int = 90) -> Iterator[tuple[Problem, Tile]]:
    """Yield every tile that fits in shared memory, with the problem that its product then solves."""
    for tile in tuning.variants(problem):
        if cost_model.fits(problem, tile, tiles.SHARED_LIMIT[arch]):
            yield problem if tile.fused else problem.without_prologue(), tile


def chosen(problem: Problem, arch: int) -> tuple[Problem, Tile, int]:
    """Return (the product's problem, the tile, the split-K count) for the estimated tile."""
    tile = tuning.estimate(problem, SM_COUNTS[arch], tiles.SHARED_LIMIT[arch])
    solved = problem if tile.fused else problem.without_prologue()
    wgrad = problem.kernel.startswith("wgrad")
    return solved, tile, cost_model.splits(solved, tile, SM_COUNTS[arch]) if wgrad else 1


@pytest.mark.parametrize("problem", [UP, WGRAD, NARROW], ids=lambda problem: problem.kernel)
@pytest.mark.parametrize("dimension", ["rows", "depth"])
def test_more_work_never_takes_less_time(problem: Problem, dimension: str) -> None:
    """Rows or depth grow by factors that no tile divides; the bytes loaded grow with them."""
    for _, tile in fitting(problem):
        seconds = []
        for factor in (1, 1.3, 2, 2.9, 4, 8, 16, 64):
            size = int(getattr(problem, dimension) * factor)
            elements = tuple(int(n * factor) for n in problem.elements)
            grown = replace(problem, **{dimension: size}, elements=elements)
            seconds.append(cost_model.predict(grown, tile).seconds)
        assert seconds == sorted(seconds)
        assert seconds[-1] > 1.5 * seconds[0]


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("arch", [80, 90])
def test_no_default_tile_beats_its_roofline(dtype: str, arch: int) -> None:
    for channels in (1, 3):
        for problem in problems(dtype, *BATCHES, channels=channels):
            solved, tile, splits = chosen(problem, arch)
            prediction = cost_model.predict(solved, tile, splits, sms=SM_COUNTS[arch])
            assert 0 < prediction.roofline_fraction <= 1, (problem, tile)
            assert prediction.ctas_per_sm >= 1


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_no_tile_at_all_beats_its_roofline(dtype: str) -> None:
    for problem in problems(dtype, 1, 64, 1024):
        for solved, tile in fitting(problem):
            for splits in (1, 7):
                assert 0 < cost_model.predict(solved, tile, splits).roofline_fraction <= 1, (problem, tile)


@pytest.mark.parametrize("arch", [80, 90])
def test_no_split_is_empty(arch: int) -> None:
    """The kernel assigns ⌈steps / splits⌉ steps to each split."""
    found = [p for p in problems("bfloat16", *BATCHES) if p.kernel.startswith("wgrad")]
    found += [replace(WGRAD, depth=depth) for depth in (1, 63, 65, 64 * 7, 64 * 13 + 1, 64 * 101)]
    for problem in found:
        for solved, tile in fitting(problem, arch):
            splits = cost_model.splits(solved, tile, SM_COUNTS[arch])
            steps = -(-solved.depth // tile.block_k)
            steps_per_split = -(-steps // splits)
            assert (splits - 1) * steps_per_split < steps <= splits * steps_per_split, (problem, tile, splits)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_split_k_fills_the_gpu_where_tiles_alone_do_not(dtype: str, arch: int) -> None:
    """For weight gradients of full batches; a split pays for its reduction from about eight steps on."""
    sms = SM_COUNTS[arch]
    split = 0
    for problem in problems(dtype, 64, 1024):
        if not problem.kernel.startswith("wgrad"):
            continue
        solved, tile, splits = chosen(problem, arch)
        programs = tiles.programs(tile, solved)
        possible = programs * (-(-solved.depth // tile.block_k) // 8)
        assert programs * splits >= min(0.45 * sms, possible), (problem, tile, splits)
        split += programs < sms // 2
        waves = cost_model.predict(solved, tile, sms=sms).waves
        if programs >= 4 * sms and waves >= 1:  # two splits may still fill the last wave
            assert splits <= 2, (problem, tile)
    assert split


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("arch", [80, 90])
def test_a_default_tile_fits(dtype: str, arch: int) -> None:
    for problem in problems(dtype, *BATCHES):
        solved, tile, _ = chosen(problem, arch)
        assert cost_model.estimate_resources(solved, tile).shared <= tiles.SHARED_LIMIT[arch]
        assert tile == tiles.fit(tile, problem)
        assert replace(tile, fused=True) in {
            tiles.fit(t, problem) for t in tiles.candidates(problem.kernel, problem.precision)
        }


def test_a_tile_that_exceeds_shared_memory_is_skipped() -> None:
    """Even if it would be the fastest of the listed tiles."""
    large = replace(UP, rows=2**20, fusion="none+statistics")
    greedy, modest = Tile(128, 128, 64, 8, 8), Tile(64, 64, 64, 4, 2)
    assert cost_model.predict(large, greedy).seconds < cost_model.predict(large, modest).seconds
    assert cost_model.ranked(large, (greedy, modest), 132) == (modest,)


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_no_tile_is_skipped_because_of_its_estimated_registers(dtype: str) -> None:
    """Only the compiler knows registers: the ranking includes the largest tile for every product it fits."""
    for problem in problems(dtype, 1024):
        found = cost_model.ranked(problem, tuning.variants(problem), 132)
        assert {tile for _, tile in fitting(problem)} == set(found)
        times = [cost_model.seconds(problem, tile, 132) for tile in found]
        assert times == sorted(times)
        if problem.kernel in ("up", "down") and problem.columns >= 256:
            assert any((tile.block_m, tile.block_n) == (128, 256) for tile in found)


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_a_standalone_prologue_is_chosen_exactly_where_it_is_predicted_faster(dtype: str) -> None:
    """The tile is then the one estimated for the product without its prologue."""
    counts = {True: 0, False: 0}
    for problem in problems(dtype, *BATCHES):
        if not problem.has_prologue:
            assert tuning.estimate(problem, 132).fused
            continue
        plain = problem.without_prologue()
        fused, standalone = (
            min(
                cost_model.product_seconds(solved, tile, 132)
                for solved, tile in fitting(problem)
                if tile.fused == choice
            )
            for choice in (True, False)
        )
        standalone += cost_model.standalone_prologue_seconds(problem)
        tile = tuning.estimate(problem, 132)
        counts[tile.fused] += 1
        if tile.fused:
            assert cost_model.product_seconds(problem, tile, 132) == fused <= standalone
        else:
            assert standalone < fused
            assert tile == replace(tuning.estimate(plain, 132), fused=False)
    assert all(counts.values())


def test_wide_products_in_training_have_standalone_prologues() -> None:
    """In the forward, where alone products have prologues: tuning on an H200 found this for every one."""
    found = [
        problem
        for problem in problems("bfloat16", 64, 1024)
        if problem.kernel in ("up", "down") and problem.has_prologue
    ]
    assert len(found) == 10
    assert {problem.epilogue for problem in found} == {"statistics"}
    assert not any(tuning.estimate(problem, 132).fused for problem in found)


def test_more_bytes_take_more_time_and_two_passes_take_more_than_one() -> None:
    """Of the kernels between products: their sweeps, merges and reductions."""
    sizes = [10**n for n in range(2, 10)]
    for gpu in cost_model.GPUS.values():
        times = [cost_model.sweep_seconds(size, gpu) for size in sizes]
        assert times == sorted(times)
        assert times[0] > cost_model.LAUNCH_GAP
    assert cost_model.sweep_seconds(10**9, cost_model.GPUS["h200"]) < cost_model.sweep_seconds(10**9)
    for merge in (cost_model.batchnorm_forward_seconds, cost_model.batchnorm_backward_seconds):
        times = [merge((2, tiles, 64)) for tiles in (2, 2000, 4000, 16000)]
        assert times == sorted(times)
        assert merge((2, 128, 64), 2) < 2 * merge((2, 64, 64))
    assert cost_model.apply_bytes(1000, "16bit") == 8000
    assert cost_model.apply_bytes(1000, "tf32", x_hat=False) == 12000


def test_the_estimate_is_deterministic_and_cached() -> None:
    found = problems("bfloat16", 64, 1024)
    first = [tuning.estimate(problem, 132) for problem in found]
    cost_model.ranked.cache_clear()
    cost_model.splits.cache_clear()
    start = time.perf_counter()
    again = [tuning.estimate(problem, 132) for problem in found]
    fresh = time.perf_counter() - start
    assert again == first
    assert fresh < 0.1 * len(found)  # once per shape and process, a few milliseconds each
    hits = cost_model.ranked.cache_info().hits
    assert [tuning.estimate(problem, 132) for problem in reversed(found)] == first[::-1]
    assert cost_model.ranked.cache_info().hits == hits + len(found)
