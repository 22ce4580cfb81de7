"""Device functions that the kernels share: rows of the implicit GEMM, prologues, activations, epilogues."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows(tile, M, H: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """(inside, n, p, q) of the BLOCK_M rows of row tile ``tile``: m = (n·H + p)·W + q. int64 if WIDE."""
    if WIDE:
        tile = tl.cast(tile, tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return m < M, m // (H * W), (m // W) % H, m % W


# --- activations -------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: the exponential form cancels near zero, where an odd polynomial serves."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = tl.abs(x) * (1.0 + x2 * (-0.33333333 + x2 * (0.13333333 + x2 * (-0.053968254 + x2 * 0.021869488))))
    magnitude = tl.where(tl.abs(x) < 0.25, near, far)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def activate(x, slope, ACT: tl.constexpr):
    """act(x) in float32; NaN goes through, as in eager (a plain maximum would drop it)."""
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
    """g·act' told from y = act(x), or from x where only its sign matters; NaN as aten's backwards pass it."""
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
    seen,
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
    """What a convolution takes in place of the tile x as loaded, rounded to x's dtype.

        none         x
        act          act(x)
        affine       act((x - center[c])·scale[c] + shift[c])
        gradient     x·act'(other)·scale[c], other = the forward's y (scale if SCALED)
        statistics   x + (other - center[c])·2·scale[c]·per_count + shift[c]·per_count:
                     center, scale, shift = mean, dvar, dmean, and other = y

    ``other`` is x itself where the prologue reads no second tensor; that is asked in each kernel in so many
    words, since Triton 3.6 takes a function's answer for a value of run time. ``channel`` and ``seen``
    broadcast against x. x and other are 0 where not ``seen``, and so is the result:
    padding pads what the convolution takes.
    """
    if PROLOGUE != "none":
        value = x.to(tl.float32)
        if PROLOGUE == "act":
            value = activate(value, slope, ACT)
            if ACT == "sigmoid":
                value = tl.where(seen, value, 0.0)
        elif PROLOGUE == "affine":
            value = (value - _vector(center_ptr, channel, C)) * _vector(scale_ptr, channel, C)
            value = activate(value + _vector(shift_ptr, channel, C), slope, ACT)
            value = tl.where(seen, value, 0.0)
        elif PROLOGUE == "gradient":
            value = activate_backward(value, other.to(tl.float32), slope, ACT)
            if SCALED:
                value = value * _vector(scale_ptr, channel, C)
        else:
            tl.static_assert(PROLOGUE == "statistics")
            b = _vector(scale_ptr, channel, C) * (2.0 * per_count)
            value += (other.to(tl.float32) - _vector(center_ptr, channel, C)) * b
            value = tl.where(seen, value + _vector(shift_ptr, channel, C) * per_count, 0.0)
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
    """act(acc·scale[c] + shift[c]) for acc [BLOCK_M, BLOCK_N], whose columns are ``channel`` [BLOCK_N]."""
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
    """What is stored of acc [BLOCK_M, BLOCK_N]; rows outside are 0 in it.

        affine       act(acc·scale[c] + shift[c])
        statistics   acc; its rows' mean and sum of squared deviations into partial[0, tile], partial[1, tile]
        adjoint      g·scale[c] for g = acc·act'((x - center[c])·scale[c] + shift[c]), x read at ``input_at``;
                     Σ g and Σ g·(x - center[c]) into partial[0, tile], partial[1, tile].
                     Without HAS_SCALE, g = acc·act'(x), and no sums

    ``tile`` [BLOCK_N] is each column's row of partial [2, TILES, C].
    """
    if EPILOGUE == "affine":
        acc = affine(acc, channel, scale_ptr, shift_ptr, slope, C, HAS_SCALE, HAS_SHIFT, ACT)
    else:
        at = partial_ptr + tile * C + channel
        if EPILOGUE == "statistics":
            mean = tl.sum(acc, axis=0) / tl.sum(inside.to(tl.float32), axis=0)
            apart = tl.where(inside[:, None], acc - mean[None, :], 0.0)
            tl.store(at, mean, mask=channel < C)
            tl.store(at + TILES * C, tl.sum(apart * apart, axis=0), mask=channel < C)
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
