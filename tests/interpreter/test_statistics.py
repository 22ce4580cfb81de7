"""Mean and variance of the Triton engine: before rounding, of any count, however large the mean."""

from __future__ import annotations

import pytest
import torch
from cases import SHAPES, Shape, check, exact_results, training_call
from statement import op
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.call import Call

WITH_STATISTICS = [
    "up",
    "up_narrow_1",
    "down_odd",
    "down_narrow_3",
    "dense_up",
    "dense_down",
    "dense_narrow_3",
]


def statistics(call: Call, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    with ops.use_engine("triton"):
        y, mean, var = op(transposed)(*call)
    return y, mean, var


def copying(shape: Shape, x: Tensor) -> Call:
    """A call whose output holds numbers of x, unchanged: every weight is 0 but one tap's of one channel."""
    order = (shape.c_in, shape.c_out) if shape.transposed else (shape.c_out, shape.c_in)
    weight = torch.zeros(*order, shape.kernel, shape.kernel)
    dense = shape.padding == 0
    if shape.transposed:
        taps = slice(None) if dense else slice(1, 3)  # each output pixel sees one of these, once
    else:
        taps = slice(0, 1) if dense else slice(1, 2)
    for c_out in range(shape.c_out):
        one = (c_out % shape.c_in, c_out) if shape.transposed else (c_out, c_out % shape.c_in)
        weight[(*one, taps, taps)] = 1
    return Call(x, weight, stats=True, stride=shape.stride, padding=shape.padding)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_mean_of_a_thousand_deviations(name: str) -> None:
    # Several row tiles, the last partly filled.
    shape = SHAPES[name]._replace(n=13 if name in ("up", "up_narrow_1") else 37)
    x = 1000 + torch.randn(shape.n, shape.c_in, shape.h, shape.w)
    y, mean, var = statistics(copying(shape, x), shape.transposed)
    assert bool(torch.isin(y, x).all())
    # With κ = √(1 + mean²/var) = 1000 the error is some κ·2⁻²⁴ = 6e-5 of the variance, a few roundings of the
    # tiles' means; that of E[y²] - E[y]² has κ², and does not pass.
    bound = 3e-4
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=bound, atol=0)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    error = naive.double() / wide.var((0, 2, 3), correction=0) - 1
    assert error.abs().max() > bound


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_of_the_accumulator_before_it_is_rounded(name: str) -> None:
    shape = SHAPES[name]
    call = training_call(shape, "as_it_is", "statistics", torch.bfloat16)
    y, mean, var = statistics(call, shape.transposed)
    nothing = (torch.zeros_like(y), None, None)
    exactly = exact_results(call, shape.transposed, nothing)
    deviation = exactly["var"].sqrt()
    assert ((mean - exactly["mean"]).abs() <= 1e-6 * (deviation + exactly["mean"].abs())).all()
    assert ((var - exactly["var"]).abs() <= 3e-6 * exactly["var"]).all()
    of_rounded = y.double().mean((0, 2, 3))
    assert ((of_rounded - exactly["mean"]).abs() / deviation).max() > 1e-4


@pytest.mark.parametrize(
    "shape",
    [
        Shape(False, 1, 20, 24, 2, 2, 4, 2, 1),  # one number a channel
        pytest.param(Shape(False, 1, 3, 17, 3, 2, 4, 2, 1), marks=pytest.mark.slow),
        Shape(True, 1, 20, 3, 1, 1, 4, 2, 1),  # one a channel and parity
        Shape(True, 1, 20, 12, 1, 1, 4, 1, 0),  # one a channel and pixel
        pytest.param(Shape(False, 1, 12, 20, 4, 4, 4, 1, 0), marks=pytest.mark.slow),
        Shape(False, 5, 5, 20, 2, 6, 4, 2, 1),  # 15 rows of a tile of 16, 16 and 17
        pytest.param(Shape(False, 4, 5, 20, 2, 8, 4, 2, 1), marks=pytest.mark.slow),
        Shape(False, 1, 5, 20, 2, 34, 4, 2, 1),
        pytest.param(Shape(True, 1, 5, 20, 17, 1, 4, 2, 1), marks=pytest.mark.slow),
        pytest.param(Shape(True, 17, 5, 4, 1, 1, 4, 1, 0), marks=pytest.mark.slow),
        Shape(False, 33, 3, 17, 2, 2, 2, 1, 0),
    ],
    ids=lambda shape: "x".join(map(str, map(int, shape))),
)
def test_any_count(shape: Shape) -> None:
    """Gradients are divided by the same count."""
    call = training_call(shape, "affine_leaky_relu", "statistics")
    made = check(call, shape.transposed)
    if made["y"][:, 0].numel() == 1:
        assert (made["var"] == 0).all()
        assert torch.equal(made["mean"], made["y"].flatten())
