"""down: the convolution k4 s2 p1 as an implicit GEMM.

    y[n, p, q, co] = Σ_{kh,kw} Σ_ci x[n, 2p-1+kh, 2q-1+kw, ci] · w[co, ci, kh, kw]

M = N·H'·W' rows of the output (H' = ⌊H/2⌋), C_out columns, K = 16·C_in. A program makes a
[BLOCK_M, BLOCK_N] tile; programs are numbered column tile first, so that those which read the same x share
it in L2.

Reads x at any strides (NHWC is the fast one), weights as :func:`..packing.down`; writes y at any strides.
Accumulates in float32; every output element is written by exactly one program.
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
def _down_kernel(
    x_ptr,
    w_ptr,  # [C_OUT, 16, C_IN]
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
    k = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + n * STRIDE_XN + 2 * p * STRIDE_XH + 2 * q * STRIDE_XW
    w_columns = w_ptr + co * (16 * C_IN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, 16 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):  # the tap is the inner index, as in up
        tap = step % 16
        c = (step // 16) * BLOCK_K + k
        dh = tap // 4 - 1
        dw = tap % 4 - 1
        seen = inside & (2 * p + dh >= 0) & (2 * p + dh < H) & (2 * q + dw >= 0) & (2 * q + dw < W)
        x_at = x_rows[:, None] + (dh * STRIDE_XH + dw * STRIDE_XW + c * STRIDE_XC)[None, :]
        x = tl.load(x_at, mask=seen[:, None] & (c < C_IN)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w_at = w_columns[None, :] + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(co < C_OUT)[None, :] & (c < C_IN)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    y = epilogue(acc, co, scale_ptr, shift_ptr, slope, C_OUT, HAS_SCALE, HAS_SHIFT, ACT)
    y_rows = y_ptr + n * STRIDE_YN + p * STRIDE_YH + q * STRIDE_YW
    y_at = y_rows[:, None] + co[None, :] * STRIDE_YC
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (co < C_OUT)[None, :])


pack = packing.down


def problem(call: Call, y: Tensor) -> Problem:
    n, c_out, h, w = y.shape
    c_in = call.x.shape[1]
    return Problem("down", precision(call.x.dtype), n * h * w, c_out, 16 * c_in, c_in)


def launch(call: Call, packed: Tensor, y: Tensor, tile: Tile) -> Launch:
    """y [N, C_out, H/2, W/2] from x [N, C_in, H, W] and the packed weight."""
    sizes = problem(call, y)
    arguments, constants = common(call, y, sizes.rows)
    constants |= {"H": call.x.shape[2], "W": call.x.shape[3], "C_IN": call.x.shape[1], "C_OUT": y.shape[1]}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return Launch(_down_kernel, programs(tile, sizes), arguments | {"w_ptr": packed}, constants, tile)
