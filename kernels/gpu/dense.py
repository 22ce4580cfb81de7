"""The layers on a 1×1 map as a matrix product.

    transposed, x [N, C_in, 1, 1]:         y[n, co, kh, kw] = Σ_ci x[n, ci] · w[ci, co, kh, kw]
    otherwise, a kernel as large as x:     y[n, co, 0, 0] = Σ_{kh,kw,ci} x[n, ci, kh, kw] · w[co, ci, kh, kw]

N rows; columns (kh, kw, co), the order of an NHWC output; reduction (kh, kw, ci), the order of an NHWC input.
One of the two maps is 1×1. A program makes one [BLOCK_M, BLOCK_N] tile. Reads x at any strides, weights as
:func:`..packing.dense_up` or :func:`..packing.dense_down`; writes y at any strides, each element once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from .device import epilogue
from .launch import Launch, common, precision
from .tiles import Problem, Tile, programs


@triton.jit
def _dense_kernel(
    x_ptr,
    w_ptr,  # [H_OUT·W_OUT·C_OUT, H·W, C_PADDED]
    y_ptr,
    scale_ptr,
    shift_ptr,
    M,
    slope,
    H: tl.constexpr,  # of x
    W: tl.constexpr,
    H_OUT: tl.constexpr,
    W_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    C_PADDED: tl.constexpr,
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
    COLUMNS: tl.constexpr = H_OUT * W_OUT * C_OUT
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile = pid // COLUMN_TILES
    column = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        tile = tile.to(tl.int64)
        column = column.to(tl.int64)
    n = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, H * W * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % (H * W)
        c = (step // (H * W)) * BLOCK_K + k
        x_k = (tap // W) * STRIDE_XH + (tap % W) * STRIDE_XW + c * STRIDE_XC
        mask = (n < M)[:, None] & (c < C_IN)[None, :]
        x = tl.load(x_ptr + n[:, None] * STRIDE_XN + x_k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        w_at = w_ptr + column[None, :] * (H * W * C_PADDED) + (tap * C_PADDED + c)[:, None]
        mask = (column < COLUMNS)[None, :] & (c < C_PADDED)[:, None]
        w = tl.load(w_at, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    co = column % C_OUT
    pixel = column // C_OUT
    y = epilogue(acc, co, scale_ptr, shift_ptr, slope, C_OUT, HAS_SCALE, HAS_SHIFT, ACT)
    y_columns = (pixel // W_OUT) * STRIDE_YH + (pixel % W_OUT) * STRIDE_YW + co * STRIDE_YC
    mask = (n < M)[:, None] & (column < COLUMNS)[None, :]
    tl.store(y_ptr + n[:, None] * STRIDE_YN + y_columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def problem(call: Call, y: Tensor) -> Problem:
    n, c_in, h, w = call.x.shape
    columns = y.shape[1] * y.shape[2] * y.shape[3]
    return Problem("dense", precision(call.x.dtype), n, columns, c_in * h * w, c_in)


def launch(call: Call, packed: Tensor, y: Tensor, tile: Tile) -> Launch:
    """y [N, C_out, kH, kW] from x [N, C_in, 1, 1], or [N, C_out, 1, 1] from [N, C_in, kH, kW]."""
    sizes = problem(call, y)
    arguments, constants = common(call, y, sizes.rows)
    constants |= {"H": call.x.shape[2], "W": call.x.shape[3], "H_OUT": y.shape[2], "W_OUT": y.shape[3]}
    constants |= {"C_IN": call.x.shape[1], "C_OUT": y.shape[1], "C_PADDED": packed.shape[-1]}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return Launch(_dense_kernel, programs(tile, sizes), arguments | {"w_ptr": packed}, constants, tile)
