"""The native engine in training: gradients that are needed, of some or of no outputs, and of gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from tests.support import native
from tests.support.engine_results import requiring_grad
from tests.support.float64_reference import (
    BOTH,
    expected_outputs,
    leaves,
    op,
)
from tests.support.native import (
    ALGORITHMS,
    LAYER,
)
from tests.support.native_training import (
    assert_correct,
    backward_of,
    backward_operator,
    cotangents,
    forced,
    layer,
    native_results,
    random_call,
)
from tests.support.tolerance import relative

pytestmark = [native.NEEDED, pytest.mark.usefixtures("nan_in_new_memory", "threads_restored")]


@pytest.mark.parametrize("epilogue", ["statistics", "scale_shift_leaky_relu"])
@ALGORITHMS
@BOTH
def test_some_inputs_require_gradients(transposed: bool, algorithm: str, epilogue: str) -> None:
    """Each gradient has the same bits as when all are required; the others are absent.

    The exception is dweight: if dout_scale is required, it is computed from e and scaled, otherwise from du.
    """
    call = random_call(layer(algorithm, transposed, "affine_relu", epilogue))
    given = cotangents(call, transposed)
    with forced(algorithm):
        everything = native_results(call, transposed, given)
        every = [("x",), ("weight",), ("scale",), ("x", "weight"), ("weight", "shift"), ("center",)]
        if not call.stats:
            every += [("out_scale",), ("out_shift",), ("out_scale", "out_shift"), ("weight", "out_scale")]
        for wanted in every:
            some = native_results(call, transposed, given, wanted)
            assert {name for name in some if name[0] == "d"} == {f"d{name}" for name in wanted}
            for name, result in some.items():
                if name == "dweight" and not call.stats and "out_scale" not in wanted:
                    assert relative(result, everything[name]) <= 2 * LAYER
                else:
                    assert torch.equal(result, everything[name]), f"{name} of {wanted}"


@BOTH
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5)), ids=str)
def test_gradients_not_needed_are_empty(transposed: bool, needs: tuple[bool, ...]) -> None:
    epilogue = "scale_shift_tanh" if any(needs[3:]) else "statistics"
    call = backward_of(random_call(layer("direct", transposed, "affine_relu", epilogue)), transposed)
    call = call._replace(needs=needs)  # type: ignore[arg-type]
    with ops.use_engine("native"):
        found = backward_operator(transposed)(*call)
    expected = ops.empty_gradients(call)
    for gradient, like in zip(found, expected, strict=True):
        assert (gradient.shape, gradient.stride()) == (like.shape, like.stride())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("used", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@BOTH
def test_some_outputs_are_used(transposed: bool, used: tuple[bool, bool, bool]) -> None:
    for algorithm in ("f4", "dense"):
        call = random_call(layer(algorithm, transposed, "affine_leaky_relu", "statistics"))
        every = cotangents(call, transposed)
        some: Any = tuple(c if use else None for c, use in zip(every, used, strict=True))
        with forced(algorithm):
            assert_correct(native_results(call, transposed, some), call, transposed, some)


@pytest.mark.parametrize("epilogue", ["statistics", "raw"])
@ALGORITHMS
@BOTH
def test_gradients_of_sums(transposed: bool, algorithm: str, epilogue: str) -> None:
    """``.sum().backward()``: output gradients with strides of 0."""
    call = requiring_grad(random_call(layer(algorithm, transposed, "affine_relu", epilogue)))
    with forced(algorithm), ops.use_engine("native"):
        y, mean, var = op(transposed)(*call)
        (y.sum() + 40 * mean.sum() - 40 * var.sum() if call.stats else y.sum()).backward()
    c = y.shape[1]
    dmean, dvar = (torch.tensor(v).expand(c) if call.stats else None for v in (40.0, -40.0))
    given = (torch.ones(()).expand(y.shape), dmean, dvar)
    plain = call._replace(**{name: t.detach() for name, t in leaves(call).items()})
    outputs = dict(zip(("y", "mean", "var") if call.stats else ("y",), (y, mean, var), strict=False))
    found = {name: t.detach() for name, t in outputs.items()}
    found |= {f"d{name}": t.grad for name, t in leaves(call).items() if t.grad is not None}
    assert_correct(found, plain, transposed, given)


@ALGORITHMS
@BOTH
def test_an_empty_batch(transposed: bool, algorithm: str) -> None:
    for prologue, epilogue in (("affine_relu", "statistics"), ("relu", "tanh")):
        call = requiring_grad(layer(algorithm, transposed, prologue, epilogue, batch=0).call())
        with forced(algorithm), ops.use_engine("native"):
            y, mean, var = op(transposed)(*call)
            y.sum().backward()
        assert y.shape == ops.check(call, transposed).shape
        assert bool(mean.isnan().all())
        assert bool(var.isnan().all())
        assert call.x.grad is not None
        assert call.x.grad.shape == call.x.shape
        assert call.weight.grad is not None
        assert not call.weight.grad.any()


@ALGORITHMS
@BOTH
def test_prologue_gradients_match_finite_differences(transposed: bool, algorithm: str) -> None:
    """dcenter, dscale and dshift agree with finite differences of the definition in float64."""
    call = random_call(layer(algorithm, transposed, "affine_leaky_relu", "statistics"))
    given = cotangents(call, transposed)

    def loss(**moved: Tensor) -> Tensor:
        outputs = expected_outputs(call._replace(**moved), transposed)
        return sum((o * c.double()).sum() for o, c in zip(outputs, given, strict=True))  # type: ignore[misc,union-attr]

    with forced(algorithm):
        found = native_results(call, transposed, given)
    for name in ("center", "scale", "shift"):
        value, direction = getattr(call, name).double(), torch.randn(call.x.shape[1], dtype=torch.float64)
        step = 1e-7 * direction
        from_differences = (loss(**{name: value + step}) - loss(**{name: value - step})) / 2e-7
        along = found[f"d{name}"].double() @ direction
        size = float(found[f"d{name}"].double().norm() * direction.norm())
        # A step of 1e-7 occasionally crosses a kink on one side of the difference.
        assert abs(float(along - from_differences)) <= 1e-4 * size, name


@BOTH
def test_second_derivatives(transposed: bool) -> None:
    """create_graph goes through the reference's aten: first and second derivatives are correct."""
    call = requiring_grad(random_call(layer("direct", transposed, "affine_leaky_relu", "statistics")))

    def penalty(call: ops.Call, outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        y, mean, var = outputs
        loss = (y * y).sum() + (mean * var).sum()
        inputs = [t for t in leaves(call).values() if t.requires_grad]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)  # type: ignore[arg-type]
        return first + second

    with ops.use_engine("native"):
        found = penalty(call, op(transposed)(*call))
    wide = requiring_grad(call._replace(**{name: t.detach().double() for name, t in leaves(call).items()}))
    expected = penalty(wide, expected_outputs(wide, transposed))
    for a, b in zip(found, expected, strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= 1e-5 * float(b.detach().norm())
