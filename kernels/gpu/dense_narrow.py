"""dense_narrow: the Discriminator's head, a product with at most 4 columns, as one dot product per program.

    y[n, co] = act(scale[co]·Σ_k x[n, k]·w[co, k] + shift[co]),   k = (kh, kw, ci), the order of an NHWC input

A tensor-core tile would use 1 of its 16 columns, and a batch of 64 would fill 1 of 132 SMs. Products are
float32 whatever the dtype of the inputs: the kernel is bound by bytes, so TF32 would gain nothing. Program
(n, co) reads row n of x, at any strides, and weights packed by :func:`..packing.dense_down`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import packing
from .device_functions import activate, prologue
from .launch import Launch, Product, common
from .tiles import Problem, Tile


@triton.jit
def _dense_narrow_kernel(
    x_ptr,
    x_other_ptr,
    x_center_ptr,
    x_scale_ptr,
    x_shift_ptr,
    w_ptr,  # [C_OUT, H·W, C_PADDED]
    y_ptr,
    input_ptr,
    center_ptr,
    scale_ptr,
    shift_ptr,
    partial_ptr,  # [2, TILES, C_OUT]
    M,
    TILES,
    slope,
    per_count,
    X_SIZE: tl.constexpr,  # C, H, W
    Y_SIZE: tl.constexpr,
    X_STRIDE: tl.constexpr,  # N, C, H, W
    X_OTHER_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    INPUT_STRIDE: tl.constexpr,
    X_PROLOGUE: tl.constexpr,
    X_ACT: tl.constexpr,
    X_SCALED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    C_PADDED: tl.constexpr,
    DEPTH: tl.constexpr,  # H·W·C_PADDED
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    C_IN: tl.constexpr = X_SIZE[0]
    W: tl.constexpr = X_SIZE[2]
    C_OUT: tl.constexpr = Y_SIZE[0]
    n = pid // C_OUT
    co = pid % C_OUT
    if WIDE:
        n = n.to(tl.int64)

    acc = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for step in range(0, (DEPTH + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        h = k // C_PADDED // W
        w = k // C_PADDED % W
        c = k % C_PADDED
        valid = (k < DEPTH) & (c < C_IN)
        x_at = x_ptr + n * X_STRIDE[0] + h * X_STRIDE[2] + w * X_STRIDE[3] + c * X_STRIDE[1]
        x = tl.load(x_at, mask=valid, other=0.0)
        other = x
        if X_PROLOGUE == "gradient" or X_PROLOGUE == "statistics":
            other_k = h * X_OTHER_STRIDE[2] + w * X_OTHER_STRIDE[3] + c * X_OTHER_STRIDE[1]
            other = tl.load(x_other_ptr + n * X_OTHER_STRIDE[0] + other_k, mask=valid, other=0.0)
        x = prologue(
            x, other, valid, c, x_center_ptr, x_scale_ptr, x_shift_ptr, slope, per_count,
            C_IN, X_PROLOGUE, X_ACT, X_SCALED,
        )  # fmt: skip
        weight = tl.load(w_ptr + co * DEPTH + k, mask=k < DEPTH, other=0.0)
        acc += x.to(tl.float32) * weight.to(tl.float32)

    tl.static_assert(EPILOGUE == "affine")  # statistics need a tile of rows: those products run as dense
    y = tl.sum(acc, axis=0)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr + co)
    if HAS_SHIFT:
        y = y + tl.load(shift_ptr + co)
    y = activate(y, slope, ACT)
    tl.store(y_ptr + n * Y_STRIDE[0] + co * Y_STRIDE[1], y.to(y_ptr.dtype.element_ty))


pack = packing.dense_down


def problem(product: Product) -> Problem:
    """Return the GEMM sizes of a product."""
    n, c_in, h, w = product.x.shape
    return product.problem("dense_narrow", n, product.y.shape[1], c_in * h * w, c_in)


def launch(product: Product, packed: Tensor, partial: Tensor | None, tile: Tile) -> Launch:
    """Return the launch of y [N, C_out ≤ 4, 1, 1] from x [N, C_in, kH, kW] and the packed weight."""
    sizes = problem(product)
    arguments, constants = common(product, packed, partial, sizes.rows)
    constants["C_PADDED"] = packed.shape[-1]
    constants |= {"DEPTH": packed.numel() // packed.shape[0], "BLOCK_K": tile.block_k}
    return Launch(_dense_narrow_kernel, sizes.rows * sizes.columns, arguments, constants, tile)
