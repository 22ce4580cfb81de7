"""up: the transposed convolution k4 s2 p1 as four dense 2×2 convolutions, one for each output parity.

    y[n, 2p+a, 2q+b, co] = Σ_{r,s ∈ {0,1}} Σ_ci x[n, p+a-r, q+b-s, ci] · w[ci, co, 1-a+2r, 1-b+2s]

For one parity (a, b) that is a matrix product over M = N·H·W rows, C_out columns and K = 4·C_in, whose left
side is gathered from x (implicit GEMM): no zero is inserted or multiplied. A program makes one
[BLOCK_M, BLOCK_N] tile of one parity. Programs are numbered column tile first, then parity, then row tile, so
that those which read the same x run together and share it in L2.

Reads x at any strides (NHWC is the fast one), weights as :func:`..packing.up`; writes y at any strides.
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
def _up_kernel(
    x_ptr,
    w_ptr,  # [4, C_OUT, 4, C_IN]
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
    pid = tl.program_id(0)
    COLUMN_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    parity = (pid // COLUMN_TILES) % 4
    a = parity // 2
    b = parity % 2
    inside, n, p, q = rows(pid // (COLUMN_TILES * 4), M, H, W, BLOCK_M, WIDE)
    co = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + n * STRIDE_XN + p * STRIDE_XH + q * STRIDE_XW
    w_columns = w_ptr + ((3 - parity) * C_OUT + co) * (4 * C_IN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # The tap is the inner index of one flat loop: a loop over taps around one over channels would drain the
    # pipeline at every tap, and channel = step % C_IN would hide from the compiler that loads are contiguous.
    for step in range(0, 4 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % 4
        c = (step // 4) * BLOCK_K + k
        dp = a - tap // 2
        dq = b - tap % 2
        seen = inside & (p + dp >= 0) & (p + dp < H) & (q + dq >= 0) & (q + dq < W)
        x_at = x_rows[:, None] + (dp * STRIDE_XH + dq * STRIDE_XW + c * STRIDE_XC)[None, :]
        x = tl.load(x_at, mask=seen[:, None] & (c < C_IN)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w_at = w_columns[None, :] + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(co < C_OUT)[None, :] & (c < C_IN)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    y = epilogue(acc, co, scale_ptr, shift_ptr, slope, C_OUT, HAS_SCALE, HAS_SHIFT, ACT)
    y_rows = y_ptr + n * STRIDE_YN + (2 * p + a) * STRIDE_YH + (2 * q + b) * STRIDE_YW
    y_at = y_rows[:, None] + co[None, :] * STRIDE_YC
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (co < C_OUT)[None, :])


pack = packing.up


def problem(call: Call, y: Tensor) -> Problem:
    n, c_in, h, w = call.x.shape
    return Problem("up", precision(call.x.dtype), n * h * w, y.shape[1], 4 * c_in, c_in, copies=4)


def launch(call: Call, packed: Tensor, y: Tensor, tile: Tile) -> Launch:
    """y [N, C_out, 2H, 2W] from x [N, C_in, H, W] and the packed weight."""
    sizes = problem(call, y)
    arguments, constants = common(call, y, sizes.rows)
    constants |= {"H": call.x.shape[2], "W": call.x.shape[3], "C_IN": call.x.shape[1], "C_OUT": y.shape[1]}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return Launch(_up_kernel, programs(tile, sizes), arguments | {"w_ptr": packed}, constants, tile)
