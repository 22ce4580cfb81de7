"""The cost model that ranks tiles.

Its predictions are compared with times measured on an H200; other properties hold whatever its constants are.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        if problem.kernel in ("up", "down") and problem.epilogue == "statistics" and problem.has_prologue
    ]
    assert found
    assert not any(tuning.estimate(problem, 132).fused for problem in found)


# --- against measured times ---------------------------------------------------------------------------------

MEASURED = Path(__file__).parents[3] / "bench/results/h200-kernels.jsonl"
"""Times of the kernels of commit e87fe32 on an H200.

A line has all that determines the launches of a layer and phase, as those kernels are no longer here:
standalone prologue kernels, which read and write the bytes ``sweeps``, a product, and a merge of
``partial_rows`` rows of partial sums or the reduction of split-K. Resources are those of Triton 3.6's code.
``us`` is null where the result was wrong. Training's were replayed in a CUDA graph of the launches of several
sets of tensors, of which none was in L2.
"""
COLD = cost_model.H200._replace(l2_size=0)
INSTRUCTIONS = {"statistics": 20, "adjoint": 23}  # per element, of the measured kernels' epilogues
GRAPH_START = 4.5e-6  # of a graph: its share is what packing, the same work, takes longer in smaller graphs
SETS = {64: 24, 1024: 2}  # of tensors in a graph, by batch size


def measured(kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind and row["contestant"] == "ours"]


def predicted(row: dict[str, Any], gpu: cost_model.Gpu) -> float:
    """Return the predicted seconds of the launches of a measured layer and phase."""
    problem = Problem(**row["problem"] | {"elements": tuple(row["problem"]["elements"])})
    tile, splits = Tile(**row["tile"]), row["splits"]
    solved = problem if tile.fused else problem.without_prologue()
    outputs_of_thread = tile.block_m * tile.block_n // (32 * tile.num_warps)
    instructions = INSTRUCTIONS.get(problem.epilogue, 0) * outputs_of_thread
    if instructions:
        instructions += cost_model.PROGRAM_INSTRUCTIONS - cost_model.BEFORE_LOOP_INSTRUCTIONS
    resources = cost_model.Resources(**row["resources"], epilogue=instructions)
    seconds = cost_model.predict(solved, tile, splits, resources, gpu=gpu).seconds
    seconds += sum(cost_model.sweep_seconds(size, gpu) for size in row["sweeps"])
    if problem.kernel.startswith("wgrad"):
        return seconds + cost_model.split_k_seconds(problem, splits, gpu, in_flight=8)
    if row["partial_rows"]:
        loops = 2 if problem.epilogue == "statistics" else 1  # for the mean, then for the variance
        seconds += cost_model.merge_seconds(loops * -(-row["partial_rows"] // 1024))
    return seconds


def test_the_times_of_an_h200_are_predicted() -> None:
    """Of all layers and phases: within 10% in the median, and within 30% at worst."""
    errors = {}
    for row in measured("kernels"):
        if row["us"] is None:
            continue
        start = 0.0 if row["phase"] == "eval" else GRAPH_START / SETS[row["batch"]]
        ratio = 1e6 * (predicted(row, COLD) + start) / row["us"]
        key = row["network"], row["layer"], row["phase"], row["batch"]
        errors[key] = max(ratio, 1 / ratio)
    assert len(errors) == 57
    assert statistics.median(errors.values()) < 1.1
    assert max(errors.values()) < 1.3, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_the_steps_of_an_h200_are_predicted() -> None:
    """Whole training steps of those kernels, within 15%; their tensors are in L2 where they fit.

    D runs forward and backward on real and on generated images, and in G's update once more, where only its
    last dgrad reaches the image. Of the step's other launches most are as short as a launch can be.
    """
    for step in measured("step"):
        if "small_launches" not in step:  # not of tuned tiles
            continue
        shortest = cost_model.PIPELINE_LATENCY + cost_model.LAUNCH_GAP
        seconds = step["small_launches"] * shortest
        for row in measured("kernels"):
            if row["batch"] != step["batch"] or row["phase"] == "eval":
                continue
            runs = 1
            if row["network"] == "D" and (row["layer"], row["phase"]) != ("1→64 @64→32", "dgrad"):
                runs = 2 if row["phase"] == "wgrad" else 3
            seconds += runs * predicted(row, cost_model.H200)
        assert 1e6 * seconds == pytest.approx(step["us"], rel=0.15)


def test_a_tile_of_128_by_64_is_bound_by_shared_memory() -> None:
    """Its loop takes 1.75 times as long as the tensor cores need; that of 128 × 256 is hardly longer."""
    large = replace(UP, rows=2**20, fusion="none+affine")
    small, full = Tile(128, 64, 64, 4, 4), Tile(128, 256, 64, 8, 3)
    prediction = cost_model.predict(large, small)
    assert prediction.bound == "shared memory"
    tensor = prediction.flops / (2 * cost_model.FMA_PER_CLOCK["16bit"] * cost_model.CLOCK * 132)
    assert 1.75 * tensor < prediction.seconds < 2.2 * tensor
    assert cost_model.predict(large, full).seconds < 1.5 * tensor


def test_stores_of_partial_sectors_take_longer() -> None:
    problem = Problem("dense", "16bit", 1024, 8192, 100, 100, elements=(102400,))
    tile = Tile(16, 64, 64, 4, 3)
    resources = cost_model.estimate_resources(problem, tile)
    seconds = [
        cost_model.predict(problem, tile, resources=resources._replace(store_bytes=width)).seconds
        for width in (16, 8, 4, 2)
    ]
    assert seconds[0] == seconds[1] < seconds[2] < seconds[3]


def test_a_load_that_each_step_waits_for_takes_longer() -> None:
    problem = Problem(
        "wgrad_narrow", "16bit", 64, 16, 2**20, 2**20, elements=(2**26, 2**22), fusion="none+none"
    )
    tile = Tile(64, 16, 64, 4, 3)
    resources = cost_model.estimate_resources(problem, tile)._replace(stalls=0)
    without, waiting = (
        cost_model.predict(problem, tile, 128, resources._replace(stalls=stalls)).seconds for stalls in (0, 1)
    )
    steps = 2**20 // 64 // 128
    assert without < waiting <= without + steps * cost_model.LOAD_LATENCY


def test_a_sliced_epilogue_leaves_registers_for_two_programs() -> None:
    """Over four column slices of the accumulator: of 128 registers, two CTAs of 8 warps fit on an SM."""
    for epilogue in ("statistics", "gradient"):
        problem = replace(UP, fusion=f"none+{epilogue}")
        for tile, registers, ctas in (
            (Tile(128, 128, 64, 8, 3), 128, 2),
            (Tile(128, 256, 64, 8, 3), 255, 1),
            (Tile(256, 128, 64, 8, 3), 255, 1),
        ):
            assert cost_model.estimate_resources(problem, tile).registers <= registers
            assert cost_model.predict(problem, tile).ctas_per_sm == ctas


def test_more_bytes_take_more_time_and_two_passes_take_more_than_one() -> None:
    """Of the kernels between products: their sweeps, merges and reductions."""
    sizes = [10**n for n in range(2, 10)]
    for gpu in cost_model.GPUS.values():
        times = [cost_model.sweep_seconds(size, gpu) for size in sizes]
        assert times == sorted(times)
        assert times[0] > cost_model.LAUNCH_GAP
    assert cost_model.sweep_seconds(10**9, cost_model.H200) < cost_model.sweep_seconds(10**9)
    for merge in (cost_model.batchnorm_forward_seconds, cost_model.batchnorm_backward_seconds):
        times = [merge((3, tiles, 64)) for tiles in (2, 2000, 4000, 16000)]
        assert times == sorted(times)
        assert merge((3, 128, 64), 2) < 2 * merge((3, 64, 64))
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
