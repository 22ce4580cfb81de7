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

from ..reference import accumulator_dtype, activate, activation_backward, normalise
from ..spec import Operand
from .launcher import Pointers, Product

aten = torch.ops.aten


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


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
        value = activate(normalise(value, x.center, x.scale, x.shift), operand.act, slope)
    elif function == "gradient":
        value = activation_backward(value, x.other.to(value.dtype), operand.act, slope)
        if operand.scaled:
            value = value * _channels(x.scale)
    elif function == "statistics":
        count = value.numel() // value.shape[1]
        value = value + _channels(x.shift / count)
        value = value + _channels(x.scale * 2 / count) * (x.other.to(value.dtype) - _channels(x.center))
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


def apply_epilogue(raw: Tensor, it: Product) -> tuple[Tensor, ...]:
    """Apply the epilogue to the raw product; returns (y, *sums) as :func:`compute` does."""
    operand, y, slope = it.spec.y, it.y, it.spec.slope
    value = raw.to(accumulator_dtype(raw.dtype))
    if operand.function == "statistics":
        var, mean = torch.var_mean(value, dim=(0, 2, 3), correction=0)
        return raw, mean, var
    sums: tuple[Tensor, ...] = ()
    if operand.function == "affine":
        if operand.scaled:
            value = value * _channels(y.scale)
        if operand.shifted:
            value = value + _channels(y.shift)
        value = activate(value, operand.act, slope)
    else:
        x = y.other.to(value.dtype)
        if operand.scaled:
            activated = activate(normalise(x, y.center, y.scale, y.shift), operand.act, slope)
            g = activation_backward(value, activated, operand.act, slope)
            sums = g.sum((0, 2, 3)), (g * (x - _channels(y.center))).sum((0, 2, 3))
            value = g * _channels(y.scale)
        else:
            value = activation_backward(value, activate(x, operand.act, slope), operand.act, slope)
    return value.to(raw.dtype), *sums


def compute(it: Product) -> tuple[Tensor, ...]:
    """Return (y, *sums), or (dweight,) of a wgrad.

    The sums are mean and var for statistics, Σ g and Σ g·(other - center) for the adjoint's epilogue.
    """
    x = apply_prologue(it.spec.x, it.x, it.spec.slope)
    if it.spec.kind == "wgrad":
        return (convolve(it, x, apply_prologue(it.spec.y, it.y, it.spec.slope)),)
    return apply_epilogue(convolve(it, x), it)


def cast(it: Product, dtype: torch.dtype) -> Product:
    """Return the product with every tensor cast to ``dtype``."""

    def pointers(operand: Pointers) -> Pointers:
        return Pointers(*(None if t is None else t.to(dtype) for t in operand))

    weight = None if it.weight is None else it.weight.to(dtype)
    return Product(it.spec._replace(dtype=dtype), pointers(it.x), weight, pointers(it.y))


def exact(it: Product) -> tuple[Tensor, ...]:
    """Evaluate :func:`compute` in float64, on operands that the prologues round to their dtype as kernels do.

    A kernel's result therefore differs from it only by its accumulation error and its own rounding.
    """
    x = apply_prologue(it.spec.x, it.x, it.spec.slope).double()
    if it.spec.kind == "wgrad":
        return (convolve(it, x, apply_prologue(it.spec.y, it.y, it.spec.slope).double()),)
    wide = cast(it, torch.float64)
    return apply_epilogue(convolve(wide, x), wide)


def merged(it: Product, partial: Tensor | None, group: int, block_m: int) -> tuple[Tensor, ...]:
    """Return a kernel's results as :func:`exact` does, from its output and its partial sums.

    ``group`` rows of the partial sums belong to each tile of ``block_m`` rows.
    """
    if it.spec.kind == "wgrad":
        assert partial is not None
        c_small, c_large, k_h, k_w = it.spec.weight
        return (partial.sum(0).view(k_h, k_w, c_small, c_large).permute(2, 3, 0, 1),)
    y: Tensor = it.y.ptr
    if partial is None:
        return (y,)
    if it.spec.y.function == "adjoint":
        return y, *partial.sum(1)
    rows = y.numel() // y.shape[1] // group
    first = torch.arange(partial.shape[1], device=y.device) // group * block_m
    count = (rows - first).clamp(max=block_m)[:, None].double()
    means, squares = partial.double()
    mean = (count * means).sum(0) / (rows * group)
    return y, mean, (squares + count * (means - mean) ** 2).sum(0) / (rows * group)


def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest ‖got - expected‖/‖expected‖ over the tensors; infinite if any is not finite."""
    each = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)]
    return max(each) if all(map(math.isfinite, each)) else math.inf
