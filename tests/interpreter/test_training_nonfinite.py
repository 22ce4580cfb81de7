"""NaN and infinities in x and dy reach the results that they reach in float64, through every reduction."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    SHAPES,
    Cotangents,
    Shape,
    assert_right,
    cotangents,
    exact_results,
    training_call,
    triton_results,
)
from statement import pairwise
from torch import Tensor

from dcgan.kernels.call import Call

NAN, INF = float("nan"), float("inf")
GEOMETRIES = {  # the middle pixel of the smaller map has no padding in its window
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
    (*("relu", "statistics"), "x", -INF),  # which stops there
]
FEWER = {"down": SOME[::2], "dense_down": SOME[1::2], "dense_up": [], "dense_narrow": []}
FAST = [(name, *row) for name in GEOMETRIES for row in FEWER.get(name, SOME)]
PAIRS = [
    (row["name"], row["before"], row["after"], *row["spoils"])
    for row in pairwise(
        name=list(GEOMETRIES),
        before=["relu", "affine_relu", "affine_leaky_relu", "affine_tanh"],
        after=["statistics", "raw", "scale_relu", "scale_shift_leaky_relu", "tanh"],
        spoils=list(itertools.product(("x", "dy"), (NAN, INF, -INF))),
    )
]


def spot(t: Tensor, pixel: tuple[int, int] | None = None) -> tuple[int, int, int, int]:
    """The middle of an image's middle channel, or another pixel there."""
    _, c, h, w = t.shape
    return (1, c // 2, *((h // 2, w // 2) if pixel is None else pixel))


def spoilt(
    shape: Shape, before: str, after: str, place: str, value: float, pixel: tuple[int, int] | None = None
) -> tuple[Call, Cotangents]:
    """A call and gradients of its outputs with one number of x or dy replaced."""
    call = training_call(shape, before, after)
    given = cotangents(call, shape.transposed)
    tensor = call.x if place == "x" else given[0]
    assert tensor is not None
    tensor[spot(tensor, pixel)] = value
    return call, given


def stops(before: str, after: str, place: str, value: float, y: Tensor) -> bool:
    """Whether a ReLU stops it on its way in, so that nothing is spoilt.

    -∞ in x is 0 after a ReLU, of which the derivative there is 0 too; after an affine map the gradient of
    ``scale`` still is that 0 times x. Of dy a ReLU takes nothing, NaN neither, where its y is not positive.
    """
    if place == "x":
        return before == "relu" and value == -INF
    return after == "scale_relu" and bool(y[spot(y)] <= 0)


@pytest.mark.parametrize(
    ("name", "before", "after", "place", "value"),
    [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in PAIRS if row not in FAST)],
)
def test_one_number(name: str, before: str, after: str, place: str, value: float) -> None:
    """NaN: the same results are NaN. Infinity: the same are not finite. All others are right.

    Which of those are NaN is the algorithm's: the mean of an infinity is one, where ``torch.var`` gives NaN,
    and Σ w·dweight has infinities of both signs where Σ e·u has one.
    """
    if name == "down_narrow" and before == "relu":  # its adjoint would be up_narrow, which spreads NaN
        before = "affine_relu"
    transposed = GEOMETRIES[name].transposed
    call, given = spoilt(GEOMETRIES[name], before, after, place, value)
    made, exactly = triton_results(call, transposed, given), exact_results(call, transposed, given)
    assert made.keys() == exactly.keys()
    spoils = torch.isnan if value != value else lambda t: ~torch.isfinite(t)
    for key, result in made.items():
        assert torch.equal(spoils(result), spoils(exactly[key])), key
    assert_right(made, call, transposed, given)
    spoilt_at_all = any(bool(spoils(result).any()) for result in made.values())
    assert spoilt_at_all != stops(before, after, place, value, exactly["y"])


@pytest.mark.parametrize("transposed", [True, False])
def test_the_window_of_a_border_pixel(transposed: bool) -> None:
    """A weight's gradient multiplies by the padding too: NaN·0. Nothing else differs."""
    shape = GEOMETRIES["up" if transposed else "down"]
    place = "x" if transposed else "dy"
    call, given = spoilt(shape, "affine_relu", "shift_sigmoid", place, NAN, (0, 0))
    made, exactly = triton_results(call, transposed, given), exact_results(call, transposed, given)
    for key, result in made.items():
        if key == "dweight":
            assert (result.isnan() >= exactly[key].isnan()).all()
        else:
            assert torch.equal(result.isnan(), exactly[key].isnan()), key


@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "adjoint"])
def test_up_narrow_spreads_to_the_next_pixel(transposed: bool) -> None:
    """Its taps of 3×3 inputs include some that are 0 by construction, and NaN·0 is NaN; but no farther."""
    shape = Shape(transposed, 2, 20, 3, 5, 5, 4, 2, 1)
    if not transposed:
        shape = Shape(False, 2, 3, 20, 10, 10, 4, 2, 1)
    call, given = spoilt(shape, "as_it_is", "raw", "x" if transposed else "dy", NAN)
    key = "y" if transposed else "dx"
    wrong = triton_results(call, transposed, given)[key].isnan()
    exactly = exact_results(call, transposed, given)[key].isnan()
    assert (wrong >= exactly).all()
    assert (wrong <= (F.max_pool2d(exactly.double(), 3, 1, 1) > 0)).all()
