"""Lowering of a call, and of its gradients, to the kernels' products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Backward, Call
from .launch import Epilogue, Product, Prologue
from .wgrad import Gradient


def _input_prologue(call: Call | Backward) -> Prologue:
    """Return the prologue that computes x̂ from x."""
    if call.center is not None:
        return Prologue("affine", call.in_act, call.center, call.scale, call.shift)
    return Prologue("act", call.in_act) if call.in_act != "none" else Prologue()


def forward(call: Call, transposed: bool, y: Tensor) -> Product:
    """Lower the forward call, with output y."""
    if call.stats:
        epilogue = Epilogue("statistics")
    else:
        epilogue = Epilogue("affine", call.out_act, None, call.out_scale, call.out_shift)
    return Product(
        call.x,
        call.weight,
        transposed,
        y,
        _input_prologue(call),
        epilogue,
        call.slope,
        call.stride,
        call.padding,
    )


def _output_gradient_prologue(call: Backward, scale: Tensor | None) -> Prologue:
    """Return the prologue that computes du from dy: through statistics, or the activation and ``scale``."""
    if call.stats:
        if call.dmean is None and call.dvar is None:
            return Prologue()
        assert call.mean is not None
        dmean = torch.zeros_like(call.mean) if call.dmean is None else call.dmean
        dvar = torch.zeros_like(call.mean) if call.dvar is None else call.dvar
        return Prologue("statistics", "none", call.mean, dvar, dmean, call.y)
    if call.out_act == "none" and scale is None:
        return Prologue()
    # Without an activation y was not saved and its value is not used: pass dy in its place.
    return Prologue("gradient", call.out_act, None, scale, None, call.dy if call.y is None else call.y)


def adjoint(call: Backward, transposed: bool, dx: Tensor) -> Product:
    """Lower dx and the partial sums of dcenter, dscale and dshift to the adjoint convolution of dy."""
    if call.center is not None:
        epilogue = Epilogue("adjoint", call.in_act, call.center, call.scale, call.shift, call.x)
    elif call.in_act != "none":
        epilogue = Epilogue("adjoint", call.in_act, input=call.x)
    else:
        epilogue = Epilogue()
    prologue = _output_gradient_prologue(call, call.out_scale)
    return Product(
        call.dy, call.weight, not transposed, dx, prologue, epilogue, call.slope, call.stride, call.padding
    )


def weight_gradient(call: Backward, transposed: bool, du: Tensor | None = None) -> Gradient:
    """Lower dweight, without its factor ``out_scale``; from the materialized ``du`` where there is one."""
    output_operand = (call.dy, _output_gradient_prologue(call, None)) if du is None else (du, Prologue())
    input_operand = (call.x, _input_prologue(call))
    first, second = (input_operand, output_operand) if transposed else (output_operand, input_operand)
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
