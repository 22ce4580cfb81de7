"""up: the transposed convolution k4 s2 p1 as four dense 2×2 convolutions, one per output parity.

    y[n, 2p+a, 2q+b, co] = Σ_{r,s ∈ {0,1}} Σ_ci x[n, p+a-r, q+b-s, ci] · w[ci, co, 1-a+2r, 1-b+2s]

Each parity (a, b) is an implicit GEMM with M = N·⌈H'/2⌉·⌈W'/2⌉ rows, C_out columns and K = 4·C_in: no zeros
are inserted or multiplied. A program computes one [BLOCK_M, BLOCK_N] tile of one parity. The column tile is
the fastest program index, then the parity, then the row tile, so that programs which read the same x run
concurrently and share it in L2. H' is 2H, or 2H+1 for the adjoint of a convolution of an odd map.

Reads x at any strides (NHWC is fastest) and weights packed by :func:`..packing.up`; writes y at any strides.
Accumulates in float32; every output element is written by exactly one program.
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
def _up_kernel(
    x_ptr,
    x_other_ptr,
    x_center_ptr,
    x_scale_ptr,
    x_shift_ptr,
    w_ptr,  # [4, C_OUT, 4, C_IN]
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
    parity = (pid // COLUMN_TILES) % 4
    a = parity // 2
    b = parity % 2
    row_tile = pid // (COLUMN_TILES * 4)
    inside, n, p, q = rows(row_tile, M, (Y_SIZE[1] + 1) // 2, (Y_SIZE[2] + 1) // 2, BLOCK_M, WIDE)
    if Y_SIZE[1] % 2 or Y_SIZE[2] % 2:
        inside = inside & (2 * p + a < Y_SIZE[1]) & (2 * q + b < Y_SIZE[2])
    co = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    x_rows = x_ptr + n * X_STRIDE[0] + p * X_STRIDE[2] + q * X_STRIDE[3]
    other_rows = x_other_ptr + n * X_OTHER_STRIDE[0] + p * X_OTHER_STRIDE[2] + q * X_OTHER_STRIDE[3]
    w_columns = w_ptr + ((3 - parity) * C_OUT + co) * (4 * C_IN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # One flat loop with the tap as inner index: nested loops over taps and channels would drain the pipeline
    # at every tap, and channel = step % C_IN would hide from the compiler that loads are contiguous.
    for step in range(0, 4 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % 4
        c = (step // 4) * BLOCK_K + k
        dp = a - tap // 2
        dq = b - tap % 2
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

        w_at = w_columns[None, :] + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(co < C_OUT)[None, :] & (c < C_IN)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    h = 2 * p + a
    w = 2 * q + b
    input_rows = input_ptr + n * INPUT_STRIDE[0] + h * INPUT_STRIDE[2] + w * INPUT_STRIDE[3]
    input_at = input_rows[:, None] + co[None, :] * INPUT_STRIDE[1]
    acc = epilogue(
        acc, inside, co, input_at, row_tile * 4 + parity, TILES, partial_ptr, center_ptr, scale_ptr,
        shift_ptr, slope, C_OUT, EPILOGUE, ACT, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y_rows = y_ptr + n * Y_STRIDE[0] + h * Y_STRIDE[2] + w * Y_STRIDE[3]
    y_at = y_rows[:, None] + co[None, :] * Y_STRIDE[1]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (co < C_OUT)[None, :])


pack = packing.up


def problem(product: Product) -> Problem:
    """Return the GEMM sizes of a product."""
    n, c_out, h, w = product.y.shape
    c_in = product.x.shape[1]
    return product.problem("up", n * -(-h // 2) * -(-w // 2), c_out, 4 * c_in, c_in, copies=4)


def launch(product: Product, packed: Tensor, partial: Tensor | None, tile: Tile) -> Launch:
    """Return the launch of y [N, C_out, 2H, 2W] (2H+1, 2W+1 for odd maps) from x [N, C_in, H, W]."""
    sizes = problem(product)
    arguments, constants = common(product, packed, partial, sizes.rows)
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return Launch(_up_kernel, programs(tile, sizes), arguments, constants, tile)
