"""Products in plain PyTorch: the reference for the kernels' results and the baseline for their speed.

:func:`compute` evaluates a :class:`.launcher.Product` in the dtype of its tensors: with float64 tensors it is
a reference, with others it is what Inductor compiles. As under autocast, products use the dtype of the
operands and elementwise work uses float32. :func:`convolve` is the product alone. :func:`exact` is the
reference for one launch: it rounds only where the kernels are documented to round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import accumulator_dtype, activate, activation_backward
from ..spec import Operand
from .launcher import Pointers, Product

aten = torch.ops.aten


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    """Return a vector [C], or one for each group of x's images [groups, C], to broadcast against x."""
    if vector.ndim == 1:
        return vector.view(1, -1, 1, 1)
    return vector.repeat_interleave(x.shape[0] // vector.shape[0], 0)[:, :, None, None]


def _normalise(x: Tensor, of: Pointers) -> Tensor:
    center, scale, shift = (_channels(v, x) for v in (of.center, of.scale, of.shift))
    return torch.addcmul(shift, x - center, scale)


def _sums(t: Tensor, groups: int) -> Tensor:
    """Return the sums [groups·C] over the pixels of each group's images."""
    sums: Tensor = t.unflatten(0, (groups, -1)).sum((1, 3, 4))
    return sums.flatten()


def apply_prologue(operand: Operand, x: Pointers, slope: float) -> Tensor:
    """Return prologue(x), the product's operand, rounded to x's dtype."""
    function, raw = operand.function, x.ptr
    assert isinstance(raw, Tensor)
    if function == "none":
        return raw
    value = raw.to(accumulator_dtype(raw.dtype))
    if function == "act":
        value = activate(value, operand.act, slope)
    elif function == "affine":
        value = activate(_normalise(value, x), operand.act, slope)
    elif function == "gradient":
        value = activation_backward(value, x.other.to(value.dtype), operand.act, slope)
        if operand.scaled:
            value = value * _channels(x.scale, value)
    elif function == "statistics":
        count = value.numel() // value.shape[1]
        centered = x.other.to(value.dtype) - _channels(x.center, value)
        value = value + _channels(x.shift / count, value) + _channels(x.scale * 2 / count, value) * centered
    else:
        raise ValueError(
            f"a prologue must be 'none', 'act', 'affine', 'gradient' or 'statistics', got {function!r}"
        )
    return value.to(raw.dtype)


def convolve(it: Product, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return the raw product of operands after their prologues; a gradient by the op of autograd's backward.

    Args:
        it: a product; only its spec, its weight and y's shape are used.
        x, y: the operands: x of a convolution, both of a wgrad.
    """
    spec = it.spec
    geometry = [spec.stride] * 2, [spec.padding] * 2, [1, 1]
    result: Tensor
    if spec.kind == "wgrad":
        assert y is not None
        small, large = (x, y) if spec.transposed else (y, x)
        weight = small.new_empty(spec.weight)  # only its shape is used
        result = aten.convolution_backward(
            small, large, weight, None, *geometry, False, [0, 0], 1, [False, True, False]
        )[1]
    elif spec.kind == "dgrad":
        result = aten.convolution_backward(
            x, it.y.ptr, it.weight, None, *geometry, not spec.transposed, [0, 0], 1, [True, False, False]
        )[0]
    else:
        result = aten.convolution(x, it.weight, None, *geometry, spec.transposed, [0, 0], 1)
    return result


def apply_epilogue(raw: Tensor, it: Product, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Apply the epilogue to the raw product; returns (y, *sums) as :func:`compute` does.

    The sums of 'gradient' are those of g rounded to ``dtype``, by default the raw product's.
    """
    operand, y, slope = it.spec.y, it.y, it.spec.slope
    value = raw.to(accumulator_dtype(raw.dtype))
    if operand.function == "statistics":
        parts = value.unflatten(0, (it.spec.groups, -1))
        var, mean = torch.var_mean(parts, dim=(1, 3, 4), correction=0)
        return raw, mean.flatten(), var.flatten()
    sums: tuple[Tensor, ...] = ()
    if operand.function == "affine":
        if operand.scaled:
            value = value * _channels(y.scale, value)
        if operand.shifted:
            value = value + _channels(y.shift, value)
        value = activate(value, operand.act, slope)
    else:
        x = y.other.to(value.dtype)
        if operand.scaled:
            g = activation_backward(value, activate(_normalise(x, y), operand.act, slope), operand.act, slope)
            if operand.function == "gradient":
                g = g.to(dtype or raw.dtype).to(g.dtype)
            groups = it.spec.groups
            sums = _sums(g, groups), _sums(g * (x - _channels(y.center, x)), groups)
            value = g if operand.function == "gradient" else g * _channels(y.scale, g)
        else:
            value = activation_backward(value, activate(x, operand.act, slope), operand.act, slope)
    return value.to(raw.dtype), *sums


def compute(it: Product) -> tuple[Tensor, ...]:
    """Return (y, *sums), or (dweight,) of a wgrad.

    The sums [groups·C] are mean and var for statistics, Σ g and Σ g·(other - center) for the epilogues
    'adjoint' and 'gradient'.
    """
    x = apply_prologue(it.spec.x, it.x, it.spec.slope)
    if it.spec.kind == "wgrad":
        return (convolve(it, x, apply_prologue(it.spec.y, it.y, it.spec.slope)),)
    return apply_epilogue(convolve(it, x), it)


def cast(it: Product, dtype: torch.dtype) -> Product:
    """Return the product with every tensor cast to ``dtype``."""

    def pointers(operand: Pointers) -> Pointers:
        return Pointers(*(None if t is None else t.to(dtype) for t in operand))

    # Kernels read the weight in the dtype of x, whatever the dtype of the parameter is.
    weight = None if it.weight is None else it.weight.to(it.spec.dtype).to(dtype)
    return Product(it.spec._replace(dtype=dtype), pointers(it.x), weight, pointers(it.y))


def exact(it: Product) -> tuple[Tensor, ...]:
    """Evaluate :func:`compute` in float64, on operands that the prologues round to their dtype as kernels do.

    A kernel's result therefore differs from it only by its accumulation error and its own rounding.
    """
    x = apply_prologue(it.spec.x, it.x, it.spec.slope).double()
    if it.spec.kind == "wgrad":
        return (convolve(it, x, apply_prologue(it.spec.y, it.y, it.spec.slope).double()),)
    wide = cast(it, torch.float64)
    return apply_epilogue(convolve(wide, x), wide, it.spec.dtype)


def merged(it: Product, partial: Tensor | None) -> tuple[Tensor, ...]:
    """Return a kernel's results as :func:`exact` does, from its output and its partial sums."""
    if it.spec.kind == "wgrad":
        assert partial is not None
        c_small, c_large, k_h, k_w = it.spec.weight
        return (partial.sum(0).view(k_h, k_w, c_small, c_large).permute(2, 3, 0, 1),)
    y: Tensor = it.y.ptr
    if partial is None:
        return (y,)
    groups = it.spec.groups
    partial = partial.unflatten(1, (groups, -1))
    if it.spec.y.function != "statistics":
        return y, *partial.sum(2).flatten(1)
    means, squares, count = partial.double()
    rows = count.sum(1)
    mean = (count * means).sum(1) / rows
    var = (squares + count * (means - mean[:, None]) ** 2).sum(1) / rows
    return y, mean.flatten(), var.flatten()


def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest ‖got - expected‖/‖expected‖ over the tensors; infinite if any is not finite."""
    each = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)]
    return max(each) if all(map(math.isfinite, each)) else math.inf
