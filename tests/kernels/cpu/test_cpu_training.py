"""The native engine in training: outputs and gradients of both ops by each algorithm, against float64.

What is fresh is NaN, so that whatever is not written shows.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import native
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import ISAS, LAYER, SPATIAL, THREADS, instruction_set, laid_out, layouts
from statement import GRADIENTS, Problem, act, column, convolve, gradients, leaves, op, pairwise, state
from tolerance import relative
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.call import Backward
from dcgan.kernels.cpu import library, select, training
from dcgan.kernels.reference import empty_gradient, memory_format

pytestmark = native.NEEDED
BOTH = pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
ALGORITHMS = pytest.mark.parametrize("algorithm", [*SPATIAL, "dense"])
NAN, INF = float("nan"), float("inf")

BEFORE: dict[str, dict[str, Any]] = {
    "as_it_is": {},
    "relu": {"in_act": "relu"},
    "leaky_relu": {"in_act": "leaky_relu"},
    "affine": {"prologue": True},
    "affine_relu": {"prologue": True, "in_act": "relu"},
    "affine_leaky_relu": {"prologue": True, "in_act": "leaky_relu"},
}
AFTER: dict[str, dict[str, Any]] = {
    "statistics": {"stats": True},
    "raw": {},
    "tanh": {"out_act": "tanh"},
    "shift_relu": {"out_shift": True, "out_act": "relu"},  # without one, sums of nothing are at the kink
    "scale": {"out_scale": True},
    **{
        f"scale_shift_{act}": {"out_scale": True, "out_shift": True, "out_act": act}
        for act in ("leaky_relu", "tanh", "sigmoid")
    },
}
DY = ("nhwc", "nchw", "strided", "expanded", "sum")
# Both sides of every vector's and panel's width; maps of one pixel, odd ones, and others.
CHANNELS = [(1, 1), (3, 5), (5, 3), (16, 16), (17, 33), (33, 17), (1, 16), (16, 1)]
MAPS = [(1, 1), (2, 3), (4, 4), (5, 7), (1, 4), (9, 8)]

Cotangents = tuple[Tensor | None, Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def _nan_and_threads() -> Iterator[None]:
    with native.fresh_memory_is_nan():
        yield
    torch.set_num_threads(THREADS)


# --- calls --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(algorithm: str) -> Iterator[None]:
    """Products of 4×4, stride 2, padding 1 by ``algorithm`` wherever it can: else by the direct one."""

    def choose(g: select.Geometry, product: int, dressed: tuple[bool, bool], *_: Any) -> str:
        prologue, stats = dressed
        if g.dense:
            return "dense"
        sums = stats if g.transposed and product == select.FPROP else False
        sums = sums or (prologue and not g.transposed and product == select.DGRAD)
        if (algorithm == "narrow" and sums) or (algorithm == "f2" and product == select.WGRAD):
            return "direct"
        return algorithm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "training", choose)
        yield


def layer(algorithm: str, transposed: bool, before: str, after: str, **changes: Any) -> Problem:
    """Of odd sizes; with an odd map where there may be one."""
    sizes: dict[str, Any] = {"c_in": 9, "c_out": 6, "size": (5, 4) if transposed else (7, 10), "batch": 3}
    if algorithm == "narrow":
        sizes |= {"c_out": 3} if transposed else {"c_in": 3}
    if algorithm == "dense":
        sizes |= {"size": (1, 1) if transposed else (4, 4), "stride": 1, "padding": 0}
    every = {**sizes, **BEFORE[before], **AFTER[after], "dtype": torch.float32, **changes}
    return Problem(transposed, **every)


def near_a_kink(call: ops.Call, transposed: bool) -> bool:
    """Whether rounding may tell which side of 0 an activation's input is on, or x̂ is what cancelling left."""
    x = call.x.double()
    if call.center is not None and call.scale is not None and call.shift is not None:
        scaled = (x - column(call.center)) * column(call.scale)
        x = scaled + column(call.shift)
        if input_of(call).norm() < 0.2 * scaled.norm():
            return True
    u = state(call._replace(out_act="none"), transposed)[0]
    near_in = call.in_act != "none" and bool((x.abs() < 1e-6).any())
    near_out = call.out_act != "none" and bool((u.abs() < 2e-5).any())
    return near_in or (near_out and call.out_act in ("relu", "leaky_relu"))


def made(problem: Problem) -> ops.Call:
    """The problem's call with y of order one, where no activation is flat, and away from kinks.

    Where there is an out_shift, which keeps it off a kink, one channel in many has an out_scale of 0.
    """
    taps = problem.kernel[0] * problem.kernel[1]
    if problem.transposed:
        taps //= problem.stride**2 if problem.padding else taps
    for seed in range(1000 * problem.seed, 1000 * problem.seed + 100):
        call = problem.with_(seed=seed).call()
        call = call._replace(weight=call.weight * (problem.c_in * taps) ** -0.5)
        if call.out_scale is not None and call.out_shift is not None and problem.c_out > 1:
            call.out_scale[problem.c_out // 2] = 0
        if not near_a_kink(call, problem.transposed):
            return call
    raise AssertionError("every draw is near a kink")


def strided(t: Tensor) -> Tensor:
    """A copy of which every second number of every dimension is another's."""
    memory = torch.full([2 * size for size in t.shape], NAN, dtype=t.dtype)
    return memory[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def cotangents(call: ops.Call, transposed: bool, layout: str = "nhwc") -> Cotangents:
    """dy laid out as that, and dmean and dvar, which reach du divided by the number of pixels."""
    n, c, h, w = ops.empty(call, ops.check(call, transposed))[0].shape
    if layout == "sum":  # what y.sum() hands back
        dy = torch.ones(()).expand(n, c, h, w)
    elif layout == "expanded":
        dy = torch.randn(1, c, 1, 1).expand(n, c, h, w)
    elif layout == "strided":
        dy = strided(torch.randn(n, c, h, w))
    else:
        dy = torch.randn(n, c, h, w).contiguous(memory_format=memory_format(layout == "nhwc"))
    if not call.stats:
        return dy, None, None
    vector = strided if layout == "strided" else torch.clone
    return dy, vector(n * h * w * torch.randn(c)), vector(n * h * w * torch.randn(c))


def requiring(call: ops.Call, wanted: tuple[str, ...] = GRADIENTS) -> ops.Call:
    return call._replace(
        **{name: t.detach().requires_grad_(name in wanted) for name, t in leaves(call).items()}
    )


def results(
    call: ops.Call, transposed: bool, given: Cotangents, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Outputs and gradients by name, of the engine in force."""
    fresh = requiring(call, wanted)
    outputs = op(transposed)(*fresh)
    inputs = {name: t for name, t in leaves(fresh).items() if t.requires_grad}
    names = ("y", "mean", "var") if call.stats else ("y",)
    found = {name: t.detach() for name, t in zip(names, outputs, strict=False)}
    return found | {f"d{name}": t for name, t in gradients(outputs, given, inputs).items()}


def native_results(
    call: ops.Call, transposed: bool, given: Cotangents, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Of the native engine, forward and backward, with the strides that they should have."""
    before = {name: t.clone() for name, t in leaves(call).items()}
    with ops.use_engine("native"), ops.recording() as choices:
        found = results(call, transposed, given, wanted)
    name = ops.NAMES[transposed]
    assert choices == [ops.Choice(name, "native", ""), ops.Choice(f"{name}_backward", "native", "")]
    assert found["y"].stride() == ops.empty(call, ops.check(call, transposed))[0].stride()
    for name, gradient in found.items():
        if name in ("y", "mean", "var"):
            continue
        argument = getattr(call, name[1:])
        assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype), name
        if name == "dx":
            assert gradient.stride() == empty_gradient(call.x).stride()
        elif name == "dweight":
            assert gradient.stride() == torch.empty_like(call.weight).stride()
    for name, t in leaves(call).items():
        assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), f"{name} was changed"
    return found


def reference_results(call: ops.Call, transposed: bool, given: Cotangents) -> dict[str, Tensor]:
    with ops.use_engine("reference"):
        return results(call, transposed, given)


# --- against float64 ----------------------------------------------------------------------------------------


def exact_results(
    call: ops.Call, transposed: bool, given: Cotangents
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Outputs and gradients in float64, by autograd, and what their norms would be if no sum cancelled.

    One sum of few may be near 0 by chance, with the error of what was summed: it is that which an error is
    to be relative to.
    """
    wide = requiring(call._replace(**{name: t.double() for name, t in leaves(call).items()}))
    outputs = state(wide, transposed)
    inputs = {name: t for name, t in leaves(wide).items() if t.requires_grad}
    found = {name: t.detach() for name, t in zip(("y", "mean", "var"), outputs, strict=True) if t.numel()}
    found |= {f"d{name}": t for name, t in gradients(outputs, given, inputs).items()}

    x_hat, weight = input_of(call), wide.weight.detach()
    u = convolve(x_hat, weight, call.stride, call.padding, transposed).requires_grad_()
    (du,) = gradients(state(after_product(wide, u), False), given, {"u": u}).values()
    if not call.stats:
        out_pre = state(after_product(wide, u)._replace(out_act="none"), False)[0].detach().requires_grad_()
        e = torch.autograd.grad(act(out_pre, call.out_act, call.slope), out_pre, given[0].double())[0].abs()
    product = call._replace(x=x_hat, center=None, scale=None, shift=None, in_act="none")
    typical = native.typical(product, transposed)
    sizes = {"y": float(typical.norm())}
    if call.stats:
        squares = typical.square().mean((0, 2, 3))
        sizes["mean"] = float(squares.sqrt().norm())
        sizes["var"] = float((found["var"] * squares).sqrt().norm())
    x2, w2 = x_hat.square().requires_grad_(), weight.square().requires_grad_()
    of_squares = convolve(x2, w2, call.stride, call.padding, transposed)
    if not call.stats:
        sizes["dout_shift"] = float(of_sum(e).norm())
        sizes["dout_scale"] = float(of_sum(e * of_squares.detach().sqrt()).norm())
    g2, dw2 = torch.autograd.grad(of_squares, (x2, w2), du.square())
    sizes |= {"dx": float(g2.sum().sqrt()), "dweight": float(dw2.sum().sqrt())}
    if call.center is not None and call.scale is not None:
        scale, centered = call.scale.double(), call.x.double() - column(call.center)
        sizes["dx"] = float((g2 * column(scale.square())).sum().sqrt())
        dshift = of_sum(g2.sqrt())
        sizes["dshift"] = float(dshift.norm())
        sizes["dscale"] = float(of_sum(g2.sqrt() * centered.abs()).norm())
        sizes["dcenter"] = float((scale * dshift).norm())
    return found, sizes


def of_sum(t: Tensor) -> Tensor:
    """How large the sum of numbers of these sizes is taken to be, by channel.

    Of independent signs and errors it is the root of the sum of their squares. But where dy is the same
    throughout, so is what a transform rounds in every tile, and the errors add up: 10 u of Σ|t|, with the u
    of tests/native.py, which is LAYER of an eighth of it.
    """
    return torch.maximum(t.square().sum((0, 2, 3)).sqrt(), t.sum((0, 2, 3)) / 8)


def after_product(call: ops.Call, u: Tensor) -> ops.Call:
    """The rest of the call, once its product is u."""
    identity = torch.eye(u.shape[1], dtype=u.dtype)[:, :, None, None]
    bare = call._replace(x=u, weight=identity, center=None, scale=None, shift=None, in_act="none")
    return bare._replace(stride=1, padding=0)


def input_of(call: ops.Call) -> Tensor:
    """x̂ in float64."""
    identity = torch.eye(call.x.shape[1], dtype=torch.float64)[:, :, None, None]
    alone = call._replace(weight=identity, stride=1, padding=0, stats=False, out_act="none")
    return state(alone._replace(out_scale=None, out_shift=None), False)[0]


def assert_right(found: dict[str, Tensor], call: ops.Call, transposed: bool, given: Cotangents) -> None:
    """Every result is within LAYER of float64's: tests/native.py has the reasons for that number.

    A gradient is that of one product more, from a du that errs by as much; dx, dweight and the sums are then
    within twice that. Where tanh and sigmoid saturate, du is told from a y that is right to some 2⁻²¹ of 1,
    whatever is left of the derivative.
    """
    exactly, sizes = exact_results(call, transposed, given)
    assert found.keys() == exactly.keys()
    saturates = call.out_act in ("tanh", "sigmoid")
    unsaturated = exact_results(call._replace(out_act="none"), transposed, given)[0] if saturates else {}
    for name, result in found.items():
        expected = exactly[name]
        error = float((result.double() - expected).norm())
        size = max(float(expected.norm()), sizes.get(name, 0.0))
        allowed = (LAYER if name in ("y", "mean", "var") else 2 * LAYER) * size
        if saturates and name != "y":
            allowed += 2**-21 * float(unsaturated[name].norm())
        assert error <= allowed, f"{name}: error {error:.2e} of {size:.2e}"  # a NaN fails too


def check(problem: Problem, layout: str = "nhwc", **changes: Any) -> dict[str, Tensor]:
    call = made(problem)._replace(**changes)
    given = cotangents(call, problem.transposed, layout)
    found = native_results(call, problem.transposed, given)
    assert_right(found, call, problem.transposed, given)
    return found


OPTIONS: dict[str, list[Any]] = {
    "algorithm": [*SPATIAL, "dense"],
    "transposed": [False, True],
    "before": list(BEFORE),
    "after": list(AFTER),
    "channels": CHANNELS,
    "size": MAPS,
    "layout": list(DY),
    "isa": list(ISAS),
    "batch": [1, 2, 5],
    "threads": [1, 2, 3],
    "x_nhwc": [True, False],
    "weight_nhwc": [True, False],
    "channels_last": [True, False],
}


def build(row: dict[str, Any], seed: int) -> Problem:
    """A convolution's map is about twice as large, and odd every second time."""
    transposed, (c_in, c_out), size = row["transposed"], row["channels"], row["size"]
    rest: dict[str, Any] = {"size": size}
    if row["algorithm"] == "dense":
        k = 1 + seed % 5
        rest = {"size": (1, 1) if transposed else (k, k), "kernel": (k, k), "padding": 0}
        rest["stride"] = 1 + seed % 2
    elif not transposed:
        rest = {"size": (2 * size[0] + seed % 2, 2 * size[1] + seed // 2 % 2)}
    return Problem(
        transposed, row["batch"], c_in, c_out, **rest, **BEFORE[row["before"]], **AFTER[row["after"]],
        dtype=torch.float32, channels_last=row["channels_last"], seed=seed,
    )  # fmt: skip


def run_row(row: dict[str, Any], seed: int) -> None:
    problem = build(row, seed)
    torch.set_num_threads(row["threads"])
    call = made(problem)
    call = call._replace(
        x=call.x.contiguous(memory_format=memory_format(row["x_nhwc"])),
        weight=call.weight.contiguous(memory_format=memory_format(row["weight_nhwc"])),
    )
    given = cotangents(call, problem.transposed, row["layout"])
    with instruction_set(row["isa"]), forced(row["algorithm"]):
        found = native_results(call, problem.transposed, given)
    assert_right(found, call, problem.transposed, given)


ROWS = pairwise(**OPTIONS)


def row_name(row: dict[str, Any]) -> str:
    return "-".join(str(v).replace(" ", "") for v in row.values())


@pytest.mark.parametrize("row", ROWS, ids=map(row_name, ROWS))
def test_outputs_and_gradients(row: dict[str, Any]) -> None:
    """Each pair of options at least once."""
    run_row(row, ROWS.index(row))


@pytest.mark.parametrize("before", BEFORE)
@ALGORITHMS
@BOTH
def test_every_mode_of_every_algorithm(transposed: bool, algorithm: str, before: str) -> None:
    for after in AFTER:
        with forced(algorithm):
            check(layer(algorithm, transposed, before, after))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@ALGORITHMS
@BOTH
def test_the_product_of_options(
    transposed: bool, algorithm: str, channels: tuple[int, int], isa: str
) -> None:
    """Maps, layouts, batches, threads and formats by turns."""
    fixed = {"transposed": transposed, "algorithm": algorithm, "channels": channels, "isa": isa}
    for seed, (before, after) in enumerate(itertools.product(BEFORE, AFTER)):
        by_turns = {name: OPTIONS[name][seed % len(OPTIONS[name])] for name in ("layout", "batch", "threads")}
        formats = dict.fromkeys(("x_nhwc", "weight_nhwc", "channels_last"), seed % 3 == 0)
        size = MAPS[seed // 3 % len(MAPS)]  # each with each batch
        row = {**fixed, "before": before, "after": after, "size": size, **by_turns, **formats}
        run_row(row, seed)


@pytest.mark.parametrize("algorithm", SPATIAL)
@BOTH
def test_sums_as_long_as_the_networks(transposed: bool, algorithm: str) -> None:
    """Many channels on either side, of which the products are made in several chunks and panels."""
    c_in, c_out = (260, 140) if transposed else (140, 260)
    size = (4, 4) if transposed else (8, 8)
    problem = layer(algorithm, transposed, "affine_relu", "statistics", c_in=c_in, c_out=c_out, size=size)
    with forced(algorithm):
        check(problem)


@pytest.mark.slow
@BOTH
def test_weights_too_large_to_be_kept_transformed(transposed: bool) -> None:
    """F(4×4) with more than 16 MB of transformed weights streams them."""
    size = (4, 4) if transposed else (9, 8)
    for before, after in (("affine_relu", "statistics"), ("as_it_is", "scale_shift_leaky_relu")):
        with forced("f4"):
            check(layer("f4", transposed, before, after, c_in=512, c_out=320, size=size))


@BOTH
def test_what_select_chooses(transposed: bool) -> None:
    """Of a few images and of many, narrow and wide; whatever it is, it is right."""
    for channels, batch in (((3, 20), 1), ((20, 3), 2), ((20, 24), 1), ((20, 24), 40)):
        for before, after in (("affine_relu", "statistics"), ("as_it_is", "tanh")):
            c_in, c_out = channels
            check(
                layer("f4", transposed, before, after, c_in=c_in, c_out=c_out, batch=batch, size=(6, 6)),
            )


# --- statistics ---------------------------------------------------------------------------------------------


def copying(algorithm: str, transposed: bool, x_of: Callable[..., Tensor]) -> ops.Call:
    """A call whose output holds numbers of x: every weight is 0 but one tap's of one channel."""
    problem = layer(algorithm, transposed, "as_it_is", "statistics", batch=37)
    call = problem.call()
    weight, dense = torch.zeros_like(call.weight), algorithm == "dense"
    # Of these each pixel of a transposed convolution's output sees one, once.
    taps = (slice(None) if transposed else slice(1)) if dense else slice(1, 3 if transposed else 2)
    for c_out in range(problem.c_out):
        one = (c_out % problem.c_in, c_out) if transposed else (c_out, c_out % problem.c_in)
        weight[(*one, taps, taps)] = 1
    return call._replace(x=x_of(*call.x.shape), weight=weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@ALGORITHMS
@BOTH
def test_a_mean_of_a_thousand_deviations(transposed: bool, algorithm: str, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    call = copying(algorithm, transposed, lambda *size: 1000 + torch.randn(*size))
    with instruction_set(isa), forced(algorithm), ops.use_engine("native"):
        y, mean, var = op(transposed)(*call)
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    # With κ = √(1 + mean²/var) = 1000 an error of some κ·2⁻²⁴ = 6e-5 is to be had; E[y²] - E[y]² has κ².
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert (naive.double() / wide.var((0, 2, 3), correction=0) - 1).abs().max() > 1e-3


@ALGORITHMS
@BOTH
def test_a_constant_channel_has_no_variance(transposed: bool, algorithm: str) -> None:
    """Whatever the constant: 1/√(var + eps) of a variance below zero would be NaN."""
    # What Winograd's transforms make of a constant is so to a few units in the last place.
    for value in (0.0, 1.0, -3.7, 1234.5):
        call = copying(algorithm, transposed, lambda *size, value=value: torch.full(size, value))
        with forced(algorithm), ops.use_engine("native"):
            _, mean, var = op(transposed)(*call)
        torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=1e-5, atol=0)
        assert bool((var >= 0).all())
        assert bool((var <= (1e-5 * value) ** 2).all())


@BOTH
def test_one_number_a_channel(transposed: bool) -> None:
    for size in ((1, 1), (1, 2)) if transposed else ((2, 2), (3, 3), (2, 4)):
        for algorithm in SPATIAL:
            with forced(algorithm):
                found = check(layer(algorithm, transposed, "affine_relu", "statistics", batch=1, size=size))
            if found["y"][:, 0].numel() == 1:
                assert bool((found["var"] == 0).all())
                assert torch.equal(found["mean"], found["y"].flatten())


# --- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["statistics", "scale_shift_leaky_relu"])
@ALGORITHMS
@BOTH
def test_some_inputs_require_gradients(transposed: bool, algorithm: str, after: str) -> None:
    """What is asked for has the bits that it has when all is asked for; nothing else is there.

    But a dweight with dout_scale is made of e and scaled afterwards, and of du without.
    """
    call = made(layer(algorithm, transposed, "affine_relu", after))
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
def test_what_the_operator_is_not_asked_for_is_empty(transposed: bool, needs: tuple[bool, ...]) -> None:
    after = "scale_shift_tanh" if any(needs[3:]) else "statistics"
    call = backward_of(made(layer("direct", transposed, "affine_relu", after)), transposed)
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
        call = made(layer(algorithm, transposed, "affine_leaky_relu", "statistics"))
        every = cotangents(call, transposed)
        some: Any = tuple(c if use else None for c, use in zip(every, used, strict=True))
        with forced(algorithm):
            assert_right(native_results(call, transposed, some), call, transposed, some)


@pytest.mark.parametrize("after", ["statistics", "raw"])
@ALGORITHMS
@BOTH
def test_gradients_of_sums(transposed: bool, algorithm: str, after: str) -> None:
    """``.sum().backward()``, as it is written: gradients with strides of 0."""
    call = requiring(made(layer(algorithm, transposed, "affine_relu", after)))
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
    assert_right(found, plain, transposed, given)


@ALGORITHMS
@BOTH
def test_no_images(transposed: bool, algorithm: str) -> None:
    for before, after in (("affine_relu", "statistics"), ("relu", "tanh")):
        call = requiring(layer(algorithm, transposed, before, after, batch=0).call())
        with forced(algorithm), ops.use_engine("native"):
            y, mean, var = op(transposed)(*call)
            y.sum().backward()
        assert y.shape == ops.check(call, transposed)
        assert bool(mean.isnan().all())
        assert bool(var.isnan().all())
        assert call.x.grad is not None
        assert call.x.grad.shape == call.x.shape
        assert call.weight.grad is not None
        assert not call.weight.grad.any()


# --- strides ------------------------------------------------------------------------------------------------


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits; but dout_scale is a sum over the weights in the order in which they lie."""
    assert found.keys() == expected.keys()
    for name, result in found.items():
        if name == "dout_scale":
            assert relative(result, expected[name]) <= LAYER
        else:
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("after", ["statistics", "scale_shift_leaky_relu"])
@ALGORITHMS
@BOTH
def test_any_strides(transposed: bool, algorithm: str, after: str) -> None:
    """Of x, weight, vectors and every gradient that comes in: the same bits."""
    call = made(layer(algorithm, transposed, "affine_relu", after))
    given = cotangents(call, transposed)
    with forced(algorithm):
        expected = native_results(call, transposed, given)
        weights = (
            call.weight.contiguous(memory_format=torch.channels_last),
            call.weight.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
            strided(call.weight),
        )
        odd = call._replace(**{name: strided(t) for name, t in leaves(call).items() if name != "weight"})
        spread: Any = tuple(None if c is None else strided(c) for c in given)
        for weight in weights:
            assert_same(native_results(odd._replace(weight=weight), transposed, spread), expected)


@BOTH
def test_expanded_and_negated_operands(transposed: bool) -> None:
    for after in ("statistics", "scale_shift_tanh"):
        call = made(layer("f4", transposed, "affine_relu", after))
        given = cotangents(call, transposed)
        for name, t in leaves(call).items():
            for odd in (t.narrow(0, 0, 1).expand(t.shape), torch._neg_view(t)):
                now = call._replace(**{name: odd})
                copied = call._replace(**{name: odd.clone().resolve_neg().contiguous()})
                found, own = (native_results(c, transposed, given) for c in (now, copied))
                assert_same(found, own)


def test_outputs_that_are_kept_keep_their_values() -> None:
    """Memory goes back to a pool with its last tensor, and with none before: in a few steps."""
    problem = layer("f4", True, "affine_relu", "statistics", batch=4, c_in=16, c_out=24, size=(40, 40))
    call = problem.call()
    given = cotangents(call, True)
    kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for step in range(4):
        found = native_results(call._replace(x=call.x + step), True, given)
        kept.append((found, {name: t.clone() for name, t in found.items()}))
        if step % 2:
            kept.pop(0)
    for found, copies in kept:
        for name, t in found.items():
            assert torch.equal(t, copies[name]), name
    views = [found["y"][1:, :, ::2] for found, _ in kept]
    expected = [view.clone() for view in views]
    kept.clear()
    del found, copies
    native_results(call, True, given)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@ALGORITHMS
@BOTH
def test_the_same_bits_again(transposed: bool, algorithm: str, isa: str) -> None:
    """On any one number of threads, with memory fresh and used."""
    problem = layer(algorithm, transposed, "affine_leaky_relu", "statistics", batch=5, c_in=17, c_out=18)
    call = made(problem)
    given = cotangents(call, transposed)
    with instruction_set(isa), forced(algorithm):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            library.release()
            first = native_results(call, transposed, given)
            for _ in range(3):
                again = native_results(call, transposed, given)
                assert all(torch.equal(first[key], again[key]) for key in first), threads


@pytest.mark.parametrize("algorithm", ["direct", "f4", "dense"])
def test_several_callers_at_once(algorithm: str) -> None:
    """Each with its own number of threads; forward and backward of both ops."""
    problems = [layer(algorithm, t, "affine_relu", "statistics", batch=5) for t in (False, True)]
    calls = [(made(p), p.transposed) for p in problems]
    tasks = [(call, transposed, cotangents(call, transposed)) for call, transposed in calls]
    expected = {}
    with forced(algorithm):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expected[threads] = [native_results(*task) for task in tasks]
        start = threading.Barrier(4)

        def work(own: int) -> bool:
            threads = 1 + own % 3
            torch.get_num_threads()  # of a new thread: the first use makes it what any has set last
            start.wait(60)
            torch.set_num_threads(threads)
            right = True
            for i in range(12):
                which = (i + own) % 2
                call, transposed, given = tasks[which]
                found = results(call, transposed, given)  # one engine for all: it is a global
                right &= all(torch.equal(t, expected[threads][which][key]) for key, t in found.items())
            return right

        with ops.use_engine("native"), ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


# --- as operators -------------------------------------------------------------------------------------------


def backward_operator(transposed: bool) -> Any:
    return getattr(torch.ops.dcgan, f"{ops.NAMES[transposed]}_backward").default


def backward_of(call: ops.Call, transposed: bool) -> Backward:
    """What autograd would ask for all gradients that there are."""
    y, mean, _ = (t.float() for t in state(call, transposed))
    dy, dmean, dvar = cotangents(call, transposed)
    assert dy is not None
    y = y.contiguous(memory_format=memory_format(call.channels_last))
    return Backward(
        dy, dmean, dvar, call.x, call.weight, call.center, call.scale, call.shift, call.in_act,
        call.out_scale, call.out_act, y if call.stats or call.out_act != "none" else None,
        mean if call.stats else None, call.stats, call.slope, call.stride, call.padding,
        (True, True, True, call.out_scale is not None, call.out_shift is not None),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(("affine_relu", "statistics"), ("leaky_relu", "tanh"), ("as_it_is", "statistics")),
        *(("affine_relu", "scale_shift_tanh"), ("as_it_is", "scale")),
    ],
)
@BOTH
def test_opcheck(transposed: bool, before: str, after: str) -> None:
    call = made(layer("direct", transposed, before, after))
    forward = getattr(torch.ops.dcgan, ops.NAMES[transposed]).default
    with ops.use_engine("native"):
        torch.library.opcheck(forward, tuple(requiring(call)))
        torch.library.opcheck(backward_operator(transposed), tuple(backward_of(call, transposed)))


@ALGORITHMS
@BOTH
def test_prologue_gradients_are_differences(transposed: bool, algorithm: str) -> None:
    """dcenter, dscale and dshift beside what float64 differences of the definition say."""
    call = made(layer(algorithm, transposed, "affine_leaky_relu", "statistics"))
    given = cotangents(call, transposed)

    def loss(**moved: Tensor) -> Tensor:
        outputs = state(call._replace(**moved), transposed)
        return sum((o * c.double()).sum() for o, c in zip(outputs, given, strict=True))  # type: ignore[misc,union-attr]

    with forced(algorithm):
        found = native_results(call, transposed, given)
    for name in ("center", "scale", "shift"):
        value, direction = getattr(call, name).double(), torch.randn(call.x.shape[1], dtype=torch.float64)
        step = 1e-7 * direction
        by_differences = (loss(**{name: value + step}) - loss(**{name: value - step})) / 2e-7
        along = found[f"d{name}"].double() @ direction
        size = float(found[f"d{name}"].double().norm() * direction.norm())
        # A step of 1e-7 crosses a kink now and then, which the other side of the difference does not.
        assert abs(float(along - by_differences)) <= 1e-4 * size, name


@BOTH
def test_gradients_of_gradients(transposed: bool) -> None:
    """create_graph goes through the reference's aten: the same first derivatives, and right second ones."""
    call = requiring(made(layer("direct", transposed, "affine_leaky_relu", "statistics")))

    def penalty(call: ops.Call, outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        y, mean, var = outputs
        loss = (y * y).sum() + (mean * var).sum()
        inputs = [t for t in leaves(call).values() if t.requires_grad]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)  # type: ignore[arg-type]
        return first + second

    with ops.use_engine("native"):
        found = penalty(call, op(transposed)(*call))
    wide = requiring(call._replace(**{name: t.detach().double() for name, t in leaves(call).items()}))
    expected = penalty(wide, state(wide, transposed))
    for a, b in zip(found, expected, strict=True):
        assert float((a.detach().double() - b.detach()).norm()) <= 1e-5 * float(b.detach().norm())


def test_a_call_that_keeps_no_gradient() -> None:
    """The same outputs under no_grad and inference mode, with weights frozen or not."""
    for after in ("statistics", "scale_shift_leaky_relu"):
        call = made(layer("direct", True, "affine_relu", after))
        with ops.use_engine("native"):
            expected = [t.detach() for t in op(True)(*requiring(call))]
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    for now in (call, requiring(call)):
                        assert all(map(torch.equal, op(True)(*now), expected))


# --- not finite ---------------------------------------------------------------------------------------------


def spoilt(t: Tensor, value: float) -> Tensor:
    """A copy with one element in the middle of its middle image replaced."""
    t = t.clone()
    t[(t.shape[0] // 2, *(size // 2 for size in t.shape[1:]))] = value
    return t


@pytest.mark.parametrize(
    ("place", "value"), [("x", NAN), ("x", INF), ("x", -INF), ("dy", NAN), ("dy", INF), ("weight", NAN)]
)
@ALGORITHMS
@BOTH
def test_not_finite_where_eager_is_not(transposed: bool, algorithm: str, place: str, value: float) -> None:
    """Nothing hides a NaN or an infinity. Winograd may spoil a tile; no other image is spoilt."""
    for before, after in (
        *(("as_it_is", "raw"), ("leaky_relu", "statistics"), ("relu", "raw"), ("affine_relu", "statistics")),
        *(("affine_relu", "shift_relu"), ("affine_leaky_relu", "scale_shift_leaky_relu")),
    ):
        call = made(layer(algorithm, transposed, before, after))
        dy, dmean, dvar = cotangents(call, transposed)
        assert dy is not None
        with forced(algorithm):
            clean = native_results(call, transposed, (dy, dmean, dvar))
            if place == "dy":
                dy = spoilt(dy, value)
            else:
                call = call._replace(**{place: spoilt(getattr(call, place), value)})
            given = (dy, dmean, dvar)
            found = native_results(call, transposed, given)
        own = reference_results(call, transposed, given)
        for name, result in found.items():
            hidden = result.isfinite() & ~own[name].isfinite()
            assert not bool(hidden.any()), f"{name}, {before}, {after}: {int(hidden.sum())} are finite"
            if place != "weight" and name in ("y", "dx") and not call.stats:
                assert torch.equal(result[[0, 2]], clean[name][[0, 2]]), f"{name}, {before}, {after}: others"
            if algorithm in ("direct", "dense") and name in ("y", "dx") and before[-4:] != "relu":
                more = ~result.isfinite() & own[name].isfinite()
                assert not bool(more.any()), f"{name}, {before}, {after}: {int(more.sum())} more are not"


@pytest.mark.parametrize(("place", "value"), [("x", -INF), ("dy", INF), ("dy", NAN)])
@pytest.mark.parametrize("algorithm", ["direct", "dense"])
@BOTH
def test_relu_stops_what_is_not_finite(transposed: bool, algorithm: str, place: str, value: float) -> None:
    """As eager's does: an input of -∞ is 0, and so is the gradient where the input is negative."""
    for before in ("relu", "affine_relu"):
        call = made(layer(algorithm, transposed, before, "raw"))
        if call.scale is not None:
            call = call._replace(scale=call.scale.abs())
        dy, *others = cotangents(call, transposed)
        assert dy is not None
        if place == "dy":
            dy = spoilt(dy, value)
        else:
            call = call._replace(x=spoilt(call.x, value))
        given: Any = (dy, *others)
        with forced(algorithm):
            found = native_results(call, transposed, given)
        own = reference_results(call, transposed, given)
        for name in ("y", "dx"):
            assert torch.equal(found[name].isfinite(), own[name].isfinite()), f"{name}, {before}"


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_the_derivative_at_a_kink(transposed: bool, algorithm: str, act: str) -> None:
    """At exactly 0 it is eager's: 0 and the slope."""
    problem = layer(algorithm, transposed, "affine", "raw", in_act=act)
    call = problem.call()
    zero = torch.zeros(problem.c_in)
    at_kink = call._replace(x=torch.zeros_like(call.x), shift=zero, center=zero)
    flat = call._replace(out_act=act, weight=torch.zeros_like(call.weight), in_act="none")
    unprefixed = at_kink._replace(center=None, scale=None, shift=None)
    for now in (at_kink, flat, flat._replace(out_scale=torch.ones(problem.c_out)), unprefixed):
        given = cotangents(now, transposed)
        with forced(algorithm):
            assert_right(native_results(now, transposed, given), now, transposed, given)


# --- what is not covered ------------------------------------------------------------------------------------


def uncovered() -> dict[str, tuple[ops.Call, str]]:
    call = layer("direct", False, "affine_relu", "statistics").call()
    half = call._replace(x=call.x.half(), weight=call.weight.half())
    wide = call._replace(**{name: t.double() for name, t in leaves(call).items()})
    square, map_ = "kernel is not square", "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    return {
        "float64": (wide, "no float64"),
        "float16": (half, "no float16"),
        "bfloat16": (half._replace(x=half.x.bfloat16(), weight=half.weight.bfloat16()), "no bfloat16"),
        "tanh": (call._replace(in_act="tanh"), "no tanh in a prologue"),
        "sigmoid": (call._replace(in_act="sigmoid"), "no sigmoid in a prologue"),
        "kernel 3": (call._replace(weight=call.weight[..., :3, :3]), map_),
        "kernel 4×3": (call._replace(weight=call.weight[..., :3]), square),
        "stride 1": (call._replace(stride=1), map_),
        "padding 0": (call._replace(padding=0), map_),
    }


@pytest.mark.parametrize("name", uncovered())
def test_what_is_not_covered(name: str) -> None:
    """Forced it is an error that says why; otherwise the reference runs, and is told why."""
    call, reason = uncovered()[name]
    with ops.use_engine("native"), pytest.raises(RuntimeError, match=reason):
        ops.conv2d_fused(*call)
    call = requiring(call)
    with ops.use_engine("auto"), ops.recording() as choices:
        ops.conv2d_fused(*call)[0].sum().backward()
    assert [choice.op for choice in choices] == ["conv2d_fused", "conv2d_fused_backward"]
    for choice in choices:
        assert choice.engine == "reference"
        assert reason in choice.reason
        assert choice.reason.startswith("native: ")


@BOTH
def test_autocast_is_the_references(transposed: bool) -> None:
    call = requiring(made(layer("direct", transposed, "affine_relu", "statistics")))
    with torch.autocast("cpu", torch.bfloat16), ops.recording() as choices:
        op(transposed)(*call)[0].float().sum().backward()
    assert [choice.engine for choice in choices] == ["reference", "reference"]
    assert "no bfloat16" in choices[0].reason


def test_an_algorithm_that_does_not_go_with_a_product_is_refused() -> None:
    """By the library: whoever forces one is told."""
    call = made(layer("direct", False, "affine_relu", "statistics"))
    it = backward_of(call, False)
    with pytest.raises(library.NativeError, match="padding"):
        training.fprop(call, False, "dense")
    with pytest.raises(library.NativeError, match="narrow"):
        training.backward(it, False, dgrad="narrow")
    with pytest.raises(library.NativeError, match="wgrad"):
        training.backward(it, False, wgrad="f2")


# --- any size -----------------------------------------------------------------------------------------------


SIDES = st.integers(1, 9)
SOME = st.one_of(st.integers(1, 5), st.integers(1, 40))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    transposed = draw(st.booleans())
    if draw(st.booleans()):
        size, kernel = (draw(SIDES) + (not transposed), draw(SIDES) + (not transposed)), (4, 4)
        stride, padding = 2, 1
    else:
        k = draw(st.integers(1, 6))
        size, kernel = (1, 1) if transposed else (k, k), (k, k)
        stride, padding = draw(st.integers(1, 3)), 0
    return Problem(
        transposed, draw(st.integers(1, 5)), draw(SOME), draw(SOME), size, kernel, stride, padding,
        **BEFORE[draw(st.sampled_from(list(BEFORE)))],
        **AFTER[draw(st.sampled_from(list(AFTER)))],
        slope=draw(st.sampled_from((0.0, 0.2, 2.0))),
        dtype=torch.float32,
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip


ANY = given(
    problem=problems(),
    x_layout=layouts(4),
    weight_layout=layouts(4),
    dy=st.sampled_from(DY),
    algorithm=st.sampled_from(SPATIAL),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 4),
)


def any_layer(
    problem: Problem,
    x_layout: tuple[list[int], list[int], int],
    weight_layout: tuple[list[int], list[int], int],
    dy: str,
    algorithm: str,
    isa: str,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(problem.seed)
    call = made(problem)
    given = cotangents(call, problem.transposed, dy)
    odd = call._replace(x=laid_out(call.x, x_layout), weight=laid_out(call.weight, weight_layout))
    with instruction_set(isa), forced(algorithm):
        found = native_results(odd, problem.transposed, given)
    assert_right(found, call, problem.transposed, given)


test_any_layer = settings(deadline=None, max_examples=60)(ANY(any_layer))
test_very_many_layers = pytest.mark.slow(settings(deadline=None, max_examples=1500)(ANY(any_layer)))
