"""The Discriminator's head, a matrix product with at most 4 columns, as one dot product a program.

    y[n, co] = act(scale[co]·Σ_k x[n, k]·w[co, k] + shift[co]),   k = (kh, kw, ci), the order of an NHWC input

A tile of a matrix instruction would use 1 of its 16 columns, and a batch of 64 would fill 1 of 132
multiprocessors. The products are float32 whatever the inputs are (TF32 has nothing to gain here).
Program (n, co) reads row n of x, at any strides, and weights as :func:`..packing.dense_down`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..call import Call
from . import packing
from .device import activate
from .launch import Launch, common, precision
from .tiles import Problem, Tile


@triton.jit
def _dense_narrow_kernel(
    x_ptr,
    w_ptr,  # [C_OUT, H·W, C_PADDED]
    y_ptr,
    scale_ptr,
    shift_ptr,
    M,
    slope,
    W: tl.constexpr,  # of x
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    C_PADDED: tl.constexpr,
    DEPTH: tl.constexpr,  # H·W·C_PADDED
    STRIDE_XN: tl.constexpr,
    STRIDE_XC: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_XW: tl.constexpr,
    STRIDE_YN: tl.constexpr,
    STRIDE_YC: tl.constexpr,
    STRIDE_YH: tl.constexpr,
    STRIDE_YW: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    n = pid // C_OUT
    co = pid % C_OUT
    if WIDE:
        n = n.to(tl.int64)

    acc = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for step in range(0, (DEPTH + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = k // C_PADDED
        c = k % C_PADDED
        x_at = x_ptr + n * STRIDE_XN + (tap // W) * STRIDE_XH + (tap % W) * STRIDE_XW + c * STRIDE_XC
        x = tl.load(x_at, mask=(k < DEPTH) & (c < C_IN), other=0.0).to(tl.float32)
        w = tl.load(w_ptr + co * DEPTH + k, mask=k < DEPTH, other=0.0).to(tl.float32)
        acc += x * w

    y = tl.sum(acc, axis=0)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + co)
    if HAS_SHIFT:
        y = y + tl.load(shift_ptr + co)
    y = activate(y, slope, ACT)
    tl.store(y_ptr + n * STRIDE_YN + co * STRIDE_YC, y.to(y_ptr.dtype.element_ty))


pack = packing.dense_down


def problem(call: Call, y: Tensor) -> Problem:
    n, c_in, h, w = call.x.shape
    return Problem("dense_narrow", precision(call.x.dtype), n, y.shape[1], c_in * h * w, c_in)


def launch(call: Call, packed: Tensor, y: Tensor, tile: Tile) -> Launch:
    """y [N, C_out ≤ 4, 1, 1] from x [N, C_in, kH, kW] and the packed weight."""
    arguments, constants = common(call, y, call.x.shape[0])
    c_padded = packed.shape[-1]
    constants |= {"W": call.x.shape[3], "C_IN": call.x.shape[1], "C_OUT": y.shape[1], "C_PADDED": c_padded}
    constants |= {"DEPTH": call.x.shape[2] * call.x.shape[3] * c_padded, "BLOCK_K": tile.block_k}
    programs = call.x.shape[0] * y.shape[1]
    return Launch(_dense_narrow_kernel, programs, arguments | {"w_ptr": packed}, constants, tile)
