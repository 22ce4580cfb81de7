"""Inference kernels against float64: shapes, layouts, dtypes, activations, tiles, bounds, 64-bit offsets."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcgan.kernels import gpu, ops
from dcgan.kernels.gpu import executor, tiles, tuning
from dcgan.kernels.reference import ACTIVATIONS, accumulator_dtype
from dcgan.kernels.spec import Call
from tests.interpreter import repair
from tests.interpreter.cases import DTYPES, SHAPES, far_apart, listed, operands, surrounded
from tests.support.float64_reference import op
from tests.support.tolerance import uncancelled, unit

ONE_OF_EACH = (
    *("up", "up_block", "up_narrow_1", "down", "down_narrow_3"),
    *("dense_up", "dense_outer_4", "dense_narrow_1"),
)

# The random operands are exact in the dtype, so the float64 reference uses the same values. What remains is
# float32 accumulation of K ≤ 2·10³ terms of random sign, √K·2⁻²⁴ of the root of the sum of their squares, and
# one rounding of the result.
ACCUMULATION = 3e-6


def expected(call: Call, transposed: bool) -> Tensor:
    wide = call._replace(
        x=call.x.double(),
        weight=call.weight.double(),
        out_scale=None if call.out_scale is None else call.out_scale.double(),
        out_shift=None if call.out_shift is None else call.out_shift.double(),
    )
    with ops.use_engine("reference"):
        return op(transposed)(*wide)[0]


def assert_close(y: Tensor, call: Call, transposed: bool) -> None:
    """Allow the error of the value before the activation: every activation is 1-Lipschitz."""
    reference = expected(call, transposed)
    before = expected(call._replace(out_act="none"), transposed)
    size = max(before.norm(), uncancelled(call, transposed)["y"].norm())
    rounding = 0.0 if y.dtype == torch.float32 else unit(y.dtype)
    assert (y.double() - reference).norm() <= ACCUMULATION * size + rounding * reference.norm()


def check(call: Call, transposed: bool) -> None:
    with ops.use_engine("triton"):
        y, mean, var = op(transposed)(*call)
    assert y.dtype == call.x.dtype
    assert y.stride() == expected(call, transposed).stride()
    assert mean.shape == var.shape == (0,)
    assert mean.dtype == var.dtype == accumulator_dtype(call.x.dtype)
    assert_close(y, call, transposed)


@pytest.mark.parametrize(
    ("channels_last", "dtype"),
    [
        *((True, dtype) for dtype in DTYPES),
        (False, torch.float32),
        *(pytest.param(False, dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain(shape: tuple, dtype: torch.dtype, channels_last: bool) -> None:
    call = operands(shape, dtype)
    x = call.x.contiguous(memory_format=torch.channels_last) if channels_last else call.x
    check(call._replace(x=x, channels_last=not channels_last), shape[0])


@pytest.mark.parametrize(
    ("name", "act"),
    [
        pytest.param(name, act, marks=[] if act == "tanh" or name in ONE_OF_EACH else pytest.mark.slow)
        for name, act in itertools.product(SHAPES, ACTIVATIONS)
    ],
)
def test_epilogue(name: str, act: str) -> None:
    shape = SHAPES[name]
    call = operands(shape, torch.float32)
    c_out = shape[3]
    scale, shift = torch.randn(c_out), torch.randn(2 * c_out)[::2]  # a strided vector too
    check(call._replace(out_scale=scale, out_shift=shift, out_act=act, slope=0.1), shape[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shift_without_scale(shape: tuple) -> None:
    call = operands(shape, torch.float32)
    check(call._replace(out_shift=torch.randn(shape[3])), shape[0])


def test_tanh_is_accurate_near_zero() -> None:
    """Elementwise relative accuracy: 1 - exp(-2x) would lose all digits at 1e-7."""
    x = torch.logspace(-8, 1, 400).view(1, 1, 20, 20)
    weight = torch.zeros(20, 1, 4, 4)
    weight[:, :, 1, 1] = 1  # y[2p] = x[2p]
    with ops.use_engine("triton"):
        y = ops.conv2d_fused(x, weight, out_act="tanh")[0]
    torch.testing.assert_close(y[:, :1], x[:, :, ::2, ::2].tanh(), rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    ("kernel", "precision", "tile"), listed(*(name for name in tiles.KERNELS if not name.startswith("wgrad")))
)
def test_every_tile(kernel: str, precision: str, tile: tiles.Tile) -> None:
    shape = next(s for name, s in SHAPES.items() if name.startswith(kernel) and "wide" not in name)
    if kernel == "dense":
        shape = SHAPES["dense_up"]
    dtype = torch.float16 if precision == "16bit" else torch.float32
    call = operands(shape, dtype)
    call = call._replace(out_scale=torch.randn(shape[3]), out_act="leaky_relu")
    spec = ops.check(call, shape[0])
    y = ops.empty(spec)[0].fill_(float("nan"))
    product, chosen = executor.fprop(spec, call, y), gpu.kernel_for(spec)
    chosen.launch(product, chosen.layout.pack(call.weight, dtype), None, tile)()
    assert_close(y, call, shape[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nothing_out_of_bounds_is_read_or_written(shape: tuple) -> None:
    """x, weight and vectors are surrounded by NaN; y starts as NaN and is surrounded by a sentinel."""
    call = operands(shape, torch.float32)
    transposed, c_out = shape[0], shape[3]

    call = call._replace(
        x=surrounded(call.x),
        out_scale=surrounded(torch.randn(c_out)),
        out_shift=surrounded(torch.randn(c_out)),
    )
    spec = ops.check(call, transposed)
    chosen = gpu.kernel_for(spec)
    packed = chosen.layout.pack(call.weight, torch.float32)
    packed = surrounded(packed.flatten()).view(packed.shape)
    framed = torch.full([size + 4 for size in spec.shape], 7.0)
    y = framed[2:-2, 2:-2, 2:-2, 2:-2].fill_(float("nan"))
    product = executor.fprop(spec._replace(y=spec.y._replace(stride=y.stride())), call, y)
    tile = tuning.estimate(chosen.problem(product.spec), 132)
    chosen.launch(product, packed, None, tile)()
    assert_close(y, call, transposed)
    y.fill_(7.0)
    assert (framed == 7.0).all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_offsets_beyond_int32(name: str) -> None:
    """The two images are more than 2³¹ elements apart; the memory in between is never allocated."""
    shape = SHAPES[name]
    call = operands((shape[0], 2, *shape[2:]), torch.float16)
    with repair.overflow_checked():
        check(call._replace(x=far_apart(call.x)), shape[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("name", ["up", "up_block"])
def test_non_finite_values_propagate(name: str, value: float, act: str) -> None:
    call = operands(SHAPES[name], torch.float32)._replace(out_act=act)
    call.x[1, 3, 2, 1] = value
    with ops.use_engine("triton"):
        y = ops.conv_transpose2d_fused(*call)[0]
    torch.testing.assert_close(y, expected(call, True).float(), equal_nan=True, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    transposed=st.booleans(),
    n=st.integers(1, 3),
    c_in=st.integers(1, 40),
    c_out=st.integers(1, 80),
    h=st.integers(2, 7),
    w=st.integers(2, 7),
    act=st.sampled_from(ACTIVATIONS),
    channels_last=st.booleans(),
)
def test_any_size(
    transposed: bool, n: int, c_in: int, c_out: int, h: int, w: int, act: str, channels_last: bool
) -> None:
    call = operands((transposed, n, c_in, c_out, h, w, 4, 2, 1), torch.float32)
    check(call._replace(out_act=act, channels_last=channels_last), transposed)


def test_unsupported_calls_are_refused_with_a_reason() -> None:
    call = operands(SHAPES["up"], torch.float32)
    for changed, reason in (
        (call._replace(padding=0), "1×1 map"),
        (call._replace(x=call.x.double(), weight=call.weight.double()), "float64"),
    ):
        with ops.use_engine("triton"), pytest.raises(RuntimeError, match=reason):
            ops.conv_transpose2d_fused(*changed)
