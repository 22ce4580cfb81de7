"""Training: fprop with prologue and statistics, dgrad, wgrad and channel sums, in float32.

csrc/dcgan.h defines what each computes. Its activations are contiguous NHWC; others are copied here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import Backward, Call, ConvSpec, Gradients, Outputs
from . import adaptive_threads, algorithm_selection, buffers, library
from .algorithm_selection import DGRAD, FPROP, WGRAD, Geometry
from .inference import geometry_of


def fprop(spec: ConvSpec, call: Call, algorithm: str | None = None) -> Outputs:
    """Return (y, mean, var) of a covered call (:func:`.inference.why_not`); ``algorithm`` forces one."""
    x, weight = nhwc(call.x), call.weight.detach().resolve_neg()
    g = geometry_of(spec)
    threads = torch.get_num_threads()
    chosen = algorithm or algorithm_selection.training(
        g, FPROP, fused(spec), x.shape[0], threads, library.isa()
    )
    op, held = _op(call, g, chosen)
    op.statistics = call.stats
    op.out_act = library.ACTIVATIONS.index(call.out_act)
    op.out_scale, op.out_shift = address(call.out_scale, held), address(call.out_shift, held)
    same_layout = g.c_out == 1 or g.output == (1, 1)
    y = buffers.empty_map((x.shape[0], g.c_out, *g.output), call.channels_last or not same_layout)
    size = g.c_out if call.stats else 0
    mean, var = x.new_empty(size), x.new_empty(size)
    strides = library.Strides(*weight.stride())
    _run(
        *(library.library().dcgan_fprop, (FPROP, g, chosen, fused(spec), x.shape[0]), threads),
        *(ctypes.addressof(op), x.shape[0], x.data_ptr(), weight.data_ptr(), ctypes.addressof(strides)),
        *(y.data_ptr(), mean.data_ptr(), var.data_ptr()),
    )
    return (y if call.channels_last else y.contiguous()), mean, var


def backward(spec: ConvSpec, call: Backward, dgrad: str | None = None, wgrad: str | None = None) -> Gradients:
    """Return the gradients of a covered call; ``dgrad``, ``wgrad`` force algorithms."""
    need_x, need_weight, need_prologue, need_out_scale, need_out_shift = call.needs
    need_prologue = need_prologue and call.center is not None
    empty = call.x.new_empty(0)
    dx, dweight, dcenter, dscale, dshift, dout_scale, dout_shift = (empty.clone() for _ in range(7))
    x, dy = nhwc(call.x), nhwc(call.dy)
    y = None if call.y is None else nhwc(call.y)
    weight = call.weight.detach().resolve_neg()
    g = geometry_of(spec)
    images, threads = x.shape[0], torch.get_num_threads()
    how = (fused(spec), images, threads, library.isa())
    op, held = _op(call, g, dgrad or algorithm_selection.training(g, DGRAD, *how))
    op.statistics = call.stats
    op.out_act = library.ACTIVATIONS.index(call.out_act)
    op.out_scale = address(call.out_scale, held)
    op.mean, op.dmean, op.dvariance = (address(v, held) for v in (call.mean, call.dmean, call.dvar))
    pointer = ctypes.addressof(op)
    if need_x or need_prologue:
        channels_last = reference.gradient_is_channels_last(call.x)
        same_layout = g.c_in == 1 or x.shape[2:] == (1, 1)
        dx = buffers.empty_map(x.shape, channels_last or not same_layout)
        if need_prologue:
            dcenter, dscale, dshift = (x.new_empty(g.c_in) for _ in range(3))
        strides = library.Strides(*weight.stride())
        _run(
            *(library.library().dcgan_dgrad, (DGRAD, g, op.algorithm, *how), threads),
            *(pointer, images, dy.data_ptr(), _pointer(y), weight.data_ptr(), ctypes.addressof(strides)),
            *(x.data_ptr(), dx.data_ptr()),
            *(v.data_ptr() if need_prologue else None for v in (dcenter, dscale, dshift)),
        )
        if not need_x:
            dx = empty
        elif not channels_last:
            dx = dx.contiguous()
    if need_weight or need_out_scale:  # dout_scale is computed from dweight
        op.algorithm = library.ALGORITHMS.index(wgrad or algorithm_selection.training(g, WGRAD, *how))
        dweight = buffers.empty_like(call.weight)
        if need_out_scale:
            dout_scale = x.new_empty(g.c_out)
        strides, weight_strides = library.Strides(*dweight.stride()), library.Strides(*weight.stride())
        _run(
            *(library.library().dcgan_wgrad, (WGRAD, g, op.algorithm, *how), threads),
            *(pointer, images, x.data_ptr(), dy.data_ptr(), _pointer(y), dweight.data_ptr()),
            *(ctypes.addressof(strides), weight.data_ptr(), ctypes.addressof(weight_strides)),
            dout_scale.data_ptr() if need_out_scale else None,
        )
        if not need_weight:
            dweight = empty
    if need_out_shift:
        dout_shift = x.new_empty(g.c_out)
        _run(
            *(library.library().dcgan_shift_gradient, ("shift", g, images), threads),
            *(pointer, images, dy.data_ptr(), _pointer(y), dout_shift.data_ptr()),
        )
    return dx, dweight, dcenter, dscale, dshift, dout_scale, dout_shift


def fused(spec: ConvSpec) -> tuple[bool, bool]:
    """Return (has a prologue, has statistics), which decide where the narrow algorithm applies."""
    return spec.x.function != "none", spec.y.function == "statistics"


def address(vector: Tensor | None, held: list[Tensor]) -> int | None:
    """Return the address of a contiguous float32 tensor with these values, and append it to ``held``."""
    if vector is None:
        return None
    ready = vector.detach().to(torch.float32).contiguous().resolve_neg()
    held.append(ready)
    return ready.data_ptr()


def nhwc(t: Tensor) -> Tensor:
    """Return the tensor, contiguous as [N, H, W, C]."""
    t = t.detach().resolve_neg()
    return t.contiguous(memory_format=torch.channels_last)


def _run(function: Callable[..., int], kind: Hashable, threads: int, *arguments: Any) -> None:
    """Run a function of the library with the adaptive thread count of its kind of call."""
    adaptive_threads.for_kind(kind, threads).run(function, *arguments, threads)


def _op(call: Call | Backward, g: Geometry, algorithm: str) -> tuple[library.Op, list[Tensor]]:
    """Build the op with its prologue, and the list of tensors that it points to."""
    held: list[Tensor] = []
    op = library.Op(g.transposed, library.ALGORITHMS.index(algorithm), *g[1:])
    op.in_act = library.ACTIVATIONS.index(call.in_act)
    op.slope = call.slope
    op.center, op.scale, op.shift = (address(v, held) for v in (call.center, call.scale, call.shift))
    return op, held


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
