"""Tests of ``dcgan.kernels.gpu.tools.tune`` with a simulated GPU: order, selection and results files."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from dcgan.kernels.gpu import aten, tiles, tuning
from dcgan.kernels.gpu.launcher import Product
from dcgan.kernels.gpu.tools import simulated_gpu, tune
from dcgan.kernels.gpu.tools.compilers import Compilers
from dcgan.kernels.gpu.tools.layers import (
    Layer,
    all_layers,
    discriminator,
    generator,
    launches,
    networks,
    pass_layers,
    step_passes,
    training,
)
from dcgan.kernels.gpu.tools.predict import KEEP, candidates, shortlist

SHARED = tiles.SHARED_LIMIT[90]


Times = Callable[[Layer, tiles.Tile], float]


def test_training_at_batch_64_is_tuned_first() -> None:
    order = list(tune.tuning_order(tune.BATCHES))
    assert order[:2] == [(64, "bfloat16"), (1024, "bfloat16")], "the cases that are benchmarked"
    assert {dtype for _, dtype in order[-len(tune.BATCHES) :]} == {"float32"}
    phases = [layer.phase for layer in tune.untuned(64, "bfloat16", {})]
    assert phases.index("eval") == len(phases) - phases.count("eval")
    assert set(phases) == {"forward", "dgrad", "wgrad", "eval"}


@pytest.mark.parametrize("batch", [64, 1024])
def test_every_product_of_a_training_step_is_tuned(batch: int) -> None:
    """Also those of D on real and on generated images in one pass of twice the batch."""
    keys = {layer.problem.key() for layer in tune.untuned(batch, "bfloat16", {})}
    passes = step_passes(batch)
    assert passes[0].images == (128 if batch == 64 else 1024)
    for of in passes:
        assert {layer.problem.key() for layer in pass_layers(networks(), of, "bfloat16")} <= keys


def test_shortlists_and_candidates() -> None:
    layers = tune.untuned(64, "bfloat16", {})
    assert len({layer.problem.key() for layer in layers}) == len(layers)
    for layer in layers:
        listed, every = shortlist(layer, 132, SHARED), candidates(layer.problem, SHARED)
        assert 0 < len(listed) <= KEEP
        assert set(listed) <= set(every)
        plain = layer.problem.fusion.split("+")[0] == "none" and layer.phase != "wgrad"
        assert not plain or all(tile.fused for tile in every)
        assert tuning.estimate(layer.problem, 132) in every


def test_tuned_problems_are_not_tuned_again() -> None:
    layers = tune.untuned(64, "bfloat16", {})
    key = layers[0].problem.key()
    rest = tune.untuned(64, "bfloat16", {key: tiles.Tile(64, 64, 32, 4, 3)})
    assert rest == layers[1:]


def test_float32_and_tf32_are_separate_problems() -> None:
    (tf32, *_), (ieee, *_) = (tune.untuned(8, dtype, {}) for dtype in ("tf32", "float32"))
    assert (tf32.problem.precision, ieee.problem.precision) == ("tf32", "ieee")


class _Pool:
    """A fake Compilers that compiles nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, *arguments: Any) -> Any:
        return types.SimpleNamespace(exception=lambda: None)


@pytest.fixture
def tuned_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs tune() with given tile times and errors and returns the tiles written."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: simulated_gpu.H100.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: simulated_gpu.H100)
    monkeypatch.setattr(tune, "Compilers", _Pool)
    product = Layer.product
    layers: list[Layer] = []

    def on_meta(layer: Layer, device: str = "meta") -> Product:
        if device != "meta":
            layers.append(layer)  # the one that is tuned
        return product(layer)

    monkeypatch.setattr(Layer, "product", on_meta)
    monkeypatch.setattr(aten, "exact", lambda it: ())

    def run(times: Times, minutes: float, error: Times = lambda layer, tile: 0.0) -> dict[str, tiles.Tile]:
        monkeypatch.setattr(tune, "time_tile", lambda it, tile, sms: times(layers[-1], tile))
        monkeypatch.setattr(tune, "tile_error", lambda it, tile, *rest: error(layers[-1], tile))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        assert tune.tune(out, [64], minutes, ticking()) == int((out / tiles.REFUSED).exists())
        name = tiles.gpu_file(simulated_gpu.H100.name)
        written, cached = tiles.read(out / name), tiles.read(tiles.cache_file(simulated_gpu.H100.name))
        assert written == cached
        return written

    return run


def ticking() -> Callable[[], float]:
    """Return a clock that advances by one second per reading."""
    now: Iterator[int] = iter(range(10**9))
    return lambda: float(next(now))


def test_tune_keeps_the_fastest_tile_and_its_fusion(
    tuned_with: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tuned_with(lambda layer, tile: tile.fused + 1 / tile.block_m, 0.3)
    assert 0 < len(found) < 40
    assert {key.split("/")[1] for key in found} == {"16bit"}, "bfloat16 is first"
    assert not any(tile.fused for key, tile in found.items() if "+statistics" in key and "affine+" in key)
    standalone = {key for key, tile in found.items() if not tile.fused}
    assert standalone
    for key in standalone:  # the product after the standalone prologue uses the same tile
        first, second = key.split("/")[-1].split("+")
        plain = "none+none" if key.startswith("wgrad") else f"none+{second}"
        assert key.removesuffix(f"{first}+{second}") + plain in found
    out = capsys.readouterr().out
    assert "the cost model chose" in out
    assert "not reached in time: up/" in out.splitlines()[-1] or "wgrad" in out.splitlines()[-1]
    more = tuned_with(lambda layer, tile: 1.0, 0.3)
    assert found.items() <= more.items(), "the second run continues"
    assert len(more) > len(found)


def test_tune_skips_tiles_that_the_gpu_refuses(tuned_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def times(layer: Layer, tile: tiles.Tile) -> float:
        if layer.phase == "dgrad" or tile.num_warps == 8:
            raise OutOfResources(250000, 232448, "shared memory")
        return 1.0

    found = tuned_with(times, 0.5)
    assert found
    assert all(tile.num_warps < 8 for tile in found.values())
    out = capsys.readouterr().out
    assert "refused: out of resource: shared memory" in out
    assert "(no tile runs)" in out


@pytest.mark.parametrize("off", [0.01, math.inf, math.nan])
def test_tune_rejects_wrong_tiles(
    tuned_with: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], off: float
) -> None:
    """A wrong tile, though the fastest, is reported, not timed, and added to the refused tiles."""
    timed: list[tuple[str, tiles.Tile]] = []

    def times(layer: Layer, tile: tiles.Tile) -> float:
        timed.append((layer.problem.key(), tile))
        return 1 / tile.block_m

    def is_wrong(layer: Layer, tile: tiles.Tile) -> bool:
        return layer.problem.kernel == "up" and tile.block_m >= 128

    found = tuned_with(times, 0.4, lambda layer, tile: off if is_wrong(layer, tile) else 0.005)
    up_tiles = {key: tile for key, tile in found.items() if key.startswith("up/")}
    assert up_tiles
    assert all(tile.block_m < 128 for tile in up_tiles.values())
    assert not [tile for key, tile in timed if key.startswith("up/") and tile.block_m >= 128]
    assert any(tile.block_m == 128 for key, tile in found.items() if not key.startswith("up/"))
    reported = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert reported
    assert all(line.startswith("up/16bit/") and "7.8e-03 is allowed" in line for line in reported)
    refused = tiles.read_refused(tmp_path / "out" / tiles.REFUSED)
    assert list(refused) == [triton.__version__]
    assert all(name.startswith("up/16bit/") for name in refused[triton.__version__])
    assert {name.split("/")[3] for name in refused[triton.__version__]} == {"128", "256"}


def test_best_tile_compares_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = next(
        layer
        for layer in training(generator(1, 8, 2, 32), 2, "float32")
        if layer.problem.fusion == "affine+statistics"
    )
    given: list[tuple[torch.Tensor, ...]] = []

    def error(it: Product, tile: tiles.Tile, sms: int, expected: Any) -> float:
        assert all(torch.equal(a, b) for a, b in zip(expected, aten.exact(it), strict=True))
        given.append(expected)
        return 1.0 if len(given) == 1 else 0.0

    done: Any = types.SimpleNamespace(exception=lambda: None)
    listed = [tiles.Tile(64, 64, 32, 4, stages) for stages in (2, 3, 4)]
    monkeypatch.setattr(tune, "tile_error", error)
    monkeypatch.setattr(tune, "time_tile", lambda it, tile, sms: float(tile.num_stages))
    found = tune.best_tile(layer, listed, [done] * 3, 132)
    assert found == tune.TuningResult(listed[1], 3.0, [listed[0]])
    assert all(expected is given[0] for expected in given), "computed once per layer"


def test_refused_tiles_are_merged_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / tiles.REFUSED
    tiles.refuse(path, "up/b", "up/a")
    tiles.refuse(path, "up/c", "up/a")
    assert tiles.read_refused(path) == {triton.__version__: ["up/a", "up/b", "up/c"]}
    path.write_text('{"0.1": ["down/x"]}')
    tiles.refuse(path, "up/a")
    assert tiles.read_refused(path) == {"0.1": ["down/x"], triton.__version__: ["up/a"]}


def test_tuned_tiles_are_read_with_and_without_the_fused_flag(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tiles.write(path, {"a": tiles.Tile(64, 64, 32, 4, 3, False), "b": tiles.Tile(16, 64, 32, 4, 3)})
    assert '"num_stages": 3, "fused": false}' in path.read_text()
    assert tiles.read(path) == {"a": tiles.Tile(64, 64, 32, 4, 3, False), "b": tiles.Tile(16, 64, 32, 4, 3)}
    path.write_text('{"old": [64, 64, 32, 4, 3]}')
    assert tiles.read(path)["old"].fused


def test_launches_find_precompiled_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The launch finds the precompiled code under Triton's cache key and compiles nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layer = all_layers(discriminator(), 2, "bfloat16")[0]
    tile = tuning.estimate(layer.problem, 132)
    with Compilers(1) as compilers:
        assert compilers.submit(layer, tile, 132).result() is None
    before = {path.name for path in tmp_path.iterdir()}
    assert before
    active: Any = triton.runtime.driver
    previous = active._active
    active.set_active(simulated_gpu.Driver())
    try:
        compiled = launches(layer.product("cpu"), tile, 132).product.compile()
    finally:
        active._active = previous
    assert compiled.metadata.shared > 0
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing was recompiled"
