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
    "up": Shape(True, 2, 20, 66, 3, 3, 4, 2, 1),
    "up_block": Shape(True, 2, 20, 24, 3, 3, 4, 2, 1),
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
FEWER = {"up": SOME[::2], "down": SOME[1::2], "dense_down": SOME[::3], "dense_up": [], "dense_narrow": []}
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


def blocks_that_read(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which pixels of a map of ``size`` lie in an up_narrow's blocks that read a marked pixel.

    Block P has output rows 4P-1 … 4P+2 and reads input rows 2P-1 … 2P+1; the same holds for columns.
    """
    read = F.max_pool2d(F.pad(x.double(), (1, 3, 1, 3)), 3, 2)
    return read.repeat_interleave(4, -2).repeat_interleave(4, -1)[..., 1:, 1:][..., : size[0], : size[1]] > 0


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("pixel", [None, (0, 0), (1, 2), (4, 3)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(True, 2, 20, 3, 5, 4, 4, 2, 1),
        Shape(False, 2, 3, 20, 10, 8, 4, 2, 1),
        Shape(False, 2, 1, 20, 11, 9, 4, 2, 1),
    ],
    ids=["forward", "adjoint", "odd adjoint"],
)
def test_up_narrow_spreads_to_its_blocks(shape: Shape, pixel: tuple[int, int] | None, value: float) -> None:
    """Of the 3×3 inputs of a block of 4×4 outputs, each output multiplies five by zeros, and NaN·0 is NaN.

    The outputs that depend on the value are those of float64; no other block has any.
    """
    place, key = ("x", "y") if shape.transposed else ("dy", "dx")
    call, grad_outputs = with_non_finite(shape, "plain", "raw", place, value, pixel)
    actual = triton_results(call, shape.transposed, grad_outputs)[key]
    expected = exact_results(call, shape.transposed, grad_outputs)[key]
    source = call.x if shape.transposed else grad_outputs[0]
    assert source is not None
    wrong = blocks_that_read(~source.isfinite().all(1, keepdim=True), actual.shape[2:])
    assert torch.equal(~actual.isfinite(), wrong.expand_as(actual))
    depends = ~expected.isfinite()
    assert (depends <= wrong).all()
    assert torch.equal(actual.double()[depends].isnan(), expected[depends].isnan())
    assert actual[wrong.expand_as(actual) & ~depends].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "pixel", [(1, 2), *(pytest.param(p, marks=pytest.mark.slow) for p in ((0, 0), (4, 3)))]
)
@pytest.mark.parametrize("c", [5, 66], ids=["up_block", "up"])
@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "odd adjoint"])
def test_up_spreads_to_the_outputs_that_depend_on_it(
    transposed: bool, c: int, pixel: tuple[int, int], value: float
) -> None:
    """Exactly those of float64: no product multiplies a value by a zero of its own."""
    shape = Shape(True, 2, 20, c, 5, 4, 4, 2, 1) if transposed else Shape(False, 2, c, 20, 11, 9, 4, 2, 1)
    place, key = ("x", "y") if transposed else ("dy", "dx")
    call, grad_outputs = with_non_finite(shape, "plain", "raw", place, value, pixel)
    actual = triton_results(call, transposed, grad_outputs)[key]
    expected = exact_results(call, transposed, grad_outputs)[key]
    assert expected.isfinite().any()
    for is_kind in (torch.isnan, torch.isinf):
        assert torch.equal(is_kind(actual), is_kind(expected))
