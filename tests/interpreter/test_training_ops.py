"""Both ops with statistics, prologues and every gradient, through the Triton engine, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import repair
import torch
from cases import (
    DTYPES,
    PROLOGUES,
    SHAPES,
    TAILS,
    Shape,
    assert_right,
    check,
    cotangents,
    far_apart,
    prologues,
    results,
    training_call,
    triton_results,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from statement import leaves, op, pairwise
from torch import Tensor

from dcgan.kernels import ops

LAYOUTS = ("nhwc", "nchw", "expanded")


def name_of(row: dict[str, Any]) -> str:
    formats = "".join("l" if row[name] else "c" for name in ("x_nhwc", "channels_last"))
    dtype = str(row["dtype"]).removeprefix("torch.")
    return f"{row['shape']}-{row['before']}-{row['after']}-{dtype}-{formats}-{row['layout']}"


def sample(prologues: list[str], tails: list[str]) -> list[dict[str, Any]]:
    return pairwise(
        shape=[name for name in SHAPES if name not in ("up_wide", "up_narrow_1", "down", "dense_narrow_1")],
        before=prologues,
        after=tails,
        dtype=list(DTYPES),
        layout=list(LAYOUTS),
        x_nhwc=[True, False],
        channels_last=[True, False],
    )


# One of each kind, with one of each activation.
SAMPLE = sample(
    ["as_it_is", "relu", "sigmoid", "affine_relu", "affine_leaky_relu", "affine_tanh"],
    ["statistics", "raw", "tanh", "scale", "shift_sigmoid", "scale_shift_leaky_relu"],
)
REST = [row for row in sample(list(PROLOGUES), list(TAILS)) if row not in SAMPLE]


@pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(row, id=name_of(row)) for row in SAMPLE),
        *(pytest.param(row, id=name_of(row), marks=pytest.mark.slow) for row in REST),
    ],
)
def test_outputs_and_gradients(row: dict[str, Any]) -> None:
    """Each geometry, prologue, tail, dtype and layout beside each of the others at least once."""
    row = row.copy()
    shape, layout = SHAPES[row.pop("shape")], row.pop("layout")
    check(training_call(shape, **row), shape.transposed, layout)


ONE_OF_EACH = (
    "up",
    "up_narrow_3",
    "down_odd",
    "down_narrow_3",
    "dense_up_few",  # whose adjoint is dense_narrow
    "dense_down",
    "dense_narrow_3",
)


@pytest.mark.slow
@pytest.mark.parametrize("after", TAILS)
@pytest.mark.parametrize("before", PROLOGUES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_combination(name: str, before: str, after: str) -> None:
    """Of kernel, prologue and tail; dtypes, and layouts within a dtype, by turns."""
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
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("up", "down_odd", "up_narrow_3")),
    ],
)
def test_some_inputs_require_gradients(name: str, after: str) -> None:
    """What is asked for has the bits that it has when all is asked for; nothing else is computed."""
    shape = SHAPES[name]
    call = training_call(shape, "affine_relu", after)
    given = cotangents(call, shape.transposed)
    everything = triton_results(call, shape.transposed, given)
    subsets = [(name,) for name in leaves(call) if name not in ("center", "shift")] + [
        ("x", "weight", "shift")
    ]
    for wanted in subsets:
        made = triton_results(call, shape.transposed, given, wanted)
        assert {name[1:] for name in made if name not in ("y", "mean", "var")} == set(wanted)
        for name, result in made.items():
            assert torch.equal(result, everything[name]), f"{name} of {wanted}"


@pytest.mark.parametrize("name", ["down_narrow_1", pytest.param("dense_down", marks=pytest.mark.slow)])
@pytest.mark.parametrize("used", list(itertools.product([True, False], repeat=3))[1:-1], ids=str)
def test_some_outputs_are_used(name: str, used: tuple[bool, bool, bool]) -> None:
    shape = SHAPES[name]
    call = training_call(shape, "affine_leaky_relu", "statistics")
    dy, dmean, dvar = cotangents(call, shape.transposed)
    given: Any = tuple(c if use else None for c, use in zip((dy, dmean, dvar), used, strict=True))
    assert_right(triton_results(call, shape.transposed, given), call, shape.transposed, given)


@pytest.mark.parametrize("name", ["up_few", "down"])
def test_gradients_of_sums(name: str) -> None:
    """What y.sum(), mean.sum() and var.sum() hand back has strides of 0 throughout."""
    shape = SHAPES[name]
    call = training_call(shape, "affine_relu", "statistics")
    c, count = shape.c_out, 40.0
    given = (
        torch.ones(()).expand(ops.check(call, shape.transposed)),
        torch.tensor(count).expand(c),
        torch.tensor(-count).expand(c),
    )
    assert_right(triton_results(call, shape.transposed, given), call, shape.transposed, given)


def strided(t: Tensor) -> Tensor:
    """A copy of which every second number of every dimension is another's."""
    memory = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
    return memory[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


@pytest.mark.parametrize("after", ["statistics", pytest.param("scale_shift_tanh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["up_few", "down_narrow_3", "dense_up"])
def test_any_strides(name: str, after: str) -> None:
    """Of x, weight, vectors and every gradient that comes in; a dense weight's gradient has its strides."""
    shape = SHAPES[name]
    call = training_call(shape, "affine_relu", after)
    given: Any = tuple(None if c is None else strided(c) for c in cotangents(call, shape.transposed))
    everything = call._replace(**{name: strided(t) for name, t in leaves(call).items() if name != "weight"})
    weights = (
        call.weight.contiguous(memory_format=torch.channels_last),
        call.weight.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    )
    for weight in weights:
        now = everything._replace(weight=weight)
        assert_right(triton_results(now, shape.transposed, given), now, shape.transposed, given)


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
    """Of relu and leaky_relu at exactly 0 it is eager's: 0 and the slope."""
    shape = SHAPES[name]
    call = training_call(shape, "affine", "raw", in_act=act)
    assert call.center is not None
    at_kink = call._replace(
        x=torch.zeros_like(call.x), shift=torch.zeros(shape.c_in), center=torch.zeros(shape.c_in)
    )
    flat = call._replace(out_act=act, weight=torch.zeros_like(call.weight))
    for now in (at_kink, flat, flat._replace(out_scale=torch.ones(shape.c_out))):
        given = cotangents(now, shape.transposed)
        assert_right(triton_results(now, shape.transposed, given), now, shape.transposed, given)


@pytest.mark.parametrize(
    "name",
    [
        *("down", "up_narrow_1"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("up_few", "dense_down")),
    ],
)
def test_the_same_bits_again(name: str) -> None:
    shape = SHAPES[name]
    call = training_call(shape, "affine_leaky_relu", "statistics", torch.bfloat16)
    given = cotangents(call, shape.transposed)
    first, second = (triton_results(call, shape.transposed, given) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        pytest.param(
            name,
            fused,
            id=f"{name}-{'fused' if fused else 'passes'}",
            marks=[] if fused or name == "down" else pytest.mark.slow,
        )
        for name in ("up", "up_narrow_1", "down", "down_narrow_3", "dense_up", "dense_down")
        for fused in (True, False)
    ],
)
def test_offsets_beyond_int32(name: str, fused: bool) -> None:
    """In x and dy, which the adjoint, the weight gradient and the passes read."""
    shape = SHAPES[name]._replace(n=2)
    call = training_call(shape, "affine_relu", "statistics", torch.float16)
    dy, dmean, dvar = cotangents(call, shape.transposed)
    call, given = call._replace(x=far_apart(call.x)), (far_apart(dy), dmean, dvar)
    with repair.overflow_checked(), prologues(fused, fused):
        made = triton_results(call, shape.transposed, given)
    assert_right(made, call, shape.transposed, given)


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


def test_no_gradient_is_asked_of_a_frozen_call() -> None:
    call = training_call(SHAPES["up"], "affine_relu", "statistics")
    with torch.no_grad(), ops.use_engine("triton"), ops.recording() as choices:
        op(True)(*call)
    assert [choice.op for choice in choices] == ["conv_transpose2d_fused"]
    with ops.use_engine("triton"), ops.recording() as choices:
        results(call, True, cotangents(call, True), ("weight",))
    assert [choice.engine for choice in choices] == ["triton", "triton"]
