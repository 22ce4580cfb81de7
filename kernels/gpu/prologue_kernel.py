"""Standalone prologue kernel: out[n, h, w, c] = prologue(x)[n, h, w, c].

A fused prologue is recomputed by every tile that loads the element: taps ÷ stride² times per column tile.
Where that costs more than a sweep over the tensor (see :mod:`.cost_model`), this kernel materializes the
result, and the product then loads it by asynchronous copies alone.

A program computes BLOCK_M pixels × BLOCK_N channels. It reads x and other at any strides and writes out at
any strides, each element once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import memory_format
from .device_functions import prologue, rows
from .launch import Launch, Prologue, operand, operand_constants, wide
from .tiles import Tile, next_power_of_two


@triton.jit
def _prologue_kernel(
    x_ptr,
    x_other_ptr,
    x_center_ptr,
    x_scale_ptr,
    x_shift_ptr,
    out_ptr,
    M,
    slope,
    per_count,
    SIZE: tl.constexpr,  # C, H, W
    X_STRIDE: tl.constexpr,  # N, C, H, W
    X_OTHER_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    X_PROLOGUE: tl.constexpr,
    X_ACT: tl.constexpr,
    X_SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    COLUMN_TILES: tl.constexpr = (SIZE[0] + BLOCK_N - 1) // BLOCK_N
    inside, n, h, w = rows(pid // COLUMN_TILES, M, SIZE[1], SIZE[2], BLOCK_M, WIDE)
    c = ((pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = inside[:, None] & (c < SIZE[0])
    at = n * X_STRIDE[0] + h * X_STRIDE[2] + w * X_STRIDE[3]
    x = tl.load(x_ptr + at[:, None] + c * X_STRIDE[1], mask=mask, other=0.0)
    other = x
    if X_PROLOGUE == "gradient" or X_PROLOGUE == "statistics":
        at = n * X_OTHER_STRIDE[0] + h * X_OTHER_STRIDE[2] + w * X_OTHER_STRIDE[3]
        other = tl.load(x_other_ptr + at[:, None] + c * X_OTHER_STRIDE[1], mask=mask, other=0.0)
    x = prologue(
        x, other, mask, c, x_center_ptr, x_scale_ptr, x_shift_ptr, slope, per_count,
        SIZE[0], X_PROLOGUE, X_ACT, X_SCALED,
    )  # fmt: skip
    at = n * OUT_STRIDE[0] + h * OUT_STRIDE[2] + w * OUT_STRIDE[3]
    tl.store(out_ptr + at[:, None] + c * OUT_STRIDE[1], x, mask=mask)


def output(x: Tensor) -> Tensor:
    """Allocate the output for x, in NHWC whatever x's layout: products load it fastest."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(True))


def launch(x: Tensor, prologue_of_x: Prologue, slope: float, out: Tensor) -> Launch:
    """Return the launch of out = prologue(x)."""
    n, c, h, w = x.shape
    block_n = min(64, next_power_of_two(c))
    tile = Tile(4096 // block_n if c > 1 else 1024, block_n, 1, 4, 1)
    arguments = operand("x", x, prologue_of_x, absent=out)
    arguments |= {"out_ptr": out, "M": n * h * w, "slope": float(slope), "per_count": 1.0 / (n * h * w)}
    constants = operand_constants("x", x, prologue_of_x)
    constants |= {"SIZE": (c, h, w), "OUT_STRIDE": out.stride()}
    constants |= {"WIDE": wide(x, out, prologue_of_x.other, count=n * h * w + tile.block_m)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": block_n}
    programs = -(-n * h * w // tile.block_m) * -(-c // block_n)
    return Launch(_prologue_kernel, programs, arguments, constants, tile)
