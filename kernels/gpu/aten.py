"""Launches in plain PyTorch: the reference for the kernels' results and the baseline for their speed.

:func:`product` and :func:`gradient` evaluate a launch description (:class:`.launch.Product`,
:class:`.wgrad.Gradient`) in the dtype of its tensors: with float64 tensors they are a reference, with others
they are what Inductor compiles. As under autocast, products use the dtype of the operands and elementwise
work uses float32. :func:`convolution` and :func:`convolution_weight` are the convolutions alone.
:func:`exact` is the reference for one launch: it rounds only where the kernels are documented to round.
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


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def apply_prologue(x: Tensor, prologue: Prologue, slope: float) -> Tensor:
    """Return prologue(x), the convolution's operand, rounded to x's dtype."""
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
        value = (value - _channels(prologue.center)) * _channels(prologue.scale) + _channels(prologue.shift)
        value = activate(value, prologue.act, slope)
    else:
        assert prologue.other is not None
        other = prologue.other.to(value.dtype)
        if kind == "gradient":
            value = activation_backward(value, other, prologue.act, slope)
            if prologue.scale is not None:
                value = value * _channels(prologue.scale)
        elif kind == "statistics":
            assert prologue.center is not None
            assert prologue.scale is not None
            assert prologue.shift is not None
            count = x.numel() // x.shape[1]
            value = value + _channels(prologue.shift / count)
            value = value + _channels(prologue.scale * 2 / count) * (other - _channels(prologue.center))
        else:
            raise ValueError(
                f"prologue.kind must be 'none', 'act', 'affine', 'gradient' or 'statistics', got {kind!r}"
            )
    return value.to(x.dtype)


def _geometry(stride: int, padding: int) -> tuple[Any, ...]:
    return [stride, stride], [padding, padding], [1, 1]


def convolution(x: Tensor, product: Product) -> Tensor:
    """Return the convolution of the prologue's result x; an adjoint by the op of autograd's backward."""
    geometry = _geometry(product.stride, product.padding)
    if product.epilogue.kind == "adjoint" or product.prologue.kind in ("gradient", "statistics"):
        arguments = (x, product.y, product.weight, None, *geometry, not product.transposed, [0, 0], 1)
        gradient: Tensor = aten.convolution_backward(*arguments, [True, False, False])[0]
        return gradient
    y: Tensor = aten.convolution(x, product.weight, None, *geometry, product.transposed, [0, 0], 1)
    return y


def product(it: Product) -> tuple[Tensor, ...]:
    """Return (y, *sums): mean and var for statistics, Σ g and Σ g·(x - center) for the adjoint's epilogue."""
    return apply_epilogue(convolution(apply_prologue(it.x, it.prologue, it.slope), it), it)


def apply_epilogue(raw: Tensor, it: Product) -> tuple[Tensor, ...]:
    """Apply the epilogue to the raw convolution; returns (y, *sums) as :func:`product` does."""
    epilogue = it.epilogue
    y = raw.to(accumulator_dtype(raw.dtype))
    if epilogue.kind == "statistics":
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        return raw, mean, var
    sums: tuple[Tensor, ...] = ()
    if epilogue.kind == "affine":
        if epilogue.scale is not None:
            y = y * _channels(epilogue.scale)
        if epilogue.shift is not None:
            y = y + _channels(epilogue.shift)
        y = activate(y, epilogue.act, it.slope)
    else:
        assert epilogue.input is not None
        x = epilogue.input.to(y.dtype)
        if epilogue.scale is None:
            y = activation_backward(y, activate(x, epilogue.act, it.slope), epilogue.act, it.slope)
        else:
            assert epilogue.center is not None
            assert epilogue.shift is not None
            centered = x - _channels(epilogue.center)
            activated = activate(
                centered * _channels(epilogue.scale) + _channels(epilogue.shift), epilogue.act, it.slope
            )
            g = activation_backward(y, activated, epilogue.act, it.slope)
            sums = g.sum((0, 2, 3)), (g * centered).sum((0, 2, 3))
            y = g * _channels(epilogue.scale)
    return y.to(raw.dtype), *sums


def convolution_weight(small: Tensor, large: Tensor, gradient: Gradient) -> Tensor:
    """Return the weight gradient after both prologues, by the op that autograd's backward runs."""
    weight = small.new_empty(gradient.shape)  # only its shape is used
    geometry = _geometry(gradient.stride, gradient.padding)
    arguments = (small, large, weight, None, *geometry, False, [0, 0], 1, [False, True, False])
    dweight: Tensor = aten.convolution_backward(*arguments)[1]
    return dweight


def gradient(it: Gradient) -> tuple[Tensor]:
    """Return (dweight,)."""
    small = apply_prologue(it.small, it.small_prologue, it.slope)
    large = apply_prologue(it.large, it.large_prologue, it.slope)
    return (convolution_weight(small, large, it),)


def compute(it: Product | Gradient) -> tuple[Tensor, ...]:
    """Evaluate :func:`product` or :func:`gradient`, whichever the launch is."""
    return product(it) if isinstance(it, Product) else gradient(it)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a launch description with every tensor cast to ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(item, dtype) for item in value))
    return value


def exact(it: Product | Gradient) -> tuple[Tensor, ...]:
    """Evaluate :func:`compute` in float64, on operands that the prologues round to their dtype as kernels do.

    A kernel's result therefore differs from it only by its accumulation error and its own rounding.
    """
    if isinstance(it, Product):
        x = apply_prologue(it.x, it.prologue, it.slope).double()
        bare = it.prologue._replace(center=None, scale=None, shift=None, other=None)
        wide = cast(it._replace(prologue=bare), torch.float64)
        return apply_epilogue(convolution(x, wide), wide)
    small = apply_prologue(it.small, it.small_prologue, it.slope).double()
    large = apply_prologue(it.large, it.large_prologue, it.slope).double()
    return (convolution_weight(small, large, it),)


def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest ‖got - expected‖/‖expected‖ over the tensors; infinite if any is not finite."""
    each = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)]
    return max(each) if all(map(math.isfinite, each)) else math.inf
