"""Reduction of per-tile partials and split-K partials, in a fixed order.

    statistics   mean[c] = Σ_t n_t·mean_t[c] / N,   var[c] = (Σ_t M2_t[c] + n_t·(mean_t[c] - mean[c])²) / N,
                 N = Σ_t n_t
    sums         dshift[c] = Σ_t Σg,   dscale[c] = Σ_t Σg·(x - center),   dcenter[c] = -scale[c]·dshift[c]
    split_k      dw[s, l, tap] = Σ_split partial[split, tap, s, l]

``statistics`` is Chan, Golub and LeVeque's merge of per-tile means and squared deviations; unlike
E[y²] - E[y]² it does not cancel. There are no atomics: the same tiles give the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launcher import Launch, run_planned
from .tiles import next_power_of_two

BLOCK_C = 8  # channels per program: one 32-byte sector of a row, and many programs
MERGE_WARPS = 8  # few programs, which need many loads in flight
SECTOR = 8  # split-K: float32 numbers per sector, at least so many adjacent ones are read
LOADS = 4096  # split-K partials that a program loads at once: 8 × 16 bytes per thread
OUTPUTS = 1024  # gradients that a program computes at most


@triton.jit
def merge_statistics(
    partial_ptr, plane, tiles, c, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return (mean, var) for channels c [BLOCK_C] from rows [tiles, C] of means, squares and counts.

    These are ``plane`` elements apart. Each of BLOCK_T lanes merges every BLOCK_T-th row into its own mean
    and squares, so that partials are read once, and the lanes are merged last.
    """
    count = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & (c < C)[None, :]
        at = partial_ptr + t[:, None] * C + c[None, :]
        added = tl.load(at + 2 * plane, mask=mask, other=0.0)
        difference = tl.load(at, mask=mask, other=0.0) - mean
        share = added / tl.maximum(count + added, 1.0)
        mean += difference * share
        squares += tl.load(at + plane, mask=mask, other=0.0) + difference * difference * count * share
        count += added
    rows = tl.sum(count, axis=0)
    of_all = tl.sum(mean * count, axis=0) / tl.maximum(rows, 1.0)  # there are none beyond C
    deviation = mean - of_all[None, :]
    return of_all, tl.sum(squares + count * deviation * deviation, axis=0) / tl.maximum(rows, 1.0)


@triton.jit
def merge_sums(partial_ptr, plane, tiles, c, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the two sums over rows [tiles, C] for channels c [BLOCK_C]; the second is ``plane`` further."""
    first = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    second = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & (c < C)[None, :]
        at = partial_ptr + t[:, None] * C + c[None, :]
        first += tl.load(at, mask=mask, other=0.0)
        second += tl.load(at + plane, mask=mask, other=0.0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def _statistics_kernel(
    partial_ptr,  # [3, TILES, C]
    mean_ptr,
    var_ptr,
    TILES,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, var = merge_statistics(partial_ptr, TILES * C, TILES, c, C, BLOCK_T, BLOCK_C)
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)


@triton.jit
def _sums_kernel(
    partial_ptr,  # [2, TILES, C]
    scale_ptr,
    dcenter_ptr,
    dscale_ptr,
    dshift_ptr,
    TILES,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dshift, dscale = merge_sums(partial_ptr, TILES * C, TILES, c, C, BLOCK_T, BLOCK_C)
    tl.store(dshift_ptr + c, dshift, mask=c < C)
    tl.store(dscale_ptr + c, dscale, mask=c < C)
    tl.store(dcenter_ptr + c, -tl.load(scale_ptr + c, mask=c < C, other=0.0) * dshift, mask=c < C)


@triton.jit
def _split_k_kernel(
    partial_ptr,  # [SPLITS, K_H·K_W, C_SMALL·C_LARGE]
    dw_ptr,
    SIZE: tl.constexpr,  # C_small, C_large, K_H, K_W
    STRIDE: tl.constexpr,  # of dw
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    ELEMENTS: tl.constexpr = SIZE[0] * SIZE[1]
    TAPS: tl.constexpr = SIZE[2] * SIZE[3]
    ELEMENT_TILES: tl.constexpr = (ELEMENTS + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    tap = (pid // ELEMENT_TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = (pid % ELEMENT_TILES) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (tap < TAPS)[:, None] & (e < ELEMENTS)[None, :]
    column = tap[:, None] * ELEMENTS + e[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_T, BLOCK_E), dtype=tl.float32)
    for start in range(0, SPLITS, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = partial_ptr + split[:, None, None] * (TAPS * ELEMENTS) + column[None, :, :]
        acc += tl.load(at, mask=(split < SPLITS)[:, None, None] & mask[None, :, :], other=0.0)
    at = (e // SIZE[1]) * STRIDE[0] + (e % SIZE[1]) * STRIDE[1]
    at = at[None, :] + ((tap // SIZE[3]) * STRIDE[2] + (tap % SIZE[3]) * STRIDE[3])[:, None]
    tl.store(dw_ptr + at, tl.sum(acc, axis=0).to(dw_ptr.dtype.element_ty), mask=mask)


def rows_per_step(tiles: int) -> int:
    """Return the rows of partial sums that a program loads at once."""
    return min(1024, next_power_of_two(tiles))


def statistics_launch(partial: Tensor, mean: Tensor, var: Tensor) -> Launch:
    """Return the launch of mean, var [C] from partial [3, T, C]."""
    tiles, channels = partial.shape[1:]
    tensors: dict[str, Any] = {"partial_ptr": partial, "mean_ptr": mean, "var_ptr": var}
    constants = {"C": channels, "BLOCK_T": rows_per_step(tiles), "BLOCK_C": BLOCK_C}
    count = -(-channels // BLOCK_C)
    return Launch(_statistics_kernel, count, tensors, {"TILES": tiles}, constants, MERGE_WARPS)


def statistics(partial: Tensor, mean: Tensor, var: Tensor) -> None:
    """Merge partial [3, T, C] into mean and var [C]."""
    tensors = (partial, mean, var)
    run_planned(("statistics", partial.shape, partial.device), tensors, lambda: statistics_launch(*tensors))


def sums_launch(partial: Tensor, scale: Tensor, dcenter: Tensor, dscale: Tensor, dshift: Tensor) -> Launch:
    """Return the launch of dcenter, dscale, dshift [C] from partial [2, T, C]."""
    tiles, channels = partial.shape[1:]
    tensors: dict[str, Any] = {"partial_ptr": partial, "scale_ptr": scale}
    tensors |= {"dcenter_ptr": dcenter, "dscale_ptr": dscale, "dshift_ptr": dshift}
    constants = {"C": channels, "BLOCK_T": rows_per_step(tiles), "BLOCK_C": BLOCK_C}
    count = -(-channels // BLOCK_C)
    return Launch(_sums_kernel, count, tensors, {"TILES": tiles}, constants, MERGE_WARPS)


def sums(partial: Tensor, scale: Tensor, dcenter: Tensor, dscale: Tensor, dshift: Tensor) -> None:
    """Add up partial [2, T, C] and write dcenter, dscale, dshift [C]."""
    tensors = (partial, scale, dcenter, dscale, dshift)
    run_planned(("sums", partial.shape, partial.device), tensors, lambda: sums_launch(*tensors))


def split_k_launch(partial: Tensor, dw: Tensor) -> Launch:
    """Return the launch of dw [C_small, C_large, kH, kW] from partial [splits, kH·kW, C_small, C_large].

    dw may have any strides and dtype. A program loads up to 512 splits at once. The more there are, the fewer
    gradients it computes, so that many splits of a small weight occupy the GPU as well.
    """
    splits, elements, taps = partial.shape[0], dw.shape[0] * dw.shape[1], dw.shape[2] * dw.shape[3]
    block_s = min(next_power_of_two(splits), LOADS // SECTOR)
    outputs = min(LOADS // block_s, OUTPUTS)
    block_e = min(max(SECTOR, outputs // next_power_of_two(taps)), next_power_of_two(elements))
    block_t = min(outputs // block_e, next_power_of_two(taps))
    constants = {"SIZE": tuple(dw.shape), "STRIDE": dw.stride(), "SPLITS": splits}
    constants |= {"BLOCK_S": block_s, "BLOCK_T": block_t, "BLOCK_E": block_e}
    count = -(-elements // block_e) * -(-taps // block_t)
    return Launch(_split_k_kernel, count, {"partial_ptr": partial, "dw_ptr": dw}, {}, constants)


def split_k(partial: Tensor, dw: Tensor) -> None:
    """Add up split-K partials and write the weight gradient."""
    key = ("split_k", partial.shape, partial.device, dw.shape, dw.stride(), dw.dtype)
    run_planned(key, (partial, dw), lambda: split_k_launch(partial, dw))
