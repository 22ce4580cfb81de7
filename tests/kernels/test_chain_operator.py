"""conv_chain as a PyTorch operator: derivatives, transforms, autocast, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import chain, ops
from dcgan.kernels.chain import conv_chain
from dcgan.kernels.spec import Stage
from tests.support import native
from tests.support.chains import (
    KINDS,
    OP,
    arguments,
    expected_output,
    leaves,
    run_separately,
    small_chain,
    to_float64,
)
from tests.support.float64_reference import Problem
from tests.support.native import LAYER
from tests.support.tolerance import relative, unit

pytestmark = pytest.mark.usefixtures("one_thread", "empty_weight_cache")


@native.NEEDED
@pytest.mark.parametrize(("kind", "gradients"), [("up", False), ("down", True)])
def test_opcheck(kind: str, gradients: bool) -> None:
    """With gradients it runs as separate ops."""
    x, stages = small_chain(kind)
    for t in leaves(x, stages):
        t.requires_grad_(gradients)
    with ops.use_engine("native"):
        torch.library.opcheck(OP, arguments(x, stages, channels_last=not gradients))


def test_opcheck_of_bfloat16() -> None:
    torch.library.opcheck(OP, arguments(*small_chain("up", torch.bfloat16)))


@native.NEEDED
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_the_ops_on_the_native_engine(transposed: bool) -> None:
    overload = torch.ops.dcgan.conv_transpose2d_fused if transposed else torch.ops.dcgan.conv2d_fused
    for problem in (
        Problem(transposed, c_in=6, c_out=5, out_scale=True, out_shift=True, out_act="tanh"),
        Problem(transposed, size=(1, 1), kernel=(1, 1), stride=1, padding=0, channels_last=False),
        Problem(transposed, c_in=7, c_out=1, out_act="sigmoid", channels_last=False),
    ):
        with ops.use_engine("native"):
            call = problem.with_(dtype=torch.float32).call(requires_grad=True)
            torch.library.opcheck(overload.default, tuple(call))


@KINDS
@pytest.mark.parametrize("engine", [pytest.param("native", marks=native.NEEDED), "reference"])
def test_gradients_equal_those_of_separate_ops(kind: str, engine: str) -> None:
    x, stages = small_chain(kind)
    inputs = [t.requires_grad_() for t in leaves(x, stages)]
    with ops.use_engine(engine):
        y, expected = conv_chain(x, stages), run_separately(x, stages)
        dy = torch.randn_like(y)
        actual, wanted = (torch.autograd.grad(t, inputs, dy) for t in (y, expected))
    exact = torch.autograd.grad(expected_output(x, stages), inputs, dy.double())
    assert relative(y, expected) < 1e-6
    for a, b, c in zip(actual, wanted, exact, strict=True):
        assert relative(a, b) < 1e-5
        assert relative(a, c) < 1e-4


@KINDS
def test_first_and_second_derivatives(kind: str) -> None:
    """In float64, by finite differences along random directions, for all inputs but eps."""
    x, stages = small_chain(kind, torch.float64, batch=2)
    stages = to_float64(stages)
    inputs = [t.requires_grad_() for t in leaves(x, stages)]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        rest = iter(values)
        return conv_chain(
            x, [Stage(s[0], *[None if t is None else next(rest) for t in s[1:7]], *s[7:]) for s in stages]
        )

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_one_gradient_alone() -> None:
    """Any tensor, running statistics included, may require a gradient alone; the others get none."""
    x, stages = small_chain("up", torch.float64)
    stages = to_float64(stages)
    for wanted in leaves(x, stages):
        wanted.requires_grad_()
        conv_chain(x, stages).square().sum().backward()
        (exact,) = torch.autograd.grad(expected_output(x, stages).square().sum(), wanted)
        assert relative(wanted.grad, exact) < 1e-10
        wanted.requires_grad_(False)
        wanted.grad = None


@KINDS
def test_nothing_is_saved_without_gradients(kind: str) -> None:
    x, stages = small_chain(kind)
    for t in leaves(x, stages):
        t.requires_grad_()
    with torch.no_grad():
        assert not conv_chain(x, stages).requires_grad
    with torch.inference_mode():
        assert conv_chain(x, stages).is_inference()
        assert chain.Chain(stages)(x).is_inference()
    assert conv_chain(x, stages).requires_grad
    assert chain.Chain(stages)(x).requires_grad


@native.NEEDED
def test_inference_mode_tensors() -> None:
    with torch.inference_mode(), ops.use_engine("native"):
        x, stages = small_chain("up")
        assert relative(conv_chain(x, stages), expected_output(x, stages)) <= 2 * LAYER
        run = chain.Chain(stages)
        assert relative(run(x), expected_output(x, stages)) <= 2 * LAYER
        stages[0].weight.mul_(-0.5)  # inference tensors have no version counter
        assert relative(run(x), expected_output(x, stages)) <= 2 * LAYER


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", [pytest.param("native", marks=native.NEEDED), "auto"])
def test_autocast_casts_only_x_and_weights(kind: str, dtype: torch.dtype, engine: str) -> None:
    x, stages = small_chain(kind)
    by_hand = [s._replace(weight=s.weight.to(dtype)) for s in stages]
    with ops.use_engine(engine), torch.no_grad():
        expected = conv_chain(x.to(dtype), by_hand)
        with torch.autocast("cpu", dtype=dtype):
            found = [conv_chain(x, stages), chain.Chain(stages)(x), OP(*arguments(x, stages))]
    with torch.autocast("cpu", dtype=dtype):
        assert conv_chain(x.double(), to_float64(stages)).dtype == torch.float64
    for y in found:
        assert y.dtype == dtype
        assert torch.equal(y, expected)
    # Other engines round once per layer; errors are of order 1 and at most double from layer to layer.
    assert relative(expected, expected_output(x.to(dtype), by_hand)) <= 4 * len(stages) * unit(dtype)


def test_autocast_with_gradients() -> None:
    x, stages = small_chain("up")
    inputs = [t.requires_grad_() for t in leaves(x, stages)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_chain(x, stages)
    assert y.dtype == torch.bfloat16
    exact = torch.autograd.grad(expected_output(x, stages).sum(), inputs)
    for got, want in zip(torch.autograd.grad(y.float().sum(), inputs), exact, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, want) < 0.1


@KINDS
def test_function_transforms(kind: str) -> None:
    """torch.func's vmap over examples and over weights, grad and jvp agree with those of the formula."""
    x, stages = small_chain(kind, torch.float64)
    stages = to_float64(stages)
    first = stages[0].weight

    def run(chain_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(x: Tensor, weight: Tensor) -> Tensor:
            x = x[None] if x.ndim == 3 else x
            return chain_of(x, [stages[0]._replace(weight=weight), *stages[1:]])

        return function

    def gradients(f: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(lambda x, weight: f(x, weight).square().sum(), argnums=(0, 1))

    both = torch.stack([first, -2 * first])
    for transform, given in (
        (lambda f: torch.func.vmap(f, (0, None)), (x, first)),
        (lambda f: torch.func.vmap(f, (None, 0)), (x, both)),
        (gradients, (x, first)),
        (lambda f: lambda x, weight: torch.func.jvp(f, (x, weight), (x, -weight)), (x, first)),
    ):
        got, want = (transform(run(f))(*given) for f in (conv_chain, expected_output))
        got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 1e-11


@native.NEEDED
def test_transforms_use_the_reference() -> None:
    """The operator has no forward-mode rule: it would silently return zero tangents."""
    x, stages = small_chain("up")
    run = chain.Chain(stages)
    with torch.no_grad():
        for f in (run, lambda x: conv_chain(x, stages)):
            with ops.recording() as choices:
                _, tangent = torch.func.jvp(f, (x,), (torch.randn_like(x),))
            assert bool(tangent.any())
            assert {c.engine for c in choices} == {"reference"}
            assert all("forward-mode" in c.reason for c in choices)
    with ops.use_engine("native"), pytest.raises(RuntimeError, match="engine 'native' is forced"):
        torch.func.vmap(lambda x: conv_chain(x[None], stages))(x)


@native.NEEDED
def test_compiled_fullgraph() -> None:
    x, stages = small_chain("up")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, stages: list[Stage]) -> Tensor:
        return 2 * conv_chain(x + 0, stages)

    torch._dynamo.reset()
    with ops.use_engine("native"), torch.no_grad():
        assert torch.equal(run(x, stages), 2 * conv_chain(x, stages))
        assert run(x, stages).stride() == conv_chain(x, stages).stride()
    inputs = [t.requires_grad_() for t in leaves(x, stages)]
    for got, want in zip(
        torch.autograd.grad(run(x, stages).sum(), inputs),
        torch.autograd.grad(2 * conv_chain(x, stages).sum(), inputs),
        strict=True,
    ):
        assert relative(got, want) < 1e-5
    torch._dynamo.reset()


def test_fake_and_meta_tensors_have_the_outputs_shape_and_strides() -> None:
    for kind in ("up", "down"):
        for channels_last in (True, False):
            x, stages = small_chain(kind)
            real = conv_chain(x, stages, channels_last)
            there = [Stage(*[v.to("meta") if isinstance(v, Tensor) else v for v in s]) for s in stages]
            meta = conv_chain(x.to("meta"), there, channels_last)
            assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)
