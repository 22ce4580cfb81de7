"""NaN and infinities in x and dy propagate to the same results as in float64, through every reduction."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan.kernels.spec import Call
from tests.interpreter.cases import (
    SHAPES,
    Cotangents,
    Shape,
    assert_accurate,
    cotangents,
    training_call,
    triton_results,
)
from tests.support.engine_results import exact_results
from tests.support.float64_reference import pairwise

NAN, INF = float("nan"), float("inf")
GEOMETRIES = {  # the window of the smaller map's middle pixel contains no padding
    "up": Shape(True, 2, 20, 24, 3, 3, 4, 2, 1),
    "down": Shape(False, 2, 20, 24, 6, 6, 4, 2, 1),
    "down_narrow": Shape(False, 2, 3, 20, 6, 6, 4, 2, 1),
    "dense_up": SHAPES["dense_up"],
    "dense_down": SHAPES["dense_down"],
    "dense_narrow": SHAPES["dense_narrow_1"],
}
SOME = [
    (*("affine_relu", "statistics"), "x", NAN),
    (*("affine_relu", "statistics"), "x", INF),
    (*("affine_relu", "statistics"), "dy", NAN),
    (*("affine_leaky_relu", "scale_relu"), "x", NAN),
    (*("affine_leaky_relu", "scale_relu"), "x", -INF),
    (*("affine_leaky_relu", "scale_shift_leaky_relu"), "dy", INF),
    (*("relu", "scale_shift_leaky_relu"), "x", NAN),
    (*("relu", "scale_shift_leaky_relu"), "dy", NAN),
    (*("relu", "statistics"), "x", -INF),  # which the ReLU stops
]
FEWER = {"down": SOME[::2], "dense_down": SOME[1::2], "dense_up": [], "dense_narrow": []}
FAST = [(name, *row) for name in GEOMETRIES for row in FEWER.get(name, SOME)]
PAIRS = [
    (row["name"], row["before"], row["after"], *row["non_finite"])
    for row in pairwise(
        name=list(GEOMETRIES),
        before=["relu", "affine_relu", "affine_leaky_relu", "affine_tanh"],
        after=["statistics", "raw", "scale_relu", "scale_shift_leaky_relu", "tanh"],
        non_finite=list(itertools.product(("x", "dy"), (NAN, INF, -INF))),
    )
]


def spot(t: Tensor, pixel: tuple[int, int] | None = None) -> tuple[int, int, int, int]:
    """Return the index of the middle pixel, or of ``pixel``, in the second image's middle channel."""
    _, c, h, w = t.shape
    return (1, c // 2, *((h // 2, w // 2) if pixel is None else pixel))


def with_non_finite(
    shape: Shape, before: str, after: str, place: str, value: float, pixel: tuple[int, int] | None = None
) -> tuple[Call, Cotangents]:
    """Return a call and gradients of its outputs with one element of x or dy replaced by ``value``."""
    call = training_call(shape, before, after)
    grad_outputs = cotangents(call, shape.transposed)
    tensor = call.x if place == "x" else grad_outputs[0]
    assert tensor is not None
    tensor[spot(tensor, pixel)] = value
    return call, grad_outputs


def is_stopped(before: str, after: str, place: str, value: float, y: Tensor) -> bool:
    """Return whether a ReLU stops the value, so that all results stay finite.

    A ReLU maps -∞ in x to 0 with derivative 0; after an affine map, however, the gradient of ``scale`` is
    that 0 times x. A ReLU's backward ignores dy, even NaN, where its y is not positive.
    """
    if place == "x":
        return before == "relu" and value == -INF
    return after == "scale_relu" and bool(y[spot(y)] <= 0)


@pytest.mark.parametrize(
    ("name", "before", "after", "place", "value"),
    [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in PAIRS if row not in FAST)],
)
def test_one_non_finite_element(name: str, before: str, after: str, place: str, value: float) -> None:
    """NaN makes the same results NaN, an infinity makes the same results non-finite; others stay accurate.

    Which non-finite results are NaN depends on the algorithm: the mean of an infinity is infinite where
    ``torch.var`` gives NaN, and Σ w·dweight has infinities of both signs where Σ e·u has one.
    """
    if name == "down_narrow" and before == "relu":  # its adjoint would be up_narrow, which spreads NaN
        before = "affine_relu"
    transposed = GEOMETRIES[name].transposed
    call, grad_outputs = with_non_finite(GEOMETRIES[name], before, after, place, value)
    actual = triton_results(call, transposed, grad_outputs)
    expected = exact_results(call, transposed, grad_outputs)
    assert actual.keys() == expected.keys()
    is_bad = torch.isnan if value != value else lambda t: ~torch.isfinite(t)
    for key, result in actual.items():
        assert torch.equal(is_bad(result), is_bad(expected[key])), key
    assert_accurate(actual, call, transposed, grad_outputs)
    propagated = any(bool(is_bad(result).any()) for result in actual.values())
    assert propagated != is_stopped(before, after, place, value, expected["y"])


@pytest.mark.parametrize("transposed", [True, False])
def test_the_window_of_a_border_pixel(transposed: bool) -> None:
    """The weight gradient also multiplies the padding, NaN·0 = NaN; nothing else differs."""
    shape = GEOMETRIES["up" if transposed else "down"]
    place = "x" if transposed else "dy"
    call, grad_outputs = with_non_finite(shape, "affine_relu", "shift_sigmoid", place, NAN, (0, 0))
    actual = triton_results(call, transposed, grad_outputs)
    expected = exact_results(call, transposed, grad_outputs)
    for key, result in actual.items():
        if key == "dweight":
            assert (result.isnan() >= expected[key].isnan()).all()
        else:
            assert torch.equal(result.isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "adjoint"])
def test_up_narrow_spreads_to_the_next_pixel(transposed: bool) -> None:
    """Some of its 3×3 taps are 0 by construction, and NaN·0 is NaN; but NaN spreads no farther."""
    shape = Shape(transposed, 2, 20, 3, 5, 5, 4, 2, 1)
    if not transposed:
        shape = Shape(False, 2, 3, 20, 10, 10, 4, 2, 1)
    call, grad_outputs = with_non_finite(shape, "plain", "raw", "x" if transposed else "dy", NAN)
    key = "y" if transposed else "dx"
    wrong = triton_results(call, transposed, grad_outputs)[key].isnan()
    expected = exact_results(call, transposed, grad_outputs)[key].isnan()
    assert (wrong >= expected).all()
    assert (wrong <= (F.max_pool2d(expected.double(), 3, 1, 1) > 0)).all()
