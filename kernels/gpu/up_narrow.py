"""up_narrow: :mod:`.up` for an image of at most 4 channels, with all four parities in one tile.

A tile has at least 16 columns, so one parity at a time would waste 15 of 16 on a one-channel image. Here the
columns are parity × channel (4 × 4), and K runs over the 3×3 inputs that the four parities of a pixel share,
each read once (see :func:`..packing.up_narrow`; 5 of 9 taps of a column are zero). This takes 9 products and
9 gathers instead of the 16 and 16 of one parity at a time.

A program computes one [BLOCK_M, 16] tile; it reads, writes and accumulates as :mod:`.up` does.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import packing
from .device_functions import affine, prologue, rows
from .launch import Launch, Product, common
from .tiles import Problem, Tile, programs


@triton.jit
def _up_narrow_kernel(
    x_ptr,
    x_other_ptr,
    x_center_ptr,
    x_scale_ptr,
    x_shift_ptr,
    w_ptr,  # [16, 9, C_IN]
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
    C_IN: tl.constexpr = X_SIZE[0]
    H: tl.constexpr = X_SIZE[1]
    W: tl.constexpr = X_SIZE[2]
    C_OUT: tl.constexpr = Y_SIZE[0]

    row_tile = tl.program_id(0)
    inside, n, p, q = rows(row_tile, M, (Y_SIZE[1] + 1) // 2, (Y_SIZE[2] + 1) // 2, BLOCK_M, WIDE)
    column = tl.arange(0, BLOCK_N)  # ((a·2 + b)·4 + co)
    co = column % 4
    k = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + n * X_STRIDE[0] + p * X_STRIDE[2] + q * X_STRIDE[3]
    other_rows = x_other_ptr + n * X_OTHER_STRIDE[0] + p * X_OTHER_STRIDE[2] + q * X_OTHER_STRIDE[3]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, 9 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % 9
        c = (step // 9) * BLOCK_K + k
        dp = 1 - tap // 3
        dq = 1 - tap % 3
        valid = inside & (p + dp >= 0) & (p + dp < H) & (q + dq >= 0) & (q + dq < W)
        mask = valid[:, None] & (c < C_IN)[None, :]
        x_at = x_rows[:, None] + (dp * X_STRIDE[2] + dq * X_STRIDE[3] + c * X_STRIDE[1])[None, :]
        x = tl.load(x_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        other = x
        if X_PROLOGUE == "gradient" or X_PROLOGUE == "statistics":
            other_at = (
                other_rows[:, None]
                + (dp * X_OTHER_STRIDE[2] + dq * X_OTHER_STRIDE[3] + c * X_OTHER_STRIDE[1])[None, :]
            )
            other = tl.load(other_at, mask=mask, other=0.0)
        x = prologue(
            x, other, mask, c[None, :], x_center_ptr, x_scale_ptr, x_shift_ptr, slope, per_count,
            C_IN, X_PROLOGUE, X_ACT, X_SCALED,
        )  # fmt: skip

        w_at = w_ptr + column[None, :] * (9 * C_IN) + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(c < C_IN)[:, None], other=0.0)  # [BLOCK_K, 16]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    # Partial sums would have to be reduced over parities: such launches run as up instead.
    tl.static_assert(EPILOGUE == "affine")
    y = affine(acc, co, scale_ptr, shift_ptr, slope, C_OUT, HAS_SCALE, HAS_SHIFT, ACT)
    y_rows = y_ptr + n * Y_STRIDE[0] + 2 * p * Y_STRIDE[2] + 2 * q * Y_STRIDE[3]
    y_columns = (column // 8) * Y_STRIDE[2] + ((column // 4) % 2) * Y_STRIDE[3] + co * Y_STRIDE[1]
    mask = inside[:, None] & (co < C_OUT)[None, :]
    if Y_SIZE[1] % 2 or Y_SIZE[2] % 2:
        mask = mask & (2 * p[:, None] + (column // 8)[None, :] < Y_SIZE[1])
        mask = mask & (2 * q[:, None] + ((column // 4) % 2)[None, :] < Y_SIZE[2])
    tl.store(y_rows[:, None] + y_columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


pack = packing.up_narrow


def problem(product: Product) -> Problem:
    """Return the GEMM sizes of a product."""
    n, _, h, w = product.y.shape
    c_in = product.x.shape[1]
    return product.problem("up_narrow", n * -(-h // 2) * -(-w // 2), 16, 9 * c_in, c_in)


def launch(product: Product, packed: Tensor, partial: Tensor | None, tile: Tile) -> Launch:
    """Return the launch of y [N, C_out ≤ 4, 2H, 2W] (2H+1, 2W+1 for odd maps) from x [N, C_in, H, W]."""
    sizes = problem(product)
    arguments, constants = common(product, packed, partial, sizes.rows)
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": 16, "BLOCK_K": tile.block_k}
    return Launch(_up_narrow_kernel, programs(tile, sizes), arguments, constants, tile)
