"""Device functions that the kernels share: where a row of the implicit GEMM lies, and the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows(tile, M, H: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """(inside, n, p, q) of the BLOCK_M rows of row tile ``tile``: m = (n·H + p)·W + q. int64 if WIDE."""
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return m < M, m // (H * W), (m // W) % H, m % W


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
    """act(x) in float32; NaN goes through, as in eager (a maximum would drop it)."""
    if ACT == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACT == "leaky_relu":
        x = tl.where(x < 0.0, x * slope, x)
    elif ACT == "tanh":
        x = tanh(x)
    elif ACT == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def epilogue(
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
        acc = acc * tl.load(scale_ptr + channel, mask=channel < C, other=0.0)[None, :]
    if HAS_SHIFT:
        acc = acc + tl.load(shift_ptr + channel, mask=channel < C, other=0.0)[None, :]
    return activate(acc, slope, ACT)
