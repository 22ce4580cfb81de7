"""What a call, or the gradients of one, are in terms of the kernels' products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Backward, Call
from .launch import Epilogue, Product, Prologue
from .wgrad import Gradient


def _of_x(call: Call | Backward) -> Prologue:
    """x̂ from x."""
    if call.center is not None:
        return Prologue("affine", call.in_act, call.center, call.scale, call.shift)
    return Prologue("act", call.in_act) if call.in_act != "none" else Prologue()


def forward(call: Call, transposed: bool, y: Tensor) -> Product:
    """The call itself."""
    if call.stats:
        epilogue = Epilogue("statistics")
    else:
        epilogue = Epilogue("affine", call.out_act, None, call.out_scale, call.out_shift)
    return Product(
        call.x, call.weight, transposed, y, _of_x(call), epilogue, call.slope, call.stride, call.padding
    )


def _gradient(call: Backward, scale: Tensor | None) -> Prologue:
    """du from dy: through the statistics, or through the epilogue's activation and ``scale``."""
    if call.stats:
        if call.dmean is None and call.dvar is None:
            return Prologue()
        assert call.mean is not None
        dmean = torch.zeros_like(call.mean) if call.dmean is None else call.dmean
        dvar = torch.zeros_like(call.mean) if call.dvar is None else call.dvar
        return Prologue("statistics", "none", call.mean, dvar, dmean, call.y)
    if call.out_act == "none" and scale is None:
        return Prologue()
    # Without an activation y was not kept, and is not looked at: dy stands in.
    return Prologue("gradient", call.out_act, None, scale, None, call.dy if call.y is None else call.y)


def adjoint(call: Backward, transposed: bool, dx: Tensor) -> Product:
    """dx, and partial sums for the prologue's vectors, from dy: the convolution of the other kind."""
    if call.center is not None:
        epilogue = Epilogue("adjoint", call.in_act, call.center, call.scale, call.shift, call.x)
    elif call.in_act != "none":
        epilogue = Epilogue("adjoint", call.in_act, input=call.x)
    else:
        epilogue = Epilogue()
    prologue = _gradient(call, call.out_scale)
    return Product(
        call.dy, call.weight, not transposed, dx, prologue, epilogue, call.slope, call.stride, call.padding
    )


def weight_gradient(call: Backward, transposed: bool, du: Tensor | None = None) -> Gradient:
    """dweight before ``out_scale``, which multiplies it by output channel; from ``du`` if that is there."""
    of_y = (call.dy, _gradient(call, None)) if du is None else (du, Prologue())
    of_x = (call.x, _of_x(call))
    first, second = (of_x, of_y) if transposed else (of_y, of_x)
    c_small, c_large, k_h, k_w = call.weight.shape
    return Gradient(
        first[0],
        second[0],
        first[1],
        second[1],
        (c_small, c_large, k_h, k_w),
        call.slope,
        call.stride,
        call.padding,
    )
