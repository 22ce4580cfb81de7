"""down from an image of at most 4 channels: one reduction step is the 16 taps of one channel.

With the channel as the contiguous index, as in :mod:`.down`, a one-channel image would fill 1 of 16 columns
of every product. Here K = C_in·16 and a step takes all taps of a channel, so nothing is wasted, the weight's
own layout [C_out, C_in·16] is the packed one, and an NCHW image is read as well as an NHWC one: one plane a
step.

A program makes a [BLOCK_M, BLOCK_N] tile; reads, writes and accumulates as :mod:`.down`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from . import packing
from .device import epilogue, rows
from .launch import Launch, common, precision
from .tiles import Problem, Tile, programs


@triton.jit
def _down_narrow_kernel(
    x_ptr,
    w_ptr,  # [C_OUT, C_IN, 16]
    y_ptr,
    scale_ptr,
    shift_ptr,
    M,
    slope,
    H: tl.constexpr,  # of x
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    STRIDE_XN: tl.constexpr,
    STRIDE_XC: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_XW: tl.constexpr,
    STRIDE_YN: tl.constexpr,
    STRIDE_YC: tl.constexpr,
    STRIDE_YH: tl.constexpr,
    STRIDE_YW: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    COLUMN_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    inside, n, p, q = rows(pid // COLUMN_TILES, M, H // 2, W // 2, BLOCK_M, WIDE)
    co = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tl.arange(0, BLOCK_K)  # BLOCK_K = 16
    h = 2 * p[:, None] + (tap // 4 - 1)[None, :]
    w = 2 * q[:, None] + (tap % 4 - 1)[None, :]
    seen = inside[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x_at = x_ptr + n[:, None] * STRIDE_XN + h * STRIDE_XH + w * STRIDE_XW
    w_at = w_ptr + co[None, :] * (16 * C_IN) + tap[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for c in tl.static_range(C_IN):
        patch = tl.load(x_at + c * STRIDE_XC, mask=seen, other=0.0)  # [BLOCK_M, 16]
        taps = tl.load(w_at + c * 16, mask=(co < C_OUT)[None, :], other=0.0)  # [16, BLOCK_N]
        acc = tl.dot(patch, taps, acc, input_precision=PRECISION)

    y = epilogue(acc, co, scale_ptr, shift_ptr, slope, C_OUT, HAS_SCALE, HAS_SHIFT, ACT)
    y_rows = y_ptr + n * STRIDE_YN + p * STRIDE_YH + q * STRIDE_YW
    y_at = y_rows[:, None] + co[None, :] * STRIDE_YC
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (co < C_OUT)[None, :])


pack = packing.down_narrow


def problem(call: Call, y: Tensor) -> Problem:
    n, c_out, h, w = y.shape
    c_in = call.x.shape[1]
    return Problem("down_narrow", precision(call.x.dtype), n * h * w, c_out, 16 * c_in, 16)


def launch(call: Call, packed: Tensor, y: Tensor, tile: Tile) -> Launch:
    """y [N, C_out, H/2, W/2] from x [N, C_in ≤ 4, H, W] and the weight."""
    sizes = problem(call, y)
    arguments, constants = common(call, y, sizes.rows)
    constants |= {"H": call.x.shape[2], "W": call.x.shape[3], "C_IN": call.x.shape[1], "C_OUT": y.shape[1]}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": 16}
    return Launch(_down_narrow_kernel, programs(tile, sizes), arguments | {"w_ptr": packed}, constants, tile)
