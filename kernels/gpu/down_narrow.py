"""down_narrow: :mod:`.down` for an image of at most 4 channels; a K step is the 16 taps of one channel.

With the channel as the contiguous K index, as in :mod:`.down`, a one-channel image would fill 1 of the 16
K columns of every matrix instruction. Here K = C_in·16 and a step covers all taps of a channel, so nothing is
wasted, the weight's own layout [C_out, C_in·16] needs no packing, and an NCHW image is read as efficiently as
an NHWC one, one plane per step.

A program computes one [BLOCK_M, BLOCK_N] tile; it reads, writes and accumulates as :mod:`.down` does.
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
def _down_narrow_kernel(
    x_ptr,
    x_other_ptr,
    x_center_ptr,
    x_scale_ptr,
    x_shift_ptr,
    w_ptr,  # [C_OUT, C_IN, 16]
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
    tap = tl.arange(0, BLOCK_K)  # BLOCK_K = 16
    h = 2 * p[:, None] + (tap // 4 - 1)[None, :]
    w = 2 * q[:, None] + (tap % 4 - 1)[None, :]
    valid = inside[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x_at = x_ptr + n[:, None] * X_STRIDE[0] + h * X_STRIDE[2] + w * X_STRIDE[3]
    other_at = x_other_ptr + n[:, None] * X_OTHER_STRIDE[0] + h * X_OTHER_STRIDE[2] + w * X_OTHER_STRIDE[3]
    w_at = w_ptr + co[None, :] * (16 * C_IN) + tap[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for c in tl.static_range(C_IN):
        patch = tl.load(x_at + c * X_STRIDE[1], mask=valid, other=0.0)  # [BLOCK_M, 16]
        other = patch
        if X_PROLOGUE == "gradient" or X_PROLOGUE == "statistics":
            other = tl.load(other_at + c * X_OTHER_STRIDE[1], mask=valid, other=0.0)
        patch = prologue(
            patch, other, valid, c, x_center_ptr, x_scale_ptr, x_shift_ptr, slope, per_count,
            C_IN, X_PROLOGUE, X_ACT, X_SCALED,
        )  # fmt: skip
        taps = tl.load(w_at + c * 16, mask=(co < C_OUT)[None, :], other=0.0)  # [16, BLOCK_N]
        acc = tl.dot(patch, taps, acc, input_precision=PRECISION)

    input_rows = input_ptr + n * INPUT_STRIDE[0] + p * INPUT_STRIDE[2] + q * INPUT_STRIDE[3]
    input_at = input_rows[:, None] + co[None, :] * INPUT_STRIDE[1]
    acc = epilogue(
        acc, inside, co, input_at, row_tile, TILES, partial_ptr, center_ptr, scale_ptr,
        shift_ptr, slope, C_OUT, EPILOGUE, ACT, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y_rows = y_ptr + n * Y_STRIDE[0] + p * Y_STRIDE[2] + q * Y_STRIDE[3]
    y_at = y_rows[:, None] + co[None, :] * Y_STRIDE[1]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (co < C_OUT)[None, :])


pack = packing.down_narrow


def problem(product: Product) -> Problem:
    """Return the GEMM sizes of a product."""
    n, c_out, h, w = product.y.shape
    c_in = product.x.shape[1]
    return product.problem("down_narrow", n * h * w, c_out, 16 * c_in, 16)


def launch(product: Product, packed: Tensor, partial: Tensor | None, tile: Tile) -> Launch:
    """Return the launch of y [N, C_out, H/2, W/2] from x [N, C_in ≤ 4, H, W] and the weight."""
    sizes = problem(product)
    arguments, constants = common(product, packed, partial, sizes.rows)
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": 16}
    return Launch(_down_narrow_kernel, programs(tile, sizes), arguments, constants, tile)
