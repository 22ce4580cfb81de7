"""NaN and infinities in training propagate wherever they do in eager, and the derivative at a kink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import native
from tests.support.float64_reference import (
    BOTH,
)
from tests.support.native import (
    ALGORITHMS,
)
from tests.support.native_training import (
    assert_correct,
    cotangents,
    forced,
    layer,
    native_results,
    random_call,
    reference_results,
)

pytestmark = [native.NEEDED, pytest.mark.usefixtures("nan_in_new_memory", "threads_restored")]
NAN, INF = float("nan"), float("inf")


def with_middle_element(t: Tensor, value: float) -> Tensor:
    """Copy t with the middle element of its middle image replaced."""
    t = t.clone()
    t[(t.shape[0] // 2, *(size // 2 for size in t.shape[1:]))] = value
    return t


@pytest.mark.parametrize(
    ("place", "value"), [("x", NAN), ("x", INF), ("x", -INF), ("dy", NAN), ("dy", INF), ("weight", NAN)]
)
@ALGORITHMS
@BOTH
def test_nonfinite_where_eager_is(transposed: bool, algorithm: str, place: str, value: float) -> None:
    """No NaN or infinity is hidden. Winograd may spread it within a tile, but to no other image."""
    for prologue, epilogue in (
        *(("identity", "raw"), ("leaky_relu", "statistics"), ("relu", "raw"), ("affine_relu", "statistics")),
        *(("affine_relu", "shift_relu"), ("affine_leaky_relu", "scale_shift_leaky_relu")),
    ):
        call = random_call(layer(algorithm, transposed, prologue, epilogue))
        dy, dmean, dvar = cotangents(call, transposed)
        assert dy is not None
        with forced(algorithm):
            clean = native_results(call, transposed, (dy, dmean, dvar))
            if place == "dy":
                dy = with_middle_element(dy, value)
            else:
                call = call._replace(**{place: with_middle_element(getattr(call, place), value)})
            given = (dy, dmean, dvar)
            found = native_results(call, transposed, given)
        expected = reference_results(call, transposed, given)
        for name, result in found.items():
            hidden = result.isfinite() & ~expected[name].isfinite()
            assert not bool(hidden.any()), f"{name}, {prologue}, {epilogue}: {int(hidden.sum())} are finite"
            if place != "weight" and name in ("y", "dx") and not call.stats:
                assert torch.equal(result[[0, 2]], clean[name][[0, 2]]), (
                    f"{name}, {prologue}, {epilogue}: others"
                )
            if algorithm in ("direct", "dense") and name in ("y", "dx") and prologue[-4:] != "relu":
                more = ~result.isfinite() & expected[name].isfinite()
                assert not bool(more.any()), (
                    f"{name}, {prologue}, {epilogue}: {int(more.sum())} more are not finite"
                )


@pytest.mark.parametrize(("place", "value"), [("x", -INF), ("dy", INF), ("dy", NAN)])
@pytest.mark.parametrize("algorithm", ["direct", "dense"])
@BOTH
def test_relu_stops_nonfinite_values(transposed: bool, algorithm: str, place: str, value: float) -> None:
    """As in eager: relu(-∞) is 0, and so is the gradient where the input is negative."""
    for prologue in ("relu", "affine_relu"):
        call = random_call(layer(algorithm, transposed, prologue, "raw"))
        if call.scale is not None:
            call = call._replace(scale=call.scale.abs())
        dy, *others = cotangents(call, transposed)
        assert dy is not None
        if place == "dy":
            dy = with_middle_element(dy, value)
        else:
            call = call._replace(x=with_middle_element(call.x, value))
        given: Any = (dy, *others)
        with forced(algorithm):
            found = native_results(call, transposed, given)
        expected = reference_results(call, transposed, given)
        for name in ("y", "dx"):
            assert torch.equal(found[name].isfinite(), expected[name].isfinite()), f"{name}, {prologue}"


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_the_derivative_at_a_kink(transposed: bool, algorithm: str, act: str) -> None:
    """At exactly 0 it equals eager's: 0 for relu, the slope for leaky_relu."""
    problem = layer(algorithm, transposed, "affine", "raw", in_act=act)
    call = problem.call()
    zero = torch.zeros(problem.c_in)
    at_kink = call._replace(x=torch.zeros_like(call.x), shift=zero, center=zero)
    flat = call._replace(out_act=act, weight=torch.zeros_like(call.weight), in_act="none")
    unprefixed = at_kink._replace(center=None, scale=None, shift=None)
    for now in (at_kink, flat, flat._replace(out_scale=torch.ones(problem.c_out)), unprefixed):
        given = cotangents(now, transposed)
        with forced(algorithm):
            assert_correct(native_results(now, transposed, given), now, transposed, given)
