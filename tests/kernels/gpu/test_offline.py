"""The kernels' code for sm_80 and sm_90: no spill, shared memory that fits, tensor cores, 16-byte copies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import pytest
import torch

from bench import shortlist
from bench.cases import DTYPES
from bench.inspect import MULTIPROCESSORS, networks, tiles_of
from bench.layers import Launches, Layer, layers, of_product, training
from dcgan import models
from dcgan.kernels.gpu import offline, tiles
from dcgan.kernels.gpu.launch import INT32_MAX, Epilogue, Launch, Product


@pytest.fixture(autouse=True)
def _restore_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def cases(channels: int, dtype: str) -> list[Layer]:
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    return [layer for network in networks(channels) for layer in layers(network, 64, DTYPES[dtype])]


def check(layer: Layer, tile: tiles.Tile, arch: int) -> None:
    launch = layer.launches(tile, MULTIPROCESSORS[arch]).product
    assert offline.faults(launch, offline.inspect(launch, arch), arch) == [], (layer.name, tile)


def training_cases(channels: int, dtype: str, batch: int = 64) -> list[Layer]:
    """Forward, adjoint and weight gradient of every layer of both networks."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    return [
        layer
        for network in networks(channels)
        for layer in training(network, batch, DTYPES[dtype], input_gradient=True)
    ]


SIZES = ("SIZE", "STRIDE", "X_STRIDE", "X_OTHER_STRIDE", "OUT_STRIDE", "C")


def code(launch: Launch, without: tuple[str, ...] = ()) -> Hashable:
    """What decides a launch's machine code, but for ``without``."""

    def kind(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return value.dtype
        return "float" if isinstance(value, float) else (value <= INT32_MAX, value % 16 == 0)

    constants = {name: value for name, value in launch.constants.items() if name not in without}
    return (
        launch.kernel.__name__,
        tuple((name, kind(value)) for name, value in launch.arguments.items()),
        tuple(sorted(constants.items())),
        (launch.tile.num_warps, launch.tile.num_stages),
    )


def check_all(found: Iterable[tuple[str, Launch]], arch: int, may_spill: bool = False) -> None:
    """No launch has a fault. One after the other: ``ast.parse`` in two threads fails on CPython 3.11."""

    def faults(case: tuple[str, Launch]) -> list[str]:
        name, launch = case
        report = offline.inspect(launch, arch)
        if may_spill:
            report = report._replace(spills=0, stack=0)
        return [
            f"{launch.kernel.__name__} of {name} {tuple(launch.tile)}: {fault}"
            for fault in offline.faults(launch, report, arch)
        ]

    assert [fault for case in found for fault in faults(case)] == []


def described(layer: Layer) -> str:
    return f"{layer.name} {layer.phase} {layer.problem.fusion}"


def with_others(layer: Layer, launches: Launches) -> Iterator[tuple[str, Launch]]:
    """The product, then the passes before it and the reduction after it."""
    yield described(layer), launches.product
    for launch in (*launches.passes, launches.reduction):
        if launch is not None:
            yield described(layer), launch


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        ("float32", 90),
        *(pytest.param(dtype, 90, marks=pytest.mark.slow) for dtype in ("tf32", "bfloat16", "float16")),
        *(pytest.param(dtype, 80, marks=pytest.mark.slow) for dtype in DTYPES),
    ],
)
def test_default_tiles(dtype: str, arch: int) -> None:
    """Those of bfloat16 are below, with an epilogue; of tf32 and of sm_80, one of each kernel in training."""
    for layer in cases(1, dtype):
        check(layer, shortlist.default(layer, MULTIPROCESSORS[arch], arch), arch)


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_default_tiles_with_their_epilogue(dtype: str, arch: int) -> None:
    """Scale, shift and the activation that takes most registers cost no spill."""
    for layer in cases(1, dtype):
        product = layer.operation
        assert isinstance(product, Product)
        vector = torch.empty(product.y.shape[1], device="meta")
        epilogue = Epilogue("affine", "tanh", None, vector, vector)
        product = product._replace(epilogue=epilogue)
        whole = of_product(layer.name, layer.phase, product)
        check(whole, shortlist.default(whole, MULTIPROCESSORS[arch], arch), arch)


EVERY = ("float32", "tf32", "bfloat16")  # float16's code is bfloat16's
Distinct = dict[Hashable, tuple[str, Launch]]


def family(layer: Layer, channels: int) -> Hashable:
    """Layers of one family have the same code but for its sizes, unless they make or take an image."""
    return layer.phase, layer.kernel, channels if "narrow" in layer.kernel else None


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", EVERY)
def test_every_tile(dtype: str, arch: int) -> None:
    """For one layer of each family that can have it."""
    distinct: Distinct = {}
    for channels in (1, 3):
        for layer in cases(channels, dtype):
            for tile in tiles.candidates(layer.problem.kernel, layer.problem.precision):
                launch = layer.launches(tiles.fit(tile, layer.problem), MULTIPROCESSORS[arch]).product
                distinct.setdefault((family(layer, channels), launch.tile), (described(layer), launch))
    check_all(distinct.values(), arch)


def test_a_spilling_tile_is_a_fault() -> None:
    """The bar can be missed: a tile far too large for its warps."""
    layer = next(x for x in cases(1, "bfloat16") if x.kernel == "up")
    launch = layer.launches(tiles.Tile(256, 256, 64, 4, 2), 132).product
    faults = offline.faults(launch, offline.inspect(launch, 90), 90)
    assert any("spills" in fault for fault in faults)


def test_default_tiles_in_training() -> None:
    """Of passes and reductions one for all sizes: their code differs in numbers alone."""
    distinct: dict[Hashable, tuple[str, Launch]] = {}
    for layer in training_cases(1, "bfloat16"):
        tile = shortlist.default(layer, MULTIPROCESSORS[90], 90)
        launches = layer.launches(tile, MULTIPROCESSORS[90])
        for name, launch in with_others(layer, launches):
            key = code(launch, () if launch is launches.product else SIZES)
            distinct.setdefault(key, (name, launch))
    names = {launch.kernel.__name__ for _, launch in distinct.values()}
    assert {"_pass_kernel", "_chunks_kernel", "_statistics_kernel", "_sums_kernel", "_wgrad_kernel"} <= names
    check_all(distinct.values(), 90)


@pytest.mark.parametrize(("dtype", "arch"), [("tf32", 90), ("bfloat16", 80)])
def test_a_tile_of_each_kernel_in_training(dtype: str, arch: int) -> None:
    """With a prologue inside, wherever one is to be had."""
    chosen: dict[str, Layer] = {}
    for layer in training_cases(1, dtype):
        before = chosen.get(layer.kernel)
        bare = before is not None and before.problem.fusion.startswith("none")
        if before is None or (bare and not layer.problem.fusion.startswith("none")):
            chosen[layer.kernel] = layer
    assert len(chosen) == 9
    found = []
    for layer in chosen.values():

        def product(tile: tiles.Tile, layer: Layer = layer) -> Launch:
            return layer.launches(tile, MULTIPROCESSORS[arch]).product

        def passed_over(tile: tiles.Tile, product: Callable[[tiles.Tile], Launch] = product) -> bool:
            return not tile.fused or offline.spills(product(tile), arch)

        limit = tiles.SHARED_LIMIT[arch]
        tile = tiles.estimate(layer.problem, MULTIPROCESSORS[arch], limit, passed_over)
        found.append((described(layer), product(tile)))
    check_all(found, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", EVERY)
def test_every_tile_in_training(dtype: str, arch: int) -> None:
    """All that have the shared memory they need, for one layer of each family; fused, and the pass beside it.

    Some spill, and are not chosen for it; tuning times them as they are.
    """
    distinct: Distinct = {}
    for channels in (1, 3):
        for layer in training_cases(channels, dtype):
            for tile in sorted(tiles_of(layer, arch, every=True), key=lambda tile: not tile.fused):
                launches = layer.launches(tile, MULTIPROCESSORS[arch])
                for name, launch in with_others(layer, launches):
                    of = family(layer, channels) if launch is launches.product else None
                    blocks = launch.tile._replace(fused=True)
                    distinct.setdefault((launch.kernel.__name__, of, blocks), (name, launch))
    check_all(distinct.values(), arch, may_spill=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", EVERY)
def test_every_default_tile_in_training(dtype: str, arch: int) -> None:
    """Of every layer, at a batch of 64 and of 1024; of passes and reductions one for all sizes."""
    distinct: Distinct = {}
    for layer in training_cases(1, dtype, 64) + training_cases(1, dtype, 1024):
        for tile in tiles_of(layer, arch, every=False):
            launches = layer.launches(tile, MULTIPROCESSORS[arch])
            for name, launch in with_others(layer, launches):
                key = code(launch, () if launch is launches.product else SIZES)
                distinct.setdefault(key, (name, launch))
    check_all(distinct.values(), arch)


def test_narrow_accesses_of_a_pass_are_a_fault() -> None:
    """Channels that do not lie together, said to."""
    layer = next(x for x in training_cases(1, "bfloat16") if x.phase == "dgrad" and x.kernel == "down")
    (launch,) = layer.launches(tiles.Tile(128, 64, 64, 4, 4, fused=False), 132).passes
    report = offline.inspect(launch, 90)
    assert offline.faults(launch, report, 90) == []
    narrow = report._replace(loads_by_width={16: 2, 2: 8}, stores_by_width={4: 4})
    assert [fault.split(":")[0] for fault in offline.faults(launch, narrow, 90)] == [
        "loads of other than 16 bytes",
        "stores of other than 16 bytes",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "tf32"])
def test_channels_that_are_no_multiple_of_16_bytes_compile(dtype: str) -> None:
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    for network in (models.Generator(30, 3, features=5), models.Discriminator(3, features=5)):
        for layer in layers(network, 3, DTYPES[dtype]):
            check(layer, shortlist.default(layer, 132, 90), 90)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("tf32", marks=pytest.mark.slow)])
def test_channels_that_are_no_multiple_of_16_bytes_compile_in_training(dtype: str) -> None:
    """One layer of each kernel and phase.

    ptxas stops at 56 registers for a tile of the head's adjoint, of 255, and spills what one more would hold:
    another is taken.
    """
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    chosen = {}
    for network in (models.Generator(30, 3, features=5), models.Discriminator(3, features=5)):
        for layer in training(network, 3, DTYPES[dtype], input_gradient=True):
            chosen[layer.kernel, layer.phase] = layer
    check_all(
        (
            (described(layer), layer.launches(shortlist.default(layer, 132, 90), 132).product)
            for layer in chosen.values()
        ),
        90,
    )
