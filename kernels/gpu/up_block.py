"""up_block: the transposed convolution k4 s2 p1 to few channels, by blocks of outputs with common inputs.

    y[n, h, w, co] = Σ_{kh,kw,ci} x[n, (h+1-kh)/2, (w+1-kw)/2, ci] · w[ci, co, kh, kw]    (whole indices of x)

Between them, output rows 2S·P-1+i for i < 2S read input rows S·P-1+u for u ≤ S, through kh = i + 2 - 2u, and
the same holds for columns. A block of 2S × 2S outputs is therefore one row of an implicit GEMM, whose columns
are (i, j, co) and whose K is (u, v, ci): each input is loaded once for all outputs of the block, where one
product per output parity (:mod:`.up`) would load it four times.

* S = 1, ``up_block``: all outputs of a block read the same 2×2 inputs, so no product is wasted, and 64
  channels fill a tile of 256 columns: the full-size tile, of which parities of 64 columns alone would use a
  quarter. There are (H+1)·(W+1) blocks for H × W inputs.
* S = 2, ``up_narrow``, for an image of at most 4 channels: 4×4 outputs from 3×3 inputs. Each output reads
  only four of them, and the other columns' weights are 0, so that a value of x that is not finite makes its
  whole block NaN. Such a product is bound by the loads of x, which are 2.5 per element instead of 4.5.

A program computes one [BLOCK_M, all columns] tile. Reads x at any strides (NHWC is fastest) and packed
weights, and writes y at any strides, each element once. Accumulates in float32.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from ..spec import ConvSpec
from .device_functions import (
    column_slices,
    load,
    load_other,
    multiply,
    of_columns,
    of_rows,
    row_pointers,
    rows,
    store,
    wait_for_previous,
    zeros,
)
from .launcher import MAX_PLANS, NARROW, convolution, convolution_problem, is_strided
from .packing import Layout
from .tiles import Problem, next_power_of_two

MAX_CHANNELS = 64
"""Of y: four times as many columns are the widest tile."""
MIN_BLOCKS = 4 * 132 * 128
"""Four waves of 128 rows on 132 SMs: with fewer, the smaller tiles of :mod:`.up` fill a GPU better."""


@triton.jit
def _up_block_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [4, 4, C_OUT, C_IN], partial [2 or 3, TILES, C_OUT]
    _up_blocks(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC, 1)


@triton.jit
def _up_narrow_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [4, 4, C_OUT, C_IN]; there are no partial sums
    _up_blocks(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC, 2)


@triton.jit
def _up_blocks(
    x,
    w_ptr,
    y,
    partial_ptr,
    M,
    TILES,
    slope,
    per_count,
    SPEC: tl.constexpr,
    S: tl.constexpr,
):
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    BLOCK_K: tl.constexpr = SPEC.block_k
    C_IN: tl.constexpr = X.size[0]
    C_OUT: tl.constexpr = Y.size[0]
    PADDED: tl.constexpr = BLOCK_N // (4 * S * S)  # C_OUT
    tl.static_assert(PADDED >= C_OUT)
    SIDE: tl.constexpr = S + 1  # inputs of a block, along each axis
    TAPS: tl.constexpr = SIDE * SIDE
    row_tile = tl.program_id(0)
    BLOCKS_H: tl.constexpr = Y.size[1] // (2 * S) + 1
    BLOCKS_W: tl.constexpr = Y.size[2] // (2 * S) + 1
    inside, group, n, p, q = rows(row_tile, M, BLOCKS_H, BLOCKS_W, BLOCK_M, SPEC.wide, SPEC.groups)
    top = S * p - 1
    left = S * q - 1
    column = tl.arange(0, BLOCK_N)
    co = column % PADDED
    i = column // (2 * S * PADDED)
    j = column // PADDED % (2 * S)
    k = tl.arange(0, BLOCK_K)

    x_rows, other_rows = row_pointers(x, n, top, left, X)
    wait_for_previous(SPEC.dependent)
    acc = zeros(SPEC)
    for step in range(0, TAPS * ((C_IN + BLOCK_K - 1) // BLOCK_K)):  # the tap is the inner index, as in up
        tap = step % TAPS
        c = (step // TAPS) * BLOCK_K + k
        u = tap // SIDE
        v = tap % SIDE
        valid = inside & (top + u >= 0) & (top + u < X.size[1]) & (left + v >= 0) & (left + v < X.size[2])
        mask = valid[:, None] & (c < C_IN)[None, :]
        x_hat = load(x_rows, other_rows, u, v, c, group, mask, x, slope, per_count, X)  # [BLOCK_M, BLOCK_K]
        kh = i + 2 - 2 * u
        kw = j + 2 - 2 * v
        of_column = co < C_OUT
        if S > 1:
            of_column = of_column & (kh >= 0) & (kh < 4) & (kw >= 0) & (kw < 4)
        w_at = w_ptr + (((kh * 4 + kw) * C_OUT + co) * C_IN)[None, :] + c[:, None]
        w = tl.load(w_at, mask=of_column[None, :] & (c < C_IN)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = multiply(x_hat, w, acc, SPEC)

    # A slice is one position (i, j) of all blocks. Unsliced, each column has its own.
    SWAPPED: tl.constexpr = SPEC.swapped
    SLICES: tl.constexpr = 4 if S == 1 else 1
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    slices = column_slices(acc, SLICES, SWAPPED)
    for s in tl.static_range(SLICES):
        co = tl.arange(0, WIDTH) % PADDED
        if SLICES == 1:
            position = tl.arange(0, WIDTH) // PADDED
            h = of_columns(position // (2 * S), SWAPPED)
            w = of_columns(position % (2 * S), SWAPPED)
        else:
            position = s
            h = s // (2 * S)
            w = s % (2 * S)
        h += of_rows(2 * S * p - 1, SWAPPED)
        w += of_rows(2 * S * q - 1, SWAPPED)
        written = of_rows(inside, SWAPPED) & (h >= 0) & (h < Y.size[1]) & (w >= 0) & (w < Y.size[2])
        tile = row_tile * (4 * S * S) + position
        at = written, of_rows(n, SWAPPED), h, w, co
        of_slice = tl.where(written, slices[s], 0.0)
        other = load_other(*at, y, Y, SWAPPED)
        store(of_slice, other, *at, group, tile, y, partial_ptr, TILES, slope, Y, SWAPPED)


LAYOUT = Layout(True, ("h", "w", "out", "in"))
"""[C_in, C_out, 4, 4] → [kh, kw, C_out, C_in]."""


def _blocks(spec: ConvSpec, s: int) -> int:
    _, h, w = spec.y.size
    return spec.images * (h // (2 * s) + 1) * (w // (2 * s) + 1)


def _covers(spec: ConvSpec) -> bool:
    few = spec.y.size[0] <= MAX_CHANNELS
    return spec.transposed and is_strided(spec) and few and _blocks(spec, 1) >= MIN_BLOCKS


def _covers_narrow(spec: ConvSpec) -> bool:
    narrow = spec.y.size[0] <= NARROW and spec.y.function == "affine"
    return spec.transposed and is_strided(spec) and narrow


def covers(spec: ConvSpec) -> bool:
    """Return whether a kernel of this module runs a product, not :mod:`.up`."""
    return _covers(spec) or _covers_narrow(spec)


def _problem(kernel: str, spec: ConvSpec, s: int) -> Problem:
    c_in, c_out = spec.x.size[0], spec.y.size[0]
    columns = max(16, 4 * s * s * next_power_of_two(c_out))
    return convolution_problem(kernel, spec, _blocks(spec, s), columns, (s + 1) ** 2 * c_in, c_in)


@functools.lru_cache(maxsize=MAX_PLANS)
def problem(spec: ConvSpec) -> Problem:
    """Return the GEMM sizes: a row per block of 2×2 outputs, and columns padded to a power of two."""
    return _problem("up_block", spec, 1)


@functools.lru_cache(maxsize=MAX_PLANS)
def problem_narrow(spec: ConvSpec) -> Problem:
    """Return the GEMM sizes: a row per block of 4×4 outputs, and columns padded to a power of two."""
    return _problem("up_narrow", spec, 2)


UP_NARROW = convolution("up_narrow", _up_narrow_kernel, _covers_narrow, LAYOUT, problem_narrow)
UP_BLOCK = convolution("up_block", _up_block_kernel, _covers, LAYOUT, problem, rows_per_tile=lambda spec: 4)
