"""dense: the convolutions to or from a 1×1 map, as a matrix product.

    transposed, x [N, C_in, 1, 1]:         y[n, co, kh, kw] = Σ_ci x[n, ci] · w[ci, co, kh, kw]
    otherwise, a kernel as large as x:     y[n, co, 0, 0] = Σ_{kh,kw,ci} x[n, ci, kh, kw] · w[co, ci, kh, kw]

M = N rows; columns (kh, kw, co), the order of an NHWC output; K = (kh, kw, ci), the order of an NHWC input.
One of the two maps is 1×1. A program computes one [BLOCK_M, BLOCK_N] tile.

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
from .device_functions import activate, load, prologue, row_pointers, rows, store
from .launcher import MAX_PLANS, NARROW, convolution, convolution_problem
from .packing import Layout
from .tiles import Problem

_VECTOR = tl.constexpr(16)  # the weight's C_in is padded to a multiple, so that its rows are 16-byte aligned


@triton.jit
def _dense_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [H_OUT·W_OUT·C_OUT, H·W, C_PADDED], partial [2, TILES, C_OUT]
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
    column = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SPEC.wide:
        tile = tile.to(tl.int64)
        column = column.to(tl.int64)
    inside, group, n, _, _ = rows(tile, M, 1, 1, BLOCK_M, SPEC.wide, SPEC.groups)
    k = tl.arange(0, BLOCK_K)

    x_rows, other_rows = row_pointers(x, n, 0, 0, X)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, TAPS * ((C_IN + BLOCK_K - 1) // BLOCK_K)):
        tap = step % TAPS
        c = (step // TAPS) * BLOCK_K + k
        mask = inside[:, None] & (c < C_IN)[None, :]
        x_hat = load(x_rows, other_rows, tap // W, tap % W, c, group, mask, x, slope, per_count, X)
        w_at = w_ptr + column[None, :] * (TAPS * C_PADDED) + (tap * C_PADDED + c)[:, None]
        mask = (column < COLUMNS)[None, :] & (c < C_PADDED)[:, None]
        w = tl.load(w_at, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x_hat, w, acc, input_precision=SPEC.precision)

    # Map columns beyond the last to channel C_OUT, which masks their stores.
    co = tl.where(column < COLUMNS, column % C_OUT, C_OUT)
    pixel = column // C_OUT
    h = (pixel // Y.size[2])[None, :]
    w = (pixel % Y.size[2])[None, :]
    tile = tile * PIXELS + pixel
    store(acc, inside, n[:, None], h, w, co, group, tile, y, partial_ptr, TILES, slope, Y)


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

DOWN_LAYOUT = Layout(False, ("out", "h", "w", "in"), in_multiple=_VECTOR.value)
"""[C_out, C_in, kH, kW] → [C_out, kh, kw, C_in padded]."""


def _covers_up(spec: ConvSpec) -> bool:
    return spec.kind != "wgrad" and spec.transposed and (*spec.x.size[1:], spec.padding) == (1, 1, 0)


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


def _pixels(spec: ConvSpec) -> int:
    return spec.y.size[1] * spec.y.size[2]


DENSE_UP = convolution("dense_up", _dense_kernel, _covers_up, UP_LAYOUT, problem, _pixels)
DENSE_NARROW = convolution("dense_narrow", _dense_narrow_kernel, _covers_narrow, DOWN_LAYOUT, problem_narrow)
DENSE_DOWN = convolution("dense_down", _dense_kernel, _covers_down, DOWN_LAYOUT, problem, _pixels)
