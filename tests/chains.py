"""Chains of layers for the tests of conv_chain, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from statement import state
from torch import Tensor, nn

from dcgan.kernels import chain, ops, weights
from dcgan.kernels.call import Stage

KINDS = pytest.mark.parametrize("kind", ["up", "down"])
OP = chain._OP
VECTORS = ("bias", "scale", "shift", "mean", "var")


def stage(transposed: bool, c_in: int, c_out: int, kernel: int = 4, given: str = "", **options: Any) -> Stage:
    """A layer with weights of about 1/√K and vectors as ``given``: c bias, s scale, b shift, n mean, var."""
    order = (c_in, c_out) if transposed else (c_out, c_in)
    dtype = options.pop("dtype", torch.float32)
    weight = torch.randn(*order, kernel, kernel) / (c_in * kernel**2 / (4 if transposed else 1)) ** 0.5
    vectors = {
        "bias": torch.randn(c_out) if "c" in given else None,
        "scale": torch.randn(c_out) if "s" in given else None,
        "shift": torch.randn(c_out) if "b" in given else None,
        "mean": torch.randn(c_out) if "n" in given else None,
        "var": torch.rand(c_out) + 0.5 if "n" in given else None,
    }
    return Stage(transposed, weight.to(dtype), **vectors, eps=1e-5 if "n" in given else 0.0, **options)


def made(kind: str, dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[Tensor, list[Stage]]:
    """A small network: BatchNorms with and without their affine map, layers with a part of an epilogue.

    Convolutions with a bias and without, before a BatchNorm and before none.
    """
    wide = {"stride": 1, "padding": 0, "dtype": dtype}
    if kind == "up":
        x = torch.randn(batch, 6, 1, 1)
        stages = [
            stage(True, 6, 12, given="csbn", act="relu", **wide),
            stage(True, 12, 9, given="n", act="leaky_relu", slope=0.3, dtype=dtype),
            stage(True, 9, 6, given="csb", act="sigmoid", dtype=dtype),
            stage(True, 6, 3, given="c", act="tanh", dtype=dtype),
        ]
    else:
        x = torch.randn(batch, 3, 16, 16)
        stages = [
            stage(False, 3, 7, given="cb", act="leaky_relu", slope=0.2, dtype=dtype),
            stage(False, 7, 10, given="sbn", act="leaky_relu", slope=0.05, dtype=dtype),
            stage(False, 10, 8, given="cs", act="tanh", **wide),
            stage(False, 8, 1, kernel=1, given="cbn", act="sigmoid", **wide),
        ]
    return x.to(dtype), stages


def wide(stages: list[Stage]) -> list[Stage]:
    """In float64."""
    return [Stage(*[v.double() if isinstance(v, Tensor) else v for v in s]) for s in stages]


def stated(x: Tensor, stages: list[Stage]) -> Tensor:
    """The module's formula in float64, differentiable."""
    y = x.double()
    for s in wide(stages):
        call = ops.Call(y, s.weight, stride=s.stride, padding=s.padding)
        u = state(call, s.transposed)[0]
        scale = torch.ones(s.c_out, dtype=torch.float64) if s.scale is None else s.scale
        if s.bias is not None:
            u = u + s.bias[:, None, None]
        if s.mean is not None and s.var is not None:
            u = u - s.mean[:, None, None]
            scale = scale / (s.var + s.eps).sqrt()
        u = u * scale[:, None, None]
        if s.shift is not None:
            u = u + s.shift[:, None, None]
        act = {"none": u, "relu": u.relu(), "tanh": u.tanh(), "sigmoid": u.sigmoid()}
        y = nn.functional.leaky_relu(u, s.slope) if s.act == "leaky_relu" else act[s.act]
    return y


def one_by_one(x: Tensor, stages: list[Stage], channels_last: bool = True) -> Tensor:
    """By the two public ops, each with bias and BatchNorm folded by hand."""
    for i, s in enumerate(stages):
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        vectors = {n: v.to(acc) for n in VECTORS if (v := getattr(s, n)) is not None}
        scale, shift, offset = vectors.get("scale"), vectors.get("shift"), vectors.get("bias")
        if "var" in vectors:
            inverse = torch.rsqrt(vectors["var"] + s.eps)
            scale = inverse if scale is None else inverse * scale
            offset = -vectors["mean"] if offset is None else offset - vectors["mean"]
        if offset is not None:
            offset = offset if scale is None else offset * scale
            shift = offset if shift is None else shift + offset
        op = ops.conv_transpose2d_fused if s.transposed else ops.conv2d_fused
        x, _, _ = op(
            x,
            s.weight,
            out_scale=scale,
            out_shift=shift,
            out_act=s.act,
            slope=s.slope,
            stride=s.stride,
            padding=s.padding,
            channels_last=channels_last or i + 1 < len(stages),
        )
    return x


def kept(stages: list[Stage]) -> nn.Module:
    """Their weights frozen, as a network in eval has them, as long as this lives."""
    owner = nn.Module()
    weights.freeze(owner, [s.weight for s in stages])
    return owner


def leaves(x: Tensor, stages: list[Stage]) -> list[Tensor]:
    return [x, *(t for s in stages for t in s[1:7] if t is not None)]


def arguments(x: Tensor, stages: list[Stage], channels_last: bool = True) -> tuple[Any, ...]:
    """As the operator takes them, after its schema."""
    transposed, *columns = (list(column) for column in zip(*stages, strict=True))
    return (x, *columns, transposed, channels_last)
