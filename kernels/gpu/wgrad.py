"""wgrad: the weight gradient of either convolution, as a product over pixels.

A convolution and a transposed convolution are adjoints of each other, so one formula serves both. Of x̂ (the
input after its prologue) and du (the output's gradient after its prologue), ``small`` is the one with fewer
pixels: du for a convolution, x̂ for a transposed one.

    dw[s, l, kh, kw] = Σ_{n,p,q} small[n, p, q, s] · large[n, S·p-P+kh, S·q-P+kw, l]

which is PyTorch's weight layout for either, [C_out, C_in, kH, kW] or [C_in, C_out, kH, kW]. M = C_small rows,
columns (tap, l) with l padded to a power of two, and K = the N·H·W pixels of ``small``, with split-K (SPLITS)
where the output tiles alone would not fill the GPU. A program computes one [BLOCK_M, BLOCK_N] tile of one
split; if C_large is smaller than BLOCK_N, the tile spans several taps. Programs of one split run concurrently
and share its pixels in L2.

``wgrad_narrow`` is the same for an image of at most 4 channels, where all columns (l, tap) are one or two
tiles and reading ``small`` once from HBM bounds the time. The patches of an image are 2-byte loads, which no
asynchronous copy can do: each step loads those of the next one into registers before it uses its own, so
that their latency overlaps with the step. The product is computed transposed, patch [BLOCK_N, BLOCK_K] times
small [BLOCK_K, BLOCK_M], by mma.sync, which needs neither operand transposed in shared memory, so that
``small`` arrives by 16-byte asynchronous copies also on sm_80 and in TF32. There are as many splits as
programs run at once.

Both read their operands at any strides and write float32 split-K partials [SPLITS, taps, C_small, C_large],
each once. :mod:`.reduce` adds them in a fixed order, so the result does not depend on scheduling.

It is a launch of its own: were the last program of each output tile to add its partials, one SM, which loads
about 100 GB/s, would read up to 16 splits of 64 KB alone: 10 µs, against 3 to 4 µs for a launch on all SMs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..spec import ConvSpec, Operand
from . import cost_model
from .device_functions import load, prologue, row_pointers, rows
from .launcher import (
    MAX_PLANS,
    NARROW,
    Kernel,
    Launch,
    Product,
    constants_of,
    per_count,
    present,
    register,
)
from .tiles import Problem, Tile, next_power_of_two, programs


@triton.jit
def _wgrad_kernel(
    small,
    large,
    partial_ptr,  # [SPLITS, K_H·K_W, C_SMALL, C_LARGE]
    M,
    slope,
    per_count,
    SPEC: tl.constexpr,
    KERNEL: tl.constexpr,  # K_H, K_W, stride, padding
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,  # C_LARGE
):
    SMALL: tl.constexpr = SPEC.x
    LARGE: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    BLOCK_K: tl.constexpr = SPEC.block_k
    pid = tl.program_id(0)
    C_SMALL: tl.constexpr = SMALL.size[0]
    C_LARGE: tl.constexpr = LARGE.size[0]
    K_W: tl.constexpr = KERNEL[1]
    TAPS: tl.constexpr = KERNEL[0] * K_W
    ROW_TILES: tl.constexpr = (C_SMALL + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (TAPS * PADDED + BLOCK_N - 1) // BLOCK_N
    split = pid // (ROW_TILES * COLUMN_TILES)
    s = ((pid // COLUMN_TILES) % ROW_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)[None, :]
    if PADDED < BLOCK_N:
        column = (pid % COLUMN_TILES) * BLOCK_N + j
        tap = column // PADDED
        channel = column % PADDED
        valid_column = (tap < TAPS) & (channel < C_LARGE)
    else:
        # channel = column % PADDED would hide that it starts at a multiple of BLOCK_N, giving scalar loads.
        TILES_PER_TAP: tl.constexpr = PADDED // BLOCK_N
        tap = (pid % COLUMN_TILES) // TILES_PER_TAP
        channel = (pid % TILES_PER_TAP) * BLOCK_N + j
        valid_column = channel < C_LARGE
    dh = tap // K_W - KERNEL[3]
    dw = tap % K_W - KERNEL[3]

    steps = (M + BLOCK_K - 1) // BLOCK_K
    steps_per_split = (steps + SPLITS - 1) // SPLITS
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(split * steps_per_split, tl.minimum((split + 1) * steps_per_split, steps)):
        inside, _, n, p, q = rows(step, M, SMALL.size[1], SMALL.size[2], BLOCK_K, SPEC.wide)
        small_rows, other_rows = row_pointers(small, n, p, q, SMALL)
        mask = (s < C_SMALL)[:, None] & inside[None, :]
        # Loaded as [BLOCK_M, BLOCK_K]: transposed afterwards, it has no asynchronous copies on sm_80.
        a = tl.load(small_rows[None, :] + s[:, None] * SMALL.stride[1], mask=mask, other=0.0)
        other = a
        if SMALL.other_stride is not None:
            other = tl.load(other_rows[None, :] + s[:, None] * SMALL.other_stride[1], mask=mask, other=0.0)
        a = prologue(a, other, mask, s[:, None], 0, small, slope, per_count, SMALL)

        h = (p * KERNEL[2])[:, None] + dh
        w = (q * KERNEL[2])[:, None] + dw
        valid = (
            inside[:, None] & (h >= 0) & (h < LARGE.size[1]) & (w >= 0) & (w < LARGE.size[2]) & valid_column
        )
        large_at, other_at = row_pointers(large, n[:, None], h, w, LARGE)
        b = tl.load(large_at + channel * LARGE.stride[1], mask=valid, other=0.0)  # [BLOCK_K, BLOCK_N]
        other = b
        if LARGE.other_stride is not None:
            other = tl.load(other_at + channel * LARGE.other_stride[1], mask=valid, other=0.0)
        b = prologue(b, other, valid, channel, 0, large, slope, per_count, LARGE)
        acc = tl.dot(a, b, acc, input_precision=SPEC.precision)

    partial = partial_ptr + ((split * TAPS + tap) * C_SMALL + s[:, None]) * C_LARGE + channel
    tl.store(partial, acc, mask=(s < C_SMALL)[:, None] & valid_column)


@triton.jit
def _patch_at(step, end, large, dh, dw, channel, valid_column, SPEC: tl.constexpr, KERNEL: tl.constexpr):
    """Return (pointers into the image, into its second tensor, valid) of a K step's patches.

    They are [BLOCK_N·BLOCK_K], pixels varying fastest. The layout of a one-dimensional load does not depend
    on what Triton infers about strides: the lanes of a warp always read one tap of neighbouring pixels.
    """
    SMALL: tl.constexpr = SPEC.x
    LARGE: tl.constexpr = SPEC.y
    if SPEC.wide:
        step = tl.cast(step, tl.int64)
    m = step * SPEC.block_k + tl.arange(0, SPEC.block_n * SPEC.block_k) % SPEC.block_k
    n, p, q = m // (SMALL.size[1] * SMALL.size[2]), (m // SMALL.size[2]) % SMALL.size[1], m % SMALL.size[2]
    h, w = p * KERNEL[2] + dh, q * KERNEL[2] + dw
    valid = (m < end) & (h >= 0) & (h < LARGE.size[1]) & (w >= 0) & (w < LARGE.size[2]) & valid_column
    at, other_at = row_pointers(large, n, h, w, LARGE)
    at += channel * LARGE.stride[1]
    if LARGE.other_stride is not None:
        other_at += channel * LARGE.other_stride[1]
    return at, other_at, valid


@triton.jit
def _wgrad_narrow_kernel(
    small, large, partial_ptr, M, slope, per_count,
    SPEC: tl.constexpr, KERNEL: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    SMALL: tl.constexpr = SPEC.x
    LARGE: tl.constexpr = SPEC.y
    BLOCK_M: tl.constexpr = SPEC.block_m
    BLOCK_N: tl.constexpr = SPEC.block_n
    BLOCK_K: tl.constexpr = SPEC.block_k
    pid = tl.program_id(0)
    if SPEC.wide:
        pid = tl.cast(pid, tl.int64)
    C_SMALL: tl.constexpr = SMALL.size[0]
    C_LARGE: tl.constexpr = LARGE.size[0]
    K_W: tl.constexpr = KERNEL[1]
    TAPS: tl.constexpr = KERNEL[0] * K_W
    ROW_TILES: tl.constexpr = (C_SMALL + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (TAPS * C_LARGE + BLOCK_N - 1) // BLOCK_N
    split = pid // (ROW_TILES * COLUMN_TILES)
    s = ((pid // COLUMN_TILES) % ROW_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (pid % COLUMN_TILES) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N * BLOCK_K) // BLOCK_K
    channel = column // TAPS
    valid_column = channel < C_LARGE
    dh = column % TAPS // K_W - KERNEL[3]
    dw = column % K_W - KERNEL[3]

    steps = (M + BLOCK_K - 1) // BLOCK_K
    steps_per_split = (steps + SPLITS - 1) // SPLITS
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    end = tl.minimum(M, last * BLOCK_K)  # so that the last step prefetches nothing
    at, other_at, valid = _patch_at(first, end, large, dh, dw, channel, valid_column, SPEC, KERNEL)
    patch = tl.load(at, mask=valid, other=0.0)
    other = patch
    if LARGE.other_stride is not None:
        other = tl.load(other_at, mask=valid, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, last):
        _, _, valid = _patch_at(step, end, large, dh, dw, channel, valid_column, SPEC, KERNEL)
        if LARGE.other_stride is None:
            other = patch
        b = prologue(patch, other, valid, channel, 0, large, slope, per_count, LARGE)
        at, other_at, valid = _patch_at(step + 1, end, large, dh, dw, channel, valid_column, SPEC, KERNEL)
        patch = tl.load(at, mask=valid, other=0.0)
        if LARGE.other_stride is not None:
            other = tl.load(other_at, mask=valid, other=0.0)

        inside, _, n, p, q = rows(step, end, SMALL.size[1], SMALL.size[2], BLOCK_K, SPEC.wide)
        small_rows, other_rows = row_pointers(small, n, p, q, SMALL)
        mask = inside[:, None] & (s < C_SMALL)[None, :]  # [BLOCK_K, BLOCK_M]
        a = load(small_rows, other_rows, 0, 0, s, 0, mask, small, slope, per_count, SMALL)
        acc = tl.dot(tl.reshape(b, (BLOCK_N, BLOCK_K)), a, acc, input_precision=SPEC.precision)

    column = first_column + tl.arange(0, BLOCK_N)[:, None]
    channel = column // TAPS
    partial = partial_ptr + ((split * TAPS + column % TAPS) * C_SMALL + s[None, :]) * C_LARGE
    if C_LARGE > 1:  # otherwise the stores are 16 bytes wide
        partial += channel
    tl.store(partial, acc, mask=(channel < C_LARGE) & (s < C_SMALL)[None, :])


def _sides(spec: ConvSpec) -> tuple[Operand, Operand]:
    """Return (small, large)."""
    return (spec.x, spec.y) if spec.transposed else (spec.y, spec.x)


@functools.lru_cache(maxsize=MAX_PLANS)
def problem(spec: ConvSpec) -> Problem:
    """Return the GEMM sizes: rows C_small, columns (tap, l), depth the pixels."""
    c_small, c_large, k_h, k_w = spec.weight
    narrow = c_large <= NARROW
    small, large = _sides(spec)
    pixels = spec.images * small.size[1] * small.size[2]
    return Problem(
        "wgrad_narrow" if narrow else "wgrad",
        spec.precision,
        c_small,
        k_h * k_w * (c_large if narrow else next_power_of_two(c_large)),
        pixels,
        pixels,
        1,
        f"{small.function}+{large.function}",
        (spec.images * math.prod(small.size), spec.images * math.prod(large.size)),
    )


def _tensors(it: Product, packed: Tensor | None, partial: Tensor | None) -> dict[str, Any]:
    assert partial is not None
    small, large = (it.x, it.y) if it.spec.transposed else (it.y, it.x)
    return {"small": present(small, partial), "large": present(large, partial), "partial_ptr": partial}


def launch(it: Product, packed: Tensor | None, partial: Tensor | None, tile: Tile) -> Launch:
    """Return the launch of partial [splits, kH·kW, C_small, C_large] float32 from both operands."""
    spec, sizes = it.spec, problem(it.spec)
    assert partial is not None
    small, large = _sides(spec)
    splits = partial.shape[0]
    scalars = {"M": sizes.depth, "slope": float(spec.slope), "per_count": per_count(spec)}
    constants = {
        "SPEC": constants_of(spec, small, large, sizes.depth, tile),
        "KERNEL": (*spec.weight[2:], spec.stride, spec.padding),
        "SPLITS": splits,
    }
    kernel = _wgrad_narrow_kernel
    if sizes.kernel == "wgrad":
        kernel = _wgrad_kernel
        constants["PADDED"] = next_power_of_two(spec.weight[1])
    tensors = _tensors(it, packed, partial)
    count = programs(tile, sizes) * splits
    return Launch(kernel, count, tensors, scalars, constants, tile.num_warps, tile.num_stages)


def _partial(spec: ConvSpec, tile: Tile, sms: int) -> tuple[int, ...]:
    c_small, c_large, k_h, k_w = spec.weight
    return cost_model.splits(problem(spec), tile, sms), k_h * k_w, c_small, c_large


WGRAD = register(Kernel("wgrad", lambda spec: spec.kind == "wgrad", problem, _tensors, launch, _partial))
