"""up: the transposed convolution k4 s2 p1 as four dense 2×2 convolutions, one per output parity.

    y[n, 2p+a, 2q+b, co] = Σ_{r,s ∈ {0,1}} Σ_ci x[n, p+a-r, q+b-s, ci] · w[ci, co, 1-a+2r, 1-b+2s]

Each parity (a, b) is an implicit GEMM with M = N·⌈H'/2⌉·⌈W'/2⌉ rows, C_out columns and K = 4·C_in: no zeros
are inserted or multiplied. A program computes one [BLOCK_M, BLOCK_N] tile of one parity. The column tile is
the fastest program index, then the parity, then the row tile, so that programs which read the same x run
concurrently and share it in L2. H' is 2H, or 2H+1 for the adjoint of a convolution of an odd map.

``up_narrow`` is the same for an image of at most 4 channels, with all four parities in one tile. A tile has
at least 16 columns, so one parity at a time would waste 15 of 16 on a one-channel image. Its columns are
parity × channel (4 × 4), and K runs over the 3×3 inputs that the four parities of a pixel share, each read
once (5 of 9 taps of a column are zero): 9 products and 9 gathers instead of the 16 and 16 of one parity at a
time. A program computes one [BLOCK_M, 16] tile.

Both read x at any strides (NHWC is fastest) and packed weights, and write y at any strides. They accumulate
in float32; every output element is written by exactly one program.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ..spec import ConvSpec
from .device_functions import affine, load, row_pointers, rows, store
from .launcher import MAX_PLANS, NARROW, convolution, convolution_problem, is_strided
from .packing import Layout
from .tiles import Problem


@triton.jit
def _up_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [4, C_OUT, 4, C_IN], partial [2, TILES, C_OUT]
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
    co = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    x_rows, other_rows = row_pointers(x, n, p, q, X)
    w_columns = w_ptr + ((3 - parity) * C_OUT + co) * (4 * C_IN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
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
        acc = tl.dot(x_hat, w, acc, input_precision=SPEC.precision)

    h = (2 * p + a)[:, None]
    w = (2 * q + b)[:, None]
    tile = row_tile * 4 + parity
    store(acc, inside, n[:, None], h, w, co, group, tile, y, partial_ptr, TILES, slope, Y)


@triton.jit
def _up_narrow_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [16, 9, C_IN]; there are no partial sums
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n  # 16
    BLOCK_K: tl.constexpr = SPEC.block_k
    C_IN: tl.constexpr = X.size[0]
    inside, group, n, p, q = rows(
        tl.program_id(0), M, (Y.size[1] + 1) // 2, (Y.size[2] + 1) // 2, BLOCK_M, SPEC.wide, SPEC.groups
    )
    column = tl.arange(0, BLOCK_N)  # ((a·2 + b)·4 + co)
    co = column % 4
    k = tl.arange(0, BLOCK_K)

    x_rows, other_rows = row_pointers(x, n, p, q, X)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, 9 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % 9
        c = (step // 9) * BLOCK_K + k
        dp = 1 - tap // 3
        dq = 1 - tap % 3
        valid = inside & (p + dp >= 0) & (p + dp < X.size[1]) & (q + dq >= 0) & (q + dq < X.size[2])
        mask = valid[:, None] & (c < C_IN)[None, :]
        x_hat = load(x_rows, other_rows, dp, dq, c, group, mask, x, slope, per_count, X)  # [BLOCK_M, BLOCK_K]
        w_at = w_ptr + column[None, :] * (9 * C_IN) + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(c < C_IN)[:, None], other=0.0)  # [BLOCK_K, 16]
        acc = tl.dot(x_hat, w, acc, input_precision=SPEC.precision)

    tl.static_assert(Y.function == "affine")  # partial sums would have to be reduced over parities
    acc = affine(acc, co, group, y, slope, Y)
    h = 2 * p[:, None] + (column // 8)[None, :]
    w = 2 * q[:, None] + ((column // 4) % 2)[None, :]
    mask = inside[:, None] & (co < Y.size[0])[None, :]
    if Y.size[1] % 2 or Y.size[2] % 2:
        mask = mask & (h < Y.size[1]) & (w < Y.size[2])
    y_at = y.ptr + n[:, None] * Y.stride[0] + h * Y.stride[2] + w * Y.stride[3] + co[None, :] * Y.stride[1]
    tl.store(y_at, acc.to(y.ptr.dtype.element_ty), mask=mask)


LAYOUT = Layout(True, ("h%2", "w%2", "out", "h//2", "w//2", "in"))
"""[C_in, C_out, 4, 4] → [parity, C_out, r, s, C_in]: kh = 1-a+2r, kw = 1-b+2s, parity = 3-(2a+b).

Output row 2p+a reads input rows p+a-r. The parities are in the order of the taps' parities, 1-a and 1-b.
"""

NARROW_LAYOUT = Layout(True, LAYOUT.axes, border=1, out_multiple=NARROW)
"""[C_in, C_out ≤ 4, 4, 4] → [a, b, 4, u, v, C_in]: all parities as columns over their 3×3 inputs.

Output (2p+a, 2q+b) reads input (p+1-u, q+1-v) through kh = 2u+a-1, kw = 2v+b-1, so a and b are the parities
and u and v the halves of the taps with a border; taps outside the kernel are zero.
"""


def _covers(spec: ConvSpec) -> bool:
    return spec.transposed and is_strided(spec)


def _covers_narrow(spec: ConvSpec) -> bool:
    return _covers(spec) and spec.y.size[0] <= NARROW and spec.y.function == "affine"


def _rows(spec: ConvSpec) -> int:
    return spec.images * -(-spec.y.size[1] // 2) * -(-spec.y.size[2] // 2)


@functools.lru_cache(maxsize=MAX_PLANS)
def problem(spec: ConvSpec) -> Problem:
    """Return the GEMM sizes: each parity is a product of its own."""
    c_in, c_out = spec.x.size[0], spec.y.size[0]
    return convolution_problem("up", spec, _rows(spec), c_out, 4 * c_in, c_in, copies=4)


@functools.lru_cache(maxsize=MAX_PLANS)
def problem_narrow(spec: ConvSpec) -> Problem:
    """Return the GEMM sizes: 16 columns, one per parity and channel, over 3×3 taps."""
    return convolution_problem("up_narrow", spec, _rows(spec), 16, 9 * spec.x.size[0], spec.x.size[0])


UP_NARROW = convolution("up_narrow", _up_narrow_kernel, _covers_narrow, NARROW_LAYOUT, problem_narrow)
UP = convolution("up", _up_kernel, _covers, LAYOUT, problem, rows_per_tile=lambda spec: 4)
