"""Chains of layers for the tests of conv_chain, and their expected outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan.kernels import chain, ops, weight_cache
from dcgan.kernels.spec import Stage
from tests.support.float64_reference import expected_outputs

KINDS = pytest.mark.parametrize("kind", ["up", "down"])
OP = chain._OP
VECTORS = ("bias", "scale", "shift", "mean", "var")


def stage(transposed: bool, c_in: int, c_out: int, kernel: int = 4, given: str = "", **options: Any) -> Stage:
    """Draw a layer with weights of about 1/√K; ``given``: c for bias, s scale, b shift, n mean and var."""
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


def small_chain(kind: str, dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[Tensor, list[Stage]]:
    """Draw a small network that covers full and partial epilogues.

    It has convolutions with and without a bias, and BatchNorms with and without their affine map.
    """
    dense = {"stride": 1, "padding": 0, "dtype": dtype}
    if kind == "up":
        x = torch.randn(batch, 6, 1, 1)
        stages = [
            stage(True, 6, 12, given="csbn", act="relu", **dense),
            stage(True, 12, 9, given="n", act="leaky_relu", slope=0.3, dtype=dtype),
            stage(True, 9, 6, given="csb", act="sigmoid", dtype=dtype),
            stage(True, 6, 3, given="c", act="tanh", dtype=dtype),
        ]
    else:
        x = torch.randn(batch, 3, 16, 16)
        stages = [
            stage(False, 3, 7, given="cb", act="leaky_relu", slope=0.2, dtype=dtype),
            stage(False, 7, 10, given="sbn", act="leaky_relu", slope=0.05, dtype=dtype),
            stage(False, 10, 8, given="cs", act="tanh", **dense),
            stage(False, 8, 1, kernel=1, given="cbn", act="sigmoid", **dense),
        ]
    return x.to(dtype), stages


def to_float64(stages: list[Stage]) -> list[Stage]:
    """Convert the stages to float64."""
    return [Stage(*[v.double() if isinstance(v, Tensor) else v for v in s]) for s in stages]


def expected_output(x: Tensor, stages: list[Stage]) -> Tensor:
    """Evaluate conv_chain's formula in float64, differentiably."""
    y = x.double()
    for s in to_float64(stages):
        call = ops.Call(y, s.weight, stride=s.stride, padding=s.padding)
        u = expected_outputs(call, s.transposed)[0]
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


def run_separately(x: Tensor, stages: list[Stage], channels_last: bool = True) -> Tensor:
    """Run the two public ops in order, with bias and BatchNorm folded by hand."""
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


def freeze_weights(stages: list[Stage]) -> nn.Module:
    """Freeze the weights, as a network in eval mode does, for the lifetime of the returned owner."""
    owner = nn.Module()
    weight_cache.freeze(owner, [s.weight for s in stages])
    return owner


def leaves(x: Tensor, stages: list[Stage]) -> list[Tensor]:
    return [x, *(t for s in stages for t in s[1:7] if t is not None)]


def arguments(x: Tensor, stages: list[Stage], channels_last: bool = True) -> tuple[Any, ...]:
    """Return the arguments in the order of the operator's schema."""
    transposed, *columns = (list(column) for column in zip(*stages, strict=True))
    return (x, *columns, transposed, channels_last)
