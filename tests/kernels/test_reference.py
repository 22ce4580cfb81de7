"""The reference engine implements its docstring: compared with F.conv*, F.batch_norm and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcgan.kernels import ops, reference
from dcgan.kernels.reference import ACTIVATIONS
from tests.support.float64_reference import (
    GRADIENTS,
    Problem,
    column,
    convolve,
    expected_outputs,
    gradients,
    leaves,
    op,
    pairwise,
)
from tests.support.tolerance import Bounds, assert_within, relative, unit

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TAILS: list[dict[str, Any]] = [
    {"stats": True},
    {},
    {"out_act": "tanh"},
    {"out_scale": True, "out_shift": True, "out_act": "relu"},
    {"out_scale": True, "out_act": "leaky_relu"},
    {"out_shift": True, "out_act": "sigmoid"},
    {"out_scale": True, "out_shift": True},
]
GEOMETRIES: list[dict[str, Any]] = [
    {"size": (4, 4), "kernel": (4, 4), "stride": 2, "padding": 1},
    {"size": (1, 1), "kernel": (4, 4), "stride": 1, "padding": 0, "transposed": True},
    {"size": (4, 4), "kernel": (4, 4), "stride": 1, "padding": 0, "transposed": False},
    {"size": (5, 3), "kernel": (3, 5), "stride": 1, "padding": 2},
    {"size": (6, 5), "kernel": (3, 3), "stride": 2, "padding": 0},
    {"size": (4, 7), "kernel": (5, 4), "stride": 3, "padding": 1},
    {"size": (3, 4), "kernel": (1, 1), "stride": 1, "padding": 0},
]


def sampled_problems() -> list[Problem]:
    rows = pairwise(
        dtype=list(DTYPES),
        geometry=GEOMETRIES,
        tail=TAILS,
        in_act=list(ACTIVATIONS),
        transposed=[False, True],
        prologue=[False, True],
        channels_last=[False, True],
        channels=[(3, 2), (1, 5), (8, 1), (16, 24)],
    )
    problems = []
    for seed, row in enumerate(rows):
        geometry, tail, (c_in, c_out) = row.pop("geometry"), row.pop("tail"), row.pop("channels")
        problems.append(Problem(**{**row, **geometry, **tail}, c_in=c_in, c_out=c_out, seed=seed))
    return problems


@pytest.mark.parametrize("problem", sampled_problems(), ids=str)
def test_outputs_and_gradients(problem: Problem) -> None:
    call = problem.call(requires_grad=True)
    exact = expected_outputs(call, problem.transposed)
    cotangents = problem.cotangents(call)
    with ops.use_engine("reference"):
        outputs = op(problem.transposed)(*call)
    bounds = Bounds(call, problem.transposed)

    names = ("y", "mean", "var") if problem.stats else ("y",)
    for name, actual, expected in zip(names, outputs, exact, strict=False):
        assert_within(name, actual, expected, bounds.forward()[name])
    assert outputs[0].dtype == problem.dtype
    assert outputs[1].dtype == outputs[2].dtype == reference.accumulator_dtype(problem.dtype)
    assert problem.stats or outputs[1].numel() == outputs[2].numel() == 0

    expected_gradients = gradients(exact, cotangents, leaves(call))
    actual_gradients = gradients(outputs, cotangents, leaves(call))
    allowed = bounds.backward(*cotangents)
    for name, expected in expected_gradients.items():
        assert_within(f"gradient of {name}", actual_gradients[name], expected, allowed[name])
        assert actual_gradients[name].dtype == getattr(call, name).dtype


def test_the_sample_covers_what_it_claims() -> None:
    problems = sampled_problems()
    assert all(p.fits for p in problems)
    assert {p.dtype for p in problems} == set(DTYPES)
    assert {(p.in_act, p.prologue) for p in problems} == {(a, b) for a in ACTIVATIONS for b in (False, True)}
    assert {(p.transposed, p.channels_last) for p in problems} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
def test_batch_norm(transposed: bool, training: bool, activation: str) -> None:
    """BatchNorm and activation become statistics and a prologue in training, an epilogue in eval."""
    problem = Problem(transposed, batch=3, c_in=4, c_out=5, size=(6, 5))
    x, weight = problem.call()[:2]
    gamma, beta, running_mean = torch.randn(3, 5, dtype=torch.float64)
    running_var = torch.rand(5, dtype=torch.float64) + 0.1
    eps = 1e-5
    u = convolve(x, weight, 2, 1, transposed)
    expected = F.batch_norm(u, running_mean.clone(), running_var.clone(), gamma, beta, training, 0.1, eps)
    expected = getattr(F, activation)(expected) if activation != "leaky_relu" else F.leaky_relu(expected, 0.2)

    if training:
        y, mean, var = op(transposed)(x, weight, stats=True)
        # A 1×1 identity convolution exposes the prologue's result.
        identity = torch.eye(5, dtype=torch.float64)[:, :, None, None]
        affine = (mean, gamma * torch.rsqrt(var + eps), beta)
        y = ops.conv2d_fused(y, identity, *affine, activation, stride=1, padding=0)[0]
    else:
        scale = gamma * torch.rsqrt(running_var + eps)
        shift = beta - running_mean * scale
        y = op(transposed)(x, weight, out_scale=scale, out_shift=shift, out_act=activation)[0]
    assert relative(y, expected) < 50 * unit(torch.float64)


class Stack(nn.Module):
    """Three ConvTranspose2d layers, two with BatchNorm and ReLU, the last with Tanh, as in a Generator."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.ConvTranspose2d(7, 6, 4, 1, 0, bias=False),
                nn.ConvTranspose2d(6, 5, 4, 2, 1, bias=False),
                nn.ConvTranspose2d(5, 3, 4, 2, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(5)])
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.5)
            nn.init.normal_(norm.bias)

    def forward(self, z: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=False):
            z = F.relu(norm(conv(z)))
        return torch.tanh(self.convs[-1](z))

    def fused(self, z: Tensor) -> Tensor:
        """Compute the same with fused ops: BatchNorm and ReLU become the next layer's prologue."""
        pending: tuple[Any, ...] = (None, None, None, "none")
        geometry = [{"stride": 1, "padding": 0}, {}, {}]
        for conv, norm, where in zip(self.convs, self.norms, geometry, strict=False):
            z, mean, var = ops.conv_transpose2d_fused(z, conv.weight, *pending, stats=True, **where)
            pending = (mean, norm.weight * torch.rsqrt(var + norm.eps), norm.bias, "relu")
        return ops.conv_transpose2d_fused(z, self.convs[-1].weight, *pending, out_act="tanh")[0]


def test_three_layers_equal_convtranspose_batchnorm_relu() -> None:
    """Output and every gradient in float64 differ only by rounding, far below 1e-13."""
    stack = Stack().double()
    z = torch.randn(6, 7, 1, 1, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    inputs = [z, *stack.parameters()]
    expected, actual = stack(z), stack.fused(z)
    assert relative(actual, expected) < 1e-13
    for want, got in zip(
        torch.autograd.grad(expected, inputs, dy), torch.autograd.grad(actual, inputs, dy), strict=True
    ):
        assert relative(got, want) < 1e-13


@pytest.mark.parametrize("transposed", [False, True])
def test_statistics_of_a_near_blank_image(transposed: bool) -> None:
    """mean/std = κ = 1000 in float32: the variance errs by n·u·κ; E[y²] - E[y]² would err by n·u·κ²."""
    ratio, count = 1000.0, 8 * 16 * 16
    x = (ratio + torch.randn(8, 4, 16, 16, dtype=torch.float64)).float()
    identity = torch.eye(4)[:, :, None, None]
    y, mean, var = op(transposed)(x, identity, stats=True, stride=1, padding=0)
    assert torch.equal(y, x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    u = unit(torch.float32)
    # The errors of a sum's terms are independent: √n of them, not n (Higham, section 2.8); 4 deviations.
    allowed = 4 * count**0.5 * u * ratio
    assert relative(mean, exact_mean) < 4 * count**0.5 * u
    assert float(((var.double() - exact_var) / exact_var).abs().max()) < allowed
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert float(((naive.double() - exact_var) / exact_var).abs().max()) > 4 * allowed


@pytest.mark.parametrize("transposed", [False, True])
def test_scale_gradient_of_a_near_blank_image(transposed: bool) -> None:
    """The sums are centered: where mean/std is 10,000, Σ g·x - center·Σ g would cancel."""
    problem = Problem(transposed, batch=4, c_in=3, c_out=4, size=(8, 8), prologue=True, in_act="leaky_relu")
    problem = problem.with_(dtype=torch.float32)
    call = problem.call()
    x = 1e4 + call.x
    call = call._replace(x=x, center=x.double().mean((0, 2, 3)).float(), scale=torch.rand(3) + 0.5)
    call = ops.Call(*[v.requires_grad_() if isinstance(v, Tensor) else v for v in call])
    cotangents = problem.cotangents(call)
    actual = gradients(op(transposed)(*call), cotangents, leaves(call))
    expected = gradients(expected_outputs(call, transposed), cotangents, leaves(call))
    allowed = Bounds(call, transposed).backward(*cotangents)
    for name in GRADIENTS[:5]:
        assert_within(f"gradient of {name}", actual[name], expected[name], allowed[name])

    # Those are worst-case bounds. Typical errors of n terms, each a sum of K products, grow as √n and √K.
    with torch.no_grad():
        count, products, u = 4 * 8 * 8, 4 * 16, unit(torch.float32)
        g = expected["x"].double() / column(call.scale.double())
        centered = (call.x.double() - column(call.center.double())).abs()
        allowed_scale = 2 * (count**0.5 + products**0.5) * u * (g.abs() * centered).sum((0, 2, 3))
        assert_within("gradient of scale", actual["scale"], expected["scale"], allowed_scale)
        narrow = g.float()
        uncentered = (narrow * call.x).sum((0, 2, 3)) - call.center * narrow.sum((0, 2, 3))
        with pytest.raises(AssertionError, match="error"):
            assert_within("uncentered", uncentered, expected["scale"], allowed_scale)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_propagate_as_in_eager(transposed: bool, value: float, activation: str) -> None:
    problem = Problem(transposed, size=(6, 6), dtype=torch.float32, out_act=activation)
    call = problem.call()
    call.x[0, 1, 2, 3] = value
    y = op(transposed)(*call)[0]
    u = convolve(call.x, call.weight, 2, 1, transposed)
    eager = F.leaky_relu(u, 0.2) if activation == "leaky_relu" else reference.activate(u, activation, 0.2)
    assert not bool(u.isfinite().all())
    assert torch.equal(y.isnan(), eager.isnan())
    assert torch.equal(y.isposinf(), eager.isposinf())
    assert torch.equal(y.isneginf(), eager.isneginf())

    _, mean, var = op(transposed)(call.x, call.weight, stats=True)
    assert not bool(mean.isfinite().any())  # every output channel depends on the pixel
    assert bool(var.isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_propagates_through_a_prologue(activation: str) -> None:
    call = Problem(size=(6, 6), prologue=True, in_act=activation).call()
    call.x[0, 1, 2, 3] = float("nan")
    assert torch.equal(ops.conv2d_fused(*call)[0].isnan(), expected_outputs(call, False)[0].isnan())


def test_padding_pads_the_activated_input() -> None:
    """With a shift, act(prologue(0)) is not 0: padding x would give different values at the border."""
    call = Problem(size=(4, 4), prologue=True, in_act="relu", padding=2, kernel=(3, 3), stride=1).call()
    call = call._replace(center=torch.zeros(3).double(), shift=torch.full((3,), 5.0).double())
    padded = F.pad(call.x, (2, 2, 2, 2))
    wrong = expected_outputs(call._replace(x=padded, padding=0), False)[0]
    expected = expected_outputs(call, False)[0]
    y = ops.conv2d_fused(*call)[0]
    assert relative(y, expected) < 1e-14
    assert relative(y, wrong) > 0.1


@pytest.mark.parametrize("transposed", [False, True])
def test_the_derivative_at_a_kink_equals_eager(transposed: bool) -> None:
    """At exactly 0, relu has the subgradient of F.relu (0) and leaky_relu that of F.leaky_relu (slope)."""
    for activation in ("relu", "leaky_relu"):
        x = torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.ones(2, 2, 3, 3, dtype=torch.float64)
        for where in ({"in_act": activation}, {"out_act": activation}):
            y = op(transposed)(x, weight, stride=1, padding=1, **where)[0]
            expected = expected_outputs(ops.Call(x, weight, stride=1, padding=1, **where), transposed)[0]
            got, want = (torch.autograd.grad(t.sum(), x)[0] for t in (y, expected))
            assert torch.equal(got, want)


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, 2.5])
def test_slopes(slope: float) -> None:
    problem = Problem(prologue=True, in_act="leaky_relu", out_act="leaky_relu", slope=slope)
    call = problem.call(requires_grad=True)
    y, exact = ops.conv2d_fused(*call), expected_outputs(call, False)
    bounds = Bounds(call, False)
    assert_within("y", y[0], exact[0], bounds.forward()["y"])
    cotangents = problem.cotangents(call)
    actual, expected = (gradients(o, cotangents, leaves(call)) for o in (y, exact))
    for name, allowed in bounds.backward(*cotangents).items():
        if name in expected:
            assert_within(f"gradient of {name}", actual[name], expected[name], allowed)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    side, tap, width = st.integers(1, 9), st.integers(1, 6), st.integers(1, 9)
    problem = Problem(
        transposed=draw(st.booleans()),
        batch=draw(st.integers(1, 4)),
        c_in=draw(width),
        c_out=draw(width),
        size=(draw(side), draw(side)),
        kernel=(draw(tap), draw(tap)),
        stride=draw(st.integers(1, 4)),
        padding=draw(st.integers(0, 3)),
        prologue=draw(st.booleans()),
        in_act=draw(st.sampled_from(ACTIVATIONS)),
        stats=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    return problem if problem.fits else problem.with_(padding=0, kernel=(1, 1))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(problem=problems(), input_channels_last=st.booleans())
def test_any_shape(problem: Problem, input_channels_last: bool) -> None:
    call = problem.call()
    if input_channels_last:
        call = call._replace(x=call.x.contiguous(memory_format=torch.channels_last))
    outputs, exact = op(problem.transposed)(*call), expected_outputs(call, problem.transposed)
    allowed = Bounds(call, problem.transposed).forward()
    for name, actual, expected in zip(("y", "mean", "var"), outputs, exact, strict=True):
        if name in allowed:
            assert_within(name, actual, expected, allowed[name])
