"""NaN and infinities in x and dy reach the results that they reach in eager, through every reduction."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import SHAPES, Shape, cotangents, results, training_call, triton_results
from torch import Tensor

from dcgan.kernels import ops

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
]
MORE = [
    row
    for row in itertools.product(
        ("relu", "affine_relu", "affine_leaky_relu", "affine_tanh"),
        ("statistics", "raw", "scale_relu", "scale_shift_leaky_relu", "tanh"),
        ("x", "dy"),
        (NAN, INF, -INF),
    )
    if row not in SOME
]


def spoilt(
    shape: Shape, before: str, after: str, place: str, value: float, pixel: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of the Triton engine and of the reference with one number of x or dy replaced."""
    call = training_call(shape, before, after)
    given = cotangents(call, shape.transposed)
    spot = call.x if place == "x" else given[0]
    assert spot is not None
    _, c, h, w = spot.shape
    spot[(1, c // 2, *((h // 2, w // 2) if pixel is None else pixel))] = value
    made = triton_results(call, shape.transposed, given)
    with ops.use_engine("reference"):
        return made, results(call, shape.transposed, given)


FEWER = {"down": SOME[::2], "dense_down": SOME[1::2], "dense_up": [], "dense_narrow": []}


@pytest.mark.parametrize(
    ("name", "before", "after", "place", "value"),
    [
        pytest.param(name, *row, marks=[] if row in FEWER.get(name, SOME) else pytest.mark.slow)
        for name in GEOMETRIES
        for row in [*SOME, *MORE]
    ],
)
def test_one_number(name: str, before: str, after: str, place: str, value: float) -> None:
    """NaN: the same results are NaN. Infinity: the same are not finite.

    Which of those are NaN is the algorithm's: the mean of an infinity is one, where ``torch.var_mean`` gives
    NaN, and Σ w·dweight has infinities of both signs where Σ e·u has one.
    """
    if name == "down_narrow" and before == "relu":  # its adjoint would be up_narrow, which spreads NaN
        before = "affine_relu"
    made, own = spoilt(GEOMETRIES[name], before, after, place, value)
    assert made.keys() == own.keys()
    spoils = torch.isnan if value != value else lambda t: ~torch.isfinite(t)
    for key, result in made.items():
        assert torch.equal(spoils(result), spoils(own[key])), key
    if (place, after) != ("dy", "scale_relu"):  # which stops it where y is not positive
        assert any(spoils(result).any() for result in made.values())


@pytest.mark.parametrize("transposed", [True, False])
def test_the_window_of_a_border_pixel(transposed: bool) -> None:
    """A weight's gradient multiplies by the padding too: NaN·0. Nothing else differs."""
    shape = GEOMETRIES["up" if transposed else "down"]
    place = "x" if transposed else "dy"
    made, own = spoilt(shape, "affine_relu", "shift_sigmoid", place, NAN, (0, 0))
    for key, result in made.items():
        if key == "dweight":
            assert (result.isnan() >= own[key].isnan()).all()
        else:
            assert torch.equal(result.isnan(), own[key].isnan()), key


@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "adjoint"])
def test_up_narrow_spreads_to_the_next_pixel(transposed: bool) -> None:
    """Its taps of 3×3 inputs include some that are 0 by construction, and NaN·0 is NaN; but no farther."""
    shape = Shape(transposed, 2, 20, 3, 5, 5, 4, 2, 1)
    if not transposed:
        shape = Shape(False, 2, 3, 20, 10, 10, 4, 2, 1)
    made, own = spoilt(shape, "as_it_is", "raw", "x" if transposed else "dy", NAN)
    key = "y" if transposed else "dx"
    wrong, eager = made[key].isnan(), own[key].isnan()
    assert (wrong >= eager).all()
    assert (wrong <= (F.max_pool2d(eager.float(), 3, 1, 1) > 0)).all()
