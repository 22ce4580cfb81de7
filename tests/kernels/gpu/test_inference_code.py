"""Launches that a network in eval repeats, and the machine code of its products and of prepare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from dcgan.kernels import chain, gpu
from dcgan.kernels.gpu import inference, launcher, offline, packing
from dcgan.kernels.gpu.launcher import Launch, Pointers, Product
from dcgan.kernels.gpu.tools.layers import (
    DTYPES,
    SM_COUNTS,
    Layer,
    Shape,
    inference_layers,
    networks,
    stages_of,
)
from dcgan.kernels.gpu.tools.predict import default_tile
from tests.support.chains import small_chain
from tests.support.recorded_launches import (
    NO_COMPILATION,
    layouts,
    new,
    unaligned,
)

pytestmark = pytest.mark.usefixtures("recorder", "no_grad", "empty_weight_cache")


# --- the launcher -------------------------------------------------------------------------------------------


def test_a_repeatable_launch_passes_the_same_addresses() -> None:
    """Through the compiled kernel; here that which packs two weights."""
    jobs = [(torch.randn(5, 3, 4, 4), gpu.down.LAYOUT), (torch.randn(8, 4, 4, 4), gpu.down.LAYOUT)]
    buffer = torch.empty(packing.offsets([(weight.shape, layout) for weight, layout in jobs])[1])
    launch = packing.launch([buffer], [jobs])
    repeat = launcher.repeatable(launch)
    first = new()
    assert len(first) == 1
    assert first[0].tensors["weights"] == tuple(weight.data_ptr() for weight, _ in jobs)
    for stream in (0, 7):
        repeat(stream)
        assert new() == [first[0]._replace(stream=stream)]


def test_a_repeatable_launch_in_the_interpreter_is_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no compiled kernel."""
    made: list[Launch] = []
    monkeypatch.setattr(Launch, "__call__", lambda self: made.append(self))
    launch = packing.launch([torch.empty(64 * 5)], [[(torch.randn(5, 3, 4, 4), gpu.down.LAYOUT)]])
    repeat = launcher.repeatable(launch)
    repeat(0)
    assert made == [launch, launch]


@NO_COMPILATION
def test_the_plan_of_a_product_is_that_of_its_run() -> None:
    """There is none before the run, and another one for another alignment of x."""
    x, stages = small_chain("down")
    (spec, *_) = inference.product_specs(chain.specs(x, stages, True), stages)
    spec = spec._replace(y=spec.y._replace(scaled=False, shifted=False))
    (layout,) = layouts([spec])
    packed = layout.pack(stages[0].weight, torch.float32)
    y = torch.empty_strided(spec.shape, spec.y.stride)
    products = [Product(spec, Pointers(t), None, Pointers(y)) for t in (x, unaligned(x))]
    plans = []
    for it in products:
        assert launcher.plan_of(it, packed) is None
        launcher.run(it, packed)
        plans.append(launcher.plan_of(it, packed))
    assert plans[0] is not None
    assert plans[0] is not plans[1]
    assert [launcher.plan_of(it, packed) is plan for it, plan in zip(products, plans, strict=True)] == [
        True,
        True,
    ]
    run = plans[1]
    assert run is not None
    assert run.rest[-1].y.function == "affine"


# --- machine code -------------------------------------------------------------------------------------------

CODE = [("G", 64, "bfloat16"), ("D", 64, "bfloat16")]
MORE_CODE = [
    (name, batch, dtype)
    for name, batch, dtype in itertools.product("GD", (1, 64), ("bfloat16", "float16", "tf32", "float32"))
    if (name, batch, dtype) not in CODE
]


def product_launch(layer: Layer, arch: int) -> Launch:
    launch: Launch = layer.launches(default_tile(layer, SM_COUNTS[arch], arch), SM_COUNTS[arch]).product
    return launch


@pytest.mark.parametrize(
    ("name", "batch", "dtype"), [*CODE, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE_CODE)]
)
def test_dependent_products_wait_before_they_access_memory(name: str, batch: int, dtype: str) -> None:
    """At default tiles, and without any other fault."""
    for layer in inference_layers(networks(1)[name], batch, dtype):
        launch = product_launch(layer, 90)
        assert launch.options()["launch_pdl"]
        report = offline.inspect(launch, 90)
        assert offline.faults(launch, report, 90) == [], layer.name
        assert report.early == 0, layer.name


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_other_products_do_not_wait(arch: int) -> None:
    """A kernel that waits is reported, as is a dependent launch of one that does not."""
    layer = inference_layers(networks(1)["G"], 1, "bfloat16", dependent=False)[-1]
    launch = product_launch(layer, arch)
    assert "launch_pdl" not in launch.options()
    report = offline.inspect(launch, arch)
    assert report.early is None
    assert offline.faults(launch, report, arch) == []
    dependent = product_launch(inference_layers(networks(1)["G"], 1, "bfloat16")[-1], 90)
    for early in (None, 1):
        (fault,) = offline.faults(dependent, report._replace(early=early), 90)
        assert "before it waits" in fault


def prepare_launch(shapes: Sequence[Shape], dtype: str, checked: bool, dependents: bool) -> Launch:
    specs = [layer.spec for layer in inference_layers(shapes, 64, dtype, dependents)]
    stages = stages_of(shapes, dtype)
    weights = inference.Weights(stages, layouts(specs), DTYPES[dtype], checked, dependents)
    assert weights.checked == checked
    return weights.launch


PREPARES = list(itertools.product("GD", ("bfloat16", "tf32"), (True, False), (90, 80)))
FEW = [("G", "bfloat16", True, 90), ("D", "tf32", True, 90), ("D", "bfloat16", False, 80)]


@pytest.mark.parametrize(
    ("name", "dtype", "checked", "arch"),
    [
        *FEW,
        *(pytest.param(*row, marks=pytest.mark.slow) for row in PREPARES if row not in FEW),
    ],
)
def test_prepare_compiles_without_spills(name: str, dtype: str, checked: bool, arch: int) -> None:
    """It compares all weights at once: samples are loaded, 16 bytes per thread, before any is waited for."""
    launch = prepare_launch(networks(1)[name], dtype, checked, dependents=arch >= 90)
    report = offline.inspect(launch, arch)
    assert (report.spills, report.stack) == (0, 0)
    assert offline.faults(launch, report, arch) == []
    assert report.early is None, "nothing that it reads is written by the kernel before it on the stream"
    _, sass = offline.machine_code(offline.compile_launch(launch, arch))
    assert ("PREEXIT" in sass) == (arch >= 90), "dependent launches may start at once"
    if checked:
        before, barrier, _ = sass.partition("BAR.SYNC")
        assert barrier
        assert before.count("LDG.E.128") == 2 * len(networks(1)[name])
        assert "STG" not in before
