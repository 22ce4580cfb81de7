"""Which kernel serves a call, and why one does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..call import Call, output_shape
from ..reference import memory_format
from . import dense, dense_narrow, down, down_narrow, packing, up, up_narrow
from .launch import Launch
from .tiles import Problem, Tile

MINIMUM_CAPABILITY = (8, 0)  # bfloat16, TF32 and asynchronous copies


class Kernel(NamedTuple):
    """A kernel file's parts."""

    name: str
    pack: Callable[[Tensor], Tensor]
    problem: Callable[[Call, Tensor], Problem]
    launch: Callable[[Call, Tensor, Tensor, Tile], Launch]


UP = Kernel("up", up.pack, up.problem, up.launch)
UP_NARROW = Kernel("up_narrow", up_narrow.pack, up_narrow.problem, up_narrow.launch)
DOWN = Kernel("down", down.pack, down.problem, down.launch)
DOWN_NARROW = Kernel("down_narrow", down_narrow.pack, down_narrow.problem, down_narrow.launch)
DENSE_UP = Kernel("dense_up", packing.dense_up, dense.problem, dense.launch)
DENSE_DOWN = Kernel("dense_down", packing.dense_down, dense.problem, dense.launch)
DENSE_NARROW = Kernel("dense_narrow", dense_narrow.pack, dense_narrow.problem, dense_narrow.launch)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not(call: Call, transposed: bool) -> str | None:
    """Why no kernel here covers the call, or None if one does."""
    x = call.x
    if x.is_cuda:
        index = torch.cuda.current_device() if x.device.index is None else x.device.index
        if _capability(index) < MINIMUM_CAPABILITY:
            return f"the GPU's compute capability is below {MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]}"
    elif not triton.knobs.runtime.interpret:
        return f"x is on the {x.device.type}, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels have no {str(x.dtype).removeprefix('torch.')}"
    if call.stats:
        return "the inference kernels gather no statistics"
    if call.scale is not None or call.in_act != "none":
        return "the inference kernels have no prologue"
    if kernel_for(call, transposed) is None:
        return "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    return None


def kernel_for(call: Call, transposed: bool) -> Kernel | None:
    """The kernel for a call's geometry."""
    x, weight = call.x, call.weight
    h, w = x.shape[2:]
    if transposed and (h, w, call.padding) == (1, 1, 0):
        return DENSE_UP
    if not transposed and (h, w) == weight.shape[2:] and call.padding == 0:
        return DENSE_NARROW if weight.shape[0] <= packing.NARROW else DENSE_DOWN
    if weight.shape[2:] != (4, 4) or (call.stride, call.padding) != (2, 1):
        return None
    if transposed:
        return UP_NARROW if weight.shape[1] <= packing.NARROW else UP
    return DOWN_NARROW if x.shape[1] <= packing.NARROW else DOWN


def output(call: Call, transposed: bool) -> Tensor:
    """An empty y for a call that :func:`kernel_for` covers."""
    return torch.empty(
        output_shape(call, transposed),
        dtype=call.x.dtype,
        device=call.x.device,
        memory_format=memory_format(call.channels_last),
    )
