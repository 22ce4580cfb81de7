"""What a launch computes, in plain PyTorch: what the kernels are checked against and raced with.

:func:`product` and :func:`gradient` are functions of the launch as data (:class:`.launch.Product`,
:class:`.wgrad.Gradient`), in the dtype of its tensors: float64 ones make them a reference, others what
Inductor gets. Products are formed in the dtype of the operands and elementwise work in float32, as autocast
has it. :func:`convolution` and :func:`convolution_weight` are the convolutions alone. :func:`exact` is the
reference for one launch: it rounds where the kernels say they do, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import accumulator_dtype, activate, activation_backward
from .launch import Product, Prologue
from .wgrad import Gradient

aten = torch.ops.aten


def _column(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def prepared(x: Tensor, prologue: Prologue, slope: float) -> Tensor:
    """What the convolution takes in place of x, rounded to x's dtype."""
    kind = prologue.kind
    if kind == "none":
        return x
    value = x.to(accumulator_dtype(x.dtype))
    if kind == "act":
        value = activate(value, prologue.act, slope)
    elif kind == "affine":
        assert prologue.center is not None
        assert prologue.scale is not None
        assert prologue.shift is not None
        value = (value - _column(prologue.center)) * _column(prologue.scale) + _column(prologue.shift)
        value = activate(value, prologue.act, slope)
    else:
        assert prologue.other is not None
        other = prologue.other.to(value.dtype)
        if kind == "gradient":
            value = activation_backward(value, other, prologue.act, slope)
            if prologue.scale is not None:
                value = value * _column(prologue.scale)
        elif kind == "statistics":
            assert prologue.center is not None
            assert prologue.scale is not None
            assert prologue.shift is not None
            count = x.numel() // x.shape[1]
            value = value + _column(prologue.shift / count)
            value = value + _column(prologue.scale * 2 / count) * (other - _column(prologue.center))
        else:
            raise ValueError(f"prologue.kind must be one of the kernels', got {kind!r}")
    return value.to(x.dtype)


def _geometry(stride: int, padding: int) -> tuple[Any, ...]:
    return [stride, stride], [padding, padding], [1, 1]


def convolution(x: Tensor, product: Product) -> Tensor:
    """The convolution alone, of what the prologue has made; an adjoint as autograd's backward runs it."""
    geometry = _geometry(product.stride, product.padding)
    if product.epilogue.kind == "adjoint" or product.prologue.kind in ("gradient", "statistics"):
        arguments = (x, product.y, product.weight, None, *geometry, not product.transposed, [0, 0], 1)
        gradient: Tensor = aten.convolution_backward(*arguments, [True, False, False])[0]
        return gradient
    y: Tensor = aten.convolution(x, product.weight, None, *geometry, product.transposed, [0, 0], 1)
    return y


def product(it: Product) -> tuple[Tensor, ...]:
    """(y, and the sums of its epilogue): of statistics mean and var, of the adjoint Σ g and Σ g·(x - c)."""
    return finished(convolution(prepared(it.x, it.prologue, it.slope), it), it)


def finished(raw: Tensor, it: Product) -> tuple[Tensor, ...]:
    """What the epilogue makes of the convolution."""
    epilogue = it.epilogue
    y = raw.to(accumulator_dtype(raw.dtype))
    if epilogue.kind == "statistics":
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        return raw, mean, var
    sums: tuple[Tensor, ...] = ()
    if epilogue.kind == "affine":
        if epilogue.scale is not None:
            y = y * _column(epilogue.scale)
        if epilogue.shift is not None:
            y = y + _column(epilogue.shift)
        y = activate(y, epilogue.act, it.slope)
    else:
        assert epilogue.input is not None
        x = epilogue.input.to(y.dtype)
        if epilogue.scale is None:
            y = activation_backward(y, activate(x, epilogue.act, it.slope), epilogue.act, it.slope)
        else:
            assert epilogue.center is not None
            assert epilogue.shift is not None
            apart = x - _column(epilogue.center)
            taken = activate(
                apart * _column(epilogue.scale) + _column(epilogue.shift), epilogue.act, it.slope
            )
            g = activation_backward(y, taken, epilogue.act, it.slope)
            sums = g.sum((0, 2, 3)), (g * apart).sum((0, 2, 3))
            y = g * _column(epilogue.scale)
    return y.to(raw.dtype), *sums


def convolution_weight(small: Tensor, large: Tensor, gradient: Gradient) -> Tensor:
    """The weight gradient alone, of what the prologues have made, as autograd's backward runs it."""
    weight = small.new_empty(gradient.shape)  # of which only the shape is looked at
    geometry = _geometry(gradient.stride, gradient.padding)
    arguments = (small, large, weight, None, *geometry, False, [0, 0], 1, [False, True, False])
    dweight: Tensor = aten.convolution_backward(*arguments)[1]
    return dweight


def gradient(it: Gradient) -> tuple[Tensor]:
    """(dweight,)"""
    small = prepared(it.small, it.small_prologue, it.slope)
    large = prepared(it.large, it.large_prologue, it.slope)
    return (convolution_weight(small, large, it),)


def compute(it: Product | Gradient) -> tuple[Tensor, ...]:
    """:func:`product` or :func:`gradient`."""
    return product(it) if isinstance(it, Product) else gradient(it)


def converted(value: Any, dtype: torch.dtype) -> Any:
    """A launch's data with every tensor in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(converted(item, dtype) for item in value))
    return value


def exact(it: Product | Gradient) -> tuple[Tensor, ...]:
    """:func:`compute` in float64, of operands that the prologues have rounded to their dtype, as kernels do.

    So a result is as far from it as its own rounding and its accumulation take it, and no further.
    """
    if isinstance(it, Product):
        x = prepared(it.x, it.prologue, it.slope).double()
        bare = it.prologue._replace(center=None, scale=None, shift=None, other=None)
        wide = converted(it._replace(prologue=bare), torch.float64)
        return finished(convolution(x, wide), wide)
    small = prepared(it.small, it.small_prologue, it.slope).double()
    large = prepared(it.large, it.large_prologue, it.slope).double()
    return (convolution_weight(small, large, it),)


def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ‖got - expected‖/‖expected‖; infinite where something is not finite."""
    each = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)]
    return max(each) if all(map(math.isfinite, each)) else math.inf
