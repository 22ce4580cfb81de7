"""down: the convolution k4 s2 p1 as an implicit GEMM.

    y[n, p, q, co] = Σ_{kh,kw} Σ_ci x[n, 2p-1+kh, 2q-1+kw, ci] · w[co, ci, kh, kw]

M = N·H'·W' rows (H' = ⌊H/2⌋), C_out columns, K = 16·C_in. A program computes one [BLOCK_M, BLOCK_N] tile.
The column tile is the fastest program index, so that programs which read the same x share it in L2.

Reads x at any strides (NHWC is fastest) and weights packed by :func:`..packing.down`; writes y at any
strides. Accumulates in float32; every output element is written by exactly one program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import packing
from .device_functions import epilogue, prologue, rows
from .launch import Launch, Product, common
from .tiles import Problem, Tile, programs


@triton.jit
def _down_kernel(
    x_ptr,
    x_other_ptr,
    x_center_ptr,
    x_scale_ptr,
    x_shift_ptr,
    w_ptr,  # [C_OUT, 16, C_IN]
    y_ptr,
    input_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    partial_ptr,  # [2, TILES, C_OUT]
    M,
    TILES,
    slope,
    per_count,
    X_SIZE: tl.constexpr,  # C, H, W
    Y_SIZE: tl.constexpr,
    X_STRIDE: tl.constexpr,  # N, C, H, W
    X_OTHER_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    INPUT_STRIDE: tl.constexpr,
    X_PROLOGUE: tl.constexpr,
    X_ACT: tl.constexpr,
    X_SCALED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X_SIZE[0]
    H: tl.constexpr = X_SIZE[1]
    W: tl.constexpr = X_SIZE[2]
    C_OUT: tl.constexpr = Y_SIZE[0]

    COLUMN_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    row_tile = pid // COLUMN_TILES
    inside, n, p, q = rows(row_tile, M, H // 2, W // 2, BLOCK_M, WIDE)
    co = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + n * X_STRIDE[0] + 2 * p * X_STRIDE[2] + 2 * q * X_STRIDE[3]
    other_rows = x_other_ptr + n * X_OTHER_STRIDE[0] + 2 * p * X_OTHER_STRIDE[2] + 2 * q * X_OTHER_STRIDE[3]
    w_columns = w_ptr + co * (16 * C_IN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, 16 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):  # the tap is the inner index, as in up
        tap = step % 16
        c = (step // 16) * BLOCK_K + k
        dh = tap // 4 - 1
        dw = tap % 4 - 1
        valid = inside & (2 * p + dh >= 0) & (2 * p + dh < H) & (2 * q + dw >= 0) & (2 * q + dw < W)
        mask = valid[:, None] & (c < C_IN)[None, :]
        x_at = x_rows[:, None] + (dh * X_STRIDE[2] + dw * X_STRIDE[3] + c * X_STRIDE[1])[None, :]
        x = tl.load(x_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        other = x
        if X_PROLOGUE == "gradient" or X_PROLOGUE == "statistics":
            other_at = (
                other_rows[:, None]
                + (dh * X_OTHER_STRIDE[2] + dw * X_OTHER_STRIDE[3] + c * X_OTHER_STRIDE[1])[None, :]
            )
            other = tl.load(other_at, mask=mask, other=0.0)
        x = prologue(
            x, other, mask, c[None, :], x_center_ptr, x_scale_ptr, x_shift_ptr, slope, per_count,
            C_IN, X_PROLOGUE, X_ACT, X_SCALED,
        )  # fmt: skip

        w_at = w_columns[None, :] + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(co < C_OUT)[None, :] & (c < C_IN)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    input_rows = input_ptr + n * INPUT_STRIDE[0] + p * INPUT_STRIDE[2] + q * INPUT_STRIDE[3]
    input_at = input_rows[:, None] + co[None, :] * INPUT_STRIDE[1]
    acc = epilogue(
        acc, inside, co, input_at, row_tile, TILES, partial_ptr, center_ptr, scale_ptr,
        shift_ptr, slope, C_OUT, EPILOGUE, ACT, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y_rows = y_ptr + n * Y_STRIDE[0] + p * Y_STRIDE[2] + q * Y_STRIDE[3]
    y_at = y_rows[:, None] + co[None, :] * Y_STRIDE[1]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (co < C_OUT)[None, :])


pack = packing.down


def problem(product: Product) -> Problem:
    """Return the GEMM sizes of a product."""
    n, c_out, h, w = product.y.shape
    c_in = product.x.shape[1]
    return product.problem("down", n * h * w, c_out, 16 * c_in, c_in)


def launch(product: Product, packed: Tensor, partial: Tensor | None, tile: Tile) -> Launch:
    """Return the launch of y [N, C_out, H/2, W/2] from x [N, C_in, H, W] and the packed weight."""
    sizes = problem(product)
    arguments, constants = common(product, packed, partial, sizes.rows)
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return Launch(_down_kernel, programs(tile, sizes), arguments, constants, tile)
