"""up for an image of at most 4 channels: all four parities in one tile.

A matrix instruction has at least 16 columns, so one parity at a time would waste 15 of 16 on a one-channel
image. Here the columns are parity × channel (4 × 4), and the reduction runs over the 3×3 inputs that the four
parities of a pixel share, each read once (see :func:`..packing.up_narrow`; 5 of 9 taps of a column are zero).
Against one parity at a time that is 9 products where there were 16, and 9 gathers where there were 16.

A program makes a [BLOCK_M, 16] tile; reads, writes and accumulates as :mod:`.up`.
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
def _up_narrow_kernel(
    x_ptr,
    w_ptr,  # [16, 9, C_IN]
    y_ptr,
    scale_ptr,
    shift_ptr,
    M,
    slope,
    H: tl.constexpr,
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
    inside, n, p, q = rows(tl.program_id(0), M, H, W, BLOCK_M, WIDE)
    column = tl.arange(0, BLOCK_N)  # ((a·2 + b)·4 + co)
    co = column % 4
    k = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + n * STRIDE_XN + p * STRIDE_XH + q * STRIDE_XW
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, 9 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % 9
        c = (step // 9) * BLOCK_K + k
        dp = tap // 3 - 1
        dq = tap % 3 - 1
        seen = inside & (p + dp >= 0) & (p + dp < H) & (q + dq >= 0) & (q + dq < W)
        x_at = x_rows[:, None] + (dp * STRIDE_XH + dq * STRIDE_XW + c * STRIDE_XC)[None, :]
        x = tl.load(x_at, mask=seen[:, None] & (c < C_IN)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w_at = w_ptr + column[None, :] * (9 * C_IN) + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(c < C_IN)[:, None], other=0.0)  # [BLOCK_K, 16]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    y = epilogue(acc, co, scale_ptr, shift_ptr, slope, C_OUT, HAS_SCALE, HAS_SHIFT, ACT)
    y_rows = y_ptr + n * STRIDE_YN + 2 * p * STRIDE_YH + 2 * q * STRIDE_YW
    y_columns = (column // 8) * STRIDE_YH + ((column // 4) % 2) * STRIDE_YW + co * STRIDE_YC
    mask = inside[:, None] & (co < C_OUT)[None, :]
    tl.store(y_rows[:, None] + y_columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


pack = packing.up_narrow


def problem(call: Call, y: Tensor) -> Problem:
    n, c_in, h, w = call.x.shape
    return Problem("up_narrow", precision(call.x.dtype), n * h * w, 16, 9 * c_in, c_in)


def launch(call: Call, packed: Tensor, y: Tensor, tile: Tile) -> Launch:
    """y [N, C_out ≤ 4, 2H, 2W] from x [N, C_in, H, W] and the packed weight."""
    sizes = problem(call, y)
    arguments, constants = common(call, y, sizes.rows)
    constants |= {"H": call.x.shape[2], "W": call.x.shape[3], "C_IN": call.x.shape[1], "C_OUT": y.shape[1]}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": 16, "BLOCK_K": tile.block_k}
    return Launch(_up_narrow_kernel, programs(tile, sizes), arguments | {"w_ptr": packed}, constants, tile)
