"""Standalone prologue kernel: out[n, h, w, c] = prologue(x)[n, h, w, c].

A fused prologue is recomputed by every tile that loads the element: taps ÷ stride² times per column tile.
Where that costs more than a sweep over the tensor (see :mod:`.cost_model`), this kernel materializes the
result, and the product then loads it by asynchronous copies alone.

A program computes BLOCK_M pixels × BLOCK_N channels. It reads x and other at any strides and writes out at
any strides, each element once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import ConvSpec, Operand
from .device_functions import load, row_pointers, rows
from .launcher import INT32_MAX, Launch, Pointers, extent, present, run_planned
from .tiles import next_power_of_two, row_tiles


@triton.jit
def _prologue_kernel(
    x,
    out_ptr,
    M,
    slope,
    per_count,
    X: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    COLUMN_TILES: tl.constexpr = (X.size[0] + BLOCK_N - 1) // BLOCK_N
    tile = pid // COLUMN_TILES
    inside, group, n, h, w = rows(tile, M, X.size[1], X.size[2], BLOCK_M, WIDE, GROUPS)
    c = (pid % COLUMN_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (c < X.size[0])[None, :]
    x_rows, other_rows = row_pointers(x, n, h, w, X)
    x_hat = load(x_rows, other_rows, 0, 0, c, group, mask, x, slope, per_count, X)
    at = n * OUT_STRIDE[0] + h * OUT_STRIDE[2] + w * OUT_STRIDE[3]
    tl.store(out_ptr + at[:, None] + c[None, :] * OUT_STRIDE[1], x_hat, mask=mask)


def launch(spec: ConvSpec, operand: Operand, tensors: Pointers, out: Tensor) -> Launch:
    """Return the launch of out = prologue(x), for an operand of a product and its tensors."""
    c, h, w = operand.size
    pixels = spec.images * h * w
    block_n = min(64, next_power_of_two(c))
    block_m = 4096 // block_n if c > 1 else 1024
    strides = [s for s in (operand.stride, operand.other_stride, out.stride()) if s is not None]
    far = max(extent((spec.images, c, h, w), stride) for stride in strides)
    return Launch(
        _prologue_kernel,
        row_tiles(pixels, block_m, spec.groups) * -(-c // block_n),
        {"x": present(tensors, out), "out_ptr": out},
        {"M": pixels, "slope": float(spec.slope), "per_count": 1.0 / max(pixels, 1)},
        {
            "X": operand,
            "OUT_STRIDE": out.stride(),
            "WIDE": max(far, pixels + block_m + 256) > INT32_MAX,
            "GROUPS": spec.groups,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
    )


def materialize(
    spec: ConvSpec, operand: Operand, tensors: Pointers, run: bool = True
) -> tuple[Operand, Tensor]:
    """Return prologue(x) as an operand without a prologue, and its tensor; x itself without a prologue.

    The result is in NHWC whatever x's layout: products load it fastest. Unless ``run``, it is uninitialized.
    """
    x: Tensor = tensors.ptr
    if operand.function == "none":
        return operand, x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if run:
        key = ("prologue", operand, spec.images, spec.dtype, spec.device, spec.slope, spec.groups)
        run_planned(key, (present(tensors, out), out), lambda: launch(spec, operand, tensors, out))
    return Operand(operand.size, out.stride()), out
