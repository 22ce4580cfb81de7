"""Execution of a call, and of its gradients, on the current stream.

Forward: one product and, for statistics, a kernel that merges its per-tile partials. Backward: the adjoint
product and a kernel that reduces its per-tile sums; the weight gradient and a kernel that reduces its split-K
partials. x̂ and du are computed by fused prologues as they are loaded, or materialized by a standalone
prologue kernel where that is faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import Backward, Call, ConvSpec, Gradients, Operand, Outputs, input_operand
from . import bce as losses
from . import reduce
from .launcher import Pointers, Product, precision, run


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which launches go to x's device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def bce(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (loss, probability) as defined in :mod:`..loss`."""
    loss, probability = (logits.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
    with device_guard(logits):
        losses.forward(logits, targets, loss, probability)
    return loss, probability


def bce_backward(
    logits: Tensor, targets: Sequence[float], dloss: Tensor | None, dprobability: Tensor | None
) -> Tensor:
    """Return dlogits."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with device_guard(logits):
        losses.backward(logits, targets, dloss, dprobability, dlogits)
    return dlogits


# --- from a call to products --------------------------------------------------------------------------------


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.stride(0) == 1 else vector.contiguous()


def _input_pointers(call: Call | Backward) -> Pointers:
    """Return x and the vectors of its prologue, :func:`..spec.input_operand`."""
    if call.center is None:
        return Pointers(call.x)
    return Pointers(call.x, None, _contiguous(call.center), _contiguous(call.scale), _contiguous(call.shift))


def fprop(spec: ConvSpec, call: Call, y: Tensor) -> Product:
    """Return the product of a forward call with output y."""
    if spec.dtype == torch.float32:
        spec = spec._replace(precision=precision(spec.dtype))
    scale, shift = _contiguous(call.out_scale), _contiguous(call.out_shift)
    return Product(spec, _input_pointers(call), call.weight, Pointers(y, None, None, scale, shift))


def _output_gradient(call: Backward, scale: Tensor | None) -> tuple[Operand, Pointers]:
    """Return dy with the prologue that makes it du: through statistics, or the activation and ``scale``."""
    _, c, h, w = call.dy.shape
    shape, strides = (c, h, w), call.dy.stride()
    if call.stats:
        if call.dmean is None and call.dvar is None:
            return Operand(shape, strides), Pointers(call.dy)
        assert call.mean is not None
        assert call.y is not None
        dmean = torch.zeros_like(call.mean) if call.dmean is None else _contiguous(call.dmean)
        dvar = torch.zeros_like(call.mean) if call.dvar is None else _contiguous(call.dvar)
        du = Operand(shape, strides, "statistics", "none", True, True, call.y.stride())
        return du, Pointers(call.dy, call.y, _contiguous(call.mean), dvar, dmean)
    if call.out_act == "none" and scale is None:
        return Operand(shape, strides), Pointers(call.dy)
    # Without an activation y was not saved and its value is not used: pass dy in its place.
    other = call.dy if call.y is None else call.y
    du = Operand(shape, strides, "gradient", call.out_act, scale is not None, False, other.stride())
    return du, Pointers(call.dy, other, None, scale)


def dgrad(call: Backward, transposed: bool, dx: Tensor) -> Product:
    """Return the product of dx, and of the partial sums of dcenter, dscale and dshift."""
    _, c, h, w = dx.shape
    size, strides = (c, h, w), dx.stride()
    x = _input_pointers(call)
    if call.center is not None:
        y = Operand(size, strides, "adjoint", call.in_act, True, True, call.x.stride())
    elif call.in_act != "none":
        y = Operand(size, strides, "adjoint", call.in_act, other_stride=call.x.stride())
    else:
        y, x = Operand(size, strides, "affine"), Pointers(None)
    du, du_pointers = _output_gradient(call, _contiguous(call.out_scale))
    spec = _spec("dgrad", not transposed, call, du, y)
    return Product(spec, du_pointers, call.weight, Pointers(dx, x.ptr, *x[2:]))


def wgrad(call: Backward, transposed: bool, du: Tensor | None = None) -> Product:
    """Return the product of dweight, without its factor ``out_scale``; from a materialized du, if given."""
    if du is None:
        y, y_pointers = _output_gradient(call, None)
    else:
        _, c, h, w = du.shape
        y, y_pointers = Operand((c, h, w), du.stride()), Pointers(du)
    spec = _spec("wgrad", transposed, call, input_operand(call), y)
    return Product(spec, _input_pointers(call), None, y_pointers)


def _spec(kind: str, transposed: bool, call: Backward, x: Operand, y: Operand) -> ConvSpec:
    first, second, k_h, k_w = call.weight.shape
    return ConvSpec(
        kind, transposed, call.x.shape[0], (first, second, k_h, k_w), call.stride, call.padding, x, y,
        call.slope, call.x.dtype, call.x.device, precision(call.x.dtype),
    )  # fmt: skip


# --- running a call -----------------------------------------------------------------------------------------


def forward(spec: ConvSpec, call: Call) -> Outputs:
    """Return (y, mean, var) of a call that :func:`.launcher.why_not` accepts."""
    channels = spec.y.size[0] if call.stats else 0
    with device_guard(call.x):
        y = torch.empty_strided(spec.shape, spec.y.stride, dtype=spec.dtype, device=spec.device)
        mean, var = (torch.empty(channels, dtype=torch.float32, device=spec.device) for _ in range(2))
        result = run(fprop(spec, call, y))
        if result.partial is not None:
            reduce.statistics(result.partial, mean, var)
    return y, mean, var


def backward(call: Backward, transposed: bool) -> Gradients:
    """Return the gradients of a call that :func:`.launcher.why_not` accepts."""
    need_x, need_weight, need_prologue, need_out_scale, need_out_shift = call.needs
    need_prologue = need_prologue and call.center is not None
    acc = reference.accumulator_dtype(call.x.dtype)
    dx = dweight = dcenter = dscale = dshift = dout_scale = dout_shift = du = None
    with device_guard(call.x):
        if need_x or need_prologue:
            dx = reference.empty_gradient(call.x)
            result = run(dgrad(call, transposed, dx))
            if result.product.spec.x.function == "none" and call.out_scale is None:
                du = result.product.x.ptr  # dy itself, or materialized: the weight gradient reuses it
            if need_prologue:
                assert result.partial is not None
                scale = _contiguous(call.scale)
                assert scale is not None
                dcenter, dscale, dshift = (torch.empty_like(scale) for _ in range(3))
                reduce.sums(result.partial, scale, dcenter, dscale, dshift)
        if need_weight or need_out_scale:
            # Without out_scale the range may exceed the dtype, and dout_scale may cancel: stay in float32.
            scaled = need_out_scale or call.out_scale is not None
            dweight = torch.empty_like(call.weight, dtype=acc if scaled else None)
            partial = run(wgrad(call, transposed, du)).partial
            assert partial is not None
            reduce.split_k(partial, dweight)
            if need_out_scale:
                # u is linear in the weight: Σ e·u = Σ w·wgrad(x̂, e), so u need not be recomputed.
                others = (0, 2, 3) if transposed else (1, 2, 3)
                dout_scale = (call.weight.to(acc) * dweight).sum(others)
            if call.out_scale is not None:
                dweight *= call.out_scale.view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
            if scaled:
                dweight = dweight.to(call.weight.dtype)
        if need_out_shift:
            e = call.dy.to(acc)
            if call.y is not None:
                e = reference.activation_backward(e, call.y.to(acc), call.out_act, call.slope)
            dout_shift = e.sum((0, 2, 3))

    def given(gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype, device=call.x.device) if gradient is None else gradient

    return (
        given(dx if need_x else None, call.x.dtype),
        given(dweight if need_weight else None, call.weight.dtype),
        *(given(dcenter, acc), given(dscale, acc), given(dshift, acc)),
        *(given(dout_scale, acc), given(dout_shift, acc)),
    )
