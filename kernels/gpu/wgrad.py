"""wgrad: the weight gradient of either convolution, as a product over pixels.

A convolution and a transposed convolution are adjoints of each other, so one formula serves both. Of x̂ (the
input after its prologue) and du (the output's gradient after its prologue), ``small`` is the one with fewer
pixels: du for a convolution, x̂ for a transposed one.

    dw[s, l, kh, kw] = Σ_{n,p,q} small[n, p, q, s] · large[n, S·p-P+kh, S·q-P+kw, l]

which is PyTorch's weight layout for either, [C_out, C_in, kH, kW] or [C_in, C_out, kH, kW]. M = C_small rows,
columns (tap, l) with l padded to a power of two, and K = the N·H·W pixels of ``small``, with split-K (SPLITS)
where the output tiles alone would not fill the GPU. A program computes one [BLOCK_M, BLOCK_N] tile of one
split; if C_large is smaller than BLOCK_N, the tile spans several taps, for an image all of them. Programs of
one split run concurrently and share its pixels in L2.

Reads both operands at any strides; writes float32 split-K partials [SPLITS, taps, C_small, C_large], each
once. :mod:`.reduce` adds them in a fixed order, so the result does not depend on scheduling.
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
        mask = inside[:, None] & (s < C_SMALL)[None, :]  # [BLOCK_K, BLOCK_M]
        a = load(small_rows, other_rows, 0, 0, s, 0, mask, small, slope, per_count, SMALL)

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
        acc = tl.dot(tl.trans(a), b, acc, input_precision=SPEC.precision)

    partial = partial_ptr + ((split * TAPS + tap) * C_SMALL + s[:, None]) * C_LARGE + channel
    tl.store(partial, acc, mask=(s < C_SMALL)[:, None] & valid_column)


def _sides(spec: ConvSpec) -> tuple[Operand, Operand]:
    """Return (small, large)."""
    return (spec.x, spec.y) if spec.transposed else (spec.y, spec.x)


@functools.lru_cache(maxsize=MAX_PLANS)
def problem(spec: ConvSpec) -> Problem:
    """Return the GEMM sizes: rows C_small, columns (tap, l), depth the pixels."""
    c_small, c_large, k_h, k_w = spec.weight
    small, large = _sides(spec)
    pixels = spec.images * small.size[1] * small.size[2]
    return Problem(
        "wgrad_narrow" if c_large <= NARROW else "wgrad",
        spec.precision,
        c_small,
        k_h * k_w * next_power_of_two(c_large),
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
        "PADDED": next_power_of_two(spec.weight[1]),
    }
    tensors = _tensors(it, packed, partial)
    count = programs(tile, sizes) * splits
    return Launch(_wgrad_kernel, count, tensors, scalars, constants, tile.num_warps, tile.num_stages)


def _partial(spec: ConvSpec, tile: Tile, sms: int) -> tuple[int, ...]:
    c_small, c_large, k_h, k_w = spec.weight
    return cost_model.splits(problem(spec), tile, sms), k_h * k_w, c_small, c_large


WGRAD = register(Kernel("wgrad", lambda spec: spec.kind == "wgrad", problem, _tensors, launch, _partial))
