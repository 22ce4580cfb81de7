"""down: the convolution k4 s2 p1.

    y[n, p, q, co] = Σ_{kh,kw} Σ_ci x[n, 2p-1+kh, 2q-1+kw, ci] · w[co, ci, kh, kw]

An implicit GEMM with M = N·H'·W' rows, C_out columns and K = 16·C_in. A program computes one
[BLOCK_M, BLOCK_N] tile. Column tiles are the fastest program index, so that programs which read the same x
run concurrently and share it in L2.

``down_narrow`` is the same for an image of at most 4 channels; a K step is the 16 taps of one channel. With
the channel as the contiguous K index, a one-channel image would fill 1 of the 16 K columns of every matrix
instruction. Here K = C_in·16 and a step covers all taps of a channel, so nothing is wasted, the weight's own
layout [C_out, C_in·16] needs no packing, and an NCHW image is read as efficiently as an NHWC one, one plane
per step.

Both read x at any strides (NHWC is fastest) and packed weights, and write y at any strides. They accumulate
in float32; every output element is written by exactly one program.
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
    of_rows,
    prologue,
    row_pointers,
    rows,
    store,
    wait_for_previous,
    zeros,
)
from .launcher import MAX_PLANS, NARROW, convolution, convolution_problem, is_strided
from .packing import Layout
from .tiles import Problem


@triton.jit
def _down_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [C_OUT, 16, C_IN], partial [2 or 3, TILES, C_OUT]
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    BLOCK_K: tl.constexpr = SPEC.block_k
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X.size[0]
    C_OUT: tl.constexpr = Y.size[0]
    COLUMN_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    row_tile = pid // COLUMN_TILES
    inside, group, n, p, q = rows(row_tile, M, Y.size[1], Y.size[2], BLOCK_M, SPEC.wide, SPEC.groups)
    column = (pid % COLUMN_TILES) * BLOCK_N
    co = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    x_rows, other_rows = row_pointers(x, n, 2 * p, 2 * q, X)
    w_columns = w_ptr + co * (16 * C_IN)
    wait_for_previous(SPEC.dependent)
    acc = zeros(SPEC)
    for step in range(0, 16 * ((C_IN + BLOCK_K - 1) // BLOCK_K)):  # the tap is the inner index, as in up
        tap = step % 16
        c = (step // 16) * BLOCK_K + k
        dh = tap // 4 - 1
        dw = tap % 4 - 1
        valid = inside & (2 * p + dh >= 0) & (2 * p + dh < X.size[1])
        valid = valid & (2 * q + dw >= 0) & (2 * q + dw < X.size[2])
        mask = valid[:, None] & (c < C_IN)[None, :]
        x_hat = load(x_rows, other_rows, dh, dw, c, group, mask, x, slope, per_count, X)  # [BLOCK_M, BLOCK_K]
        w_at = w_columns[None, :] + (tap * C_IN + c)[:, None]
        w = tl.load(w_at, mask=(co < C_OUT)[None, :] & (c < C_IN)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = multiply(x_hat, w, acc, SPEC)

    SWAPPED: tl.constexpr = SPEC.swapped
    n, p, q = of_rows(n, SWAPPED), of_rows(p, SWAPPED), of_rows(q, SWAPPED)
    SLICES: tl.constexpr = SPEC.slices
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    slices = column_slices(acc, SLICES, SWAPPED)
    for i in tl.static_range(SLICES):
        co = column + i * WIDTH + tl.arange(0, WIDTH)
        at = of_rows(inside, SWAPPED), n, p, q, co
        other = load_other(*at, y, Y, SWAPPED)
        store(slices[i], other, *at, group, row_tile, y, partial_ptr, TILES, slope, Y, SWAPPED)


@triton.jit
def _down_narrow_kernel(x, w_ptr, y, partial_ptr, M, TILES, slope, per_count, SPEC: tl.constexpr):
    # w [C_OUT, C_IN, 16], partial [2 or 3, TILES, C_OUT]
    X: tl.constexpr = SPEC.x
    Y: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    BLOCK_K: tl.constexpr = SPEC.block_k  # 16
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X.size[0]
    C_OUT: tl.constexpr = Y.size[0]
    COLUMN_TILES: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    row_tile = pid // COLUMN_TILES
    inside, group, n, p, q = rows(row_tile, M, Y.size[1], Y.size[2], BLOCK_M, SPEC.wide, SPEC.groups)
    co = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tl.arange(0, BLOCK_K)
    h = 2 * p[:, None] + (tap // 4 - 1)[None, :]
    w = 2 * q[:, None] + (tap % 4 - 1)[None, :]
    valid = inside[:, None] & (h >= 0) & (h < X.size[1]) & (w >= 0) & (w < X.size[2])
    x_at, other_at = row_pointers(x, n[:, None], h, w, X)
    w_at = w_ptr + co[None, :] * (16 * C_IN) + tap[:, None]
    SWAPPED: tl.constexpr = SPEC.swapped
    at = of_rows(inside, SWAPPED), of_rows(n, SWAPPED), of_rows(p, SWAPPED), of_rows(q, SWAPPED), co
    wait_for_previous(SPEC.dependent)
    of_epilogue = load_other(*at, y, Y, SWAPPED)  # early: there is one step, whose latency hides this load's

    acc = zeros(SPEC)
    for c in tl.static_range(C_IN):
        patch = tl.load(x_at + c * X.stride[1], mask=valid, other=0.0)  # [BLOCK_M, 16]
        other = patch
        if X.other_stride is not None:
            other = tl.load(other_at + c * X.other_stride[1], mask=valid, other=0.0)
        patch = prologue(patch, other, valid, c, group, x, slope, per_count, X)
        taps = tl.load(w_at + c * 16, mask=(co < C_OUT)[None, :], other=0.0)  # [16, BLOCK_N]
        acc = multiply(patch, taps, acc, SPEC)

    store(acc, of_epilogue, *at, group, row_tile, y, partial_ptr, TILES, slope, Y, SWAPPED)


LAYOUT = Layout(False, ("out", "h", "w", "in"))
"""[C_out, C_in, 4, 4] → [C_out, kh, kw, C_in]: that of a channels_last weight."""

NARROW_LAYOUT = Layout(False, ("out", "in", "h", "w"))
"""[C_out, C_in, 4, 4], contiguous: K runs over the taps within each channel."""


def _covers(spec: ConvSpec) -> bool:
    return not spec.transposed and is_strided(spec)


def _covers_narrow(spec: ConvSpec) -> bool:
    return _covers(spec) and spec.x.size[0] <= NARROW


@functools.lru_cache(maxsize=MAX_PLANS)
def problem(spec: ConvSpec, kernel: str = "down") -> Problem:
    """Return the GEMM sizes; a narrow K step has the 16 taps of a channel where others have channels."""
    c_out, h, w = spec.y.size
    c_in = spec.x.size[0]
    return convolution_problem(
        kernel, spec, spec.images * h * w, c_out, 16 * c_in, c_in if kernel == "down" else 16
    )


def problem_narrow(spec: ConvSpec) -> Problem:
    """Return :func:`problem` for the narrow kernel."""
    return problem(spec, "down_narrow")


DOWN_NARROW = convolution("down_narrow", _down_narrow_kernel, _covers_narrow, NARROW_LAYOUT, problem_narrow)
DOWN = convolution("down", _down_kernel, _covers, LAYOUT, problem)
