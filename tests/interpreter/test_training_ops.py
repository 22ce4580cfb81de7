"""Both ops with statistics, prologues and every gradient, through the Triton engine, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgan.kernels import ops
from tests.interpreter import repair
from tests.interpreter.cases import (
    DTYPES,
    PROLOGUES,
    SHAPES,
    TAILS,
    Shape,
    assert_accurate,
    check,
    cotangents,
    far_apart,
    prologues,
    training_call,
    triton_results,
)
from tests.support.engine_results import results
from tests.support.float64_reference import leaves, op, pairwise
from tests.support.native_training import strided

LAYOUTS = ("nhwc", "nchw", "expanded")
LEFT_OUT = (  # the slower of similar shapes
    *("up_wide", "up_few", "up_block_64", "up_block_few", "up_narrow_1", "up_narrow_2"),
    *("down", "down_odd_wide", "down_odd_pixel", "dense_outer_1", "dense_narrow_1"),
)


def row_id(row: dict[str, Any]) -> str:
    formats = "".join("l" if row[name] else "c" for name in ("x_nhwc", "channels_last"))
    dtype = str(row["dtype"]).removeprefix("torch.")
    return f"{row['shape']}-{row['before']}-{row['after']}-{dtype}-{formats}-{row['layout']}"


def sample(prologues: list[str], tails: list[str]) -> list[dict[str, Any]]:
    return pairwise(
        shape=[name for name in SHAPES if name not in LEFT_OUT],
        before=prologues,
        after=tails,
        dtype=list(DTYPES),
        layout=list(LAYOUTS),
        x_nhwc=[True, False],
        channels_last=[True, False],
    )


# One prologue and tail of each kind, with each activation once.
SAMPLE = sample(
    ["plain", "relu", "sigmoid", "affine_relu", "affine_leaky_relu", "affine_tanh"],
    ["statistics", "raw", "tanh", "scale", "shift_sigmoid", "scale_shift_leaky_relu"],
)
REST = [row for row in sample(list(PROLOGUES), list(TAILS)) if row not in SAMPLE]


@pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(row, id=row_id(row)) for row in SAMPLE),
        *(pytest.param(row, id=row_id(row), marks=pytest.mark.slow) for row in REST),
    ],
)
def test_outputs_and_gradients(row: dict[str, Any]) -> None:
    """Pairwise: each geometry, prologue, tail, dtype and layout occurs with each value of the others."""
    row = row.copy()
    shape, layout = SHAPES[row.pop("shape")], row.pop("layout")
    check(training_call(shape, **row), shape.transposed, layout)


ONE_OF_EACH = (
    "up",
    "up_block",
    "up_narrow_3",
    "down_odd",
    "down_narrow_3",
    "dense_outer_4",  # its adjoint is dense_narrow
    "dense_down",
    "dense_narrow_3",
)


@pytest.mark.slow
@pytest.mark.parametrize("after", TAILS)
@pytest.mark.parametrize("before", PROLOGUES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_combination(name: str, before: str, after: str) -> None:
    """Every combination of kernel, prologue and tail, cycling through dtypes and layouts."""
    shape = SHAPES[name]
    turn = ONE_OF_EACH.index(name) + list(PROLOGUES).index(before) + list(TAILS).index(after)
    dtype, layout = DTYPES[turn % 3], LAYOUTS[turn // 3 % 3]
    call = training_call(shape, before, after, dtype, turn % 2 == 0, channels_last=turn % 4 < 2)
    check(call, shape.transposed, layout)


@pytest.mark.parametrize("after", ["statistics", "scale_shift_tanh"])
@pytest.mark.parametrize(
    "name",
    [
        "down_narrow_3",
        "dense_up",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("up", "up_block", "down_odd", "up_narrow_3")
        ),
    ],
)
def test_some_inputs_require_gradients(name: str, after: str) -> None:
    """The requested gradients have the same bits as when all are requested; no others are computed."""
    shape = SHAPES[name]
    call = training_call(shape, "affine_relu", after)
    grad_outputs = cotangents(call, shape.transposed)
    everything = triton_results(call, shape.transposed, grad_outputs)
    subsets = [(name,) for name in leaves(call) if name not in ("center", "shift")] + [
        ("x", "weight", "shift")
    ]
    for wanted in subsets:
        actual = triton_results(call, shape.transposed, grad_outputs, wanted)
        assert {name[1:] for name in actual if name not in ("y", "mean", "var")} == set(wanted)
        for name, result in actual.items():
            assert torch.equal(result, everything[name]), f"{name} of {wanted}"


@pytest.mark.parametrize("name", ["down_narrow_1", pytest.param("dense_down", marks=pytest.mark.slow)])
@pytest.mark.parametrize("used", list(itertools.product([True, False], repeat=3))[1:-1], ids=str)
def test_some_outputs_are_used(name: str, used: tuple[bool, bool, bool]) -> None:
    shape = SHAPES[name]
    call = training_call(shape, "affine_leaky_relu", "statistics")
    dy, dmean, dvar = cotangents(call, shape.transposed)
    grad_outputs: Any = tuple(c if use else None for c, use in zip((dy, dmean, dvar), used, strict=True))
    assert_accurate(
        triton_results(call, shape.transposed, grad_outputs), call, shape.transposed, grad_outputs
    )


@pytest.mark.parametrize("name", ["up_few", "down"])
def test_gradients_of_sums(name: str) -> None:
    """The backwards of y.sum(), mean.sum() and var.sum() pass gradients whose strides are all 0."""
    shape = SHAPES[name]
    call = training_call(shape, "affine_relu", "statistics")
    c, count = shape.c_out, 40.0
    grad_outputs = (
        torch.ones(()).expand(ops.check(call, shape.transposed).shape),
        torch.tensor(count).expand(c),
        torch.tensor(-count).expand(c),
    )
    assert_accurate(
        triton_results(call, shape.transposed, grad_outputs), call, shape.transposed, grad_outputs
    )


@pytest.mark.parametrize("after", ["statistics", pytest.param("scale_shift_tanh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["up_few", "up_block", "down_narrow_3", "dense_up"])
def test_any_strides(name: str, after: str) -> None:
    """Any strides of x, weight, vectors and gradients; a dense weight's gradient has the weight's strides."""
    shape = SHAPES[name]
    call = training_call(shape, "affine_relu", after)
    grad_outputs: Any = tuple(None if c is None else strided(c) for c in cotangents(call, shape.transposed))
    everything = call._replace(**{name: strided(t) for name, t in leaves(call).items() if name != "weight"})
    weights = (
        call.weight.contiguous(memory_format=torch.channels_last),
        call.weight.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    )
    for weight in weights:
        now = everything._replace(weight=weight)
        assert_accurate(
            triton_results(now, shape.transposed, grad_outputs), now, shape.transposed, grad_outputs
        )


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("up_few", "relu"),
        ("dense_down", "leaky_relu"),
        pytest.param("up_few", "leaky_relu", marks=pytest.mark.slow),
        pytest.param("dense_down", "relu", marks=pytest.mark.slow),
    ],
)
def test_the_derivative_at_a_kink(name: str, act: str) -> None:
    """At exactly 0 the derivatives of relu and leaky_relu are those of eager: 0 and the slope."""
    shape = SHAPES[name]
    call = training_call(shape, "affine", "raw", in_act=act)
    assert call.center is not None
    at_kink = call._replace(
        x=torch.zeros_like(call.x), shift=torch.zeros(shape.c_in), center=torch.zeros(shape.c_in)
    )
    flat = call._replace(out_act=act, weight=torch.zeros_like(call.weight))
    for now in (at_kink, flat, flat._replace(out_scale=torch.ones(shape.c_out))):
        grad_outputs = cotangents(now, shape.transposed)
        assert_accurate(
            triton_results(now, shape.transposed, grad_outputs), now, shape.transposed, grad_outputs
        )


@pytest.mark.parametrize(
    "name",
    [
        *("down", "up_block", "up_narrow_1"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("up_few", "dense_down")),
    ],
)
def test_results_are_deterministic(name: str) -> None:
    shape = SHAPES[name]
    call = training_call(shape, "affine_leaky_relu", "statistics", torch.bfloat16)
    grad_outputs = cotangents(call, shape.transposed)
    first, second = (triton_results(call, shape.transposed, grad_outputs) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        pytest.param(
            name,
            fused,
            id=f"{name}-{'fused' if fused else 'standalone'}",
            marks=[] if fused or name == "down" else pytest.mark.slow,
        )
        for name in ("up", "up_block", "up_narrow_1", "down", "down_narrow_3", "dense_up", "dense_down")
        for fused in (True, False)
    ],
)
def test_offsets_beyond_int32(name: str, fused: bool) -> None:
    """In x and dy, which dgrad, wgrad and the standalone prologues read."""
    shape = SHAPES[name]._replace(n=2)
    call = training_call(shape, "affine_relu", "statistics", torch.float16)
    dy, dmean, dvar = cotangents(call, shape.transposed)
    call, grad_outputs = call._replace(x=far_apart(call.x)), (far_apart(dy), dmean, dvar)
    with repair.overflow_checked(), prologues(fused, fused):
        actual = triton_results(call, shape.transposed, grad_outputs)
    assert_accurate(actual, call, shape.transposed, grad_outputs)


ANY_SIZE = given(
    transposed=st.booleans(),
    n=st.integers(1, 3),
    c_in=st.integers(1, 20),
    c_out=st.integers(1, 20),
    h=st.integers(2, 5),
    w=st.integers(2, 4),
    before=st.sampled_from(list(PROLOGUES)),
    after=st.sampled_from(list(TAILS)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    x_nhwc=st.booleans(),
    channels_last=st.booleans(),
)
ANY_SIZE_ON_ONE_PIXEL = given(
    transposed=st.booleans(),
    n=st.integers(1, 20),
    c_in=st.integers(1, 20),
    c_out=st.integers(1, 20),
    kernel=st.integers(1, 4),
    before=st.sampled_from(list(PROLOGUES)),
    after=st.sampled_from(list(TAILS)),
    dtype=st.sampled_from(DTYPES),
)
A_FEW = settings(deadline=None, max_examples=5, derandomize=True)
MANY = settings(deadline=None, max_examples=50, derandomize=True)


def any_size(
    transposed: bool, n: int, c_in: int, c_out: int, h: int, w: int, before: str, after: str,
    dtype: torch.dtype, layout: str, x_nhwc: bool, channels_last: bool,
) -> None:  # fmt: skip
    shape = Shape(transposed, n, c_in, c_out, h, w, 4, 2, 1)
    call = training_call(shape, before, after, dtype, x_nhwc, channels_last=channels_last)
    check(call, transposed, layout)


def any_size_on_one_pixel(
    transposed: bool, n: int, c_in: int, c_out: int, kernel: int, before: str, after: str, dtype: torch.dtype
) -> None:
    side = 1 if transposed else kernel
    shape = Shape(transposed, n, c_in, c_out, side, side, kernel, 1, 0)
    check(training_call(shape, before, after, dtype), transposed)


test_any_size = A_FEW(ANY_SIZE(any_size))
test_any_size_on_a_map_of_one_pixel = A_FEW(ANY_SIZE_ON_ONE_PIXEL(any_size_on_one_pixel))
test_many_sizes = pytest.mark.slow(MANY(ANY_SIZE(any_size)))
test_many_sizes_on_a_map_of_one_pixel = pytest.mark.slow(MANY(ANY_SIZE_ON_ONE_PIXEL(any_size_on_one_pixel)))


def test_no_backward_without_gradients() -> None:
    call = training_call(SHAPES["up"], "affine_relu", "statistics")
    with torch.no_grad(), ops.use_engine("triton"), ops.recording() as choices:
        op(True)(*call)
    assert [choice.op for choice in choices] == ["conv_transpose2d_fused"]
    with ops.use_engine("triton"), ops.recording() as choices:
        results(call, True, cotangents(call, True), ("weight",))
    assert [choice.engine for choice in choices] == ["triton", "triton"]
