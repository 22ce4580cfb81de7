"""Running a call: its launch is planned once, and then only takes pointers.

Choosing a kernel and a tile, and Triton's own binding of some thirty arguments, take several times as long as
the launch. All of it follows from shapes, strides, dtypes and the alignment of pointers; so what the first
call finds out, the compiled kernel included, is kept under those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import weights
from ..call import Call, Outputs
from ..reference import accumulator_dtype
from .launch import Launch, precision
from .select import kernel_for, output
from .tiles import Tile, choose

POINTERS = ("x_ptr", "w_ptr", "y_ptr", "scale_ptr", "shift_ptr")
LIMIT = 4096  # plans kept; a plan is a few kilobytes


class Plan(NamedTuple):
    """A launch that wants only its pointers."""

    run: Callable[..., None]
    arguments: list[Any]
    positions: tuple[int, ...]  # of POINTERS among the arguments


_plans: dict[Hashable, Plan] = {}


def _key(call: Call, packed: Tensor, transposed: bool) -> Hashable:
    x, scale, shift = call.x, call.out_scale, call.out_shift
    # y comes aligned from the allocator. The rest may be slices: the packed weight too, where no packing was
    # needed and it is the weight itself.
    pointers = x.data_ptr() | packed.data_ptr()
    if scale is not None:
        pointers |= scale.data_ptr()
    if shift is not None:
        pointers |= shift.data_ptr()
    return (
        *(transposed, x.shape, x.stride(), x.dtype, x.device, call.weight.shape, precision(x.dtype)),
        *(scale is None, shift is None, pointers % 16 == 0),
        *call[8:],  # out_act … channels_last
    )


def run(call: Call, transposed: bool) -> Outputs:
    """(y, mean, var) of a call that :func:`..select.why_not` has let through."""
    scale, shift = call.out_scale, call.out_shift
    if (scale is not None and scale.stride(0) != 1) or (shift is not None and shift.stride(0) != 1):
        call = call._replace(
            out_scale=None if scale is None else scale.contiguous(),
            out_shift=None if shift is None else shift.contiguous(),
        )
    with _on(call.x):
        y = _run(call, transposed)
    empty = torch.empty(0, dtype=accumulator_dtype(call.x.dtype), device=call.x.device)
    return y, empty, torch.empty_like(empty)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _run(call: Call, transposed: bool) -> Tensor:
    kernel = kernel_for(call, transposed)
    assert kernel is not None
    y = output(call, transposed)
    packed = weights.transformed(call.weight, kernel.name, kernel.pack)
    key = _key(call, packed, transposed)
    plan = _plans.get(key)
    if plan is not None:
        arguments = plan.arguments.copy()
        tensors = (call.x, packed, y, call.out_scale, call.out_shift)
        for position, tensor in zip(plan.positions, tensors, strict=True):
            arguments[position] = y if tensor is None else tensor
        plan.run(*arguments)
        return y

    def with_tile(tile: Tile) -> None:
        kernel.launch(call, packed, y, tile)()

    tile = choose(kernel.problem(call, y), call.x.device, with_tile)
    launch = kernel.launch(call, packed, y, tile)
    compiled = launch()
    if compiled is not None:  # Triton's interpreter compiles nothing
        if len(_plans) >= LIMIT:
            _plans.clear()
        _plans[key] = _plan(launch, compiled)
    return y


def _plan(launch: Launch, compiled: Any) -> Plan:
    names = launch.kernel.arg_names
    values = launch.arguments | launch.constants
    arguments = [None if name in POINTERS else values[name] for name in names]
    return Plan(
        compiled[(launch.programs, 1, 1)], arguments, tuple(names.index(pointer) for pointer in POINTERS)
    )
