"""Device functions shared by the kernels: implicit GEMM rows, activations, prologues, epilogues."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows(tile, M, H: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """Return (inside, n, p, q) for the rows m = (n·H + p)·W + q of row tile ``tile``; int64 if WIDE."""
    if WIDE:
        tile = tl.cast(tile, tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return m < M, m // (H * W), (m // W) % H, m % W


# --- activations -------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Compute tanh to float32 accuracy: an odd polynomial near zero, where the exponential form cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = tl.abs(x) * (1.0 + x2 * (-0.33333333 + x2 * (0.13333333 + x2 * (-0.053968254 + x2 * 0.021869488))))
    magnitude = tl.where(tl.abs(x) < 0.25, near, far)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def activate(x, slope, ACT: tl.constexpr):
    """Compute act(x) in float32; NaN propagates as in eager (a plain maximum would drop it)."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "leaky_relu":
        x = tl.where(x < 0.0, x * slope, x)
    elif ACT == "tanh":
        x = tanh(x)
    elif ACT == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def activate_backward(g, y, slope, ACT: tl.constexpr):
    """Compute g·act' from the saved output y = act(x), or from x if only its sign matters; NaN as in aten."""
    if ACT == "relu":
        g = tl.where(y <= 0.0, 0.0, g)
    elif ACT == "leaky_relu":
        g = tl.where(y > 0.0, g, g * slope)
    elif ACT == "tanh":
        g = g * (1.0 - y * y)
    elif ACT == "sigmoid":
        g = g * (1.0 - y) * y
    return g


# --- prologues ---------------------------------------------------------------------------------------------


@triton.jit
def _vector(ptr, channel, C: tl.constexpr):
    return tl.load(ptr + channel, mask=channel < C, other=0.0)


@triton.jit
def prologue(
    x,
    other,
    valid,
    channel,
    center_ptr,
    scale_ptr,
    shift_ptr,
    slope,
    per_count,
    C: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Apply a prologue to a loaded tile x; returns the convolution's operand, rounded to x's dtype.

        none         x
        act          act(x)
        affine       act((x - center[c])·scale[c] + shift[c])
        gradient     x·act'(other)·scale[c], other = the forward's y (scale if SCALED)
        statistics   x + (other - center[c])·2·scale[c]·per_count + shift[c]·per_count:
                     center, scale, shift = mean, dvar, dmean, and other = y

    ``other`` is x itself where the prologue reads no second tensor. Each kernel spells out that condition,
    because Triton 3.6 treats a function's result as a runtime value. ``channel`` and ``valid`` broadcast
    against x. x and other are 0 where not ``valid``, and so is the result: zero padding applies after the
    prologue.
    """
    if PROLOGUE != "none":
        value = x.to(tl.float32)
        if PROLOGUE == "act":
            value = activate(value, slope, ACT)
            if ACT == "sigmoid":
                value = tl.where(valid, value, 0.0)
        elif PROLOGUE == "affine":
            value = (value - _vector(center_ptr, channel, C)) * _vector(scale_ptr, channel, C)
            value = activate(value + _vector(shift_ptr, channel, C), slope, ACT)
            value = tl.where(valid, value, 0.0)
        elif PROLOGUE == "gradient":
            value = activate_backward(value, other.to(tl.float32), slope, ACT)
            if SCALED:
                value = value * _vector(scale_ptr, channel, C)
        else:
            tl.static_assert(PROLOGUE == "statistics")
            b = _vector(scale_ptr, channel, C) * (2.0 * per_count)
            value += (other.to(tl.float32) - _vector(center_ptr, channel, C)) * b
            value = tl.where(valid, value + _vector(shift_ptr, channel, C) * per_count, 0.0)
        x = value.to(x.dtype)
    return x


# --- epilogues ---------------------------------------------------------------------------------------------


@triton.jit
def affine(
    acc,
    channel,
    scale_ptr,
    shift_ptr,
    slope,
    C: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACT: tl.constexpr,
):
    """Compute act(acc·scale[c] + shift[c]) for acc [BLOCK_M, BLOCK_N]; ``channel`` [BLOCK_N] gives c."""
    if HAS_SCALE:
        acc = acc * _vector(scale_ptr, channel, C)[None, :]
    if HAS_SHIFT:
        acc = acc + _vector(shift_ptr, channel, C)[None, :]
    return activate(acc, slope, ACT)


@triton.jit
def epilogue(
    acc,
    inside,
    channel,
    input_at,
    tile,
    TILES,
    partial_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    slope,
    C: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Return the tile to store for acc [BLOCK_M, BLOCK_N] (0 in rows not ``inside``); store its partial sums.

        affine       act(acc·scale[c] + shift[c])
        statistics   acc; stores its rows' mean in partial[0, tile], their sum of squared deviations in
                     partial[1, tile]
        adjoint      g·scale[c] for g = acc·act'((x - center[c])·scale[c] + shift[c]), x read at ``input_at``;
                     stores Σ g and Σ g·(x - center[c]) in partial[0, tile], partial[1, tile].
                     Without HAS_SCALE, g = acc·act'(x), and there are no sums

    ``tile`` [BLOCK_N] is the row of partial [2, TILES, C] for each column.
    """
    if EPILOGUE == "affine":
        acc = affine(acc, channel, scale_ptr, shift_ptr, slope, C, HAS_SCALE, HAS_SHIFT, ACT)
    else:
        at = partial_ptr + tile * C + channel
        if EPILOGUE == "statistics":
            mean = tl.sum(acc, axis=0) / tl.sum(inside.to(tl.float32), axis=0)
            deviation = tl.where(inside[:, None], acc - mean[None, :], 0.0)
            tl.store(at, mean, mask=channel < C)
            tl.store(at + TILES * C, tl.sum(deviation * deviation, axis=0), mask=channel < C)
        else:
            tl.static_assert(EPILOGUE == "adjoint")
            x = tl.load(input_at, mask=inside[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)
            if HAS_SCALE:
                x = x - _vector(center_ptr, channel, C)[None, :]
                scale = _vector(scale_ptr, channel, C)[None, :]
                y = activate(x * scale + _vector(shift_ptr, channel, C)[None, :], slope, ACT)
                g = activate_backward(acc, y, slope, ACT)
                tl.store(at, tl.sum(g, axis=0), mask=channel < C)
                tl.store(at + TILES * C, tl.sum(g * x, axis=0), mask=channel < C)
                acc = g * scale
            else:
                acc = activate_backward(acc, activate(x, slope, ACT), slope, ACT)
    return acc
