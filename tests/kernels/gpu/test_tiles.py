"""Tile selection: the default choice, tuned tiles and their files, tuning, refused tiles."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcgan.kernels.gpu import cost_model, tiles, tuning
from dcgan.kernels.gpu.tiles import Problem, Tile

UP = Problem("up", "16bit", rows=64 * 16, columns=256, depth=2048, channels_in=512, copies=4)


def test_every_kernel_and_precision_has_candidates() -> None:
    for kernel in tiles.KERNELS:
        for precision in tiles.PRECISIONS:
            listed = tiles.candidates(kernel, precision)
            assert listed
            for tile in listed:
                blocks = (tile.block_m, tile.block_n, tile.block_k)
                sizes = blocks if kernel != "dense_narrow" else blocks[2:]
                assert all(tiles.next_power_of_two(size) == size and size >= 16 for size in sizes)


def test_the_estimate_fills_the_gpu() -> None:
    """For 512→256 at batch 64, 128×128 tiles would be 64 programs for 132 SMs."""
    tile = tuning.estimate(UP, 132)
    assert (tile.block_m, tile.block_n) == (128, 64)
    assert tiles.programs(tile, UP) == 128


def test_large_problems_use_large_tiles() -> None:
    tile = tuning.estimate(replace(UP, rows=4096 * 16), 132)
    assert tile.block_m == 128
    assert tile.block_n >= 128


@pytest.mark.parametrize(("channels", "columns"), [(3, 5), (20, 24), (512, 256)])
def test_tiles_fit_the_problem(channels: int, columns: int) -> None:
    problem = replace(UP, channels_in=channels, columns=columns)
    tile = tiles.fit(Tile(128, 128, 64, 8, 3), problem)
    assert tile.block_n == min(128, max(16, tiles.next_power_of_two(columns)))
    assert tile.block_k == min(64, max(16, tiles.next_power_of_two(channels)))


def test_tuned_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    assert tiles.read(path) == {}
    tuned = {UP.key(): Tile(64, 64, 32, 4, 5), replace(UP, rows=1).key(): Tile(16, 64, 64, 4, 4)}
    tiles.write(path, tuned)
    assert tiles.read(path) == tuned
    assert json.loads(path.read_text())[UP.key()] == asdict(tuned[UP.key()])
    assert list(path.parent.iterdir()) == [path]


def test_tuned_files_store_whether_prologues_are_fused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tuned = {UP.key(): Tile(64, 64, 32, 4, 5, fused=False), replace(UP, rows=1).key(): Tile(16, 64, 64, 4, 4)}
    tiles.write(path, tuned)
    found = tiles.read(path)
    assert found == tuned
    assert [found[key].fused for key in tuned] == [False, True]


def test_tuned_files_with_five_numbers_per_tile_are_still_read(tmp_path: Path) -> None:
    """Files from before standalone prologues existed: every tile is fused."""
    path = tmp_path / "gpu.json"
    path.write_text('{"up/16bit/1024/256/2048/512/4": [64, 64, 32, 4, 5]}')
    assert tiles.read(path) == {"up/16bit/1024/256/2048/512/4": Tile(64, 64, 32, 4, 5, fused=True)}


@pytest.mark.parametrize("text", ["{", "[1]", '{"up": 3}', '{"up": [1, 2]}'])
def test_the_error_names_a_damaged_tuned_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json is not a file of tuned tiles"):
        tiles.read(path)


def test_the_cache_file_depends_on_gpu_and_triton_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton

    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    path = tiles.cache_file("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / f"triton-{triton.__version__}" / "NVIDIA_H100_80GB_HBM3.json"


# --- tuning ------------------------------------------------------------------------------------------------


EXPECTED = torch.ones(3, dtype=torch.float64)


class FakeLaunch:
    """A launch that returns ``EXPECTED`` plus ``error(tile)``, and records the tiles it runs with."""

    def __init__(self, error: Callable[[Tile], float] = lambda tile: 0.0) -> None:
        self.ran: list[Tile] = []
        self.references = 0
        self._error = error

    def results(self, tile: Tile) -> tuple[torch.Tensor, ...]:
        return (EXPECTED.float() + self._error(tile),)

    def expected(self) -> tuple[torch.Tensor, ...]:
        self.references += 1
        return (EXPECTED,)

    def trial(self) -> tuning.Trial:
        return tuning.Trial(self.ran.append, self.results, self.expected)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeLaunch, Callable[[Tile], float]], tuning.Trial]:
    """Return the trial of a launch whose measured time is a function of its tile."""
    import triton

    def of(launching: FakeLaunch, seconds: Callable[[Tile], float]) -> tuning.Trial:
        def measured(run: Callable[[], object], return_mode: str) -> float:
            run()
            return seconds(launching.ran[-1])

        monkeypatch.setattr(triton.testing, "do_bench_cudagraph", measured)
        return launching.trial()

    return of


def test_tuning_chooses_the_fastest(timed: Any) -> None:
    launching = FakeLaunch()
    chosen = tuning.tune(UP, timed(launching, lambda tile: float(tile.block_m * 7 % 5)))
    ran = launching.ran
    assert chosen == min(ran, key=lambda tile: tile.block_m * 7 % 5)
    assert len(ran) == len(set(ran)) == len(tiles.candidates("up", "16bit"))
    assert launching.references == 1


def test_tuning_tries_standalone_prologues_and_skips_tiles_out_of_resources(timed: Any) -> None:
    from triton.runtime.errors import OutOfResources

    def seconds(tile: Tile) -> float:
        if tile.block_m != 64:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0 if tile.fused else 0.5

    launching = FakeLaunch()
    chosen = tuning.tune(replace(UP, fusion="affine+statistics"), timed(launching, seconds))
    assert chosen.block_m == 64
    assert not chosen.fused
    assert any(tile.fused for tile in launching.ran)


@pytest.mark.parametrize("off", [0.02, math.nan, math.inf])
def test_tuning_rejects_a_tile_with_wrong_results(timed: Any, off: float) -> None:
    """Even if it is the fastest: it is not timed, and a warning names it."""
    launching = FakeLaunch(lambda tile: off if tile.block_n == 256 else 2**-10)
    trial = timed(launching, lambda tile: 1 / tile.block_n)
    with pytest.warns(UserWarning, match=r"up/16bit/none\+affine/128/256/64/8/3 gives a wrong result"):
        chosen = tuning.tune(UP, trial)
    assert chosen.block_n == 128
    assert all(tile.block_n < 256 for tile in launching.ran)


@pytest.mark.filterwarnings("ignore:.*gives a wrong result")
def test_tuning_falls_back_to_the_estimate_if_every_tile_is_wrong(
    monkeypatch: pytest.MonkeyPatch, h100: dict[str, Tile], timed: Any
) -> None:
    """For example where the result is nearly zero and drowns in rounding."""
    monkeypatch.setenv("DCGAN_AUTOTUNE", "1")
    trial = timed(FakeLaunch(lambda tile: 1.0), lambda tile: 1.0)
    assert tuning.tune(UP, trial) is None
    assert tuning.choose(UP, GPU, lambda tile: False, trial) == ranked(UP)[0]
    assert h100 == {}


# --- choosing ----------------------------------------------------------------------------------------------


def must_not_compile(tile: Tile) -> bool:
    raise AssertionError("compiled")


def test_without_a_gpu_the_choice_is_the_estimate() -> None:
    assert tuning.choose(UP, torch.device("cpu"), must_not_compile) == tuning.estimate(UP, 132)


TRAINED = replace(UP, rows=1024 * 16, fusion="affine+statistics", elements=(1024 * 16 * 512,))


def ranked(problem: Problem) -> tuple[Tile, ...]:
    return cost_model.ranked(problem, tuning.variants(problem), 132)


def test_a_tile_that_spills_is_skipped() -> None:
    """In order of predicted time, until a tile does not spill; no further tile is compiled."""
    first, second, third = ranked(UP)[:3]
    compiled: list[Tile] = []

    def spills(tile: Tile) -> bool:
        compiled.append(tile)
        return tile in (first, second)

    assert tuning.estimate(UP, 132, spills=spills) == third
    assert compiled == [first, second, third]
    assert tuning.estimate(UP, 132, spills=lambda tile: False) == first
    assert tuning.estimate(UP, 132, spills=lambda tile: True) == first, "all spill"


def test_a_tile_that_spills_without_its_prologue_is_not_compiled_with_it() -> None:
    first = ranked(TRAINED)[0]
    compiled: list[Tile] = []

    def spills(tile: Tile) -> bool:
        compiled.append(tile)
        return replace(tile, fused=False) == first

    chosen = tuning.estimate(TRAINED, 132, spills=spills)
    assert not first.fused
    assert first in compiled
    assert replace(first, fused=True) not in compiled
    assert chosen == next(tile for tile in ranked(TRAINED) if replace(tile, fused=False) != first)


@pytest.mark.parametrize("largest", [64, 128, 256, 1])
def test_a_product_after_a_standalone_prologue_uses_the_tile_chosen_with_it(largest: int) -> None:
    """Whichever tiles spill: the standalone prologue was chosen for the sake of that tile."""

    def spills(tile: Tile) -> bool:
        return tile.block_n > largest

    for problem in (TRAINED, replace(TRAINED, fusion="statistics+adjoint"), replace(TRAINED, rows=4096)):
        tile = tuning.estimate(problem, 132, spills=spills)
        if not tile.fused:
            after = tuning.estimate(problem.without_prologue(), 132, spills=spills)
            assert after == replace(tile, fused=True)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Tile]:
    """Simulate an H100; returns its tuned tiles, initially empty."""
    tuned: dict[str, Tile] = {}
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_device", lambda index: ("NVIDIA H100", 132, tiles.SHARED_LIMIT[90]))
    monkeypatch.setattr(tuning, "_tuned", lambda name: tuned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tuned


GPU = torch.device("cuda", 0)


def test_on_a_gpu_the_choice_is_the_first_that_does_not_spill(h100: dict[str, Tile]) -> None:
    first, second = ranked(UP)[:2]
    assert tuning.choose(UP, GPU, lambda tile: tile == first) == second
    h100[UP.key()] = Tile(64, 32, 64, 4, 4)
    assert tuning.choose(UP, GPU, must_not_compile) == Tile(64, 32, 64, 4, 4), (
        "a tuned tile is not compiled to check for spills"
    )


def test_tuned_tiles_are_cached(monkeypatch: pytest.MonkeyPatch, h100: dict[str, Tile], timed: Any) -> None:
    monkeypatch.setenv("DCGAN_AUTOTUNE", "1")
    trial = timed(FakeLaunch(), lambda tile: 1 / tile.block_n)
    chosen = tuning.choose(UP, GPU, must_not_compile, trial)
    assert chosen.block_n == 256
    assert h100 == tiles.read(tiles.cache_file("NVIDIA H100")) == {UP.key(): chosen}
    assert tuning.choose(UP, GPU, lambda tile: False, None) == chosen


# --- tiles that a version of Triton miscompiles -------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that writes a refused.json for a Triton version next to a copy of default.json."""
    import triton

    (tmp_path / "default.json").write_text((tiles.DIRECTORY / "default.json").read_text())

    def write(*names: str, version: str = triton.__version__) -> None:
        (tmp_path / "refused.json").write_text(json.dumps({version: names}))
        tiles._refused.cache_clear()

    monkeypatch.setattr(tiles, "DIRECTORY", tmp_path)
    yield write
    monkeypatch.undo()
    tiles._refused.cache_clear()


def test_the_shipped_list_is_well_formed() -> None:
    shipped = tiles.read_refused(tiles.DIRECTORY / "refused.json")
    for names in shipped.values():
        for name in names:
            kernel, precision, fusion, *numbers = name.split("/")
            assert kernel in tiles.KERNELS
            assert precision in tiles.PRECISIONS
            assert "+" in fusion
            assert len(list(map(int, numbers))) == 5


def test_a_refused_tile_is_named_by_its_product() -> None:
    tile = Tile(128, 256, 64, 8, 3)
    assert tiles.refused_name(TRAINED, tile) == "up/16bit/affine+statistics/128/256/64/8/3"
    assert (
        tiles.refused_name(TRAINED, replace(tile, fused=False)) == "up/16bit/none+statistics/128/256/64/8/3"
    )
    assert tiles.refused_name(TRAINED.without_prologue(), tile) == "up/16bit/none+statistics/128/256/64/8/3"


def test_a_refused_tile_is_not_estimated(refuse: Any) -> None:
    refuse()
    first, second = ranked(TRAINED)[:2]
    assert tuning.estimate(TRAINED, 132) == first
    refuse(tiles.refused_name(TRAINED, first), version="0.1")
    assert tuning.estimate(TRAINED, 132) == first, "refused for another version only"
    refuse(tiles.refused_name(TRAINED, first))
    assert tuning.estimate(TRAINED, 132) == second
    assert first not in tuning.variants(TRAINED)
    plain = TRAINED.without_prologue()
    assert first.fused or replace(first, fused=True) not in tuning.variants(plain)


def test_a_refused_tile_is_not_used_even_if_tuned(refuse: Any, h100: dict[str, Tile]) -> None:
    tile = Tile(64, 32, 64, 4, 4)
    h100[TRAINED.key()] = tile
    refuse()
    assert tuning.choose(TRAINED, GPU, must_not_compile) == tile
    refuse(tiles.refused_name(TRAINED, tile))
    assert tuning.choose(TRAINED, GPU, lambda tile: False) == ranked(TRAINED)[0] != tile


def test_a_refused_tile_is_not_tried_in_tuning(refuse: Any, timed: Any) -> None:
    best = [tile for tile in tuning.variants(UP) if tile.block_n == 256]
    refuse(*(tiles.refused_name(UP, tile) for tile in best))
    launching = FakeLaunch()
    assert tuning.tune(UP, timed(launching, lambda tile: 1 / tile.block_n)).block_n == 128
    assert not {*best} & {*launching.ran}
