"""The model that chooses tiles: what must hold of its predictions whatever its constants are."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from bench.cases import DTYPES
from bench.inspect import MULTIPROCESSORS, networks
from bench.layers import layers, training
from dcgan.kernels.gpu import model, tiles
from dcgan.kernels.gpu.tiles import Problem, Tile

BATCHES = (1, 3, 16, 64, 200, 1024, 4096)
UP = Problem("up", "16bit", 64 * 16, 256, 2048, 512, 4, "affine+statistics", (64 * 16 * 512,))
WGRAD = Problem("wgrad", "16bit", 128, 1024, 64 * 256, 64 * 256, 1, "affine+statistics", (2**21, 2**22))
NARROW = Problem("dense_narrow", "16bit", 64, 1, 8192, 512, 1, "affine+affine", (64 * 8192,))


def problems(dtype: str, *batches: int, channels: int = 1) -> list[Problem]:
    """Those of both networks, in eval and in training."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        found = [
            layer.problem
            for batch in batches
            for network in networks(channels)
            for layer in (
                *layers(network, batch, DTYPES[dtype]),
                *training(network, batch, DTYPES[dtype], input_gradient=True),
            )
        ]
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return list(dict.fromkeys(found))


def listed(problem: Problem, arch: int = 90) -> Iterator[tuple[Problem, Tile]]:
    """Every tile that fits its shared memory, with the problem as the product then sees it."""
    for tile in tiles.ways(problem):
        if model.fits(problem, tile, tiles.SHARED_LIMIT[arch]):
            yield problem if tile.fused else model.plain(problem), tile


def chosen(problem: Problem, arch: int) -> tuple[Problem, Tile, int]:
    """(the problem as its product sees it, the tile, the chunks) of the estimate."""
    tile = tiles.estimate(problem, MULTIPROCESSORS[arch], tiles.SHARED_LIMIT[arch])
    seen = problem if tile.fused else model.plain(problem)
    wgrad = problem.kernel.startswith("wgrad")
    return seen, tile, model.splits(seen, tile, MULTIPROCESSORS[arch]) if wgrad else 1


@pytest.mark.parametrize("problem", [UP, WGRAD, NARROW], ids=lambda problem: problem.kernel)
@pytest.mark.parametrize("dimension", ["rows", "depth"])
def test_more_work_never_takes_less_time(problem: Problem, dimension: str) -> None:
    """Rows or depth grow by steps that no tile divides; what is loaded grows with them."""
    for _, tile in listed(problem):
        seconds = []
        for factor in (1, 1.3, 2, 2.9, 4, 8, 16, 64):
            size = int(getattr(problem, dimension) * factor)
            elements = tuple(int(n * factor) for n in problem.elements)
            grown = problem._replace(**{dimension: size}, elements=elements)
            seconds.append(model.predict(grown, tile).seconds)
        assert seconds == sorted(seconds)
        assert seconds[-1] > 1.5 * seconds[0]


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("arch", [80, 90])
def test_no_default_tile_beats_its_roofline(dtype: str, arch: int) -> None:
    for channels in (1, 3):
        for problem in problems(dtype, *BATCHES, channels=channels):
            seen, tile, splits = chosen(problem, arch)
            prediction = model.predict(seen, tile, splits, processors=MULTIPROCESSORS[arch])
            assert 0 < prediction.share <= 1, (problem, tile)
            assert prediction.resident >= 1


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_no_tile_at_all_beats_its_roofline(dtype: str) -> None:
    for problem in problems(dtype, 1, 64, 1024):
        for seen, tile in listed(problem):
            for splits in (1, 7):
                assert 0 < model.predict(seen, tile, splits).share <= 1, (problem, tile)


@pytest.mark.parametrize("arch", [80, 90])
def test_no_chunk_is_empty(arch: int) -> None:
    """The kernel gives each of them ⌈steps / splits⌉ steps."""
    found = [p for p in problems("bfloat16", *BATCHES) if p.kernel.startswith("wgrad")]
    found += [WGRAD._replace(depth=depth) for depth in (1, 63, 65, 64 * 7, 64 * 13 + 1, 64 * 101)]
    for problem in found:
        for seen, tile in listed(problem, arch):
            splits = model.splits(seen, tile, MULTIPROCESSORS[arch])
            steps = -(-seen.depth // tile.block_k)
            chunk = -(-steps // splits)
            assert (splits - 1) * chunk < steps <= splits * chunk, (problem, tile, splits)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_chunks_fill_the_chip_where_tiles_alone_do_not(dtype: str, arch: int) -> None:
    """Of a batch's weight gradients, a chunk being worth its merging from some eight steps on."""
    processors = MULTIPROCESSORS[arch]
    split = 0
    for problem in problems(dtype, 64, 1024):
        if not problem.kernel.startswith("wgrad"):
            continue
        seen, tile, splits = chosen(problem, arch)
        programs = tiles.programs(tile, seen)
        possible = programs * (-(-seen.depth // tile.block_k) // 8)
        assert programs * splits >= min(0.45 * processors, possible), (problem, tile, splits)
        split += programs < processors // 2
        if programs >= 4 * processors:  # two may still even out the last round
            assert splits <= 2, (problem, tile)
    assert split


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("arch", [80, 90])
def test_a_default_tile_fits(dtype: str, arch: int) -> None:
    for problem in problems(dtype, *BATCHES):
        seen, tile, _ = chosen(problem, arch)
        assert model.guess(seen, tile).shared <= tiles.SHARED_LIMIT[arch]
        assert tile == tiles.fit(tile, problem)
        assert tile._replace(fused=True) in {
            tiles.fit(t, problem) for t in tiles.candidates(problem.kernel, problem.precision)
        }


def test_a_tile_without_the_shared_memory_it_needs_is_passed_over() -> None:
    """The fastest of those listed, were there the memory for it."""
    large = UP._replace(rows=2**20, fusion="none+statistics")
    greedy, modest = Tile(128, 128, 64, 8, 8), Tile(64, 64, 64, 4, 2)
    assert model.predict(large, greedy).seconds < model.predict(large, modest).seconds
    assert model.ranked(large, (greedy, modest), 132) == (modest,)


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_no_tile_is_passed_over_for_a_guess_of_its_registers(dtype: str) -> None:
    """Only the compiler knows them: the largest tile is among the ranked ones of every product it fits."""
    for problem in problems(dtype, 1024):
        found = model.ranked(problem, tiles.ways(problem), 132)
        assert {tile for _, tile in listed(problem)} == set(found)
        times = [model.seconds(problem, tile, 132) for tile in found]
        assert times == sorted(times)
        if problem.kernel in ("up", "down") and problem.columns >= 256:
            assert any((tile.block_m, tile.block_n) == (128, 256) for tile in found)


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_a_pass_of_its_own_is_chosen_where_it_is_predicted_faster(dtype: str) -> None:
    """And nowhere else; it is the tile that the product after the pass takes for itself."""
    counts = {True: 0, False: 0}
    for problem in problems(dtype, *BATCHES):
        if set(model.prologues(problem)) == {"none"}:
            assert tiles.estimate(problem, 132).fused
            continue
        plain = model.plain(problem)
        fused, apart = (
            min(model.product_seconds(seen, tile, 132) for seen, tile in listed(problem) if tile.fused == way)
            for way in (True, False)
        )
        apart += model.pass_seconds(problem)
        tile = tiles.estimate(problem, 132)
        counts[tile.fused] += 1
        if tile.fused:
            assert model.product_seconds(problem, tile, 132) == fused <= apart
        else:
            assert apart < fused
            assert tile == tiles.estimate(plain, 132)._replace(fused=False)
    assert all(counts.values())


def test_wide_products_of_training_have_passes_of_their_own_for_their_prologues() -> None:
    """As tuning on an H200 has found of every one of them, at both batches."""
    found = [
        problem
        for problem in problems("bfloat16", 64, 1024)
        if problem.kernel in ("up", "down") and set(model.prologues(problem)) != {"none"}
    ]
    assert len(found) >= 16
    assert not any(tiles.estimate(problem, 132).fused for problem in found)


def test_the_estimate_is_the_same_each_time_and_kept() -> None:
    found = problems("bfloat16", 64, 1024)
    first = [tiles.estimate(problem, 132) for problem in found]
    model.ranked.cache_clear()
    model.splits.cache_clear()
    start = time.perf_counter()
    again = [tiles.estimate(problem, 132) for problem in found]
    fresh = time.perf_counter() - start
    assert again == first
    assert fresh < 0.1 * len(found)  # once a shape and process; some milliseconds
    hits = model.ranked.cache_info().hits
    assert [tiles.estimate(problem, 132) for problem in reversed(found)] == first[::-1]
    assert model.ranked.cache_info().hits == hits + len(found)
