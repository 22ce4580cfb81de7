"""Tiles as data: the default choice, tuned files, and their cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcgan.kernels.gpu import model, tiles
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


# --- tuning ------------------------------------------------------------------------------------------------


RIGHT = torch.ones(3, dtype=torch.float64)


class Launching:
    """A launch that gives ``RIGHT`` but for what ``wrong`` adds to it, and lists the tiles it is run with."""

    def __init__(self, wrong: Callable[[Tile], float] = lambda tile: 0.0) -> None:
        self.ran: list[Tile] = []
        self.references = 0
        self._wrong = wrong

    def results(self, tile: Tile) -> tuple[torch.Tensor, ...]:
        return (RIGHT.float() + self._wrong(tile),)

    def expected(self) -> tuple[torch.Tensor, ...]:
        self.references += 1
        return (RIGHT,)

    def trial(self) -> tiles.Trial:
        return tiles.Trial(self.ran.append, self.results, self.expected)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launching, Callable[[Tile], float]], tiles.Trial]:
    """The trial of a launch that takes as long as a function says of its tile."""
    import triton

    def of(launching: Launching, seconds: Callable[[Tile], float]) -> tiles.Trial:
        def measured(run: Callable[[], object], return_mode: str) -> float:
            run()
            return seconds(launching.ran[-1])

        monkeypatch.setattr(triton.testing, "do_bench_cudagraph", measured)
        return launching.trial()

    return of


def test_tuning_takes_the_fastest(timed: Any) -> None:
    launching = Launching()
    chosen = tiles.tune(UP, timed(launching, lambda tile: float(tile.block_m * 7 % 5)))
    ran = launching.ran
    assert chosen == min(ran, key=lambda tile: tile.block_m * 7 % 5)
    assert len(ran) == len(set(ran)) == len(tiles.candidates("up", "16bit"))
    assert launching.references == 1


def test_tuning_tries_passes_and_skips_what_the_chip_refuses(timed: Any) -> None:
    from triton.runtime.errors import OutOfResources

    def seconds(tile: Tile) -> float:
        if tile.block_m != 64:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0 if tile.fused else 0.5

    launching = Launching()
    chosen = tiles.tune(UP._replace(fusion="affine+statistics"), timed(launching, seconds))
    assert chosen.block_m == 64
    assert not chosen.fused
    assert any(tile.fused for tile in launching.ran)


@pytest.mark.parametrize("off", [0.02, math.nan, math.inf])
def test_tuning_does_not_take_a_tile_that_is_wrong(timed: Any, off: float) -> None:
    """Though it is the fastest; it is not even timed, and it is named."""
    launching = Launching(lambda tile: off if tile.block_n == 256 else 2**-10)
    trial = timed(launching, lambda tile: 1 / tile.block_n)
    with pytest.warns(UserWarning, match=r"up/16bit/none\+affine/128/256/64/8/3 gives a wrong result"):
        chosen = tiles.tune(UP, trial)
    assert chosen.block_n == 128
    assert all(tile.block_n < 256 for tile in launching.ran)


@pytest.mark.filterwarnings("ignore:.*gives a wrong result")
def test_tuning_where_every_tile_is_wrong(
    monkeypatch: pytest.MonkeyPatch, a_gpu: dict[str, Tile], timed: Any
) -> None:
    """As where a result is all but zero, and everything is lost in its rounding: the estimate."""
    monkeypatch.setenv("DCGAN_AUTOTUNE", "1")
    trial = timed(Launching(lambda tile: 1.0), lambda tile: 1.0)
    assert tiles.tune(UP, trial) is None
    assert tiles.choose(UP, GPU, lambda tile: False, trial) == ranked(UP)[0]
    assert a_gpu == {}


# --- choosing ----------------------------------------------------------------------------------------------


def never(tile: Tile) -> bool:
    raise AssertionError("compiled")


def test_off_a_gpu_the_choice_is_the_estimate() -> None:
    assert tiles.choose(UP, torch.device("cpu"), never) == tiles.estimate(UP, 132)


TRAINED = UP._replace(rows=1024 * 16, fusion="affine+statistics", elements=(1024 * 16 * 512,))


def ranked(problem: Problem) -> tuple[Tile, ...]:
    return model.ranked(problem, tiles.ways(problem), 132)


def test_a_tile_that_spills_is_passed_over() -> None:
    """From the one predicted fastest on, until one does not; no more than these are compiled."""
    first, second, third = ranked(UP)[:3]
    asked: list[Tile] = []

    def spills(tile: Tile) -> bool:
        asked.append(tile)
        return tile in (first, second)

    assert tiles.estimate(UP, 132, spills=spills) == third
    assert asked == [first, second, third]
    assert tiles.estimate(UP, 132, spills=lambda tile: False) == first
    assert tiles.estimate(UP, 132, spills=lambda tile: True) == first, "all spill"


def test_what_spills_without_its_prologue_is_not_compiled_with_it() -> None:
    asked: list[Tile] = []

    def spills(tile: Tile) -> bool:
        asked.append(tile)
        return (tile.block_m, tile.block_n) == (128, 256)

    chosen = tiles.estimate(TRAINED, 132, spills=spills)
    large = [tile for tile in ranked(TRAINED) if (tile.block_m, tile.block_n) == (128, 256)]
    assert [tile.fused for tile in large] == [False, True]
    assert large[0] in asked
    assert large[1] not in asked
    assert chosen == next(tile for tile in ranked(TRAINED) if tile not in large)


@pytest.mark.parametrize("largest", [64, 128, 256, 1])
def test_a_product_after_its_pass_takes_the_tile_that_was_chosen_with_it(largest: int) -> None:
    """Whatever spills of them: the pass is chosen for the sake of that tile."""

    def spills(tile: Tile) -> bool:
        return tile.block_n > largest

    for problem in (TRAINED, TRAINED._replace(fusion="statistics+adjoint"), TRAINED._replace(rows=4096)):
        tile = tiles.estimate(problem, 132, spills=spills)
        if not tile.fused:
            after = tiles.estimate(model.plain(problem), 132, spills=spills)
            assert after == tile._replace(fused=True)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Tile]:
    """An H100 seems to be there; gives its tuned tiles, of which there are none yet."""
    tuned: dict[str, Tile] = {}
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "_device", lambda index: ("NVIDIA H100", 132, tiles.SHARED_LIMIT[90]))
    monkeypatch.setattr(tiles, "_tuned", lambda name: tuned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tuned


GPU = torch.device("cuda", 0)


def test_on_a_gpu_the_choice_is_the_first_that_does_not_spill(a_gpu: dict[str, Tile]) -> None:
    first, second = ranked(UP)[:2]
    assert tiles.choose(UP, GPU, lambda tile: tile == first) == second
    a_gpu[UP.key()] = Tile(64, 32, 64, 4, 4)
    assert tiles.choose(UP, GPU, never) == Tile(64, 32, 64, 4, 4), (
        "what is tuned is not compiled to be judged"
    )


def test_what_tuning_finds_is_kept(
    monkeypatch: pytest.MonkeyPatch, a_gpu: dict[str, Tile], timed: Any
) -> None:
    monkeypatch.setenv("DCGAN_AUTOTUNE", "1")
    trial = timed(Launching(), lambda tile: 1 / tile.block_n)
    chosen = tiles.choose(UP, GPU, never, trial)
    assert chosen.block_n == 256
    assert a_gpu == tiles.read(tiles.cache_file("NVIDIA H100")) == {UP.key(): chosen}
    assert tiles.choose(UP, GPU, lambda tile: False, None) == chosen


# --- tiles that a version of Triton miscompiles -------------------------------------------------------------


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Writes a refused.json beside the shipped default.json, for a version of Triton."""
    import triton

    (tmp_path / "default.json").write_text((tiles.DIRECTORY / "default.json").read_text())

    def write(*names: str, version: str = triton.__version__) -> None:
        (tmp_path / "refused.json").write_text(json.dumps({version: names}))
        tiles._refused.cache_clear()

    monkeypatch.setattr(tiles, "DIRECTORY", tmp_path)
    yield write
    monkeypatch.undo()
    tiles._refused.cache_clear()


def test_the_shipped_list_reads() -> None:
    shipped = tiles.read_refused(tiles.DIRECTORY / "refused.json")
    for names in shipped.values():
        for name in names:
            kernel, precision, fusion, *numbers = name.split("/")
            assert kernel in tiles.KERNELS
            assert precision in tiles.PRECISIONS
            assert "+" in fusion
            assert len(list(map(int, numbers))) == 5


def test_a_refused_tile_is_named_as_the_product_sees_it() -> None:
    tile = Tile(128, 256, 64, 8, 3)
    assert tiles.refusal(TRAINED, tile) == "up/16bit/affine+statistics/128/256/64/8/3"
    assert tiles.refusal(TRAINED, tile._replace(fused=False)) == "up/16bit/none+statistics/128/256/64/8/3"
    assert tiles.refusal(model.plain(TRAINED), tile) == "up/16bit/none+statistics/128/256/64/8/3"


def test_a_refused_tile_is_not_estimated(refuse: Any) -> None:
    refuse()
    first, second = ranked(TRAINED)[:2]
    assert tiles.estimate(TRAINED, 132) == first
    refuse(tiles.refusal(TRAINED, first), version="0.1")
    assert tiles.estimate(TRAINED, 132) == first, "of another version"
    refuse(tiles.refusal(TRAINED, first))
    assert tiles.estimate(TRAINED, 132) == second
    assert first not in tiles.ways(TRAINED)
    bare = model.plain(TRAINED)
    assert first.fused or first._replace(fused=True) not in tiles.ways(bare)


def test_a_refused_tile_is_not_taken_though_it_is_tuned(refuse: Any, a_gpu: dict[str, Tile]) -> None:
    tile = Tile(64, 32, 64, 4, 4)
    a_gpu[TRAINED.key()] = tile
    refuse()
    assert tiles.choose(TRAINED, GPU, never) == tile
    refuse(tiles.refusal(TRAINED, tile))
    assert tiles.choose(TRAINED, GPU, lambda tile: False) == ranked(TRAINED)[0] != tile


def test_a_refused_tile_is_not_tried_in_tuning(refuse: Any, timed: Any) -> None:
    best = next(tile for tile in tiles.ways(UP) if tile.block_n == 256)
    refuse(tiles.refusal(UP, best))
    launching = Launching()
    assert tiles.tune(UP, timed(launching, lambda tile: 1 / tile.block_n)).block_n == 128
    assert best not in launching.ran
