"""The kernels' machine code for sm_80 and sm_90: spills, shared memory, tensor cores, 16-byte copies."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import pytest
import torch

from dcgan.kernels import gpu, train_chain
from dcgan.kernels.gpu import batchnorm, cost_model, launcher, offline, packing, tiles, tuning
from dcgan.kernels.gpu.bce import backward_launch, forward_launch
from dcgan.kernels.gpu.launcher import INT32_MAX, Launch
from dcgan.kernels.gpu.tools.inspect import tiles_of
from dcgan.kernels.gpu.tools.layers import (
    DTYPES,
    SM_COUNTS,
    Launches,
    Layer,
    Shape,
    discriminator,
    evaluation,
    generator,
    networks,
    training,
)
from dcgan.kernels.gpu.tools.predict import default_tile
from dcgan.kernels.spec import Operand, TrainBackward, TrainCall, TrainStage


def cases(channels: int, dtype: str) -> list[Layer]:
    return [layer for shapes in networks(channels).values() for layer in evaluation(shapes, 64, dtype)]


def check(layer: Layer, arch: int) -> None:
    """Check the default tile."""
    tile = default_tile(layer, SM_COUNTS[arch], arch)
    launch = layer.launches(tile, SM_COUNTS[arch]).product
    assert offline.faults(launch, offline.inspect(launch, arch), arch) == [], (layer.name, tile)


def training_cases(channels: int, dtype: str, batch: int = 64) -> list[Layer]:
    """Return the forward, dgrad and wgrad of every layer of both networks; D's images are in two groups."""
    return [
        layer
        for name, shapes in networks(channels).items()
        for layer in training(shapes, batch, dtype, input_gradient=True, groups=2 if name == "D" else 1)
    ]


SIZES = ("SIZE", "STRIDE", "X", "OUT_STRIDE", "C", "BLOCK_T")


def code_key(launch: Launch, without: tuple[str, ...] = ()) -> Hashable:
    """Return all that a launch's machine code depends on, except the constants in ``without``."""

    def kind(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return value.dtype
        return "float" if isinstance(value, float) else (value <= INT32_MAX, value % 16 == 0)

    arguments = [*launch.flat_tensors(), *launch.scalars.items()]
    constants = {name: value for name, value in launch.constants.items() if name not in without}
    functions = tuple((v.function, v.act) for v in launch.constants.values() if isinstance(v, Operand))
    return (
        launch.kernel.__name__,
        tuple((name, kind(value)) for name, value in arguments),
        tuple(sorted(constants.items())),
        functions,
        (launch.num_warps, launch.num_stages),
    )


def blocks(launch: Launch) -> Hashable:
    """Return a launch's tile."""
    constants = launch.constants["SPEC"]._asdict() if "SPEC" in launch.constants else launch.constants
    sizes = tuple(value for name, value in constants.items() if name.lower().startswith("block"))
    return *sizes, launch.num_warps, launch.num_stages


def check_all(found: Iterable[tuple[str, Launch]], arch: int, may_spill: bool = False) -> None:
    """Check that no launch has a fault; serially, as concurrent ``ast.parse`` fails on CPython 3.11."""

    def faults(case: tuple[str, Launch]) -> list[str]:
        name, launch = case
        report = offline.inspect(launch, arch)
        if may_spill:
            report = report._replace(spills=0, stack=0)
        return [
            f"{launch.kernel.__name__} of {name} {blocks(launch)}: {fault}"
            for fault in offline.faults(launch, report, arch)
        ]

    assert [fault for case in found for fault in faults(case)] == []


def described(layer: Layer) -> str:
    return f"{layer.name} {layer.phase} {layer.problem.fusion}"


def named_launches(layer: Layer, launches: Launches) -> Iterator[tuple[str, Launch]]:
    """Yield the product, then the prologue kernels before it and what follows it."""
    for launch in (launches.product, *launches.prologues, *launches.after):
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
    """bfloat16 is tested with epilogues below, tf32 and sm_80 with one tile per kernel in training."""
    for layer in cases(1, dtype):
        check(layer, arch)


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_default_tiles_with_their_epilogue(dtype: str, arch: int) -> None:
    """Scale, shift and the activation that needs the most registers cause no spills."""
    for layer in cases(1, dtype):
        epilogue = layer.spec.y._replace(act="tanh", scaled=True, shifted=True)
        check(layer._replace(spec=layer.spec._replace(y=epilogue)), arch)


PRECISIONS = ("float32", "tf32", "bfloat16")  # float16 compiles to the same code as bfloat16
Distinct = dict[Hashable, tuple[str, Launch]]


def family(layer: Layer, channels: int) -> tuple[str, str, int | None]:
    """Return a key of layers whose code differs in sizes alone; image layers also differ by channels."""
    name = layer.kernel_name
    return layer.phase, name, channels if "narrow" in name else None


STRIDED = ("up", "up_block", "up_narrow", "down")
SPILLING: dict[tuple[str, str], list[tuple[int, int]]] = {
    ("down", "16bit"): [(16, 32), (16, 64), (64, 256), (128, 128), (128, 256), (256, 128)],
    ("down", "tf32"): [(128, 128), (256, 128)],
    ("up", "16bit"): [(256, 128)],
    ("up", "tf32"): [(128, 256), (256, 128)],
    ("up_block", "16bit"): [(64, 256), (128, 256)],
    ("up_block", "tf32"): [(64, 256), (128, 256)],
    ("up_narrow", "16bit"): [(128, 64)],
    ("up_narrow", "tf32"): [(128, 64)],
}
"""Rows and columns of the candidates that spill with some epilogue on some architecture.

They are candidates for the sake of the other epilogues and architectures, where they do not.
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_tile(dtype: str, arch: int) -> None:
    """Every candidate compiles without faults, for one layer of each family; those in SPILLING may spill."""
    distinct: dict[bool, Distinct] = {True: {}, False: {}}
    for channels in (1, 3):
        for layer in cases(channels, dtype):
            for tile in tiles.candidates(layer.problem.kernel, layer.problem.precision):
                fitted = tiles.fit(tile, layer.problem)
                launch = layer.launches(fitted, SM_COUNTS[arch]).product
                spilling = SPILLING.get((layer.kernel_name, layer.problem.precision), ())
                may_spill = (fitted.block_m, fitted.block_n) in spilling
                key = family(layer, channels), fitted
                distinct[may_spill].setdefault(key, (described(layer), launch))
    for may_spill, found in distinct.items():
        check_all(found.values(), arch, may_spill)


def without_prologue(layer: Layer) -> Layer:
    """Return the product of a convolution after a standalone prologue."""
    x = Operand(layer.spec.x.size, layer.spec.x.stride)
    return layer._replace(spec=layer.spec._replace(x=x))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_tile_with_each_epilogue(dtype: str, arch: int) -> None:
    """Of the strided convolutions, without a prologue; the default choice is never one that spills."""
    chosen: dict[Hashable, Layer] = {}
    for channels in (1, 3):
        for layer in [*training_cases(channels, dtype, 1024), *cases(channels, dtype)]:
            if layer.phase != "wgrad" and layer.kernel_name in STRIDED:
                plain = without_prologue(layer)
                key = family(layer, channels)[1:], plain.problem.fusion, plain.spec.y.act, plain.spec.y.scaled
                chosen.setdefault(key, plain)
    faults = []
    for layer in chosen.values():
        default = default_tile(layer, SM_COUNTS[arch], arch)
        for tile in tuning.variants(layer.problem):
            may_spill = SPILLING.get((layer.kernel_name, layer.problem.precision), ())
            launch = layer.launches(tile, SM_COUNTS[arch]).product
            report = offline.inspect(launch, arch)
            if tile != default and (tile.block_m, tile.block_n) in may_spill:
                report = report._replace(spills=0, stack=0)
            found = offline.faults(launch, report, arch)
            faults += [f"{described(layer)} {tile}: {fault}" for fault in found]
    assert faults == []


def test_a_spilling_tile_is_a_fault() -> None:
    """The check can fail: this tile is far too large for its warps."""
    layer = next(x for x in cases(1, "bfloat16") if x.kernel_name == "up")
    launch = layer.launches(tiles.Tile(256, 256, 64, 4, 2), 132).product
    faults = offline.faults(launch, offline.inspect(launch, 90), 90)
    assert any("spills" in fault for fault in faults)


def test_default_tiles_in_training() -> None:
    """Kernels before and after a product are compiled for one size: their code differs in constants alone."""
    distinct: dict[Hashable, tuple[str, Launch]] = {}
    large = [layer for layer in training_cases(1, "bfloat16", 1024) if layer.kernel_name == "up_block"]
    for layer in [*training_cases(1, "bfloat16"), *large]:
        tile = default_tile(layer, SM_COUNTS[90], 90)
        launches = layer.launches(tile, SM_COUNTS[90])
        for name, launch in named_launches(layer, launches):
            key = code_key(launch, () if launch is launches.product else SIZES)
            distinct.setdefault(key, (name, launch))
    names = {launch.kernel.__name__ for _, launch in distinct.values()}
    assert {
        "_apply_kernel",
        "_backward_kernel",
        "_forward_kernel",
        "_prologue_kernel",
        "_split_k_kernel",
        "_up_block_kernel",
        "_wgrad_kernel",
        "_wgrad_narrow_kernel",
    } <= names
    check_all(distinct.values(), 90)


@pytest.mark.parametrize(("dtype", "arch"), [("tf32", 90), ("bfloat16", 80)])
def test_a_tile_of_each_kernel_in_training(dtype: str, arch: int) -> None:
    """With a fused prologue wherever the kernel has one."""
    chosen: dict[str, Layer] = {}
    for layer in training_cases(1, dtype, 1024):
        before = chosen.get(layer.kernel_name)
        plain = before is not None and before.problem.fusion.startswith("none")
        if before is None or (plain and not layer.problem.fusion.startswith("none")):
            chosen[layer.kernel_name] = layer
    assert {layer.problem.kernel for layer in chosen.values()} == set(tiles.KERNELS)
    found = []
    for layer in chosen.values():
        problem, sms = layer.problem, SM_COUNTS[arch]
        fused = tuple(tile for tile in tuning.variants(problem) if tile.fused)
        ranked = cost_model.ranked(problem, fused, sms, tiles.SHARED_LIMIT[arch])
        products = (layer.launches(tile, sms).product for tile in ranked)
        found.append((described(layer), next(p for p in products if not offline.spills(p, arch))))
    check_all(found, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_tile_in_training(dtype: str, arch: int) -> None:
    """Every tile that fits in shared memory, for one layer of each family, and the standalone prologues.

    Some spill, so the default choice skips them; tuning times them nevertheless.
    """
    distinct: Distinct = {}
    for channels in (1, 3):
        for layer in training_cases(channels, dtype):
            for tile in sorted(tiles_of(layer, arch, every=True), key=lambda tile: not tile.fused):
                launches = layer.launches(tile, SM_COUNTS[arch])
                for name, launch in named_launches(layer, launches):
                    of = family(layer, channels) if launch is launches.product else None
                    distinct.setdefault((launch.kernel.__name__, of, blocks(launch)), (name, launch))
    check_all(distinct.values(), arch, may_spill=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_default_tile_in_training(dtype: str, arch: int) -> None:
    """For every layer at batch 64 and 1024; prologue and reduction kernels at one size."""
    distinct: Distinct = {}
    for layer in training_cases(1, dtype, 64) + training_cases(1, dtype, 1024):
        for tile in tiles_of(layer, arch, every=False):
            launches = layer.launches(tile, SM_COUNTS[arch])
            for name, launch in named_launches(layer, launches):
                key = code_key(launch, () if launch is launches.product else SIZES)
                distinct.setdefault(key, (name, launch))
    check_all(distinct.values(), arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("source", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_packing(source: str, dtype: str, arch: int) -> None:
    """A network's weights for fprop and dgrad compile without spills, wide ones with 16-byte accesses."""
    for shapes in networks(3).values():
        jobs: list[packing.Job] = []
        for layer in training(shapes, 64, dtype, input_gradient=True):
            if layer.kernel.layout is not None:
                weight = torch.empty(layer.spec.weight, dtype=DTYPES[source], device="meta")
                jobs.append((weight, layer.kernel.layout))
        wide = [job for job in jobs if min(job[0].shape[:2]) > 3]
        for some in (jobs, wide):
            _, total = packing.offsets([(weight.shape, layout) for weight, layout in some])
            launch = packing.launch([torch.empty(total, dtype=DTYPES[dtype], device="meta")], [some])
            report = offline.inspect(launch, arch)
            assert offline.faults(launch, report, arch) == []
        assert report.loads_by_width.keys() == report.stores_by_width.keys() == {16}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("targets", [(0.9,), (0.9, 0.0)], ids=str)
def test_loss(targets: tuple[float, ...], arch: int) -> None:
    """Also without the gradient of the probability, which the kernel then does not read."""
    logits = torch.empty(64, dtype=torch.bfloat16, device="meta")
    each = torch.empty(len(targets), device="meta")
    both = backward_launch(logits, targets, each, each, logits)
    one = backward_launch(logits, targets, each, None, logits)
    forward = forward_launch(logits, targets, each, each)
    check_all([("forward", forward), ("backward", both), ("backward", one)], arch)
    assert offline.inspect(both, arch).loads_by_width == {2: 1, 4: 2}
    assert offline.inspect(one, arch).loads_by_width == {2: 1, 4: 1}


MORE = [(1, 64), (2, 512), *((groups, c) for groups in (1, 2) for c in (1, 5, 24, 128, 256))]


def batchnorm_launches(channels: int, groups: int) -> dict[str, Launch]:
    """Return the launches between the products of a network in bfloat16 with float32 parameters."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    stats, coefficients, vector = empty(4, groups, channels), empty(2, groups, channels), empty(channels)
    statistics, sums = (empty(planes, groups * 2048, channels) for planes in (3, 2))
    y = empty(4 * groups, channels, 32, 32, dtype=torch.bfloat16)
    batches = [empty(dtype=torch.int64)] * 3
    return {
        "forward": batchnorm.forward_launch(statistics, vector, vector, 1e-5, stats),
        "backward": batchnorm.backward_launch(sums, stats, coefficients, vector, vector, 65536, 1e-5),
        "both": batchnorm.apply_launch(y, y, stats, coefficients, y, "leaky_relu", 0.2),
        "du": batchnorm.apply_launch(y, y, stats, coefficients, None, "leaky_relu", 0.2),
        "x̂": batchnorm.apply_launch(None, y, stats, None, y, "leaky_relu", 0.2),
        "track": batchnorm.track_launch(
            [vector] * 3, [vector] * 3, batches, [stats] * 3, [0.1, -1.0, 1.0], [9] * 3
        ),
    }


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("groups", "channels"), [(2, 64), (1, 512), *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)]
)
def test_batchnorm(groups: int, channels: int, arch: int) -> None:
    """No spills; ``apply`` accesses channels that are a multiple of 8 by 16 bytes, in maps and in vectors."""
    for name, launch in batchnorm_launches(channels, groups).items():
        report = offline.inspect(launch, arch)
        assert offline.faults(launch, report, arch) == [], name
        if launch.kernel.__name__ == "_apply_kernel" and channels % 8 == 0:
            assert report.loads_by_width.keys() == report.stores_by_width.keys() == {16}, name


def launches_of_a_network(shapes: list[Shape], groups: int, arch: int) -> list[Launch]:
    """Return the launches of both passes, at default tiles, in bfloat16 with float32 parameters."""
    found: list[Launch] = []

    def choose(problem: tiles.Problem, device: torch.device, spills: Any, trial: Any = None) -> tiles.Tile:
        return tuning.estimate(problem, SM_COUNTS[arch], tiles.SHARED_LIMIT[arch], spills)

    stages = []
    for shape in shapes:
        order = (shape.c_in, shape.c_out) if shape.transposed else (shape.c_out, shape.c_in)
        stage = TrainStage(shape.transposed, torch.empty(*order, 4, 4), act=shape.act)
        stage = stage._replace(norm=shape.norm, stride=shape.stride, padding=shape.padding)
        vectors = {"gamma": torch.empty(shape.c_out), "beta": torch.empty(shape.c_out)}
        stages.append(stage._replace(**vectors) if shape.norm else stage)
    size = shapes[0].size
    call = TrainCall(torch.empty(64, shapes[0].c_in, size, size).bfloat16(), stages, groups=groups)
    specs = train_chain.specs(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_plans", {})
        patch.setattr(Launch, "__call__", lambda launch: found.append(launch))
        patch.setattr(Launch, "spills", lambda launch: offline.spills(launch, arch))
        patch.setattr(tuning, "choose", choose)
        y, saved, stats, packed = gpu.train_forward(specs, call)
        norm = [shape.norm for shape in shapes]
        needs = True, [True] * len(shapes), norm, norm
        back = TrainBackward(torch.empty_like(y), y, list(saved), stats, packed, *needs, call)
        gpu.train_backward(specs, back, train_chain.empty_gradients(back))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["G", "D"])
def test_every_launch_of_a_network_in_two_groups(name: str, arch: int) -> None:
    """As they are launched on a GPU; the epilogues of all products but the first are those of training."""
    found = launches_of_a_network(networks(1)[name], 2, arch)
    products = [launch.constants["SPEC"] for launch in found if "SPEC" in launch.constants]
    assert len(products) == 3 * 5
    assert {spec.groups for spec in products} == {1, 2}
    assert [spec.y.function for spec in products].count("gradient") == (4 if name == "G" else 3)
    distinct: dict[Hashable, tuple[str, Launch]] = {}
    for launch in found:
        distinct.setdefault(code_key(launch), (launch.kernel.__name__, launch))
    check_all(distinct.values(), arch)


def test_narrow_accesses_of_a_prologue_kernel_are_a_fault() -> None:
    """As reported for channels that are not contiguous."""
    layer = next(x for x in training_cases(1, "bfloat16") if x.problem.has_prologue)
    (launch,) = layer.launches(tiles.Tile(128, 64, 64, 4, 4, fused=False), 132).prologues
    report = offline.inspect(launch, 90)
    assert offline.faults(launch, report, 90) == []
    narrow = report._replace(loads_by_width={16: 1, 2: 8}, stores_by_width={4: 4})
    assert [fault.split(":")[0] for fault in offline.faults(launch, narrow, 90)] == [
        "loads not 16 bytes wide, counts by width",
        "stores not 16 bytes wide, counts by width",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "tf32"])
def test_channels_not_a_multiple_of_16_bytes(dtype: str) -> None:
    for shapes in (generator(3, 30, features=5), discriminator(3, features=5)):
        for layer in evaluation(shapes, 3, dtype):
            check(layer, 90)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("tf32", marks=pytest.mark.slow)])
def test_channels_not_a_multiple_of_16_bytes_in_training(dtype: str) -> None:
    """One layer for each kernel and phase.

    For one tile of the head's adjoint, ptxas stops at 56 of 255 registers and spills a single one, so the
    default choice is another tile.
    """
    chosen = {}
    for shapes in (generator(3, 30, features=5), discriminator(3, features=5)):
        for layer in training(shapes, 3, dtype, input_gradient=True):
            chosen[layer.kernel_name, layer.phase] = layer
    check_all(
        (
            (described(layer), layer.launches(default_tile(layer, 132, 90), 132).product)
            for layer in chosen.values()
        ),
        90,
    )
