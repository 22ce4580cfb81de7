"""A network in eval on the Triton engine: its results in float64, from inputs and tensors of every kind.

All memory starts as NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dcgan import fast, models
from dcgan.kernels import chain, ops
from dcgan.kernels.gpu import cost_model, inference, launcher, tuning
from dcgan.kernels.gpu.tiles import Problem, Tile
from tests.interpreter.cases import DTYPES, surrounded
from tests.support.chains import freeze_weights, small_chain, stage
from tests.support.changes import CHANGES, NOT_REPEATABLE
from tests.support.inference import (
    FLOAT32,
    OTHER_VECTORS,
    assert_accurate,
    memory,
    some_fast,
    weights_of,
    with_vectors,
)
from tests.support.native import eager64
from tests.support.networks import NETWORKS, fast_network, sample
from tests.support.tolerance import relative, unit

pytestmark = pytest.mark.usefixtures("inference_engine", "no_grad", "empty_weight_cache")


# --- results ------------------------------------------------------------------------------------------------


RESULTS = list(itertools.product(("up", "down"), DTYPES, (1, 3, 11), ("nhwc", "nchw")))
FAST_RESULTS = [
    ("up", torch.float32, 1, "nhwc"),
    ("up", torch.float16, 1, "nchw"),
    ("down", torch.float32, 1, "nhwc"),
    ("down", torch.bfloat16, 3, "nchw"),
]


@pytest.mark.parametrize(("kind", "dtype", "batch", "layout"), some_fast(RESULTS, FAST_RESULTS))
def test_results(kind: str, dtype: torch.dtype, batch: int, layout: str) -> None:
    """All entry points return the formula's values in the reference's strides, in every call."""
    x, stages = small_chain(kind, dtype, batch)
    channels_last = layout == "nhwc"
    with ops.recording() as choices:
        y = chain.conv_chain(x, stages, channels_last)
    assert [choice.engine for choice in choices] == ["triton"] * len(stages)
    assert_accurate(y, x, stages, channels_last)

    def check(checked: bool) -> None:
        run = chain.Chain(stages)
        for _ in range(2):
            with ops.recording() as choices:
                again = run(x, channels_last)
            assert [choice.engine for choice in choices] == ["triton"] * len(stages)
            assert torch.equal(again, y)
            assert again.stride() == y.stride()
        assert weights_of(run).checked is checked

    check(checked=False)
    owner = freeze_weights(stages)
    check(checked=True)
    del owner


@pytest.mark.parametrize("kind", some_fast(("up", "down"), ("down",)))
def test_batches_share_packed_weights(kind: str) -> None:
    """A Chain follows every shape of x with one set of packed weights, which only the first call writes."""
    small, stages = small_chain(kind, torch.bfloat16, 1)
    odd, _ = small_chain(kind, torch.bfloat16, 9)
    owner = freeze_weights(stages)
    run = chain.Chain(stages)
    first = run(small)
    packed = memory(weights_of(run)).clone()
    assert_accurate(run(odd), odd, stages)
    assert torch.equal(run(small), first)
    assert torch.equal(memory(weights_of(run)), packed)
    del owner


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "inside NaN": surrounded,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


FAST_INPUTS = [
    *(("up", strides) for strides in ("inside NaN", "misaligned", "expanded")),
    *(("down", strides) for strides in ("channels_last", "transposed", "every other")),
]


@pytest.mark.parametrize(
    ("kind", "strides"), some_fast(itertools.product(("up", "down"), INPUTS), FAST_INPUTS)
)
def test_inputs_of_other_strides(kind: str, strides: str) -> None:
    """A Chain that has run on a contiguous x as well."""
    x, stages = small_chain(kind, torch.float16, 2)
    stages = stages[:2]
    owner = freeze_weights(stages)
    run = chain.Chain(stages)
    run(x)
    strided = INPUTS[strides](x)
    y = run(strided)
    assert_accurate(y, strided, stages)
    assert torch.equal(y, chain.conv_chain(strided, stages))
    del owner


def test_prepared_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are too many kinds of calls they start over, and results stay correct."""
    monkeypatch.setattr(inference, "MAX_PREPARED", 2)
    x, stages = small_chain("down", batch=1)
    stages = stages[:2]
    owner = freeze_weights(stages)
    run = chain.Chain(stages)
    for strides in (*INPUTS, *INPUTS):
        strided = INPUTS[strides](x)
        assert_accurate(run(strided), strided, stages)
        assert len(run._network._prepared) <= 2
    del owner


class WeightStrides(NamedTuple):
    """Strides of a weight, and whether its elements are contiguous in memory in some order."""

    change: Callable[[Tensor], Tensor]
    dense: bool = True


WEIGHTS: dict[str, WeightStrides] = {
    "contiguous": WeightStrides(lambda w: w),
    "channels_last": WeightStrides(lambda w: w.contiguous(memory_format=torch.channels_last)),
    "transposed": WeightStrides(lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)),
    "inside NaN": WeightStrides(surrounded, dense=False),
    "expanded": WeightStrides(lambda w: w[:1].expand_as(w), dense=False),
}


FAST_WEIGHTS = [("up", "channels_last"), ("up", "expanded"), ("down", "transposed"), ("down", "inside NaN")]


@pytest.mark.parametrize(
    ("kind", "strides"), some_fast(itertools.product(("up", "down"), WEIGHTS), FAST_WEIGHTS)
)
def test_weights_of_other_strides(kind: str, strides: str) -> None:
    """Those that are not dense in memory cannot be compared, and are packed in every call."""
    x, stages = small_chain(kind, torch.bfloat16, 2)
    stages = [s._replace(weight=WEIGHTS[strides].change(s.weight)) for s in stages[:2]]
    owner = freeze_weights(stages)
    assert_accurate(chain.conv_chain(x, stages), x, stages)
    run = chain.Chain(stages)
    for edit in (0.0, -1.25, 1.5):
        if edit:
            stages[1].weight.data[0, 0, 0, 0] = edit
            stages[-1].weight.data[:1].mul_(edit)
        assert_accurate(run(x), x, stages)
        assert weights_of(run).checked is WEIGHTS[strides].dense
    del owner


FAST_VECTORS = [("up", "float64"), ("up", "expanded"), ("down", "float16"), ("down", "bfloat16 of stride 2")]


@pytest.mark.parametrize(
    ("kind", "name"), some_fast(itertools.product(("up", "down"), OTHER_VECTORS), FAST_VECTORS)
)
def test_vectors_of_other_dtypes_and_strides(kind: str, name: str) -> None:
    x, stages = small_chain(kind, batch=2)
    stages = with_vectors(stages[:3], OTHER_VECTORS[name])
    owner = freeze_weights(stages)
    run = chain.Chain(stages)
    for y in (run(x), run(x), chain.conv_chain(x, stages)):
        assert_accurate(y, x, stages)
    del owner


@pytest.mark.parametrize("dtype", some_fast(DTYPES, (torch.bfloat16,)))
def test_layers_without_vectors(dtype: torch.dtype) -> None:
    """Between others, and a network that has none at all."""
    x = torch.randn(2, 3, 12, 10).to(dtype)
    bare = [
        stage(False, 3, 5, act="leaky_relu", slope=0.2, dtype=dtype),
        stage(False, 5, 9, act="relu", dtype=dtype),
        stage(True, 9, 3, dtype=dtype),
    ]
    mixed = [bare[0], stage(False, 5, 9, given="sbn", act="relu", dtype=dtype), bare[2]]
    for stages in (bare, mixed, bare[:1]):
        owner = freeze_weights(stages)
        run = chain.Chain(stages)
        for y in (run(x), run(x), chain.conv_chain(x, stages)):
            assert_accurate(y, x, stages)
        del owner


# --- networks -----------------------------------------------------------------------------------------------

FAST_CHANGES = [
    ("G", "Adam fused"),
    ("D", "load_state_dict"),
    ("D", "numpy view"),
    ("D", "parameter replaced"),
    ("D", "running statistics replaced"),
]


@pytest.mark.parametrize(("kind", "name"), some_fast(itertools.product("GD", CHANGES), FAST_CHANGES))
def test_a_network_follows_changes(kind: str, name: str) -> None:
    """In the next call, and again in the call after one that compares only.

    The result is computed before float64's, whose network invalidates caches.
    """
    model = fast_network(kind)
    x = sample(model, 1)
    for _ in range(1 if name in NOT_REPEATABLE else 2):
        before = [model(x) for _ in range(2)][-1]
        CHANGES[name](model)
        y = model(x)
        assert relative(y, eager64(model, x)) <= 10 * FLOAT32
        assert y.shape != before.shape or not torch.equal(y, before)


def test_refresh() -> None:
    """An edit of one element without a version that the next call misses is seen after ``refresh``."""
    model = fast_network("G", features=8)
    z = sample(model, 1)
    before = [model(z) for _ in range(2)][-1]
    model.main[0].weight.data[0, 0, 0, 0] += 5.0
    assert torch.equal(model(z), before), "one of 1,536 lines was sampled by chance: choose another seed"
    model.refresh()
    for _ in range(2):
        y = model(z)
        assert not torch.equal(y, before)
        assert relative(y, eager64(model, z)) <= FLOAT32 * 10


def eager(model: Any) -> Any:
    """Return the reference network with the same state and dtype, whose modules PyTorch runs one by one."""
    kind = models.Generator if isinstance(model, models.Generator) else models.Discriminator
    found: Any = kind(**model.sizes()).to(next(model.parameters()).dtype).eval()
    found.load_state_dict(model.state_dict())
    return found


@pytest.fixture
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program compute 1,024 rows: the interpreter's time is that of its programs and K steps."""

    def choose(problem: Problem, *_: Any) -> Tile:
        tile = tuning.estimate(problem, cost_model.SM_COUNT)
        return tile if problem.kernel == "dense_narrow" else replace(tile, block_m=1024)

    monkeypatch.setattr(launcher, "_plans", {})
    monkeypatch.setattr(tuning, "choose", choose)


@pytest.mark.usefixtures("tall_tiles")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    some_fast(itertools.product("GD", DTYPES[1:]), [("G", torch.float16), ("G", torch.bfloat16)]),
)
def test_16_bit_networks_are_as_accurate_as_eager(kind: str, dtype: torch.dtype) -> None:
    """The error is at most 1.05 times that of PyTorch's modules in the same dtype, each of which rounds.

    A Discriminator's few results are compared over many images.
    """
    model = fast_network(kind, dtype, features=8)
    x = sample(model, 2 if kind == "G" else 200)
    calls = ["forward"] if kind == "G" else ["forward", "logits"]
    for name in calls:
        with ops.recording() as choices:
            y = getattr(model, name)(x)
        assert [choice.engine for choice in choices] == ["triton"] * 4
        baseline = getattr(eager(model), name)(x)
        exact = getattr(eager(model).double(), name)(x.double())
        assert y.dtype == baseline.dtype == dtype
        assert y.shape == baseline.shape
        assert y.stride() == baseline.stride()
        assert relative(y, exact) <= 1.05 * relative(baseline, exact)


@NETWORKS
def test_explain(kind: str) -> None:
    """Every layer runs on the engine, and a note says that they are one operator of five launches."""
    model = fast_network(kind)
    found = fast.explain(model, sample(model, 1))
    assert [row.engine for row in found] == ["triton"] * 4
    assert found.note == "one operator: 5 launches per call"
    assert str(found).endswith(found.note)


def test_logits_and_forward_have_separate_chains() -> None:
    """Both follow an edit that bumps no version."""
    model = fast_network("D")
    image = sample(model, 1)
    for _ in range(2):
        model.logits(image), model(image)
        model.logits(image), model(image)
        model.main[2].weight.data.neg_()
        logits, probability = model.logits(image), model(image)
        exact = eager(model).double().logits(image.double())
        assert relative(logits, exact) <= 10 * FLOAT32
        assert relative(probability, exact.sigmoid()) <= 10 * FLOAT32


def test_networks_in_autocast() -> None:
    """The weights of a float32 network, cast to bfloat16 by autocast, follow edits too."""
    model = fast_network("G")
    z = sample(model, 1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(z)
        assert y.dtype == torch.bfloat16
        assert relative(y, eager64(model, z)) <= 10 * unit(torch.bfloat16)
        model.main[3].weight.data.neg_()
