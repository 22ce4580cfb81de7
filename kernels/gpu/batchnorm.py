"""BatchNorm in a network's training: everything between two products, as four small kernels.

    forward    mean, var[group, c] from a product's partial statistics;  s = gamma·rsqrt(var + eps)
    apply      x̂ = act((y - mean)·s + beta)
    backward   with S_1 = Σ g and S_2 = Σ g·(y - mean) from a product's partial sums, r = rsqrt(var + eps):
               dbeta = S_1;  dgamma = r·S_2;  factor = -r²·S_2/M;  offset = -S_1/M     over M pixels
               du = s·(g + offset + (y - mean)·factor)
    track      running statistics, of all layers in one launch

``forward`` and ``backward`` are launches of C/8 programs on vectors. ``apply`` is one sweep over two maps
that computes du of a layer, which its dgrad and wgrad read, and x̂, which the next layer's wgrad reads; du may
overwrite g. All arithmetic is float32; du and x̂ are rounded once.

Vectors are [groups, C], and sums are those of each group alone. ``stats`` is [4, groups, C]: mean, var, s and
beta, as :mod:`..train_chain` returns them; ``coefficients`` is [2, groups, C]: factor and offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device_functions import activate, rows
from .launcher import INT32_MAX, Launch, run_planned
from .reduce import BLOCK_C, MERGE_WARPS, merge_statistics, merge_sums, rows_per_step
from .tiles import next_power_of_two, row_tiles


@triton.jit
def _reciprocal_root(x):
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def _forward_kernel(
    partial_ptr,  # [3, TILES, C]
    gamma_ptr,
    beta_ptr,
    stats_ptr,  # [4, GROUPS, C]
    TILES,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    AFFINE: tl.constexpr,  # (has gamma, has beta)
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0) % GROUPS
    c = (tl.program_id(0) // GROUPS) * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = TILES // GROUPS
    own = partial_ptr + group * tiles * C
    mean, var = merge_statistics(own, TILES * C, tiles, c, C, BLOCK_T, BLOCK_C)
    mask = c < C
    scale = _reciprocal_root(var + eps)
    shift = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if AFFINE[0]:
        scale = scale * tl.load(gamma_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if AFFINE[1]:
        shift = tl.load(beta_ptr + c, mask=mask, other=0.0).to(tl.float32)
    at = stats_ptr + group * C + c
    tl.store(at, mean, mask=mask)
    tl.store(at + GROUPS * C, var, mask=mask)
    tl.store(at + 2 * GROUPS * C, scale, mask=mask)
    tl.store(at + 3 * GROUPS * C, shift, mask=mask)


@triton.jit
def _backward_kernel(
    partial_ptr,  # [2, TILES, C]
    stats_ptr,  # [4, GROUPS, C]
    coefficients_ptr,  # [2, GROUPS, C]
    dgamma_ptr,
    dbeta_ptr,
    TILES,
    per_count,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    NEEDED: tl.constexpr,  # (dgamma, dbeta)
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    tiles = TILES // GROUPS
    dgamma = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dbeta = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for group in range(0, GROUPS):
        own = partial_ptr + group * tiles * C
        first, second = merge_sums(own, TILES * C, tiles, c, C, BLOCK_T, BLOCK_C)
        var = tl.load(stats_ptr + (GROUPS + group) * C + c, mask=mask, other=1.0)
        root = _reciprocal_root(var + eps)
        second = second * root
        dgamma += second
        dbeta += first
        at = coefficients_ptr + group * C + c
        tl.store(at, -(second * root * per_count), mask=mask)
        tl.store(at + GROUPS * C, -(first * per_count), mask=mask)
    if NEEDED[0]:
        tl.store(dgamma_ptr + c, dgamma.to(dgamma_ptr.dtype.element_ty), mask=mask)
    if NEEDED[1]:
        tl.store(dbeta_ptr + c, dbeta.to(dbeta_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _apply_kernel(
    g_ptr,  # [M, C], as are y, du and x̂
    y_ptr,
    stats_ptr,  # [4, GROUPS, C]
    coefficients_ptr,  # [2, GROUPS, C]
    du_ptr,
    x_ptr,
    M,
    slope,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    ACT: tl.constexpr,
    WANTED: tl.constexpr,  # (du, x̂)
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_TILES
    inside, group, pixel, _, _ = rows(tile, M, 1, 1, BLOCK_M, WIDE, GROUPS)
    c = (tl.program_id(0) % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_channel = c < C
    mask = inside[:, None] & of_channel[None, :]
    at = pixel[:, None] * C + c[None, :]
    vectors = stats_ptr + group * C + c
    mean = tl.load(vectors, mask=of_channel, other=0.0)
    scale = tl.load(vectors + 2 * GROUPS * C, mask=of_channel, other=0.0)
    y = tl.load(y_ptr + at, mask=mask, other=0.0)
    centred = y.to(tl.float32) - mean[None, :]
    if WANTED[0]:
        vectors = coefficients_ptr + group * C + c
        factor = tl.load(vectors, mask=of_channel, other=0.0)
        offset = tl.load(vectors + GROUPS * C, mask=of_channel, other=0.0)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        du = scale[None, :] * (g + offset[None, :] + centred * factor[None, :])
        tl.store(du_ptr + at, du.to(y.dtype), mask=mask)
    if WANTED[1]:
        shift = tl.load(stats_ptr + 3 * GROUPS * C + group * C + c, mask=of_channel, other=0.0)
        x = activate(centred * scale[None, :] + shift[None, :], slope, ACT)
        tl.store(x_ptr + at, x.to(y.dtype), mask=mask)


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp, which is exact for weight 0 and 1."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - (1.0 - weight) * difference)


@triton.jit
def _track_layer(
    mean_ptr,
    var_ptr,
    batches_ptr,
    stats_ptr,
    C: tl.constexpr,
    MOMENTUM: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    seen = tl.load(batches_ptr)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = c < C
        mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
        var = tl.load(var_ptr + c, mask=mask, other=0.0)
        for group in tl.static_range(GROUPS):
            weight = tl.full((), MOMENTUM, tl.float32)
            if MOMENTUM < 0:
                weight = tl.div_rn(1.0, (seen + group + 1).to(tl.float32))
            at = stats_ptr + group * C + c
            values = tl.load(at, mask=mask, other=0.0)
            unbiased = tl.load(at + GROUPS * C, mask=mask, other=0.0) * (COUNT / (COUNT - 1))
            # Rounded to the dtype after each group, as that many calls would.
            mean = _lerp(mean.to(tl.float32), values, weight).to(mean.dtype)
            var = _lerp(var.to(tl.float32), unbiased, weight).to(var.dtype)
        tl.store(mean_ptr + c, mean, mask=mask)
        tl.store(var_ptr + c, var, mask=mask)
    tl.debug_barrier()  # all threads have read the number of batches
    tl.store(batches_ptr, seen + GROUPS)


@triton.jit
def _track_kernel(
    means,
    variances,
    batches,
    stats,
    C: tl.constexpr,  # of every layer, as the two below
    MOMENTUM: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    for i in tl.static_range(len(C)):  # one program a layer
        if tl.program_id(0) == i:
            of_layer = means[i], variances[i], batches[i], stats[i]
            _track_layer(*of_layer, C[i], MOMENTUM[i], COUNT[i], GROUPS, BLOCK_C)


# --- launches -----------------------------------------------------------------------------------------------


def forward_launch(
    partial: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, stats: Tensor
) -> Launch:
    """Return the launch of stats [4, groups, C] from partial [3, T, C], group after group."""
    channels, groups, tiles = partial.shape[2], stats.shape[1], partial.shape[1]
    tensors: dict[str, Any] = {
        "partial_ptr": partial,
        "gamma_ptr": stats if gamma is None else gamma,
        "beta_ptr": stats if beta is None else beta,
        "stats_ptr": stats,
    }
    constants = {
        "C": channels,
        "GROUPS": groups,
        "AFFINE": (gamma is not None, beta is not None),
        "BLOCK_T": rows_per_step(tiles // groups),
        "BLOCK_C": BLOCK_C,
    }
    scalars: dict[str, int | float] = {"TILES": tiles, "eps": float(eps)}
    count = -(-channels // BLOCK_C) * groups
    return Launch(_forward_kernel, count, tensors, scalars, constants, MERGE_WARPS)


def forward(partial: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, stats: Tensor) -> None:
    """Merge a product's partial statistics into stats [4, groups, C]; gamma and beta [C], any dtype."""
    gamma, beta = (None if v is None else v.contiguous() for v in (gamma, beta))
    dtypes = tuple(None if v is None else v.dtype for v in (gamma, beta))
    key = ("batchnorm", partial.shape, stats.shape, stats.device, dtypes, eps)
    tensors = (partial, *(stats if v is None else v for v in (gamma, beta)), stats)
    run_planned(key, tensors, lambda: forward_launch(partial, gamma, beta, eps, stats))


def backward_launch(
    sums: Tensor,
    stats: Tensor,
    coefficients: Tensor,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    pixels: int,
    eps: float,
) -> Launch:
    """Return the launch of coefficients [2, groups, C] and, unless None, dgamma and dbeta [C]."""
    tiles, channels, groups = sums.shape[1], sums.shape[2], stats.shape[1]
    tensors: dict[str, Any] = {
        "partial_ptr": sums,
        "stats_ptr": stats,
        "coefficients_ptr": coefficients,
        "dgamma_ptr": coefficients if dgamma is None else dgamma,
        "dbeta_ptr": coefficients if dbeta is None else dbeta,
    }
    scalars: dict[str, int | float] = {"TILES": tiles, "per_count": 1.0 / pixels, "eps": float(eps)}
    constants = {
        "C": channels,
        "GROUPS": groups,
        "NEEDED": (dgamma is not None, dbeta is not None),
        "BLOCK_T": rows_per_step(tiles // groups),
        "BLOCK_C": BLOCK_C,
    }
    return Launch(_backward_kernel, -(-channels // BLOCK_C), tensors, scalars, constants, MERGE_WARPS)


def backward(
    sums: Tensor,
    stats: Tensor,
    coefficients: Tensor,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    pixels: int,
    eps: float,
) -> None:
    """Merge a product's partial sums [2, T, C]; ``pixels`` is M, the number of pixels of a group."""
    dtypes = tuple(None if v is None else v.dtype for v in (dgamma, dbeta))
    key = ("dbatchnorm", sums.shape, stats.shape, stats.device, dtypes, pixels, eps)
    results = (coefficients if v is None else v for v in (dgamma, dbeta))
    run_planned(
        key,
        (sums, stats, coefficients, *results),
        lambda: backward_launch(sums, stats, coefficients, dgamma, dbeta, pixels, eps),
    )


def apply_launch(
    g: Tensor | None,
    y: Tensor,
    stats: Tensor,
    coefficients: Tensor | None,
    x: Tensor | None,
    act: str,
    slope: float,
) -> Launch:
    """Return the launch that overwrites g with du, and writes x̂; either may be None."""
    channels, groups = stats.shape[2], stats.shape[1]
    pixels = y.numel() // channels
    block_n = min(64, next_power_of_two(channels))
    block_m = 4096 // block_n
    tensors: dict[str, Any] = {
        "g_ptr": y if g is None else g,
        "y_ptr": y,
        "stats_ptr": stats,
        "coefficients_ptr": stats if coefficients is None else coefficients,
        "du_ptr": y if g is None else g,
        "x_ptr": y if x is None else x,
    }
    constants = {
        "C": channels,
        "GROUPS": groups,
        "ACT": act,
        "WANTED": (g is not None, x is not None),
        "WIDE": (pixels + block_m) * channels > INT32_MAX,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    scalars: dict[str, int | float] = {"M": pixels, "slope": float(slope)}
    count = row_tiles(pixels, block_m, groups) * -(-channels // block_n)
    return Launch(_apply_kernel, count, tensors, scalars, constants)


def apply(
    g: Tensor | None,
    y: Tensor,
    stats: Tensor,
    coefficients: Tensor | None,
    x: Tensor | None,
    act: str,
    slope: float,
) -> None:
    """Overwrite g with du and write x̂, unless None; the maps are dense NHWC, [N, C, H, W]."""
    key = ("apply", y.shape, y.dtype, y.device, stats.shape, g is None, x is None, act, slope)
    du = y if g is None else g
    rest = (stats, stats if coefficients is None else coefficients, du, y if x is None else x)
    run_planned(key, (du, y, *rest), lambda: apply_launch(g, y, stats, coefficients, x, act, slope))


def track_launch(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    batches: Sequence[Tensor],
    stats: Sequence[Tensor],
    momentum: Sequence[float],
    count: Sequence[int],
) -> Launch:
    """Return the launch that updates the running statistics of every layer."""
    channels = [s.shape[2] for s in stats]
    tensors: dict[str, Any] = {"means": tuple(means), "variances": tuple(variances)}
    tensors |= {"batches": tuple(batches), "stats": tuple(stats)}
    constants = {
        "C": tuple(channels),
        "MOMENTUM": tuple(map(float, momentum)),
        "COUNT": tuple(map(int, count)),
        "GROUPS": stats[0].shape[1],
        "BLOCK_C": min(1024, next_power_of_two(max(channels))),
    }
    return Launch(_track_kernel, len(stats), tensors, {}, constants)


def track(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    batches: Sequence[Tensor],
    stats: Sequence[Tensor],
    momentum: Sequence[float],
    count: Sequence[int],
) -> None:
    """Update the running statistics of every layer; a negative momentum is cumulative."""
    tensors = (tuple(means), tuple(variances), tuple(batches), tuple(stats))
    shapes = tuple((m.shape, m.dtype, v.dtype) for m, v in zip(means, variances, strict=True))
    key = ("track", shapes, stats[0].shape[1], stats[0].device, tuple(momentum), tuple(count))
    run_planned(key, tensors, lambda: track_launch(means, variances, batches, stats, momentum, count))
