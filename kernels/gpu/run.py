"""A call, and the gradients of one, on the current stream.

Forward: one product, and for statistics a second kernel that merges its tiles. Backward: the adjoint product
with a kernel that adds its tiles' sums, and the weight gradient with one that adds its chunks. x̂ and du are
made inside these as they are loaded, or by a pass of their own before where that is faster.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..call import Backward, Call, Gradients, Outputs
from ..reference import accumulator_dtype, activation_backward, empty_gradient
from . import plans, products
from .select import output


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def bce(logits: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """(loss, probability) of :mod:`..loss`."""
    loss, probability = (torch.empty((), dtype=torch.float32, device=logits.device) for _ in range(2))
    with _on(logits):
        plans.bce(logits, target, loss, probability)
    return loss, probability


def bce_backward(logits: Tensor, target: float, dloss: Tensor, dprobability: Tensor) -> Tensor:
    """dlogits."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with _on(logits):
        plans.bce_backward(logits, target, dloss, dprobability, dlogits)
    return dlogits


def _dense(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.stride(0) == 1 else vector.contiguous()


def forward(call: Call, transposed: bool) -> Outputs:
    """(y, mean, var) of a call that :func:`..select.why_not` has let through."""
    call = call._replace(
        center=_dense(call.center),
        scale=_dense(call.scale),
        shift=_dense(call.shift),
        out_scale=_dense(call.out_scale),
        out_shift=_dense(call.out_shift),
    )
    channels = call.weight.shape[1 if transposed else 0] if call.stats else 0
    with _on(call.x):
        y = output(call, transposed)
        mean, var = (
            torch.empty(channels, dtype=accumulator_dtype(y.dtype), device=y.device) for _ in range(2)
        )
        done = plans.product(products.forward(call, transposed, y))
        if done.partial is not None:
            rows = y.numel() // channels // done.group
            plans.statistics(done.partial, mean, var, rows, done.group, done.tile.block_m)
    return y, mean, var


def backward(call: Backward, transposed: bool) -> Gradients:
    """Gradients of a call that :func:`..select.why_not` has let through."""
    call = call._replace(
        center=_dense(call.center),
        scale=_dense(call.scale),
        shift=_dense(call.shift),
        out_scale=_dense(call.out_scale),
        mean=_dense(call.mean),
        dmean=_dense(call.dmean),
        dvar=_dense(call.dvar),
    )
    need_x, need_weight, need_prologue, need_out_scale, need_out_shift = call.needs
    need_prologue = need_prologue and call.center is not None
    acc = accumulator_dtype(call.x.dtype)
    dx, dweight, dcenter, dscale, dshift, dout_scale, dout_shift = (
        torch.empty(0, dtype=dtype, device=call.x.device)
        for dtype in (call.x.dtype, call.weight.dtype, acc, acc, acc, acc, acc)
    )
    du: Tensor | None = None
    with _on(call.x):
        if need_x or need_prologue:
            dx = empty_gradient(call.x)
            done = plans.product(products.adjoint(call, transposed, dx))
            if done.prologue.kind == "none" and call.out_scale is None:
                du = done.x  # a pass of its own has written it, and the weight gradient takes it too
            if need_prologue:
                assert done.partial is not None
                assert call.scale is not None
                dcenter, dscale, dshift = (torch.empty_like(call.scale) for _ in range(3))
                plans.sums(done.partial, call.scale, dcenter, dscale, dshift)
            if not need_x:
                dx = call.x.new_empty(0)
        if need_weight or need_out_scale:
            # Before out_scale its range is another, and a sum over it may cancel: float32 until the end.
            scaled = need_out_scale or call.out_scale is not None
            dweight = torch.empty_like(call.weight, dtype=acc if scaled else None)
            plans.chunks(plans.gradient(products.weight_gradient(call, transposed, du)), dweight)
            shape = [1, 1, 1, 1]
            shape[1 if transposed else 0] = -1
            if need_out_scale:
                # u is linear in the weight: Σ e·u = Σ w·wgrad(x̂, e), and u need not be had again.
                others = (0, 2, 3) if transposed else (1, 2, 3)
                dout_scale = (call.weight.to(acc) * dweight).sum(others)
            if call.out_scale is not None:
                dweight *= call.out_scale.view(shape)
            dweight = dweight.to(call.weight.dtype) if need_weight else call.weight.new_empty(0)
        if need_out_shift:
            e = call.dy.to(acc)
            if call.y is not None:
                e = activation_backward(e, call.y.to(acc), call.out_act, call.slope)
            dout_shift = e.sum((0, 2, 3))
    return dx, dweight, dcenter, dscale, dshift, dout_scale, dout_shift
