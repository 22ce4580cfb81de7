"""The fused convolutions as PyTorch operators: derivatives, transforms, schemas and fakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.reference import ACTIVATIONS
from tests.support.float64_reference import BOTH, Problem, expected_outputs, gradients, leaves, op, pairwise
from tests.support.tolerance import Bounds, assert_within, relative

pytestmark = pytest.mark.usefixtures("one_thread")
TAILS: list[dict[str, Any]] = [
    {"stats": True},
    *({"out_act": a} for a in ACTIVATIONS),
    *({"out_scale": True, "out_shift": True, "out_act": a} for a in ACTIVATIONS),
    {"out_scale": True, "out_act": "relu"},
    {"out_shift": True, "out_act": "tanh"},
]
MAPS: list[dict[str, Any]] = [
    {"size": (4, 4), "kernel": (4, 4)},
    {"size": (3, 5), "kernel": (3, 3)},
    {"size": (4, 5), "kernel": (3, 5)},
    {"size": (5, 4), "kernel": (5, 4)},
]
OPTIONS: dict[str, list[Any]] = {
    "tail": TAILS,
    "in_act": list(ACTIVATIONS),
    "map": MAPS,
    "padding": [0, 1, 2],
    "stride": [1, 2],
    "transposed": [False, True],
    "prologue": [False, True],
}


def build(rows: list[dict[str, Any]]) -> list[Problem]:
    problems = []
    for seed, row in enumerate(rows):
        rest = {k: v for k, v in row.items() if k not in ("tail", "map")}
        problems.append(Problem(**row["tail"], **row["map"], **rest, c_in=2, c_out=3, seed=seed))
    return problems


def differentiable(problem: Problem) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return the op as a function of its differentiable arguments, and those arguments."""
    call = problem.call(requires_grad=True)
    inputs = leaves(call)

    def function(*values: Tensor) -> Any:
        outputs = op(problem.transposed)(*call._replace(**dict(zip(inputs, values, strict=True))))
        return outputs if problem.stats else outputs[0]

    return function, tuple(inputs.values())


# --- derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", build(pairwise(**OPTIONS)), ids=str)
def test_first_and_second_derivatives(problem: Problem) -> None:
    """Along random directions (fast_mode), for every pair of options."""
    function, inputs = differentiable(problem)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("in_act", ACTIVATIONS)
@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_derivatives_of_all_option_combinations(tail: dict[str, Any], in_act: str, prologue: bool) -> None:
    here = {**OPTIONS, "tail": [tail], "in_act": [in_act], "prologue": [prologue]}
    rows = [dict(zip(here, values, strict=True)) for values in itertools.product(*here.values())]
    for problem in build(rows):
        function, inputs = differentiable(problem)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True), problem
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True), problem


def test_every_option_combination_has_an_output() -> None:
    whole = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    assert all(p.fits for p in build(whole))


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"prologue": True, "in_act": "leaky_relu", "stats": True},
        {"prologue": True, "in_act": "relu", "out_scale": True, "out_shift": True, "out_act": "tanh"},
    ],
    ids=["stats", "epilogue"],
)
def test_every_entry_of_the_jacobian(transposed: bool, options: dict[str, Any]) -> None:
    """The networks' options, entry by entry instead of along random directions."""
    function, inputs = differentiable(Problem(transposed, c_in=2, c_out=2, size=(4, 3), **options))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@BOTH
@pytest.mark.parametrize("wanted", ["x", "weight", "center", "scale", "shift", "out_scale", "out_shift"])
def test_one_gradient_alone(transposed: bool, wanted: str) -> None:
    """Each input's gradient is the same whether or not the others require one."""
    problem = Problem(
        transposed, prologue=True, in_act="relu", out_scale=True, out_shift=True, out_act="tanh"
    )
    call = problem.call(requires_grad=True)
    dy = problem.cotangents(call)
    everything = gradients(op(transposed)(*call), dy, leaves(call))
    alone = ops.Call(*[v.detach() if isinstance(v, Tensor) else v for v in call])
    alone = alone._replace(**{wanted: getattr(call, wanted)})
    assert torch.equal(gradients(op(transposed)(*alone), dy, {wanted: getattr(call, wanted)})[wanted],
                       everything[wanted])  # fmt: skip


@BOTH
@pytest.mark.parametrize("used", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_some_outputs_unused(transposed: bool, used: tuple[bool, bool, bool]) -> None:
    """A loss of any of y, mean and var: a missing output gradient counts as zero."""
    problem = Problem(transposed, prologue=True, in_act="leaky_relu", stats=True)
    call = problem.call(requires_grad=True)
    cotangents: Any = tuple(c if u else None for c, u in zip(problem.cotangents(call), used, strict=True))
    actual = gradients(op(transposed)(*call), cotangents, leaves(call))
    expected = gradients(expected_outputs(call, transposed), cotangents, leaves(call))
    bounds = Bounds(call, transposed)
    dy = torch.zeros_like(problem.cotangents(call)[0]) if cotangents[0] is None else cotangents[0]
    for name, allowed in bounds.backward(dy, *cotangents[1:]).items():
        if name in expected:
            assert_within(f"gradient of {name}", actual[name], expected[name], allowed)


@BOTH
def test_third_derivatives(transposed: bool) -> None:
    """The reference backward is differentiable aten to any order."""
    problem = Problem(transposed, batch=1, c_in=2, c_out=1, size=(3, 3), kernel=(3, 3), out_act="tanh")
    function, inputs = differentiable(problem)

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*values).sum(), values, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, inputs, fast_mode=True)


TRANSFORMED: list[dict[str, Any]] = [
    {"prologue": True, "in_act": "relu", "stats": True},
    {"prologue": True, "in_act": "leaky_relu", "out_scale": True, "out_shift": True, "out_act": "tanh"},
    {"in_act": "sigmoid", "out_shift": True, "out_act": "relu"},
]


@BOTH
@pytest.mark.parametrize("options", TRANSFORMED, ids=str)
def test_forward_mode(transposed: bool, options: dict[str, Any]) -> None:
    """Tangents are correct; an operator with only a backward would silently return zeros."""
    function, inputs = differentiable(Problem(transposed, **options))
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)


@BOTH
@pytest.mark.parametrize("options", TRANSFORMED, ids=str)
def test_function_transforms(transposed: bool, options: dict[str, Any]) -> None:
    """torch.func's grad, and vmap over examples and over weights, agree with those of the expected result."""
    problem = Problem(transposed, **options)
    call = problem.call()

    def changed(x: Tensor, weight: Tensor) -> ops.Call:
        return call._replace(x=x[None] if x.ndim == 3 else x, weight=weight)

    def total(outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        y, mean, var = outputs
        return y.square().sum() + mean.square().sum() + var.sum()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return total(op(transposed)(*changed(x, weight)))

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return total(expected_outputs(changed(x, weight), transposed))

    weights = torch.stack([call.weight, -2 * call.weight])
    for transform, arguments in (
        (lambda f: torch.func.grad(f, argnums=(0, 1)), (call.x, call.weight)),
        (lambda f: torch.func.vmap(torch.func.grad(f), (0, None)), (call.x, call.weight)),
        (lambda f: torch.func.vmap(f, (None, 0)), (call.x, weights)),
        (lambda f: torch.func.jacrev(torch.func.grad(f)), (call.x[0], call.weight)),
    ):
        got, want = transform(loss)(*arguments), transform(exact)(*arguments)
        got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 1e-12


@BOTH
def test_transforms_respect_checks_autocast_and_engines(transposed: bool) -> None:
    """Under torch.func, argument checks, the autocast rule and forced engines apply as well."""
    problem = Problem(transposed, prologue=True, in_act="relu", stats=True, dtype=torch.float32)
    call = problem.call()
    f = op(transposed)

    def run(x: Tensor) -> Any:
        return f(*call._replace(x=x))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, (actual, tangents) = run(call.x), torch.func.jvp(run, (call.x,), (call.x,))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert [t.dtype for t in tangents] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(bool(t.any()) for t in tangents)
    with pytest.raises(ValueError, match="in_act must be one of"):
        torch.func.jvp(lambda x: f(x, call.weight, in_act="gelu")[0], (call.x,), (call.x,))
    with ops.recording() as choices:
        torch.func.jvp(run, (call.x,), (call.x,))
    assert choices[0].engine == "reference"
    assert "forward-mode" in choices[0].reason
    with ops.use_engine("triton"), pytest.raises(RuntimeError, match="engine 'triton' is forced"):
        torch.func.jvp(run, (call.x,), (call.x,))


def test_nothing_is_saved_without_gradients() -> None:
    call = Problem(prologue=True, stats=True).call()
    assert not any(t.requires_grad for t in ops.conv2d_fused(*call))
    with torch.no_grad():
        call = Problem(prologue=True, stats=True).call(requires_grad=True)
        assert not any(t.requires_grad for t in ops.conv2d_fused(*call))


# --- operators ---------------------------------------------------------------------------------------------


def overload(transposed: bool) -> Any:
    name = "conv_transpose2d_fused" if transposed else "conv2d_fused"
    return getattr(torch.ops.dcgan, name).default


OPCHECKS: dict[str, Problem] = {
    "plain": Problem(),
    "nchw": Problem(channels_last=False),
    "stats": Problem(prologue=True, in_act="relu", stats=True),
    "stats nchw": Problem(in_act="leaky_relu", stats=True, channels_last=False),
    "epilogue": Problem(prologue=True, in_act="relu", out_scale=True, out_shift=True, out_act="tanh"),
    "head": Problem(kernel=(4, 4), stride=1, padding=0, out_act="sigmoid", c_out=1),
    "1x1": Problem(size=(1, 1), kernel=(3, 3), stride=1, padding=1, stats=True),
    "bfloat16": Problem(prologue=True, in_act="leaky_relu", stats=True, dtype=torch.bfloat16),
    "float16": Problem(out_scale=True, out_act="relu", dtype=torch.float16),
    "empty": Problem(batch=0, prologue=True, in_act="relu", out_act="tanh"),
}


@BOTH
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(transposed: bool, name: str) -> None:
    problem = OPCHECKS[name].with_(transposed=transposed)
    torch.library.opcheck(overload(transposed), tuple(problem.call(requires_grad=True)))


@BOTH
def test_opcheck_without_the_default_arguments(transposed: bool) -> None:
    call = Problem(transposed, dtype=torch.float32).call(requires_grad=True)
    torch.library.opcheck(overload(transposed), (call.x, call.weight))
    torch.library.opcheck(overload(transposed), (call.x, call.weight), {"stats": True, "stride": 1})


@BOTH
def test_defaults_match_the_signature(transposed: bool) -> None:
    call = Problem(transposed, dtype=torch.float32).call(requires_grad=True)
    short, long = op(transposed)(call.x, call.weight), op(transposed)(*ops.Call(call.x, call.weight))
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)
    short[0].sum().backward()
    assert call.x.grad is not None
    assert call.weight.grad is not None


@BOTH
def test_fake_and_meta_tensors_have_the_outputs_shapes_and_strides(transposed: bool) -> None:
    for problem in (Problem(transposed, stats=True), Problem(transposed, c_out=1, channels_last=False)):
        call = problem.call()
        real = op(transposed)(*call)
        meta = op(transposed)(*[v.to("meta") if isinstance(v, Tensor) else v for v in call])
        for a, b in zip(real, meta, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
