"""The native engine in training: outputs and gradients of both ops by each algorithm, against float64.

New memory is filled with NaN, which reveals elements that are not written.
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
from float64_reference import (
    GRADIENTS,
    Problem,
    act,
    column,
    convolve,
    expected_outputs,
    gradients,
    leaves,
    op,
    pairwise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from native import ISAS, LAYER, SPATIAL, THREADS, instruction_set, laid_out, layouts
from tolerance import relative
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.call import Backward
from dcgan.kernels.cpu import algorithm_selection, library, products
from dcgan.kernels.reference import empty_gradient, memory_format

pytestmark = native.NEEDED
BOTH = pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
ALGORITHMS = pytest.mark.parametrize("algorithm", [*SPATIAL, "dense"])
NAN, INF = float("nan"), float("inf")

PROLOGUES: dict[str, dict[str, Any]] = {
    "identity": {},
    "relu": {"in_act": "relu"},
    "leaky_relu": {"in_act": "leaky_relu"},
    "affine": {"prologue": True},
    "affine_relu": {"prologue": True, "in_act": "relu"},
    "affine_leaky_relu": {"prologue": True, "in_act": "leaky_relu"},
}
EPILOGUES: dict[str, dict[str, Any]] = {
    "statistics": {"stats": True},
    "raw": {},
    "tanh": {"out_act": "tanh"},
    # With a shift: without one, empty sums lie exactly on the kink.
    "shift_relu": {"out_shift": True, "out_act": "relu"},
    "scale": {"out_scale": True},
    **{
        f"scale_shift_{act}": {"out_scale": True, "out_shift": True, "out_act": act}
        for act in ("leaky_relu", "tanh", "sigmoid")
    },
}
DY = ("nhwc", "nchw", "strided", "expanded", "sum")
# Both sides of every vector and panel width; maps of one pixel, of odd sizes, and others.
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
    """Force ``algorithm`` for 4×4 products with stride 2 and padding 1; direct where it is not supported."""

    def choose(g: algorithm_selection.Geometry, product: int, fused: tuple[bool, bool], *_: Any) -> str:
        prologue, stats = fused
        if g.dense:
            return "dense"
        sums = stats if g.transposed and product == algorithm_selection.FPROP else False
        sums = sums or (prologue and not g.transposed and product == algorithm_selection.DGRAD)
        if (algorithm == "narrow" and sums) or (algorithm == "f2" and product == algorithm_selection.WGRAD):
            return "direct"
        return algorithm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithm_selection, "training", choose)
        yield


def layer(algorithm: str, transposed: bool, prologue: str, epilogue: str, **changes: Any) -> Problem:
    """Return a layer of odd sizes, with an odd map where possible."""
    sizes: dict[str, Any] = {"c_in": 9, "c_out": 6, "size": (5, 4) if transposed else (7, 10), "batch": 3}
    if algorithm == "narrow":
        sizes |= {"c_out": 3} if transposed else {"c_in": 3}
    if algorithm == "dense":
        sizes |= {"size": (1, 1) if transposed else (4, 4), "stride": 1, "padding": 0}
    every = {**sizes, **PROLOGUES[prologue], **EPILOGUES[epilogue], "dtype": torch.float32, **changes}
    return Problem(transposed, **every)


def near_a_kink(call: ops.Call, transposed: bool) -> bool:
    """Return whether rounding may decide an activation input's sign, or x̂ is a remnant of cancellation."""
    x = call.x.double()
    if call.center is not None and call.scale is not None and call.shift is not None:
        scaled = (x - column(call.center)) * column(call.scale)
        x = scaled + column(call.shift)
        if prologue_output(call).norm() < 0.2 * scaled.norm():
            return True
    u = expected_outputs(call._replace(out_act="none"), transposed)[0]
    near_in = call.in_act != "none" and bool((x.abs() < 1e-6).any())
    near_out = call.out_act != "none" and bool((u.abs() < 2e-5).any())
    return near_in or (near_out and call.out_act in ("relu", "leaky_relu"))


def random_call(problem: Problem) -> ops.Call:
    """Draw the problem's call with y of order one, where no activation is flat, and away from kinks.

    With an out_shift, which keeps it off the kink, one channel of several has an out_scale of 0.
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
    """Copy t with a step of 2 in every dimension, with NaN between its elements."""
    memory = torch.full([2 * size for size in t.shape], NAN, dtype=t.dtype)
    return memory[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


def cotangents(call: ops.Call, transposed: bool, layout: str = "nhwc") -> Cotangents:
    """Draw dy in that layout, and dmean and dvar, scaled by the pixel count that du divides them by."""
    n, c, h, w = ops.empty(call, ops.check(call, transposed))[0].shape
    if layout == "sum":  # the gradient of y.sum()
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


def requiring_grad(call: ops.Call, wanted: tuple[str, ...] = GRADIENTS) -> ops.Call:
    return call._replace(
        **{name: t.detach().requires_grad_(name in wanted) for name, t in leaves(call).items()}
    )


def results(
    call: ops.Call, transposed: bool, given: Cotangents, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Return outputs and gradients by name, from the current engine."""
    fresh = requiring_grad(call, wanted)
    outputs = op(transposed)(*fresh)
    inputs = {name: t for name, t in leaves(fresh).items() if t.requires_grad}
    names = ("y", "mean", "var") if call.stats else ("y",)
    found = {name: t.detach() for name, t in zip(names, outputs, strict=False)}
    return found | {f"d{name}": t for name, t in gradients(outputs, given, inputs).items()}


def native_results(
    call: ops.Call, transposed: bool, given: Cotangents, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Return the native engine's outputs and gradients; check strides and that no argument was modified."""
    originals = {name: t.clone() for name, t in leaves(call).items()}
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
        assert torch.equal(t.nan_to_num(), originals[name].nan_to_num()), f"{name} was modified"
    return found


def reference_results(call: ops.Call, transposed: bool, given: Cotangents) -> dict[str, Tensor]:
    with ops.use_engine("reference"):
        return results(call, transposed, given)


# --- against float64 ----------------------------------------------------------------------------------------


def exact_results(
    call: ops.Call, transposed: bool, given: Cotangents
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compute outputs and gradients in float64 by autograd, and their norms if no sum cancelled.

    One sum of a few terms may be near 0 by chance but has the error of its terms: errors are relative to
    these norms.
    """
    wide = requiring_grad(call._replace(**{name: t.double() for name, t in leaves(call).items()}))
    outputs = expected_outputs(wide, transposed)
    inputs = {name: t for name, t in leaves(wide).items() if t.requires_grad}
    found = {name: t.detach() for name, t in zip(("y", "mean", "var"), outputs, strict=True) if t.numel()}
    found |= {f"d{name}": t for name, t in gradients(outputs, given, inputs).items()}

    x_hat, weight = prologue_output(call), wide.weight.detach()
    u = convolve(x_hat, weight, call.stride, call.padding, transposed).requires_grad_()
    (du,) = gradients(expected_outputs(epilogue_call(wide, u), False), given, {"u": u}).values()
    if not call.stats:
        out_pre = (
            expected_outputs(epilogue_call(wide, u)._replace(out_act="none"), False)[0]
            .detach()
            .requires_grad_()
        )
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
        sizes["dout_shift"] = float(sum_magnitude(e).norm())
        sizes["dout_scale"] = float(sum_magnitude(e * of_squares.detach().sqrt()).norm())
    g2, dw2 = torch.autograd.grad(of_squares, (x2, w2), du.square())
    sizes |= {"dx": float(g2.sum().sqrt()), "dweight": float(dw2.sum().sqrt())}
    if call.center is not None and call.scale is not None:
        scale, centered = call.scale.double(), call.x.double() - column(call.center)
        sizes["dx"] = float((g2 * column(scale.square())).sum().sqrt())
        dshift = sum_magnitude(g2.sqrt())
        sizes["dshift"] = float(dshift.norm())
        sizes["dscale"] = float(sum_magnitude(g2.sqrt() * centered.abs()).norm())
        sizes["dcenter"] = float((scale * dshift).norm())
    return found, sizes


def sum_magnitude(t: Tensor) -> Tensor:
    """Estimate the size of the channel sums of terms with these magnitudes.

    With independent signs and errors it is the root of the sum of squares. But where dy is constant, a
    transform's rounding errors are the same in every tile and add up to 10 u·Σ|t|, with the u of
    tests/native.py: that is LAYER times an eighth of Σ|t|.
    """
    return torch.maximum(t.square().sum((0, 2, 3)).sqrt(), t.sum((0, 2, 3)) / 8)


def epilogue_call(call: ops.Call, u: Tensor) -> ops.Call:
    """Return a call that applies the epilogue of ``call`` to the product u."""
    identity = torch.eye(u.shape[1], dtype=u.dtype)[:, :, None, None]
    bare = call._replace(x=u, weight=identity, center=None, scale=None, shift=None, in_act="none")
    return bare._replace(stride=1, padding=0)


def prologue_output(call: ops.Call) -> Tensor:
    """Compute x̂ in float64."""
    identity = torch.eye(call.x.shape[1], dtype=torch.float64)[:, :, None, None]
    alone = call._replace(weight=identity, stride=1, padding=0, stats=False, out_act="none")
    return expected_outputs(alone._replace(out_scale=None, out_shift=None), False)[0]


def assert_correct(found: dict[str, Tensor], call: ops.Call, transposed: bool, given: Cotangents) -> None:
    """Check that every result is within LAYER of float64's; tests/native.py derives that number.

    A gradient takes one more product, of a du that errs by as much: dx, dweight and the sums are within twice
    that. Where tanh and sigmoid saturate, du is computed from a y that is accurate to some 2⁻²¹ of 1, however
    small the derivative is.
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
    call = random_call(problem)._replace(**changes)
    given = cotangents(call, problem.transposed, layout)
    found = native_results(call, problem.transposed, given)
    assert_correct(found, call, problem.transposed, given)
    return found


OPTIONS: dict[str, list[Any]] = {
    "algorithm": [*SPATIAL, "dense"],
    "transposed": [False, True],
    "prologue": list(PROLOGUES),
    "epilogue": list(EPILOGUES),
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
    """Build a problem; a convolution's map is about twice as large, and odd every second time."""
    transposed, (c_in, c_out), size = row["transposed"], row["channels"], row["size"]
    rest: dict[str, Any] = {"size": size}
    if row["algorithm"] == "dense":
        k = 1 + seed % 5
        rest = {"size": (1, 1) if transposed else (k, k), "kernel": (k, k), "padding": 0}
        rest["stride"] = 1 + seed % 2
    elif not transposed:
        rest = {"size": (2 * size[0] + seed % 2, 2 * size[1] + seed // 2 % 2)}
    return Problem(
        transposed, row["batch"], c_in, c_out, **rest,
        **PROLOGUES[row["prologue"]], **EPILOGUES[row["epilogue"]], dtype=torch.float32,
        channels_last=row["channels_last"], seed=seed,
    )  # fmt: skip


def run_row(row: dict[str, Any], seed: int) -> None:
    problem = build(row, seed)
    torch.set_num_threads(row["threads"])
    call = random_call(problem)
    call = call._replace(
        x=call.x.contiguous(memory_format=memory_format(row["x_nhwc"])),
        weight=call.weight.contiguous(memory_format=memory_format(row["weight_nhwc"])),
    )
    given = cotangents(call, problem.transposed, row["layout"])
    with instruction_set(row["isa"]), forced(row["algorithm"]):
        found = native_results(call, problem.transposed, given)
    assert_correct(found, call, problem.transposed, given)


ROWS = pairwise(**OPTIONS)


def row_name(row: dict[str, Any]) -> str:
    return "-".join(str(v).replace(" ", "") for v in row.values())


@pytest.mark.parametrize("row", ROWS, ids=map(row_name, ROWS))
def test_outputs_and_gradients(row: dict[str, Any]) -> None:
    """Each pair of options occurs at least once."""
    run_row(row, ROWS.index(row))


@pytest.mark.parametrize("prologue", PROLOGUES)
@ALGORITHMS
@BOTH
def test_every_prologue_and_epilogue_of_every_algorithm(
    transposed: bool, algorithm: str, prologue: str
) -> None:
    for epilogue in EPILOGUES:
        with forced(algorithm):
            check(layer(algorithm, transposed, prologue, epilogue))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@ALGORITHMS
@BOTH
def test_all_option_combinations(
    transposed: bool, algorithm: str, channels: tuple[int, int], isa: str
) -> None:
    """Maps, layouts, batch sizes, threads and formats alternate."""
    fixed = {"transposed": transposed, "algorithm": algorithm, "channels": channels, "isa": isa}
    for seed, (prologue, epilogue) in enumerate(itertools.product(PROLOGUES, EPILOGUES)):
        alternating = {
            name: OPTIONS[name][seed % len(OPTIONS[name])] for name in ("layout", "batch", "threads")
        }
        formats = dict.fromkeys(("x_nhwc", "weight_nhwc", "channels_last"), seed % 3 == 0)
        size = MAPS[seed // 3 % len(MAPS)]  # each with each batch
        row = {**fixed, "prologue": prologue, "epilogue": epilogue, "size": size, **alternating, **formats}
        run_row(row, seed)


@pytest.mark.parametrize("algorithm", SPATIAL)
@BOTH
def test_many_channels(transposed: bool, algorithm: str) -> None:
    """Many channels on either side: products take several K blocks and panels."""
    c_in, c_out = (260, 140) if transposed else (140, 260)
    size = (4, 4) if transposed else (8, 8)
    problem = layer(algorithm, transposed, "affine_relu", "statistics", c_in=c_in, c_out=c_out, size=size)
    with forced(algorithm):
        check(problem)


@pytest.mark.slow
@BOTH
def test_weights_too_large_to_cache_transformed(transposed: bool) -> None:
    """F(4×4) streams transformed weights of more than 16 MB."""
    size = (4, 4) if transposed else (9, 8)
    for prologue, epilogue in (("affine_relu", "statistics"), ("identity", "scale_shift_leaky_relu")):
        with forced("f4"):
            check(layer("f4", transposed, prologue, epilogue, c_in=512, c_out=320, size=size))


@BOTH
def test_the_selected_algorithm(transposed: bool) -> None:
    """For few and many images, narrow and wide layers; any choice must be correct."""
    for channels, batch in (((3, 20), 1), ((20, 3), 2), ((20, 24), 1), ((20, 24), 40)):
        for prologue, epilogue in (("affine_relu", "statistics"), ("identity", "tanh")):
            c_in, c_out = channels
            check(
                layer("f4", transposed, prologue, epilogue, c_in=c_in, c_out=c_out, batch=batch, size=(6, 6)),
            )


# --- statistics ---------------------------------------------------------------------------------------------


def copying(algorithm: str, transposed: bool, x_of: Callable[..., Tensor]) -> ops.Call:
    """Return a call whose output copies elements of x: all weights are 0 except at one tap of one channel."""
    problem = layer(algorithm, transposed, "identity", "statistics", batch=37)
    call = problem.call()
    weight, dense = torch.zeros_like(call.weight), algorithm == "dense"
    # Each output pixel of a transposed convolution depends on exactly one of these taps.
    taps = (slice(None) if transposed else slice(1)) if dense else slice(1, 3 if transposed else 2)
    for c_out in range(problem.c_out):
        one = (c_out % problem.c_in, c_out) if transposed else (c_out, c_out % problem.c_in)
        weight[(*one, taps, taps)] = 1
    return call._replace(x=x_of(*call.x.shape), weight=weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@ALGORITHMS
@BOTH
def test_statistics_where_the_mean_is_a_thousand_deviations(
    transposed: bool, algorithm: str, threads: int, isa: str
) -> None:
    torch.set_num_threads(threads)
    call = copying(algorithm, transposed, lambda *size: 1000 + torch.randn(*size))
    with instruction_set(isa), forced(algorithm), ops.use_engine("native"):
        y, mean, var = op(transposed)(*call)
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    # With κ = √(1 + mean²/var) = 1000, an error of some κ·2⁻²⁴ = 6e-5 is achievable; E[y²] - E[y]² has κ².
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert (naive.double() / wide.var((0, 2, 3), correction=0) - 1).abs().max() > 1e-3


@ALGORITHMS
@BOTH
def test_a_constant_channel_has_no_variance(transposed: bool, algorithm: str) -> None:
    """For any constant: with a negative variance, 1/√(var + eps) could be NaN."""
    # Winograd's transforms reproduce a constant to a few units in the last place.
    for value in (0.0, 1.0, -3.7, 1234.5):
        call = copying(algorithm, transposed, lambda *size, value=value: torch.full(size, value))
        with forced(algorithm), ops.use_engine("native"):
            _, mean, var = op(transposed)(*call)
        torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=1e-5, atol=0)
        assert bool((var >= 0).all())
        assert bool((var <= (1e-5 * value) ** 2).all())


@BOTH
def test_statistics_of_few_pixels(transposed: bool) -> None:
    for size in ((1, 1), (1, 2)) if transposed else ((2, 2), (3, 3), (2, 4)):
        for algorithm in SPATIAL:
            with forced(algorithm):
                found = check(layer(algorithm, transposed, "affine_relu", "statistics", batch=1, size=size))
            if found["y"][:, 0].numel() == 1:
                assert bool((found["var"] == 0).all())
                assert torch.equal(found["mean"], found["y"].flatten())


# --- needed gradients ---------------------------------------------------------------------------------------


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
        assert y.shape == ops.check(call, transposed)
        assert bool(mean.isnan().all())
        assert bool(var.isnan().all())
        assert call.x.grad is not None
        assert call.x.grad.shape == call.x.shape
        assert call.weight.grad is not None
        assert not call.weight.grad.any()


# --- strides ------------------------------------------------------------------------------------------------


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check for equal bits; dout_scale sums over the weights in memory order, and may differ by rounding."""
    assert found.keys() == expected.keys()
    for name, result in found.items():
        if name == "dout_scale":
            assert relative(result, expected[name]) <= LAYER
        else:
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("epilogue", ["statistics", "scale_shift_leaky_relu"])
@ALGORITHMS
@BOTH
def test_any_strides(transposed: bool, algorithm: str, epilogue: str) -> None:
    """x, weight, vectors and output gradients of any strides give the same bits."""
    call = random_call(layer(algorithm, transposed, "affine_relu", epilogue))
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
    for epilogue in ("statistics", "scale_shift_tanh"):
        call = random_call(layer("f4", transposed, "affine_relu", epilogue))
        given = cotangents(call, transposed)
        for name, t in leaves(call).items():
            for odd in (t.narrow(0, 0, 1).expand(t.shape), torch._neg_view(t)):
                now = call._replace(**{name: odd})
                copied = call._replace(**{name: odd.clone().resolve_neg().contiguous()})
                found, expected = (native_results(c, transposed, given) for c in (now, copied))
                assert_same(found, expected)


def test_live_outputs_are_not_overwritten() -> None:
    """Over several steps: memory returns to the pool with its last tensor, and not earlier."""
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
def test_runs_are_deterministic(transposed: bool, algorithm: str, isa: str) -> None:
    """For each number of threads, with new and with reused memory."""
    problem = layer(algorithm, transposed, "affine_leaky_relu", "statistics", batch=5, c_in=17, c_out=18)
    call = random_call(problem)
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
def test_concurrent_callers(algorithm: str) -> None:
    """Each caller uses a different number of threads; forward and backward of both ops."""
    problems = [layer(algorithm, t, "affine_relu", "statistics", batch=5) for t in (False, True)]
    calls = [(random_call(p), p.transposed) for p in problems]
    tasks = [(call, transposed, cotangents(call, transposed)) for call, transposed in calls]
    expected = {}
    with forced(algorithm):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expected[threads] = [native_results(*task) for task in tasks]
        start = threading.Barrier(4)

        def work(index: int) -> bool:
            threads = 1 + index % 3
            torch.get_num_threads()  # a new thread's first use sets its count to the last set by any thread
            start.wait(60)
            torch.set_num_threads(threads)
            equal = True
            for i in range(12):
                which = (i + index) % 2
                call, transposed, given = tasks[which]
                found = results(call, transposed, given)  # all use one engine, which is a global
                equal &= all(torch.equal(t, expected[threads][which][key]) for key, t in found.items())
            return equal

        with ops.use_engine("native"), ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


# --- as operators -------------------------------------------------------------------------------------------


def backward_operator(transposed: bool) -> Any:
    return getattr(torch.ops.dcgan, f"{ops.NAMES[transposed]}_backward").default


def backward_of(call: ops.Call, transposed: bool) -> Backward:
    """Return the backward call for all gradients of ``call``."""
    y, mean, _ = (t.float() for t in expected_outputs(call, transposed))
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
    ("prologue", "epilogue"),
    [
        *(("affine_relu", "statistics"), ("leaky_relu", "tanh"), ("identity", "statistics")),
        *(("affine_relu", "scale_shift_tanh"), ("identity", "scale")),
    ],
)
@BOTH
def test_opcheck(transposed: bool, prologue: str, epilogue: str) -> None:
    call = random_call(layer("direct", transposed, prologue, epilogue))
    forward = getattr(torch.ops.dcgan, ops.NAMES[transposed]).default
    with ops.use_engine("native"):
        torch.library.opcheck(forward, tuple(requiring_grad(call)))
        torch.library.opcheck(backward_operator(transposed), tuple(backward_of(call, transposed)))


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


def test_grad_mode_does_not_change_outputs() -> None:
    """The same outputs under no_grad and inference mode, with weights frozen or not."""
    for epilogue in ("statistics", "scale_shift_leaky_relu"):
        call = random_call(layer("direct", True, "affine_relu", epilogue))
        with ops.use_engine("native"):
            expected = [t.detach() for t in op(True)(*requiring_grad(call))]
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    for now in (call, requiring_grad(call)):
                        assert all(map(torch.equal, op(True)(*now), expected))


# --- not finite ---------------------------------------------------------------------------------------------


def with_middle_element(t: Tensor, value: float) -> Tensor:
    """Copy t with the middle element of its middle image replaced."""
    t = t.clone()
    t[(t.shape[0] // 2, *(size // 2 for size in t.shape[1:]))] = value
    return t


@pytest.mark.parametrize(
    ("place", "value"), [("x", NAN), ("x", INF), ("x", -INF), ("dy", NAN), ("dy", INF), ("weight", NAN)]
)
@ALGORITHMS
@BOTH
def test_nonfinite_where_eager_is(transposed: bool, algorithm: str, place: str, value: float) -> None:
    """No NaN or infinity is hidden. Winograd may spread it within a tile, but to no other image."""
    for prologue, epilogue in (
        *(("identity", "raw"), ("leaky_relu", "statistics"), ("relu", "raw"), ("affine_relu", "statistics")),
        *(("affine_relu", "shift_relu"), ("affine_leaky_relu", "scale_shift_leaky_relu")),
    ):
        call = random_call(layer(algorithm, transposed, prologue, epilogue))
        dy, dmean, dvar = cotangents(call, transposed)
        assert dy is not None
        with forced(algorithm):
            clean = native_results(call, transposed, (dy, dmean, dvar))
            if place == "dy":
                dy = with_middle_element(dy, value)
            else:
                call = call._replace(**{place: with_middle_element(getattr(call, place), value)})
            given = (dy, dmean, dvar)
            found = native_results(call, transposed, given)
        expected = reference_results(call, transposed, given)
        for name, result in found.items():
            hidden = result.isfinite() & ~expected[name].isfinite()
            assert not bool(hidden.any()), f"{name}, {prologue}, {epilogue}: {int(hidden.sum())} are finite"
            if place != "weight" and name in ("y", "dx") and not call.stats:
                assert torch.equal(result[[0, 2]], clean[name][[0, 2]]), (
                    f"{name}, {prologue}, {epilogue}: others"
                )
            if algorithm in ("direct", "dense") and name in ("y", "dx") and prologue[-4:] != "relu":
                more = ~result.isfinite() & expected[name].isfinite()
                assert not bool(more.any()), (
                    f"{name}, {prologue}, {epilogue}: {int(more.sum())} more are not finite"
                )


@pytest.mark.parametrize(("place", "value"), [("x", -INF), ("dy", INF), ("dy", NAN)])
@pytest.mark.parametrize("algorithm", ["direct", "dense"])
@BOTH
def test_relu_stops_nonfinite_values(transposed: bool, algorithm: str, place: str, value: float) -> None:
    """As in eager: relu(-∞) is 0, and so is the gradient where the input is negative."""
    for prologue in ("relu", "affine_relu"):
        call = random_call(layer(algorithm, transposed, prologue, "raw"))
        if call.scale is not None:
            call = call._replace(scale=call.scale.abs())
        dy, *others = cotangents(call, transposed)
        assert dy is not None
        if place == "dy":
            dy = with_middle_element(dy, value)
        else:
            call = call._replace(x=with_middle_element(call.x, value))
        given: Any = (dy, *others)
        with forced(algorithm):
            found = native_results(call, transposed, given)
        expected = reference_results(call, transposed, given)
        for name in ("y", "dx"):
            assert torch.equal(found[name].isfinite(), expected[name].isfinite()), f"{name}, {prologue}"


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_the_derivative_at_a_kink(transposed: bool, algorithm: str, act: str) -> None:
    """At exactly 0 it equals eager's: 0 for relu, the slope for leaky_relu."""
    problem = layer(algorithm, transposed, "affine", "raw", in_act=act)
    call = problem.call()
    zero = torch.zeros(problem.c_in)
    at_kink = call._replace(x=torch.zeros_like(call.x), shift=zero, center=zero)
    flat = call._replace(out_act=act, weight=torch.zeros_like(call.weight), in_act="none")
    unprefixed = at_kink._replace(center=None, scale=None, shift=None)
    for now in (at_kink, flat, flat._replace(out_scale=torch.ones(problem.c_out)), unprefixed):
        given = cotangents(now, transposed)
        with forced(algorithm):
            assert_correct(native_results(now, transposed, given), now, transposed, given)


# --- calls not covered --------------------------------------------------------------------------------------


def uncovered() -> dict[str, tuple[ops.Call, str]]:
    call = layer("direct", False, "affine_relu", "statistics").call()
    half = call._replace(x=call.x.half(), weight=call.weight.half())
    wide = call._replace(**{name: t.double() for name, t in leaves(call).items()})
    square, map_ = "kernel is not square", "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    return {
        "float64": (wide, "do not support float64"),
        "float16": (half, "do not support float16"),
        "bfloat16": (
            half._replace(x=half.x.bfloat16(), weight=half.weight.bfloat16()),
            "do not support bfloat16",
        ),
        "tanh": (call._replace(in_act="tanh"), "do not support tanh in a prologue"),
        "sigmoid": (call._replace(in_act="sigmoid"), "do not support sigmoid in a prologue"),
        "kernel 3": (call._replace(weight=call.weight[..., :3, :3]), map_),
        "kernel 4×3": (call._replace(weight=call.weight[..., :3]), square),
        "stride 1": (call._replace(stride=1), map_),
        "padding 0": (call._replace(padding=0), map_),
    }


@pytest.mark.parametrize("name", uncovered())
def test_calls_not_covered(name: str) -> None:
    """A forced engine raises an error with the reason; otherwise the reference runs and records it."""
    call, reason = uncovered()[name]
    with ops.use_engine("native"), pytest.raises(RuntimeError, match=reason):
        ops.conv2d_fused(*call)
    call = requiring_grad(call)
    with ops.use_engine("auto"), ops.recording() as choices:
        ops.conv2d_fused(*call)[0].sum().backward()
    assert [choice.op for choice in choices] == ["conv2d_fused", "conv2d_fused_backward"]
    for choice in choices:
        assert choice.engine == "reference"
        assert reason in choice.reason
        assert choice.reason.startswith("native: ")


@BOTH
def test_autocast_uses_the_reference(transposed: bool) -> None:
    call = requiring_grad(random_call(layer("direct", transposed, "affine_relu", "statistics")))
    with torch.autocast("cpu", torch.bfloat16), ops.recording() as choices:
        op(transposed)(*call)[0].float().sum().backward()
    assert [choice.engine for choice in choices] == ["reference", "reference"]
    assert "do not support bfloat16" in choices[0].reason


def test_an_unsupported_algorithm_is_an_error() -> None:
    """The library raises an error if a forced algorithm does not support the product."""
    call = random_call(layer("direct", False, "affine_relu", "statistics"))
    it = backward_of(call, False)
    with pytest.raises(library.NativeError, match="padding"):
        products.fprop(call, False, "dense")
    with pytest.raises(library.NativeError, match="narrow"):
        products.backward(it, False, dgrad="narrow")
    with pytest.raises(library.NativeError, match="wgrad"):
        products.backward(it, False, wgrad="f2")


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
        **PROLOGUES[draw(st.sampled_from(list(PROLOGUES)))],
        **EPILOGUES[draw(st.sampled_from(list(EPILOGUES)))],
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
    call = random_call(problem)
    given = cotangents(call, problem.transposed, dy)
    odd = call._replace(x=laid_out(call.x, x_layout), weight=laid_out(call.weight, weight_layout))
    with instruction_set(isa), forced(algorithm):
        found = native_results(odd, problem.transposed, given)
    assert_correct(found, call, problem.transposed, given)


test_any_layer = settings(deadline=None, max_examples=60)(ANY(any_layer))
test_many_random_layers = pytest.mark.slow(settings(deadline=None, max_examples=1500)(ANY(any_layer)))
