"""Helpers for testing the native engine one algorithm at a time, in memory that is filled with NaN."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dcgan.kernels import ops, weight_cache
from dcgan.kernels.cpu import algorithm_selection, library
from tests.support.float64_reference import Problem, column, expected_outputs, op
from tests.support.networks import plain
from tests.support.tolerance import unit

run = importlib.import_module("dcgan.kernels.cpu.inference")  # the package has a function named run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    MISSING = library.problem()
NEEDED = pytest.mark.skipif(MISSING is not None, reason=f"no native engine: {MISSING}")
ISAS = ("none",) if MISSING is not None else library.isas()
THREADS = 2  # for every test that does not set another number
SPATIAL = ("direct", "f2", "f4", "narrow")  # for 4×4, stride 2, padding 1; other layers are dense
ALGORITHMS = pytest.mark.parametrize("algorithm", [*SPATIAL, "dense"])

# Relative L2 errors in float32, from its unit roundoff u = 6e-8. A sum of K products of independent signs
# errs by some u·√K of one product's size, which is u of the sum; the transforms of F4, the largest, err by
# about 10 u. 5e-6 is 80 u: above all of these, and below one wrong element among the 1e5 of the largest map.
LAYER = 5e-6
NETWORK = 1e-5

SIDES = st.integers(1, 9)
CHANNELS = st.one_of(st.integers(1, 5), st.integers(1, 40))


def allowed(dtype: torch.dtype, float32: float = LAYER) -> float:
    """Return the relative error allowed for a result rounded once to ``dtype``."""
    return float32 if dtype == torch.float32 else float32 + unit(dtype)


@contextlib.contextmanager
def forced(algorithm: str) -> Iterator[None]:
    """Force ``algorithm`` for 4×4 layers with stride 2 and padding 1, whatever the cost model says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm_selection, "algorithm", lambda g, *rest: "dense" if g.dense else algorithm)
        run._plan.cache_clear()
        yield
    run._plan.cache_clear()


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = library.isa()
    library.use_isa(name)
    try:
        yield
    finally:
        library.use_isa(before)


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill every torch.empty, packed weights and outputs included, with NaN to reveal unwritten elements."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(1).isnan())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def odd_sized(algorithm: str, transposed: bool, **options: Any) -> Problem:
    """Return a float32 layer of odd sizes, with an odd map where possible, that ``algorithm`` supports."""
    sizes: dict[str, Any] = {"c_in": 9, "c_out": 6, "size": (5, 4) if transposed else (7, 10), "batch": 3}
    if algorithm == "narrow":
        sizes |= {"c_out": 3} if transposed else {"c_in": 3}
    if algorithm == "dense":
        sizes |= {"size": (1, 1) if transposed else (4, 4), "stride": 1, "padding": 0}
    return Problem(transposed, **{**sizes, "dtype": torch.float32, **options})


def small(algorithm: str, transposed: bool, **changes: Any) -> Problem:
    """Return such a layer with a full epilogue."""
    epilogue = {"out_scale": True, "out_shift": True, "out_act": "leaky_relu"}
    return odd_sized(algorithm, transposed, **{**epilogue, **changes})


class Owner:
    """An owner of frozen weights."""


def run_native(call: ops.Call, transposed: bool) -> Tensor:
    """Return y from the native engine's inference with frozen weights; raise if it cannot run the call."""
    owner = Owner()
    weight_cache.freeze(owner, [call.weight])
    with ops.use_engine("native"):
        y, mean, var = op(transposed)(*call)
    assert (mean.shape, var.shape) == ((0,), (0,))
    return y  # type: ignore[no-any-return]


def typical(call: ops.Call, transposed: bool) -> Tensor:
    """Estimate the magnitude of y's elements before the activation if the products had random signs."""
    squares = call._replace(x=call.x.double().square(), weight=call.weight.double().square())
    bare = squares._replace(out_scale=None, out_shift=None, out_act="none")
    size = expected_outputs(bare, transposed)[0].sqrt()
    if call.out_scale is not None:
        size = size * column(call.out_scale.abs())
    if call.out_shift is not None:
        size = size + column(call.out_shift.abs())
    return size * max(1.0, call.slope)


def assert_correct(problem: Problem, call: ops.Call | None = None) -> Tensor:
    """Check native y against float64, and its strides against the reference's; return y.

    ``call`` defaults to the problem's. The error is relative to y's norm, or where y cancels, to the norm
    that it would have without cancellation.
    """
    call = problem.call() if call is None else call
    y, expected = run_native(call, problem.transposed), expected_outputs(call, problem.transposed)[0]
    assert y.dtype == call.x.dtype
    assert y.shape == expected.shape
    error, size = float((y.double() - expected).norm()), float(expected.norm())
    bound = allowed(call.x.dtype) * max(size, float(typical(call, problem.transposed).norm()))
    assert error <= bound, f"error {error:.2e} of {size:.2e}, {bound:.2e} is allowed"  # a NaN fails too
    with ops.use_engine("reference"):
        assert y.stride() == op(problem.transposed)(*call)[0].stride()
    return y


@st.composite
def geometries(draw: st.DrawFn) -> tuple[bool, int, int, int, tuple[int, int], tuple[int, int], int, int]:
    """Draw a layer that the engine covers, as the first arguments of :class:`Problem`."""
    transposed = draw(st.booleans())
    if draw(st.booleans()):
        size, kernel = (draw(SIDES) + (not transposed), draw(SIDES) + (not transposed)), (4, 4)
        stride, padding = 2, 1
    else:
        k = draw(st.integers(1, 6))
        size, kernel = (1, 1) if transposed else (k, k), (k, k)
        stride, padding = draw(st.integers(1, 3)), 0
    batch, c_in, c_out = draw(st.integers(1, 5)), draw(CHANNELS), draw(CHANNELS)
    return transposed, batch, c_in, c_out, size, kernel, stride, padding


@st.composite
def layouts(draw: st.DrawFn, ndim: int) -> tuple[list[int], list[int], int]:
    """Draw (dimensions from outermost to innermost, the gap of each, an offset in elements)."""
    order = draw(st.permutations(range(ndim)))
    return order, draw(st.lists(st.integers(0, 3), min_size=ndim, max_size=ndim)), draw(st.integers(0, 17))


def laid_out(t: Tensor, layout: tuple[list[int], list[int], int]) -> Tensor:
    """Copy ``t`` into that layout, with NaN in all gaps."""
    order, gaps, start = layout
    strides, step = [0] * t.ndim, 1
    for dim, gap in zip(reversed(order), gaps, strict=True):
        strides[dim], step = step, step * (t.shape[dim] + gap)
    room = torch.full((start + step + 1,), float("nan"), dtype=t.dtype)
    return room.as_strided(t.shape, strides, start).copy_(t)


def eager64(model: Any, x: Tensor) -> Tensor:
    """Run the reference network in float64 with the model's present modules and values."""
    wide = copy.deepcopy(model).double()
    for module in wide.modules():  # double() does not convert tensors that are not parameters
        if isinstance(weight := module.__dict__.get("weight"), Tensor):
            module.weight = weight.double()
    with torch.no_grad():
        y: Tensor = plain(wide)(x.double())
    return y


def packed() -> int:
    """Count the packed weights in the cache."""
    keys = [key for entry in list(weight_cache._entries.values()) for key in entry.derived]
    return sum(isinstance(key, tuple) and key[0] == "native" for key in keys)


def engines(model: nn.Module, x: Tensor) -> list[str]:
    """List the engine of each op that ``model(x)`` runs."""
    with torch.no_grad(), ops.recording() as choices:
        model(x)
    return [choice.engine for choice in choices]


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter, without this process's DCGAN_* environment variables."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DCGAN_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
