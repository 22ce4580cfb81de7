"""Mean and variance from the Triton engine: unrounded input, any count, large means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.spec import Call
from tests.interpreter.cases import SHAPES, Shape, check, training_call
from tests.support.engine_results import exact_results
from tests.support.float64_reference import op

WITH_STATISTICS = [
    "up",
    "up_block",
    "up_narrow_1",
    "down_odd",
    "down_narrow_3",
    "dense_up",
    "dense_outer_4",
    "dense_down",
    "dense_narrow_3",
]


def statistics(call: Call, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    with ops.use_engine("triton"):
        y, mean, var = op(transposed)(*call)
    return y, mean, var


def copying(shape: Shape, x: Tensor) -> Call:
    """Return a call whose output copies elements of x: all weights are 0 except one tap of one channel."""
    order = (shape.c_in, shape.c_out) if shape.transposed else (shape.c_out, shape.c_in)
    weight = torch.zeros(*order, shape.kernel, shape.kernel)
    dense = shape.padding == 0
    if shape.transposed:
        taps = slice(None) if dense else slice(1, 3)  # each output pixel uses exactly one of these taps
    else:
        taps = slice(0, 1) if dense else slice(1, 2)
    for c_out in range(shape.c_out):
        one = (c_out % shape.c_in, c_out) if shape.transposed else (c_out, c_out % shape.c_in)
        weight[(*one, taps, taps)] = 1
    return Call(x, weight, stats=True, stride=shape.stride, padding=shape.padding)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_mean_of_a_thousand_standard_deviations(name: str) -> None:
    # Several row tiles, the last one partially filled.
    shape = SHAPES[name]._replace(n=13 if name.startswith("up") else 37)
    x = 1000 + torch.randn(shape.n, shape.c_in, shape.h, shape.w)
    y, mean, var = statistics(copying(shape, x), shape.transposed)
    assert bool(torch.isin(y, x).all())
    # With κ = √(1 + mean²/var) = 1000 the relative error of the variance is about κ·2⁻²⁴ = 6e-5, from a few
    # roundings of the tiles' means; that of E[y²] - E[y]² grows with κ² and fails.
    bound = 3e-4
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=bound, atol=0)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    error = naive.double() / wide.var((0, 2, 3), correction=0) - 1
    assert error.abs().max() > bound


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_statistics_use_the_unrounded_accumulator(name: str) -> None:
    shape = SHAPES[name]
    call = training_call(shape, "plain", "statistics", torch.bfloat16)
    y, mean, var = statistics(call, shape.transposed)
    zeros = (torch.zeros_like(y), None, None)
    expected = exact_results(call, shape.transposed, zeros)
    deviation = expected["var"].sqrt()
    assert ((mean - expected["mean"]).abs() <= 1e-6 * (deviation + expected["mean"].abs())).all()
    assert ((var - expected["var"]).abs() <= 3e-6 * expected["var"]).all()
    of_rounded = y.double().mean((0, 2, 3))
    assert ((of_rounded - expected["mean"]).abs() / deviation).max() > 1e-4


@pytest.mark.parametrize(
    "shape",
    [
        Shape(False, 1, 20, 24, 2, 2, 4, 2, 1),  # one element per channel
        pytest.param(Shape(False, 1, 3, 17, 3, 2, 4, 2, 1), marks=pytest.mark.slow),
        Shape(True, 1, 20, 3, 1, 1, 4, 2, 1),  # one element per channel and position of a block
        pytest.param(Shape(True, 1, 20, 66, 1, 1, 4, 2, 1), marks=pytest.mark.slow),  # and parity
        Shape(True, 1, 20, 12, 1, 1, 4, 1, 0),  # one element per channel and pixel
        pytest.param(Shape(False, 1, 12, 20, 4, 4, 4, 1, 0), marks=pytest.mark.slow),
        Shape(False, 5, 5, 20, 2, 6, 4, 2, 1),  # 15 rows in a tile of 16; the next have 16 and 17
        pytest.param(Shape(False, 4, 5, 20, 2, 8, 4, 2, 1), marks=pytest.mark.slow),
        Shape(False, 1, 5, 20, 2, 34, 4, 2, 1),
        Shape(True, 5, 5, 20, 2, 1, 4, 2, 1),  # 30 blocks of outputs; the next have 32 and 36
        pytest.param(Shape(True, 4, 5, 20, 3, 1, 4, 2, 1), marks=pytest.mark.slow),
        pytest.param(Shape(True, 1, 5, 20, 17, 1, 4, 2, 1), marks=pytest.mark.slow),
        pytest.param(Shape(True, 1, 5, 66, 17, 1, 4, 2, 1), marks=pytest.mark.slow),
        pytest.param(Shape(True, 17, 5, 4, 1, 1, 4, 1, 0), marks=pytest.mark.slow),
        Shape(False, 33, 3, 17, 2, 2, 2, 1, 0),
    ],
    ids=lambda shape: "x".join(map(str, map(int, shape))),
)
def test_any_count(shape: Shape) -> None:
    """Including the gradients, which divide by the same count."""
    call = training_call(shape, "affine_leaky_relu", "statistics")
    actual = check(call, shape.transposed)
    if actual["y"][:, 0].numel() == 1:
        assert (actual["var"] == 0).all()
        assert torch.equal(actual["mean"], actual["y"].flatten())
