"""dense: the convolutions to or from a 1×1 map, as a matrix product.

    transposed, x [N, C_in, 1, 1]:         y[n, co, kh, kw] = Σ_ci x[n, ci] · w[ci, co, kh, kw]
    otherwise, a kernel as large as x:     y[n, co, 0, 0] = Σ_{kh,kw,ci} x[n, ci, kh, kw] · w[co, ci, kh, kw]

M = N rows; columns (kh, kw, co), the order of an NHWC output; K = (kh, kw, ci), the order of an NHWC input.
One of the two maps is 1×1. A program computes one [BLOCK_M, BLOCK_N] tile. It reads x at any strides and
weights packed by :func:`..packing.dense_up` or :func:`..packing.dense_down`, and writes y at any strides,
each element once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_functions import epilogue, prologue
from .launch import Launch, Product, common
from .tiles import Problem, Tile, programs


@triton.jit
def _dense_kernel(
    x_ptr,
    x_other_ptr,
    x_center_ptr,
    x_scale_ptr,
    x_shift_ptr,
    w_ptr,  # [H_OUT·W_OUT·C_OUT, H·W, C_PADDED]
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
    C_PADDED: tl.constexpr,
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
    PIXELS: tl.constexpr = Y_SIZE[1] * Y_SIZE[2]
    COLUMNS: tl.constexpr = PIXELS * C_OUT
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile = pid // COLUMN_TILES
    column = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        tile = tile.to(tl.int64)
        column = column.to(tl.int64)
    n = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = n < M
    k = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + n * X_STRIDE[0]
    other_rows = x_other_ptr + n * X_OTHER_STRIDE[0]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, H * W * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % (H * W)
        c = (step // (H * W)) * BLOCK_K + k
        mask = inside[:, None] & (c < C_IN)[None, :]
        x_k = (tap // W) * X_STRIDE[2] + (tap % W) * X_STRIDE[3] + c * X_STRIDE[1]
        x_at = x_rows[:, None] + x_k[None, :]
        x = tl.load(x_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        other = x
        if X_PROLOGUE == "gradient" or X_PROLOGUE == "statistics":
            other_k = (tap // W) * X_OTHER_STRIDE[2] + (tap % W) * X_OTHER_STRIDE[3] + c * X_OTHER_STRIDE[1]
            other_at = other_rows[:, None] + other_k[None, :]
            other = tl.load(other_at, mask=mask, other=0.0)
        x = prologue(
            x, other, mask, c[None, :], x_center_ptr, x_scale_ptr, x_shift_ptr, slope, per_count,
            C_IN, X_PROLOGUE, X_ACT, X_SCALED,
        )  # fmt: skip

        w_at = w_ptr + column[None, :] * (H * W * C_PADDED) + (tap * C_PADDED + c)[:, None]
        mask = (column < COLUMNS)[None, :] & (c < C_PADDED)[:, None]
        w = tl.load(w_at, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    # Map columns beyond the last to channel C_OUT, which masks their stores.
    co = tl.where(column < COLUMNS, column % C_OUT, C_OUT)
    pixel = column // C_OUT
    h = pixel // Y_SIZE[2]
    w = pixel % Y_SIZE[2]
    input_columns = h * INPUT_STRIDE[2] + w * INPUT_STRIDE[3] + co * INPUT_STRIDE[1]
    input_at = (input_ptr + n * INPUT_STRIDE[0])[:, None] + input_columns[None, :]
    acc = epilogue(
        acc, inside, co, input_at, tile * PIXELS + pixel, TILES, partial_ptr, center_ptr, scale_ptr,
        shift_ptr, slope, C_OUT, EPILOGUE, ACT, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y_columns = h * Y_STRIDE[2] + w * Y_STRIDE[3] + co * Y_STRIDE[1]
    mask = inside[:, None] & (column < COLUMNS)[None, :]
    tl.store(y_ptr + n[:, None] * Y_STRIDE[0] + y_columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def pixels(product: Product) -> int:
    """Return the pixels of y: a row tile stores partial sums for each of them."""
    return product.y.shape[2] * product.y.shape[3]


def problem(product: Product) -> Problem:
    """Return the GEMM sizes of a product."""
    n, c_in, h, w = product.x.shape
    columns = product.y[0].numel()
    return product.problem("dense", n, columns, c_in * h * w, c_in)


def launch(product: Product, packed: Tensor, partial: Tensor | None, tile: Tile) -> Launch:
    """Return the launch of y [N, C_out, kH, kW] from x [N, C_in, 1, 1], or y [.., 1, 1] from [.., kH, kW]."""
    sizes = problem(product)
    arguments, constants = common(product, packed, partial, sizes.rows)
    constants["C_PADDED"] = packed.shape[-1]
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return Launch(_dense_kernel, programs(tile, sizes), arguments, constants, tile)
