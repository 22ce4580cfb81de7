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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cost_model, packing
from .device_functions import prologue, rows
from .launch import Launch, Prologue, operand, operand_constants, precision, wide
from .tiles import Problem, Tile, next_power_of_two, programs


@triton.jit
def _wgrad_kernel(
    small_ptr,
    small_other_ptr,
    small_center_ptr,
    small_scale_ptr,
    small_shift_ptr,
    large_ptr,
    large_other_ptr,
    large_center_ptr,
    large_scale_ptr,
    large_shift_ptr,
    partial_ptr,  # [SPLITS, K_H·K_W, C_SMALL, C_LARGE]
    M,
    slope,
    per_count,
    SIZE_SMALL: tl.constexpr,  # C, H, W
    SIZE_LARGE: tl.constexpr,
    KERNEL: tl.constexpr,  # K_H, K_W, stride, padding
    SMALL_STRIDE: tl.constexpr,  # N, C, H, W
    SMALL_OTHER_STRIDE: tl.constexpr,
    LARGE_STRIDE: tl.constexpr,
    LARGE_OTHER_STRIDE: tl.constexpr,
    SMALL_PROLOGUE: tl.constexpr,
    SMALL_ACT: tl.constexpr,
    SMALL_SCALED: tl.constexpr,
    LARGE_PROLOGUE: tl.constexpr,
    LARGE_ACT: tl.constexpr,
    LARGE_SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,  # C_LARGE
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    C_SMALL: tl.constexpr = SIZE_SMALL[0]
    C_LARGE: tl.constexpr = SIZE_LARGE[0]
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
        inside, n, p, q = rows(step, M, SIZE_SMALL[1], SIZE_SMALL[2], BLOCK_K, WIDE)
        mask = inside[:, None] & (s < C_SMALL)[None, :]
        at = n * SMALL_STRIDE[0] + p * SMALL_STRIDE[2] + q * SMALL_STRIDE[3]
        small = tl.load(small_ptr + at[:, None] + s[None, :] * SMALL_STRIDE[1], mask=mask, other=0.0)
        other = small  # [BLOCK_K, BLOCK_M]
        if SMALL_PROLOGUE == "gradient" or SMALL_PROLOGUE == "statistics":
            at = n * SMALL_OTHER_STRIDE[0] + p * SMALL_OTHER_STRIDE[2] + q * SMALL_OTHER_STRIDE[3]
            other_at = small_other_ptr + at[:, None] + s[None, :] * SMALL_OTHER_STRIDE[1]
            other = tl.load(other_at, mask=mask, other=0.0)
        small = prologue(
            small, other, mask, s[None, :], small_center_ptr, small_scale_ptr, small_shift_ptr, slope,
            per_count, C_SMALL, SMALL_PROLOGUE, SMALL_ACT, SMALL_SCALED,
        )  # fmt: skip

        h = (p * KERNEL[2])[:, None] + dh
        w = (q * KERNEL[2])[:, None] + dw
        valid = (
            inside[:, None] & (h >= 0) & (h < SIZE_LARGE[1]) & (w >= 0) & (w < SIZE_LARGE[2]) & valid_column
        )
        at = (
            n[:, None] * LARGE_STRIDE[0]
            + h * LARGE_STRIDE[2]
            + w * LARGE_STRIDE[3]
            + channel * LARGE_STRIDE[1]
        )
        large = tl.load(large_ptr + at, mask=valid, other=0.0)  # [BLOCK_K, BLOCK_N]
        other = large
        if LARGE_PROLOGUE == "gradient" or LARGE_PROLOGUE == "statistics":
            at = n[:, None] * LARGE_OTHER_STRIDE[0] + channel * LARGE_OTHER_STRIDE[1]
            at += h * LARGE_OTHER_STRIDE[2] + w * LARGE_OTHER_STRIDE[3]
            other = tl.load(large_other_ptr + at, mask=valid, other=0.0)
        large = prologue(
            large, other, valid, channel, large_center_ptr, large_scale_ptr, large_shift_ptr, slope,
            per_count, C_LARGE, LARGE_PROLOGUE, LARGE_ACT, LARGE_SCALED,
        )  # fmt: skip
        acc = tl.dot(tl.trans(small), large, acc, input_precision=PRECISION)

    partial = partial_ptr + ((split * TAPS + tap) * C_SMALL + s[:, None]) * C_LARGE + channel
    tl.store(partial, acc, mask=(s < C_SMALL)[:, None] & valid_column)


class Gradient(NamedTuple):
    """One weight gradient: its two operands with their prologues, and the geometry of the weight."""

    small: Tensor
    large: Tensor
    small_prologue: Prologue
    large_prologue: Prologue
    shape: tuple[int, int, int, int]
    """[C_small, C_large, kH, kW]"""
    slope: float = 0.0
    stride: int = 2
    padding: int = 1


def problem(gradient: Gradient) -> Problem:
    """Return the GEMM sizes: rows C_small, columns (tap, l), depth the pixels."""
    c_small, c_large, k_h, k_w = gradient.shape
    n, _, h, w = gradient.small.shape
    return Problem(
        "wgrad_narrow" if c_large <= packing.NARROW else "wgrad",
        precision(gradient.small.dtype),
        c_small,
        k_h * k_w * next_power_of_two(c_large),
        n * h * w,
        n * h * w,
        1,
        f"{gradient.small_prologue.kind}+{gradient.large_prologue.kind}",
        (gradient.small.numel(), gradient.large.numel()),
    )


def launch(gradient: Gradient, partial: Tensor, tile: Tile) -> Launch:
    """Return the launch of partial [splits, kH·kW, C_small, C_large] float32 from both operands."""
    small, large = gradient.small, gradient.large
    sizes = problem(gradient)
    first, second = gradient.small_prologue, gradient.large_prologue
    arguments = operand("small", small, first, absent=partial) | operand(
        "large", large, second, absent=partial
    )
    # Only du's prologue uses per_count, with the number of du's pixels.
    du = small if first.kind == "statistics" else large
    arguments |= {
        "partial_ptr": partial,
        "M": sizes.depth,
        "slope": float(gradient.slope),
        "per_count": 1.0 / max(du.numel() // du.shape[1], 1)
        if "statistics" in (first.kind, second.kind)
        else 0.0,
    }
    constants = operand_constants("small", small, first) | operand_constants("large", large, second)
    constants |= {
        "SIZE_SMALL": tuple(small.shape[1:]),
        "SIZE_LARGE": tuple(large.shape[1:]),
        "KERNEL": (*gradient.shape[2:], gradient.stride, gradient.padding),
        "PRECISION": "tf32" if precision(small.dtype) == "tf32" else "ieee",
        "WIDE": wide(small, large, first.other, second.other, count=sizes.depth),
        "SPLITS": partial.shape[0],
        "PADDED": next_power_of_two(gradient.shape[1]),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    return Launch(_wgrad_kernel, programs(tile, sizes) * partial.shape[0], arguments, constants, tile)


def partials(gradient: Gradient, tile: Tile, sm_count: int) -> Tensor:
    """Allocate the split-K partials of a launch."""
    c_small, c_large, k_h, k_w = gradient.shape
    count = cost_model.splits(problem(gradient), tile, sm_count)
    return torch.empty(count, k_h * k_w, c_small, c_large, dtype=torch.float32, device=gradient.small.device)
