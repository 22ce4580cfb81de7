"""Error bounds for correct results, derived from unit roundoff instead of hand-picked thresholds.

Running error analysis: an :class:`Approx` is an exact value (float64) and an elementwise bound on the error
of the engine's value. Each step adds its own rounding (Higham, *Accuracy and Stability of Numerical
Algorithms*, 2002, chapters 3 and 4):

    fl(a∘b) = (a∘b)(1+δ), |δ| ≤ u;    a sum of n terms, in any order: error ≤ n·u·Σ|terms|

An engine may round the operands of a product to x's dtype (``operand``, by default that dtype's unit
roundoff; 2⁻¹¹ for a tensor core in TF32 mode) and results once to their dtype; everything else is in the
accumulator's dtype. All bounds are first order, with a factor that covers higher orders.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.reference import accumulator_dtype
from tests.support.float64_reference import act, column, convolve, gradients, leaves

Cotangents = tuple[Tensor | None, Tensor | None, Tensor | None]

FUNCTION_ULPS = 8  # error of a vector library's tanh and sigmoid, in units in the last place
SLACK = 1.1  # second-order terms


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff: half the spacing of the numbers just above 1."""
    return torch.finfo(dtype).eps / 2


class Approx(NamedTuple):
    value: Tensor
    error: Tensor


def exact(t: Tensor) -> Approx:
    t = t.detach().double()
    return Approx(t, torch.zeros_like(t))


def rounded(a: Approx, u: float) -> Approx:
    return Approx(a.value, a.error + u * (a.value.abs() + a.error))


def add(a: Approx, b: Approx, u: float) -> Approx:
    return rounded(Approx(a.value + b.value, a.error + b.error), u)


def mul(a: Approx, b: Approx, u: float) -> Approx:
    error = a.error * b.value.abs() + b.error * a.value.abs() + a.error * b.error
    return rounded(Approx(a.value * b.value, error), u)


def total(a: Approx, u: float) -> Approx:
    """Sum over N, H, W."""
    count = a.value.numel() // max(a.value.shape[1], 1)
    error = a.error + count * u * (a.value.abs() + a.error)
    return Approx(a.value.sum((0, 2, 3)), error.sum((0, 2, 3)))


def per_channel(a: Approx) -> Approx:
    return Approx(column(a.value), column(a.error))


def activate(a: Approx, name: str, slope: float, u: float) -> Approx:
    """Apply an activation, which is Lipschitz with constant max(1, slope)."""
    if name == "none":
        return a
    error = a.error * max(1.0, slope)
    value = act(a.value, name, slope)
    ulps = FUNCTION_ULPS if name in ("tanh", "sigmoid") else 1
    return rounded(Approx(value, error), ulps * u)


def _derivative(x: Approx, y: Approx, name: str, slope: float, u: float) -> Approx:
    """Compute act'(x) from the output y; within its error of a kink, x may be on either side."""
    if name in ("relu", "leaky_relu"):
        low = slope if name == "leaky_relu" else 0.0
        value = torch.where(x.value > 0, 1.0, low).to(x.value)
        kink = (x.error > 0) & (x.value.abs() <= x.error)
        return Approx(value, torch.where(kink, abs(1 - low), 0.0).to(value))
    if name == "tanh":
        return rounded(Approx(1 - y.value**2, 2 * y.value.abs() * y.error + y.error**2 + u), 2 * u)
    if name == "sigmoid":
        return rounded(Approx(y.value * (1 - y.value), y.error * (1 + y.error) + u * y.value), 3 * u)
    return exact(torch.ones_like(y.value))


def _products(a: Approx, b: Approx, u: float, terms: int, bilinear: object, operand: float) -> Approx:
    """Apply a bilinear map: each output sums ``terms`` products of operands rounded to ``operand``."""
    a, b = rounded(a, operand), rounded(b, operand)
    f = bilinear
    assert callable(f)
    a_abs, b_abs = a.value.abs(), b.value.abs()
    error = f(a.error, b_abs) + f(a_abs + a.error, b.error)
    error = error + (terms + 1) * u * f(a_abs + a.error, b_abs + b.error)
    return Approx(f(a.value, b.value), error)


class Bounds:
    """Error bounds of a call's outputs (``forward()``) and gradients (``backward(...)``), by name."""

    def __init__(self, call: ops.Call, transposed: bool, operand: float | None = None) -> None:
        self.call, self.transposed = call, transposed
        self.u = unit(accumulator_dtype(call.x.dtype))
        self.r = unit(call.x.dtype)
        self.operand = self.r if operand is None else operand
        # In float64 the expected result has errors of the same size.
        self.slack = 2 * SLACK if call.x.dtype == torch.float64 else SLACK
        self.tiny = torch.finfo(call.x.dtype).smallest_normal * 2 * self.r  # a subnormal's spacing

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, weight, self.call.stride, self.call.padding, self.transposed)

    def _terms(self) -> int:
        shape = self.call.weight.shape
        return (shape[0] if self.transposed else shape[1]) * shape[2] * shape[3]

    def _input(self) -> tuple[Approx, Approx, Approx]:
        """Return x - center (or x), the prologue's affine map of it, and x̂."""
        call, u = self.call, self.u
        centered = pre = exact(call.x)
        if call.center is not None and call.scale is not None and call.shift is not None:
            centered = add(pre, per_channel(exact(-call.center)), u)
            pre = mul(centered, per_channel(exact(call.scale)), u)
            pre = add(pre, per_channel(exact(call.shift)), u)
        return centered, pre, activate(pre, call.in_act, call.slope, u)

    def _raw(self, x_hat: Approx) -> Approx:
        weight = exact(self.call.weight)
        return _products(x_hat, weight, self.u, self._terms(), self._convolve, self.operand)

    def _output(self, raw: Approx) -> tuple[Approx, Approx]:
        """Return the output before and after its activation."""
        call, y = self.call, raw
        if call.out_scale is not None:
            y = mul(y, per_channel(exact(call.out_scale)), self.u)
        if call.out_shift is not None:
            y = add(y, per_channel(exact(call.out_shift)), self.u)
        return y, activate(y, call.out_act, call.slope, self.u)

    def forward(self) -> dict[str, Tensor]:
        raw = self._raw(self._input()[2])
        if not self.call.stats:
            return {"y": self._finish(self._output(raw)[1], self.r)}
        mean, var = self._statistics(raw)
        return {
            "y": self._finish(raw, self.r),
            "mean": self.slack * mean.error,
            "var": self.slack * var.error,
        }

    def _statistics(self, raw: Approx) -> tuple[Approx, Approx]:
        count = raw.value.numel() // raw.value.shape[1]
        sums = total(raw, self.u)
        mean = rounded(Approx(sums.value / count, sums.error / count), self.u)
        centered = (raw.value - column(mean.value)).abs()
        var = raw.value.var((0, 2, 3), unbiased=False)
        # The propagated errors of the data, and the summation's error: n·u·κ, κ = √(1 + mean²/var), for every
        # algorithm but E[y²] - E[y]², which has κ² (Chan, Golub, LeVeque, The American Statistician, 1983).
        error = (2 * centered * raw.error + raw.error**2).mean((0, 2, 3)) + mean.error**2
        error = error + (count + 2) * self.u * (var * (var + mean.value**2)).sqrt()
        return mean, Approx(var, error)

    def backward(
        self, dy: Tensor, dmean: Tensor | None = None, dvar: Tensor | None = None
    ) -> dict[str, Tensor]:
        call, u = self.call, self.u
        centered, pre, x_hat = self._input()
        raw = self._raw(x_hat)
        x_hat_operand = rounded(x_hat, self.operand)
        found: dict[str, Approx] = {}

        du = exact(dy)
        if call.stats:
            count = raw.value.numel() // raw.value.shape[1]
            mean, _ = self._statistics(raw)
            if dmean is not None:
                term = rounded(Approx(dmean.double() / count, torch.zeros_like(mean.value)), u)
                du = add(du, per_channel(term), u)
            if dvar is not None:
                term = rounded(Approx(2 * dvar.double() / count, torch.zeros_like(mean.value)), 2 * u)
                saved_y = rounded(raw, self.r)
                off = add(saved_y, per_channel(Approx(-mean.value, mean.error)), u)
                du = add(du, mul(per_channel(term), off, u), u)
        else:
            out_pre, y = self._output(raw)
            y = rounded(y, self.r)
            du = mul(du, _derivative(out_pre, y, call.out_act, call.slope, u), u)
            found["out_shift"] = total(du, u)
            found["out_scale"] = total(mul(du, raw, u), u)
            if call.out_scale is not None:
                du = mul(du, per_channel(exact(call.out_scale)), u)

        weight = exact(call.weight)
        taps = call.weight.shape[2] * call.weight.shape[3]
        c_out = call.weight.shape[1 if self.transposed else 0]
        found["weight"] = _products(
            x_hat_operand, du, u, raw.value[:, 0].numel(), self._weight_gradient, self.operand
        )
        dx_hat = _products(du, weight, u, c_out * taps, self._input_gradient, self.operand)
        g = mul(dx_hat, _derivative(pre, x_hat, call.in_act, call.slope, u), u)
        found["x"] = g
        if call.scale is not None:
            scale = exact(call.scale)
            found["shift"] = total(g, u)
            found["scale"] = total(mul(g, centered, u), u)
            found["center"] = mul(scale, found["shift"], u)
            found["x"] = mul(g, per_channel(scale), u)
        return {name: self._finish(a, self.r if name in ("x", "weight") else u) for name, a in found.items()}

    def _finish(self, a: Approx, u: float) -> Tensor:
        return self.slack * rounded(a, u).error + self.tiny

    def _input_gradient(self, du: Tensor, weight: Tensor) -> Tensor:
        x = torch.zeros_like(self.call.x, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self._convolve(x, weight), x, du)[0]

    def _weight_gradient(self, x_hat: Tensor, du: Tensor) -> Tensor:
        weight = torch.zeros_like(self.call.weight, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self._convolve(x_hat, weight), weight, du)[0]


def assert_within(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Check |actual - expected| ≤ bound elementwise; the message gives the worst error and its place."""
    assert actual.shape == expected.shape, f"{name} is {list(actual.shape)}, expected {list(expected.shape)}"
    error = (actual.detach().double() - expected.detach().double()).abs()
    excess = error - bound
    if error.numel() and not bool((excess <= 0).all()):  # a NaN fails too
        worst = int(torch.nan_to_num(excess, nan=float("inf")).argmax())
        raise AssertionError(
            f"{name}: error {error.flatten()[worst].item():.3e} where {bound.flatten()[worst].item():.3e} is "
            f"allowed, at flat index {worst} of {list(error.shape)}; "
            f"{int((~(excess <= 0)).sum())} of {error.numel()} elements are out of bounds"
        )


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖₂ / ‖expected‖₂, in float64."""
    a, e = actual.detach().double(), expected.detach().double()
    return float((a - e).norm() / e.norm().clamp_min(torch.finfo(torch.float64).tiny))


def uncancelled(
    call: ops.Call, transposed: bool, given: Cotangents = (None, None, None)
) -> dict[str, Tensor]:
    """Estimate, elementwise in float64, the size of a call's outputs and gradients if no sum cancelled.

    Every result is a sum of products. With random signs, such a sum is about as large as the root of the sum
    of squares. A single sum may be near 0 by chance, but its error is still that of its terms, so errors are
    taken relative to this root. By Cauchy-Schwarz, Σ|t| ≤ √n·√Σt².

    Outputs are those before their activation, which is 1-Lipschitz. Gradients are included if ``given``, the
    gradients of the outputs, has any.
    """
    wide = call._replace(**{name: t.detach().double() for name, t in leaves(call).items()})
    centered = pre = wide.x
    if wide.center is not None and wide.scale is not None and wide.shift is not None:
        centered = wide.x - column(wide.center)
        pre = centered * column(wide.scale) + column(wide.shift)
    pre = pre.detach().requires_grad_()
    x_hat = act(pre, call.in_act, call.slope)
    (in_slope,) = torch.autograd.grad(x_hat.sum(), pre)

    def convolved(x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, weight, call.stride, call.padding, transposed)

    x2, weight2 = x_hat.detach().square().requires_grad_(), wide.weight.square().requires_grad_()
    u, u2 = convolved(x_hat.detach(), wide.weight).requires_grad_(), convolved(x2, weight2)
    mean, var = u.mean((0, 2, 3)), u.var((0, 2, 3), unbiased=False)
    out_scale2 = 1.0 if wide.out_scale is None else column(wide.out_scale.square())
    squares = {"y": u2 * out_scale2}
    if call.stats:
        squares["mean"] = u2.sum((0, 2, 3)) / u2[:, 0].numel() ** 2
        # Its terms do not cancel, but those of u do: the error is the mean of 2·(u - mean)·error(u).
        squares["var"] = var * u2.mean((0, 2, 3))
    if all(g is None for g in given):
        return {name: t.detach().sqrt() for name, t in squares.items()}

    if call.stats:
        (e,) = gradients((u, mean, var), given, {"u": u}).values()
    else:
        out_pre = u if wide.out_scale is None else u * column(wide.out_scale)
        out_pre = out_pre if wide.out_shift is None else out_pre + column(wide.out_shift)
        out_pre = out_pre.detach().requires_grad_()
        y = act(out_pre, call.out_act, call.slope)
        (e,) = gradients((y, mean, var), given, {"out_pre": out_pre}).values()
        squares["dout_shift"] = e.square().sum((0, 2, 3))
        squares["dout_scale"] = (e.square() * u2).sum((0, 2, 3))
    g2, squares["dweight"] = torch.autograd.grad(u2, (x2, weight2), e.square() * out_scale2)
    squares["dx"] = g2 = g2 * in_slope.square()
    if wide.scale is not None:
        scale2 = wide.scale.square()
        squares["dshift"] = g2.sum((0, 2, 3))
        squares["dscale"] = (g2 * centered.square()).sum((0, 2, 3))
        squares["dcenter"] = scale2 * squares["dshift"]
        squares["dx"] = g2 * column(scale2)
    return {name: t.detach().sqrt() for name, t in squares.items()}
