"""dense: the convolutions to or from a 1×1 map, as a matrix product.

    transposed, x [N, C_in, 1, 1]:         y[n, co, kh, kw] = Σ_ci x[n, ci] · w[ci, co, kh, kw]
    otherwise, a kernel as large as x:     y[n, co, 0, 0] = Σ_{kh,kw,ci} x[n, ci, kh, kw] · w[co, ci, kh, kw]

M = N rows; columns (kh, kw, co), the order of an NHWC output; K = (kh, kw, ci), the order of an NHWC input.
One of the two maps is 1×1. A program computes one [BLOCK_M, BLOCK_N] tile.

``dense_outer`` is the first product with at most 4 input channels, in training the gradient of the
Discriminator's head: a sum of outer products of x and w, bound by the bytes of y and of the tensor that its
epilogue reads. A matrix instruction would pad K to 16. Products are float32 whatever the dtype of the inputs.

``dense_narrow`` is the Discriminator's head, a product with at most 4 columns, as one dot product per
program: a tensor-core tile would use 1 of its 16 columns, and a batch of 64 would fill 1 of 132 SMs. Products
are float32 whatever the dtype of the inputs: the kernel is bound by bytes, so TF32 would gain nothing.
Program (n, co) reads row n of x.

Both read x at any strides and packed weights, and write y at any strides, each element once.
"""

from __future__ import annotations

import functools
import math

import triton
import triton.language as tl

from ..spec import ConvSpec
from .device_functions import (
    activate,
    column_slices,
    load,
    load_other,
    multiply,
    of_columns,
    of_rows,
    prologue,
    row_pointers,
    rows,
    store,
    wait_for_previous,
    zeros,
)
from .launcher import MAX_PLANS, NARROW, convolution, convolution_problem
from .packing import Layout
from .tiles import Problem

_VECTOR = tl.constexpr(16)  # the weight's C_in is padded to a multiple, so that its rows are 16-byte aligned


@triton.jit
def _dense_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [H_OUT·W_OUT·C_OUT, H·W, C_PADDED], partial [2 or 3, TILES, C_OUT]
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    BLOCK_K: tl.constexpr = SPEC.block_k
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X.size[0]
    W: tl.constexpr = X.size[2]
    TAPS: tl.constexpr = X.size[1] * W
    C_PADDED: tl.constexpr = (C_IN + _VECTOR - 1) // _VECTOR * _VECTOR
    C_OUT: tl.constexpr = Y.size[0]
    PIXELS: tl.constexpr = Y.size[1] * Y.size[2]
    COLUMNS: tl.constexpr = PIXELS * C_OUT
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile = pid // COLUMN_TILES
    first = (pid % COLUMN_TILES) * BLOCK_N
    if SPEC.wide:
        tile = tile.to(tl.int64)
        first = first.to(tl.int64)
    column = first + tl.arange(0, BLOCK_N)
    inside, group, n, _, _ = rows(tile, M, 1, 1, BLOCK_M, SPEC.wide, SPEC.groups)
    k = tl.arange(0, BLOCK_K)

    x_rows, other_rows = row_pointers(x, n, 0, 0, X)
    wait_for_previous(SPEC.dependent)
    acc = zeros(SPEC)
    for step in range(0, TAPS * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % TAPS
        c = (step // TAPS) * BLOCK_K + k
        mask = inside[:, None] & (c < C_IN)[None, :]
        x_hat = load(x_rows, other_rows, tap // W, tap % W, c, group, mask, x, slope, per_count, X)
        w_at = w_ptr + column[None, :] * (TAPS * C_PADDED) + (tap * C_PADDED + c)[:, None]
        mask = (column < COLUMNS)[None, :] & (c < C_PADDED)[:, None]
        w = tl.load(w_at, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = multiply(x_hat, w, acc, SPEC)

    _store_columns(acc, inside, n, group, tile, first, y, partial_ptr, TILES, slope, SPEC)


@triton.jit
def _dense_outer_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [C_IN, H_OUT·W_OUT·C_OUT], partial [2 or 3, TILES, C_OUT]
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X.size[0]
    COLUMNS: tl.constexpr = Y.size[1] * Y.size[2] * Y.size[0]
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile = pid // COLUMN_TILES
    first = (pid % COLUMN_TILES) * BLOCK_N
    if SPEC.wide:
        tile = tile.to(tl.int64)
        first = first.to(tl.int64)
    column = first + tl.arange(0, BLOCK_N)
    inside, group, n, _, _ = rows(tile, M, 1, 1, BLOCK_M, SPEC.wide, SPEC.groups)

    x_rows, other_rows = row_pointers(x, n, 0, 0, X)
    wait_for_previous(SPEC.dependent)
    acc = zeros(SPEC)
    SWAPPED: tl.constexpr = SPEC.swapped
    for ci in tl.static_range(C_IN):
        c = ci + tl.arange(0, 1)
        x_hat = load(x_rows, other_rows, 0, 0, c, group, inside[:, None], x, slope, per_count, X)
        x_hat = tl.sum(x_hat.to(tl.float32), axis=1)  # of one element: [BLOCK_M, 1] → [BLOCK_M]
        w = tl.load(w_ptr + ci * COLUMNS + column, mask=column < COLUMNS, other=0.0)
        acc += of_rows(x_hat, SWAPPED) * of_columns(w.to(tl.float32), SWAPPED)
    _store_columns(acc, inside, n, group, tile, first, y, partial_ptr, TILES, slope, SPEC)


@triton.jit
def _store_columns(acc, inside, n, group, tile, first, y, partial_ptr, TILES, slope, SPEC: tl.constexpr):
    """Apply the epilogue to acc [BLOCK_M, BLOCK_N] with columns (kh, kw, co) from ``first`` on; store it."""
    Y: tl.constexpr = SPEC.y
    C_OUT: tl.constexpr = Y.size[0]
    PIXELS: tl.constexpr = Y.size[1] * Y.size[2]
    SWAPPED: tl.constexpr = SPEC.swapped
    SLICES: tl.constexpr = SPEC.slices
    WIDTH: tl.constexpr = SPEC.block_n // SLICES
    slices = column_slices(acc, SLICES, SWAPPED)
    for i in tl.static_range(SLICES):
        column = first + i * WIDTH
        # Columns beyond the last are mapped to channel C_OUT, which masks their stores.
        if PIXELS == 1:
            pixel = 0
            h = 0
            w = 0
            co = column + tl.arange(0, WIDTH)
        elif C_OUT % WIDTH == 0:
            # A slice lies within one pixel. With %, the compiler would not see that its first channel is a
            # multiple of 8, and would store each element alone.
            pixel = column // C_OUT
            h = pixel // Y.size[2]
            w = pixel % Y.size[2]
            co = column - pixel * C_OUT + tl.arange(0, WIDTH)
            if PIXELS * C_OUT % SPEC.block_n != 0:
                co = tl.where(column < PIXELS * C_OUT, co, C_OUT)
        else:
            column += tl.arange(0, WIDTH)
            pixel = column // C_OUT
            h = of_columns(pixel // Y.size[2], SWAPPED)
            w = of_columns(pixel % Y.size[2], SWAPPED)
            co = tl.where(column < PIXELS * C_OUT, column % C_OUT, C_OUT)
        row = tile * PIXELS + pixel
        at = of_rows(inside, SWAPPED), of_rows(n, SWAPPED), h, w, co
        other = load_other(*at, y, Y, SWAPPED)
        store(slices[i], other, *at, group, row, y, partial_ptr, TILES, slope, Y, SWAPPED)


@triton.jit
def _dense_narrow_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [C_OUT, H·W, C_PADDED]; there are no partial sums
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_K: tl.constexpr = SPEC.block_k
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X.size[0]
    C_PADDED: tl.constexpr = (C_IN + _VECTOR - 1) // _VECTOR * _VECTOR
    DEPTH: tl.constexpr = X.size[1] * X.size[2] * C_PADDED
    n = pid // Y.size[0]
    co = pid % Y.size[0]
    group = 0
    if SPEC.groups > 1:
        group = n // (M // SPEC.groups)
    if SPEC.wide:
        n = n.to(tl.int64)

    wait_for_previous(SPEC.dependent)
    acc = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for step in range(0, (DEPTH + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        h = k // C_PADDED // X.size[2]
        w = k // C_PADDED % X.size[2]
        c = k % C_PADDED
        valid = (k < DEPTH) & (c < C_IN)
        x_at, other_at = row_pointers(x, n, h, w, X)
        x_hat = tl.load(x_at + c * X.stride[1], mask=valid, other=0.0)
        other = x_hat
        if X.other_stride is not None:
            other = tl.load(other_at + c * X.other_stride[1], mask=valid, other=0.0)
        x_hat = prologue(x_hat, other, valid, c, group, x, slope, per_count, X)
        weight = tl.load(w_ptr + co * DEPTH + k, mask=k < DEPTH, other=0.0)
        acc += x_hat.to(tl.float32) * weight.to(tl.float32)

    tl.static_assert(Y.function == "affine")  # statistics need a tile of rows: those products run as dense
    result = tl.sum(acc, axis=0)
    if Y.scaled:
        result = result * tl.load(y.scale + co)
    if Y.shifted:
        result = result + tl.load(y.shift + co)
    ACT: tl.constexpr = Y.act
    result = activate(result, slope, ACT)
    tl.store(y.ptr + n * Y.stride[0] + co * Y.stride[1], result.to(y.ptr.dtype.element_ty))


UP_LAYOUT = Layout(True, ("h", "w", "out", "in"), in_multiple=_VECTOR.value)
"""[C_in, C_out, kH, kW] → [kh, kw, C_out, C_in padded]: a row per column of the product."""

OUTER_LAYOUT = Layout(True, ("in", "h", "w", "out"))
"""[C_in, C_out, kH, kW] → [C_in, kh, kw, C_out]."""

DOWN_LAYOUT = Layout(False, ("out", "h", "w", "in"), in_multiple=_VECTOR.value)
"""[C_out, C_in, kH, kW] → [C_out, kh, kw, C_in padded]."""


def _covers_up(spec: ConvSpec) -> bool:
    return spec.kind != "wgrad" and spec.transposed and (*spec.x.size[1:], spec.padding) == (1, 1, 0)


def _covers_outer(spec: ConvSpec) -> bool:
    return _covers_up(spec) and spec.x.size[0] <= NARROW


def _covers_down(spec: ConvSpec) -> bool:
    if spec.kind == "wgrad" or spec.transposed:
        return False
    return spec.x.size[1:] == spec.weight[2:] and spec.padding == 0


def _covers_narrow(spec: ConvSpec) -> bool:
    return _covers_down(spec) and spec.y.size[0] <= NARROW and spec.y.function == "affine"


@functools.lru_cache(maxsize=MAX_PLANS)
def problem(spec: ConvSpec, kernel: str = "dense") -> Problem:
    """Return the GEMM sizes of a product."""
    depth = math.prod(spec.x.size)
    return convolution_problem(kernel, spec, spec.images, math.prod(spec.y.size), depth, spec.x.size[0])


def problem_narrow(spec: ConvSpec) -> Problem:
    """Return :func:`problem` for the narrow kernel."""
    return problem(spec, "dense_narrow")


def problem_outer(spec: ConvSpec) -> Problem:
    """Return :func:`problem` for the sum of outer products."""
    return problem(spec, "dense_outer")


def _pixels(spec: ConvSpec) -> int:
    return spec.y.size[1] * spec.y.size[2]


DENSE_OUTER = convolution(
    "dense_outer", _dense_outer_kernel, _covers_outer, OUTER_LAYOUT, problem_outer, _pixels
)
DENSE_UP = convolution("dense_up", _dense_kernel, _covers_up, UP_LAYOUT, problem, _pixels)
DENSE_NARROW = convolution("dense_narrow", _dense_narrow_kernel, _covers_narrow, DOWN_LAYOUT, problem_narrow)
DENSE_DOWN = convolution("dense_down", _dense_kernel, _covers_down, DOWN_LAYOUT, problem, _pixels)
