"""Helpers for testing the native engine in training: layers, and their outputs and gradients in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.cpu import algorithm_selection, training
from dcgan.kernels.reference import memory_format
from dcgan.kernels.spec import Backward
from tests.support import native
from tests.support.engine_results import engine_results, exact_results, results
from tests.support.float64_reference import (
    GRADIENTS,
    Problem,
    act,
    column,
    convolve,
    expected_outputs,
    gradients,
    leaves,
)
from tests.support.native import LAYER, odd_sized
from tests.support.tolerance import Cotangents

PROLOGUES: dict[str, dict[str, Any]] = {
    "identity": {},
    "relu": {"in_act": "relu"},
    "leaky_relu": {"in_act": "leaky_relu"},
    "affine": {"prologue": True},
    "affine_relu": {"prologue": True, "in_act": "relu"},
    "affine_leaky_relu": {"prologue": True, "in_act": "leaky_relu"},
}
EPILOGUES: dict[str, dict[str, Any]] = {
    "statistics": {"stats": True},
    "raw": {},
    "tanh": {"out_act": "tanh"},
    # With a shift: without one, empty sums lie exactly on the kink.
    "shift_relu": {"out_shift": True, "out_act": "relu"},
    "scale": {"out_scale": True},
    **{
        f"scale_shift_{act}": {"out_scale": True, "out_shift": True, "out_act": act}
        for act in ("leaky_relu", "tanh", "sigmoid")
    },
}
DY = ("nhwc", "nchw", "strided", "expanded", "sum")


# --- calls --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(algorithm: str) -> Iterator[None]:
    """Force ``algorithm`` for 4×4 products with stride 2 and padding 1; direct where it is not supported."""

    def choose(g: algorithm_selection.Geometry, product: int, fused: tuple[bool, bool], *_: Any) -> str:
        prologue, stats = fused
        if g.dense:
            return "dense"
        sums = stats if g.transposed and product == algorithm_selection.FPROP else False
        sums = sums or (prologue and not g.transposed and product == algorithm_selection.DGRAD)
        if (algorithm == "narrow" and sums) or (algorithm == "f2" and product == algorithm_selection.WGRAD):
            return "direct"
        return algorithm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm_selection, "training", choose)
        training._plan.cache_clear()
        yield
    training._plan.cache_clear()


def layer(algorithm: str, transposed: bool, prologue: str, epilogue: str, **changes: Any) -> Problem:
    return odd_sized(algorithm, transposed, **{**PROLOGUES[prologue], **EPILOGUES[epilogue], **changes})


def near_a_kink(call: ops.Call, transposed: bool) -> bool:
    """Return whether rounding may decide an activation input's sign, or x̂ is a remnant of cancellation."""
    x = call.x.double()
    if call.center is not None and call.scale is not None and call.shift is not None:
        scaled = (x - column(call.center)) * column(call.scale)
        x = scaled + column(call.shift)
        if prologue_output(call).norm() < 0.2 * scaled.norm():
            return True
    u = expected_outputs(call._replace(out_act="none"), transposed)[0]
    near_in = call.in_act != "none" and bool((x.abs() < 1e-6).any())
    near_out = call.out_act != "none" and bool((u.abs() < 2e-5).any())
    return near_in or (near_out and call.out_act in ("relu", "leaky_relu"))


def random_call(problem: Problem) -> ops.Call:
    """Draw the problem's call with y of order one, where no activation is flat, and away from kinks.

    With an out_shift, which keeps it off the kink, one channel of several has an out_scale of 0.
    """
    taps = problem.kernel[0] * problem.kernel[1]
    if problem.transposed:
        taps //= problem.stride**2 if problem.padding else taps
    for seed in range(1000 * problem.seed, 1000 * problem.seed + 100):
        call = problem.with_(seed=seed).call()
        call = call._replace(weight=call.weight * (problem.c_in * taps) ** -0.5)
        if call.out_scale is not None and call.out_shift is not None and problem.c_out > 1:
            call.out_scale[problem.c_out // 2] = 0
        if not near_a_kink(call, problem.transposed):
            return call
    raise AssertionError("every draw is near a kink")


def strided(t: Tensor) -> Tensor:
    """Copy t with a step of 2 in every dimension, with NaN between its elements."""
    memory = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
    return memory[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def cotangents(call: ops.Call, transposed: bool, layout: str = "nhwc") -> Cotangents:
    """Draw dy in that layout, and dmean and dvar, scaled by the pixel count that du divides them by."""
    n, c, h, w = ops.check(call, transposed).shape
    if layout == "sum":  # the gradient of y.sum()
        dy = torch.ones(()).expand(n, c, h, w)
    elif layout == "expanded":
        dy = torch.randn(1, c, 1, 1).expand(n, c, h, w)
    elif layout == "strided":
        dy = strided(torch.randn(n, c, h, w))
    else:
        dy = torch.randn(n, c, h, w).contiguous(memory_format=memory_format(layout == "nhwc"))
    if not call.stats:
        return dy, None, None
    vector = strided if layout == "strided" else torch.clone
    return dy, vector(n * h * w * torch.randn(c)), vector(n * h * w * torch.randn(c))


def native_results(
    call: ops.Call, transposed: bool, given: Cotangents, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Return :func:`engine_results` of the native engine; check that no argument was modified."""
    originals = {name: t.clone() for name, t in leaves(call).items()}
    found = engine_results("native", call, transposed, given, wanted)
    for name, t in leaves(call).items():
        assert torch.equal(t.nan_to_num(), originals[name].nan_to_num()), f"{name} was modified"
    return found


def reference_results(call: ops.Call, transposed: bool, given: Cotangents) -> dict[str, Tensor]:
    with ops.use_engine("reference"):
        return results(call, transposed, given)


def backward_operator(transposed: bool) -> Any:
    return getattr(torch.ops.dcgan, f"{ops.NAMES[transposed]}_backward").default


def backward_of(call: ops.Call, transposed: bool) -> Backward:
    """Return the backward call for all gradients of ``call``."""
    y, mean, _ = (t.float() for t in expected_outputs(call, transposed))
    dy, dmean, dvar = cotangents(call, transposed)
    assert dy is not None
    y = y.contiguous(memory_format=memory_format(call.channels_last))
    return Backward(
        dy, dmean, dvar, call.x, call.weight, call.center, call.scale, call.shift, call.in_act,
        call.out_scale, call.out_act, y if call.stats or call.out_act != "none" else None,
        mean if call.stats else None, call.stats, call.slope, call.stride, call.padding,
        (True, True, True, call.out_scale is not None, call.out_shift is not None),
    )  # fmt: skip


# --- against float64 ----------------------------------------------------------------------------------------


def uncancelled_norms(
    call: ops.Call, transposed: bool, given: Cotangents, exactly: dict[str, Tensor]
) -> dict[str, float]:
    """Estimate the norms of the results ``exactly`` if no sum cancelled.

    One sum of a few terms may be near 0 by chance but has the error of its terms: errors are relative to
    these norms.
    """
    wide = call._replace(**{name: t.double() for name, t in leaves(call).items()})
    x_hat, weight = prologue_output(call), wide.weight
    u = convolve(x_hat, weight, call.stride, call.padding, transposed).requires_grad_()
    (du,) = gradients(expected_outputs(epilogue_call(wide, u), False), given, {"u": u}).values()
    if not call.stats:
        out_pre = (
            expected_outputs(epilogue_call(wide, u)._replace(out_act="none"), False)[0]
            .detach()
            .requires_grad_()
        )
        e = torch.autograd.grad(act(out_pre, call.out_act, call.slope), out_pre, given[0].double())[0].abs()
    product = call._replace(x=x_hat, center=None, scale=None, shift=None, in_act="none")
    typical = native.typical(product, transposed)
    sizes = {"y": float(typical.norm())}
    if call.stats:
        squares = typical.square().mean((0, 2, 3))
        sizes["mean"] = float(squares.sqrt().norm())
        sizes["var"] = float((exactly["var"] * squares).sqrt().norm())
    x2, w2 = x_hat.square().requires_grad_(), weight.square().requires_grad_()
    of_squares = convolve(x2, w2, call.stride, call.padding, transposed)
    if not call.stats:
        sizes["dout_shift"] = float(sum_magnitude(e).norm())
        sizes["dout_scale"] = float(sum_magnitude(e * of_squares.detach().sqrt()).norm())
    g2, dw2 = torch.autograd.grad(of_squares, (x2, w2), du.square())
    sizes |= {"dx": float(g2.sum().sqrt()), "dweight": float(dw2.sum().sqrt())}
    if call.center is not None and call.scale is not None:
        scale, centered = call.scale.double(), call.x.double() - column(call.center)
        sizes["dx"] = float((g2 * column(scale.square())).sum().sqrt())
        dshift = sum_magnitude(g2.sqrt())
        sizes["dshift"] = float(dshift.norm())
        sizes["dscale"] = float(sum_magnitude(g2.sqrt() * centered.abs()).norm())
        sizes["dcenter"] = float((scale * dshift).norm())
    return sizes


def sum_magnitude(t: Tensor) -> Tensor:
    """Estimate the size of the channel sums of terms with these magnitudes.

    With independent signs and errors it is the root of the sum of squares. But where dy is constant, a
    transform's rounding errors are the same in every tile and add up to 10 u·Σ|t|, with the u of
    tests/support/native.py: that is LAYER times an eighth of Σ|t|.
    """
    return torch.maximum(t.square().sum((0, 2, 3)).sqrt(), t.sum((0, 2, 3)) / 8)


def epilogue_call(call: ops.Call, u: Tensor) -> ops.Call:
    """Return a call that applies the epilogue of ``call`` to the product u."""
    identity = torch.eye(u.shape[1], dtype=u.dtype)[:, :, None, None]
    bare = call._replace(x=u, weight=identity, center=None, scale=None, shift=None, in_act="none")
    return bare._replace(stride=1, padding=0)


def prologue_output(call: ops.Call) -> Tensor:
    """Compute x̂ in float64."""
    identity = torch.eye(call.x.shape[1], dtype=torch.float64)[:, :, None, None]
    alone = call._replace(weight=identity, stride=1, padding=0, stats=False, out_act="none")
    return expected_outputs(alone._replace(out_scale=None, out_shift=None), False)[0]


def assert_correct(found: dict[str, Tensor], call: ops.Call, transposed: bool, given: Cotangents) -> None:
    """Check that every result is within LAYER of float64's; tests/support/native.py derives that number.

    A gradient takes one more product, of a du that errs by as much: dx, dweight and the sums are within twice
    that. Where tanh and sigmoid saturate, du is computed from a y that is accurate to some 2⁻²¹ of 1, however
    small the derivative is.
    """
    exactly = exact_results(call, transposed, given)
    sizes = uncancelled_norms(call, transposed, given, exactly)
    assert found.keys() == exactly.keys()
    saturates = call.out_act in ("tanh", "sigmoid")
    unsaturated = exact_results(call._replace(out_act="none"), transposed, given) if saturates else {}
    for name, result in found.items():
        expected = exactly[name]
        error = float((result.double() - expected).norm())
        size = max(float(expected.norm()), sizes.get(name, 0.0))
        allowed = (LAYER if name in ("y", "mean", "var") else 2 * LAYER) * size
        if saturates and name != "y":
            allowed += 2**-21 * float(unsaturated[name].norm())
        assert error <= allowed, f"{name}: error {error:.2e} of {size:.2e}"  # a NaN fails too


def check(problem: Problem, layout: str = "nhwc", **changes: Any) -> dict[str, Tensor]:
    call = random_call(problem)._replace(**changes)
    given = cotangents(call, problem.transposed, layout)
    found = native_results(call, problem.transposed, given)
    assert_correct(found, call, problem.transposed, given)
    return found
