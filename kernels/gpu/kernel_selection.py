"""Selection of the kernel for a product, and the reason where no kernel covers it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..call import Backward, Call, output_shape
from ..reference import memory_format
from . import dense, dense_narrow, down, down_narrow, packing, up, up_narrow
from .launch import Launch, Product
from .tiles import Problem, Tile

MIN_CAPABILITY = (8, 0)  # for bfloat16, TF32 and asynchronous copies


class Kernel(NamedTuple):
    """The functions of one kernel file."""

    name: str
    pack: Callable[[Tensor], Tensor]
    problem: Callable[[Product], Problem]
    launch: Callable[[Product, Tensor, Tensor | None, Tile], Launch]
    partial_rows_per_row_tile: Callable[[Product], int] = lambda product: 1
    """Rows of the epilogue's partial sums per row tile."""


UP = Kernel("up", up.pack, up.problem, up.launch, lambda product: 4)
UP_NARROW = Kernel("up_narrow", up_narrow.pack, up_narrow.problem, up_narrow.launch)
DOWN = Kernel("down", down.pack, down.problem, down.launch)
DOWN_NARROW = Kernel("down_narrow", down_narrow.pack, down_narrow.problem, down_narrow.launch)
DENSE_UP = Kernel("dense_up", packing.dense_up, dense.problem, dense.launch, dense.pixels)
DENSE_DOWN = Kernel("dense_down", packing.dense_down, dense.problem, dense.launch, dense.pixels)
DENSE_NARROW = Kernel("dense_narrow", dense_narrow.pack, dense_narrow.problem, dense_narrow.launch)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not(call: Call | Backward, transposed: bool) -> str | None:
    """Return why no kernel covers the call or its gradients, or None if one does."""
    reason = why_not_here(call.x.device, call.x.dtype)
    kernels = _geometry(transposed, call.x.shape, call.weight.shape, call.stride, call.padding)
    if reason is None and kernels is None:
        return "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    return reason


def why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels do not run on the device or with the dtype, or None if they do."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        if _capability(index) < MIN_CAPABILITY:
            return f"the GPU's compute capability is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    elif not triton.knobs.runtime.interpret:
        return f"x is on the {device.type}, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels do not support {str(dtype).removeprefix('torch.')}"
    return None


def _geometry(
    transposed: bool, x: torch.Size, weight: torch.Size, stride: int, padding: int
) -> tuple[Kernel, Kernel] | None:
    """Return (kernel with an affine epilogue, kernel with partial sums in its epilogue), or None."""
    if transposed and (*x[2:], padding) == (1, 1, 0):
        return DENSE_UP, DENSE_UP
    if not transposed and x[2:] == weight[2:] and padding == 0:
        return DENSE_NARROW if weight[0] <= packing.NARROW else DENSE_DOWN, DENSE_DOWN
    if weight[2:] != (4, 4) or (stride, padding) != (2, 1):
        return None
    if transposed:
        return UP_NARROW if weight[1] <= packing.NARROW else UP, UP
    down_kernel = DOWN_NARROW if x[1] <= packing.NARROW else DOWN
    return down_kernel, down_kernel


def kernel_for(product: Product) -> Kernel:
    """Return the kernel for a product that :func:`why_not` accepts."""
    kernels = _geometry(
        product.transposed, product.x.shape, product.weight.shape, product.stride, product.padding
    )
    assert kernels is not None
    return kernels[product.epilogue.kind != "affine"]


def output(call: Call, transposed: bool) -> Tensor:
    """Allocate the output y of a call."""
    return torch.empty(
        output_shape(call, transposed),
        dtype=call.x.dtype,
        device=call.x.device,
        memory_format=memory_format(call.channels_last),
    )
