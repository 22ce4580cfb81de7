"""up: the transposed convolution k4 s2 p1 as four dense 2×2 convolutions, one per output parity.

    y[n, 2p+a, 2q+b, co] = Σ_{r,s ∈ {0,1}} Σ_ci x[n, p+a-r, q+b-s, ci] · w[ci, co, 1-a+2r, 1-b+2s]

Each parity (a, b) is an implicit GEMM with M = N·⌈H'/2⌉·⌈W'/2⌉ rows, C_out columns and K = 4·C_in: no zeros
are inserted or multiplied. A program computes one [BLOCK_M, BLOCK_N] tile of one parity. The column tile is
the fastest program index, then the parity, then the row tile, so that programs which read the same x run
concurrently and share it in L2. H' is 2H, or 2H+1 for the adjoint of a convolution of an odd map.

Reads x at any strides (NHWC is fastest) and packed weights, and writes y at any strides. Accumulates in
float32; every output element is written by exactly one program. :mod:`.up_block` runs large batches of layers
with few output channels.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ..spec import ConvSpec
from . import up_block
from .device_functions import (
    column_slices,
    load,
    load_other,
    multiply,
    of_rows,
    row_pointers,
    rows,
    store,
    wait_for_previous,
    zeros,
)
from .launcher import MAX_PLANS, convolution, convolution_problem, is_strided
from .packing import Layout
from .tiles import Problem


@triton.jit
def _up_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [4, C_OUT, 4, C_IN], partial [2 or 3, TILES, C_OUT]
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    BLOCK_K: tl.constexpr = SPEC.block_k
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X.size[0]
    C_OUT: tl.constexpr = Y.size[0]

    COLUMN_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    parity = (pid // COLUMN_TILES) % 4
    a = parity // 2
    b = parity % 2
    row_tile = pid // (COLUMN_TILES * 4)
    inside, group, n, p, q = rows(
        row_tile, M, (Y.size[1] + 1) // 2, (Y.size[2] + 1) // 2, BLOCK_M, SPEC.wide, SPEC.groups
    )
    if Y.size[1] % 2 or Y.size[2] % 2:
        inside = inside & (2 * p + a < Y.size[1]) & (2 * q + b < Y.size[2])
    column = (pid % COLUMN_TILES) * BLOCK_N
    co = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    x_rows, other_rows = row_pointers(x, n, p, q, X)
    w_columns = w_ptr + ((3 - parity) * C_OUT + co) * (4 * C_IN)
    wait_for_previous(SPEC.dependent)
    acc = zeros(SPEC)
    # One flat loop with the tap as inner index: nested loops over taps and channels would drain the pipeline
    # at every tap, and channel = step % C_IN would hide from the compiler that loads are contiguous.
    for step in range(0, 4 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % 4
        c = (step // 4) * BLOCK_K + k
        dp = a - tap // 2
        dq = b - tap % 2
        valid = inside & (p + dp >= 0) & (p + dp < X.size[1]) & (q + dq >= 0) & (q + dq < X.size[2])
        mask = valid[:, None] & (c < C_IN)[None, :]
        x_hat = load(x_rows, other_rows, dp, dq, c, group, mask, x, slope, per_count, X)  # [BLOCK_M, BLOCK_K]
        w_at = w_columns[None, :] + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(co < C_OUT)[None, :] & (c < C_IN)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = multiply(x_hat, w, acc, SPEC)

    SWAPPED: tl.constexpr = SPEC.swapped
    h = of_rows(2 * p + a, SWAPPED)
    w = of_rows(2 * q + b, SWAPPED)
    tile = row_tile * 4 + parity
    SLICES: tl.constexpr = SPEC.slices
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    slices = column_slices(acc, SLICES, SWAPPED)
    for i in tl.static_range(SLICES):
        co = column + i * WIDTH + tl.arange(0, WIDTH)
        at = of_rows(inside, SWAPPED), of_rows(n, SWAPPED), h, w, co
        other = load_other(*at, y, Y, SWAPPED)
        store(slices[i], other, *at, group, tile, y, partial_ptr, TILES, slope, Y, SWAPPED)


LAYOUT = Layout(True, ("h%2", "w%2", "out", "h//2", "w//2", "in"))
"""[C_in, C_out, 4, 4] → [parity, C_out, r, s, C_in]: kh = 1-a+2r, kw = 1-b+2s, parity = 3-(2a+b).

Output row 2p+a reads input rows p+a-r. The parities are in the order of the taps' parities, 1-a and 1-b.
"""


def _covers(spec: ConvSpec) -> bool:
    return spec.transposed and is_strided(spec) and not up_block.covers(spec)


def _rows(spec: ConvSpec) -> int:
    return spec.images * -(-spec.y.size[1] // 2) * -(-spec.y.size[2] // 2)


@functools.lru_cache(maxsize=MAX_PLANS)
def problem(spec: ConvSpec) -> Problem:
    """Return the GEMM sizes: each parity is a product of its own."""
    c_in, c_out = spec.x.size[0], spec.y.size[0]
    return convolution_problem("up", spec, _rows(spec), c_out, 4 * c_in, c_in, copies=4)


UP = convolution("up", _up_kernel, _covers, LAYOUT, problem, rows_per_tile=lambda spec: 4)
