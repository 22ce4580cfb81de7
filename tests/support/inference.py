"""Packed weights of a network in eval on the Triton engine, what they must be, and the errors allowed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan.kernels import chain, ops
from dcgan.kernels.cpu import value_guard
from dcgan.kernels.gpu import dense, inference, packing
from dcgan.kernels.gpu.inference import Weights
from dcgan.kernels.spec import Stage
from tests.support.chains import VECTORS, expected_output
from tests.support.tolerance import relative, unit

PROGRAMS = 5
"""Of a launch of ``prepare`` in the interpreter."""
SENTINEL = 7.0
FLOAT32 = 1e-6  # some √K·2⁻²⁴ per layer, K ≤ 1,000


def allowed(dtype: torch.dtype) -> float:
    """Return the relative error allowed for layers whose results and weights are rounded to ``dtype``.

    A rounding errs by u/√3 on average, and four layers by twice that.
    """
    return FLOAT32 if dtype == torch.float32 else FLOAT32 + 2 * unit(dtype)


def assert_accurate(y: Tensor, x: Tensor, stages: list[Stage], channels_last: bool = True) -> None:
    """Check the values against float64, and the strides against the reference engine's."""
    assert y.dtype == x.dtype
    assert relative(y, expected_output(x, stages)) <= allowed(x.dtype)
    with ops.use_engine("reference"):
        assert y.stride() == chain.conv_chain(x, stages, channels_last).stride()


def weights_of(run: chain.Chain) -> Weights:
    """Return a chain's packed weights, of which there must be one set."""
    (found,) = run._network._weights.values()
    assert isinstance(found, Weights)
    return found


def some_fast(rows: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Return the parameters of a test; rows that are not in ``fast`` are slow."""
    rows = list(rows)
    assert all(row in rows for row in fast)
    found = []
    for row in rows:
        values = row if isinstance(row, tuple) else (row,)
        ids = [str(value).removeprefix("torch.") for value in values]
        marks = [] if row in fast else [pytest.mark.slow]
        found.append(pytest.param(*values, id="-".join(ids), marks=marks))
    return found


OTHER_VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda v: v,
    "bfloat16": lambda v: v.bfloat16(),  # as in the BatchNorms of a bfloat16 network
    "float16": lambda v: v.half(),
    "float64": lambda v: v.double(),
    "stride 2": lambda v: torch.stack([v, torch.full_like(v, math.nan)], 1)[:, 0],
    "bfloat16 of stride 2": lambda v: torch.stack([v, torch.full_like(v, math.nan)], 1).bfloat16()[:, 0],
    "expanded": lambda v: v[:1].expand_as(v),
}


def with_vectors(stages: list[Stage], change: Callable[[Tensor], Tensor]) -> list[Stage]:
    found = []
    for s in stages:
        given: dict[str, Any] = {name: v for name in VECTORS if (v := getattr(s, name)) is not None}
        changed: dict[str, Any] = {name: change(v) for name, v in given.items()}
        found.append(s._replace(**changed))
    return found


def memory(weights: Weights) -> Tensor:
    """Return all packed weights, with the gaps between them."""
    buffers = weights.launch.tensors["buffers"]
    assert isinstance(buffers, tuple)
    assert len(buffers) == 1
    found: Tensor = buffers[0]
    return found


def copies(weights: Weights) -> tuple[Tensor, ...]:
    found = weights.launch.tensors["copies"]
    assert isinstance(found, tuple)
    return found


class Packing:
    """Packed weights of stages, with what they must be now."""

    def __init__(
        self,
        stages: list[Stage],
        dtype: torch.dtype = torch.float32,
        checked: bool = True,
        layouts: Sequence[packing.Layout] | None = None,
    ) -> None:
        """Let ``layouts`` default to those for any map: of dense layers."""
        self.stages, self.dtype = stages, dtype
        kinds = dense.DOWN_LAYOUT, dense.UP_LAYOUT
        self.layouts = [kinds[s.transposed] for s in stages] if layouts is None else list(layouts)
        self.weights = Weights(stages, self.layouts, dtype, checked, dependents=False)

    @classmethod
    def of_products(cls, x: Tensor, stages: list[Stage], checked: bool = True) -> Packing:
        """Return the packed weights of the products of a network in x's dtype."""
        cast = [s._replace(weight=s.weight.to(x.dtype)) for s in stages]
        specs = inference.product_specs(chain.specs(x, cast, True), stages)
        return cls(stages, x.dtype, checked, inference.layouts_of(specs))

    def expected(self) -> Tensor:
        """Return all packed weights, by aten, with zeros between them."""
        packed = [permuted(s.weight, layout) for s, layout in zip(self.stages, self.layouts, strict=True)]
        aligned = [F.pad(t.flatten(), (0, -t.numel() % packing.ALIGNMENT)) for t in packed]
        return torch.cat([t.to(self.dtype) for t in aligned])

    def current(self) -> bool:
        """Return whether the packed weights are right, every bit and gap of them."""
        return same_bits(memory(self.weights), self.expected())

    def packs(self, context: contextlib.AbstractContextManager[None] | None = None) -> bool:
        """Launch, in a context; return whether the launch has written all packed weights, or else none."""
        memory(self.weights).fill_(SENTINEL)
        with contextlib.nullcontext() if context is None else context:
            self.weights.prepare()
        if bool((memory(self.weights) == SENTINEL).all()):
            return False
        assert self.current()
        return True

    def copied(self) -> bool:
        """Return whether the copies are the present weights."""
        pairs = zip(copies(self.weights), self.stages, strict=True)
        return all(same_bits(copy, in_memory_order(s.weight)) for copy, s in pairs)


def permuted(weight: Tensor, layout: packing.Layout) -> Tensor:
    """Return a weight in a layout, by aten."""
    t = weight.transpose(0, 1) if layout.transposed else weight
    t = F.pad(t, (0, 0, 0, 0, 0, -t.shape[1] % layout.in_multiple))
    names = ["out", "in"]
    for tap in "hw":
        if tap in layout.axes:
            names.append(tap)
        else:
            t = t.unflatten(len(names), (-1, 2))
            names += [f"{tap}//2", f"{tap}%2"]
    return t.permute([names.index(axis) for axis in layout.axes])


def in_memory_order(t: Tensor) -> Tensor:
    assert value_guard.dense(t)
    return t.as_strided((t.numel(),), (1,))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
