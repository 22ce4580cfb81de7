"""Execution of a call, and of its gradients, on the current stream.

Forward: one product and, for statistics, a kernel that merges its per-tile partials. Backward: the adjoint
product and a kernel that reduces its per-tile sums; the weight gradient and a kernel that reduces its split-K
partials. x̂ and du are computed by fused prologues as they are loaded, or materialized by a standalone
prologue kernel where that is faster.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..call import Backward, Call, Gradients, Outputs
from ..reference import accumulator_dtype, activation_backward, empty_gradient
from . import lowering, plans
from .kernel_selection import output


def _device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def bce(logits: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Return (loss, probability) as defined in :mod:`..loss`."""
    loss, probability = (torch.empty((), dtype=torch.float32, device=logits.device) for _ in range(2))
    with _device_guard(logits):
        plans.bce(logits, target, loss, probability)
    return loss, probability


def bce_backward(logits: Tensor, target: float, dloss: Tensor, dprobability: Tensor) -> Tensor:
    """Return dlogits."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with _device_guard(logits):
        plans.bce_backward(logits, target, dloss, dprobability, dlogits)
    return dlogits


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.stride(0) == 1 else vector.contiguous()


def forward(call: Call, transposed: bool) -> Outputs:
    """Return (y, mean, var) of a call that :func:`.kernel_selection.why_not` accepts."""
    call = call._replace(
        center=_contiguous(call.center),
        scale=_contiguous(call.scale),
        shift=_contiguous(call.shift),
        out_scale=_contiguous(call.out_scale),
        out_shift=_contiguous(call.out_shift),
    )
    channels = call.weight.shape[1 if transposed else 0] if call.stats else 0
    with _device_guard(call.x):
        y = output(call, transposed)
        mean, var = (
            torch.empty(channels, dtype=accumulator_dtype(y.dtype), device=y.device) for _ in range(2)
        )
        result = plans.product(lowering.forward(call, transposed, y))
        if result.partial is not None:
            rows = y.numel() // channels // result.group
            plans.statistics(result.partial, mean, var, rows, result.group, result.tile.block_m)
    return y, mean, var


def backward(call: Backward, transposed: bool) -> Gradients:
    """Return the gradients of a call that :func:`.kernel_selection.why_not` accepts."""
    call = call._replace(
        center=_contiguous(call.center),
        scale=_contiguous(call.scale),
        shift=_contiguous(call.shift),
        out_scale=_contiguous(call.out_scale),
        mean=_contiguous(call.mean),
        dmean=_contiguous(call.dmean),
        dvar=_contiguous(call.dvar),
    )
    need_x, need_weight, need_prologue, need_out_scale, need_out_shift = call.needs
    need_prologue = need_prologue and call.center is not None
    acc = accumulator_dtype(call.x.dtype)
    dx, dweight, dcenter, dscale, dshift, dout_scale, dout_shift = (
        torch.empty(0, dtype=dtype, device=call.x.device)
        for dtype in (call.x.dtype, call.weight.dtype, acc, acc, acc, acc, acc)
    )
    du: Tensor | None = None
    with _device_guard(call.x):
        if need_x or need_prologue:
            dx = empty_gradient(call.x)
            result = plans.product(lowering.adjoint(call, transposed, dx))
            if result.prologue.kind == "none" and call.out_scale is None:
                du = result.x  # dy itself, or materialized: the weight gradient reuses it
            if need_prologue:
                assert result.partial is not None
                assert call.scale is not None
                dcenter, dscale, dshift = (torch.empty_like(call.scale) for _ in range(3))
                plans.sums(result.partial, call.scale, dcenter, dscale, dshift)
            if not need_x:
                dx = call.x.new_empty(0)
        if need_weight or need_out_scale:
            # Without out_scale the range may exceed the dtype, and dout_scale may cancel: stay in float32.
            scaled = need_out_scale or call.out_scale is not None
            dweight = torch.empty_like(call.weight, dtype=acc if scaled else None)
            plans.split_k(plans.gradient(lowering.weight_gradient(call, transposed, du)), dweight)
            shape = [1, 1, 1, 1]
            shape[1 if transposed else 0] = -1
            if need_out_scale:
                # u is linear in the weight: Σ e·u = Σ w·wgrad(x̂, e), so u need not be recomputed.
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
