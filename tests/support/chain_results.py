"""A training chain's results: of an engine, in float64, and in float64 from the engine's own maps.

Through several layers a difference in the last bit grows: in 16 bits it flips the sign of some activation's
input, and an element of a gradient changes by its full size. :func:`assert_accurate` therefore compares with
float64 in two ways. From end to end, an error may be twice that of the reference engine, which rounds at the
same places. And each layer's output, and the whole backward, is computed from the maps and the statistics
that the engine itself has saved, where nothing but its own rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcgan.kernels import ops, reference
from dcgan.kernels.reference import accumulator_dtype, empty_gradient
from dcgan.kernels.spec import TrainBackward, TrainCall
from dcgan.kernels.train_chain import empty_gradients, specs
from tests.support.train_chains import (
    BACKWARD_OP,
    OP,
    Layer,
    arguments,
    build,
    chain_of,
    tensors_of,
    with_tensors,
)

Needs = Callable[[str], bool]


class Bounds(NamedTuple):
    """Bounds of errors relative to a tensor's norm."""

    layer: float
    """Of a layer's output, computed from the engine's own maps: one rounding."""
    statistics: float
    """Of means, variances and scales, computed from the same: they are float32."""
    gradients: float
    """Of gradients, computed from the same: the roundings of x̂, g and du of each layer.

    A BatchNorm of a few values, of which little is left, amplifies them: as much as the reference engine's.
    """
    whole: float
    """From end to end, however small the reference engine's error is."""


# float32: sums of up to 2·10³ products of random sign, and of 10⁴ pixels. In 16 bits a layer's output errs by
# at most a unit roundoff elementwise, 0.4 in norm; the gradients of five layers err by 1 to 2 in norm. One
# x̂ that float32 and float64 round to different neighbours changes the statistics of a small map.
BOUNDS = {
    torch.float32: Bounds(1e-6, 1e-6, 2e-6, 2e-6),
    torch.float16: Bounds(1.1 * 2**-11, 1e-5, 5 * 2**-11, 8 * 2**-11),
    torch.bfloat16: Bounds(1.1 * 2**-8, 3e-5, 5 * 2**-8, 8 * 2**-8),
}


# --- calls --------------------------------------------------------------------------------------------------


def call_of(layers: Iterable[Layer], x: Tensor, groups: int = 1) -> TrainCall:
    """Return a call of newly drawn layers in float32."""
    return chain_of(build(x.shape[1], tuple(layers))).call(x)._replace(groups=groups)


def cast(call: TrainCall, dtype: torch.dtype, weights: torch.dtype | None = None) -> TrainCall:
    """Return the call with x in ``dtype``, and all parameters in ``weights``, by default the same."""
    given = {name: t.detach().to(weights or dtype) for name, t in tensors_of(call).items()}
    return with_tensors(call, given | {"x": call.x.detach().to(dtype)})


def in_float64(call: TrainCall) -> TrainCall:
    """Return the call in float64, with its weights rounded to x's dtype as kernels read them."""
    given = {name: t.detach() for name, t in tensors_of(call).items()}
    rounded = {n: t.to(call.x.dtype) if n.startswith("weight") else t for n, t in given.items()}
    return with_tensors(call, {name: t.double() for name, t in rounded.items()})


def draw(make: Callable[[], TrainCall]) -> TrainCall:
    """Draw a call until no activation's input is so near the kink that float32 decides its sign."""
    for _ in range(100):
        call = make()
        if not near_a_kink(call):
            return call
    raise AssertionError("every draw is near a kink")


def near_a_kink(call: TrainCall) -> bool:
    """Return whether an activation's input in float64 is within rounding of 0; exact zeros are not."""
    wide = in_float64(call)
    with torch.no_grad():
        y, saved, stats, _ = reference.train_forward(specs(wide), wide)
    vectors = iter(stats)
    for stage, z in zip(wide.stages, (*saved, y), strict=True):
        pre = reference._normalised(z, next(vectors)) if stage.norm else z
        # A leaky ReLU scales both sides by at most 1; what a ReLU clears without a BatchNorm is unknown.
        if stage.act in ("relu", "leaky_relu") and bool(((pre.abs() < 2e-6) & (pre != 0)).any()):
            return True
    return False


def cotangent(call: TrainCall) -> Tensor:
    """Draw a gradient of y."""
    return torch.randn(specs(call)[-1].shape, device=call.x.device).to(call.x.dtype)


# --- results ------------------------------------------------------------------------------------------------


class Passes(NamedTuple):
    """A forward with all that it keeps, and a backward's gradients by name."""

    y: Tensor
    saved: Sequence[Tensor]
    stats: Sequence[Tensor]
    gradients: dict[str, Tensor]


def passes(call: TrainCall, dy: Tensor, needs: Needs = lambda name: True) -> Passes:
    """Run both passes by the operators, without autograd, on the current engine."""
    call = with_tensors(call, {name: t.detach() for name, t in tensors_of(call).items()})
    names = ["x", *(f"{name} {i}" for name in ("weight", "gamma", "beta") for i in range(len(call.stages)))]
    needed = [needs(name) for name in names]
    with torch.no_grad():
        y, saved, stats, packed = OP(*arguments(call))
        kept = None if call.stages[-1].act == "none" else y
        found = BACKWARD_OP(dy, kept, list(saved), stats, packed, needed, *arguments(call))
    flat = dict(zip(names, (found[0], *(t for column in found[1:] for t in column)), strict=True))
    present = tensors_of(call)
    return Passes(y, saved, stats, {n: t for n, t in flat.items() if n in present and needed[names.index(n)]})


def passes_of(engine: str, call: TrainCall, dy: Tensor, needs: Needs = lambda name: True) -> Passes:
    """Return :func:`passes` of an engine."""
    with ops.use_engine(engine):
        return passes(call, dy, needs)


def named(own: Passes) -> dict[str, Tensor]:
    """Return y, the statistics and the gradients by name."""
    found = {"y": own.y, **{f"stats {i}": t for i, t in enumerate(own.stats)}}
    return found | {f"d{name}": t for name, t in own.gradients.items()}


# --- float64 ------------------------------------------------------------------------------------------------


def exact_layers(call: TrainCall, own: Passes) -> dict[str, Tensor]:
    """Compute every layer in float64 from what the engine has saved before it, x̂ rounded to x's dtype.

    Results are named as :func:`own_layers` names them.
    """
    wide, found = in_float64(call), {}
    stats = iter(own.stats)
    before: Tensor = wide.x
    of_before: Tensor | None = None
    for i, (stage, stored) in enumerate(zip(wide.stages, (*own.saved, own.y), strict=True)):
        x_hat = reference._layer_input(wide, i, before, of_before, call.slope).to(call.x.dtype).double()
        y = reference._convolve(x_hat, stage.weight, stage.stride, stage.padding, stage.transposed)
        of_before = None
        if stage.norm:
            of_before = next(stats).double()
            var, mean = torch.var_mean(y.unflatten(0, (call.groups, -1)), dim=(1, 3, 4), correction=0)
            scale = (of_before[1] + stage.eps).rsqrt() * (1.0 if stage.gamma is None else stage.gamma)
            shift = torch.zeros_like(scale) if stage.beta is None else stage.beta.expand_as(scale)
            found |= {f"mean {i}": mean, f"var {i}": var, f"scale {i}": scale, f"shift {i}": shift}
        else:
            if stage.beta is not None:
                y = y + stage.beta[:, None, None]
            y = reference.activate(y, stage.act, call.slope)
        found[f"y {i}"] = y
        before = stored.double()
    return found


def own_layers(call: TrainCall, own: Passes) -> dict[str, Tensor]:
    """Return what the engine has saved, by name."""
    found = {f"y {i}": t for i, t in enumerate((*own.saved, own.y))}
    norms = [i for i, stage in enumerate(call.stages) if stage.norm]
    for i, vectors in zip(norms, own.stats, strict=True):
        names = ("mean", "var", "scale", "shift")
        found |= {f"{name} {i}": v for name, v in zip(names, vectors, strict=True)}
    return found


def gradients_from(call: TrainCall, dy: Tensor, own: Passes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the gradients of ``own`` from what it has saved, as the reference computes them in ``dtype``."""
    there, n = in_float64(call) if dtype == torch.float64 else call, len(call.stages)
    there = with_tensors(there, {name: t.detach() for name, t in tensors_of(there).items()})
    present = [[getattr(s, name) is not None for s in there.stages] for name in ("gamma", "beta")]
    last = own.y.to(dtype) if call.stages[-1].act != "none" else None
    saved, stats = [t.to(dtype) for t in own.saved], [t.to(accumulator_dtype(dtype)) for t in own.stats]
    back = TrainBackward(dy.to(dtype), last, saved, stats, dy.new_empty(0), True, [True] * n, *present, there)
    found = empty_gradients(back)
    with torch.no_grad():
        reference.train_backward(specs(there), back, found)
    named = {"x": found.x}
    for name, column in zip(("weight", "gamma", "beta"), found[1:], strict=True):
        named |= {f"{name} {i}": t for i, t in enumerate(column)}
    return {f"d{name}": named[name] for name in own.gradients}


# --- comparison ---------------------------------------------------------------------------------------------


def norm(t: Tensor) -> float:
    return float(t.double().norm())


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return each error relative to the norm, at least 1% of the norm of all gradients for a gradient."""
    assert found.keys() == expected.keys()
    floor = 1e-2 * sum(norm(t) ** 2 for name, t in expected.items() if name.startswith("d")) ** 0.5
    sizes = {name: max(norm(t), floor if name.startswith("d") else 0.0) for name, t in expected.items()}
    return {name: norm(found[name] - t) / max(sizes[name], 1e-30) for name, t in expected.items()}


def assert_own_accuracy(call: TrainCall, dy: Tensor, own: Passes, bounds: Bounds | None = None) -> None:
    """Compare every layer, statistic and gradient with float64 from the engine's own maps."""
    bounds = bounds or BOUNDS[call.x.dtype]
    layers, exact = own_layers(call, own), exact_layers(call, own)
    assert layers.keys() == exact.keys()
    for name, want in exact.items():
        kind, _, index = name.partition(" ")
        size = norm(want)
        if kind == "mean":  # relative to the values that are summed
            size = float((want.square() + exact[f"var {index}"]).sum().sqrt())
        error, bound = norm(layers[name] - want), bounds.layer if kind == "y" else bounds.statistics
        assert error <= bound * size, f"{name}: error {error / size:.1e}, allowed {bound:.1e}"
    expected = gradients_from(call, dy, own, torch.float64)
    plain = errors(gradients_from(call, dy, own, call.x.dtype), expected)
    found = {f"d{name}": t for name, t in own.gradients.items()}
    for name, off in errors(found, expected).items():
        allowed = max(2 * plain[name], bounds.gradients)
        assert off <= allowed, f"{name}: error {off:.1e}, the reference's {plain[name]:.1e}"


def assert_metadata(call: TrainCall, own: Passes) -> None:
    """Check shapes, dtypes and strides."""
    spec, acc = specs(call), accumulator_dtype(call.x.dtype)
    for t, of in zip((*own.saved, own.y), spec, strict=True):
        assert (t.shape, t.dtype, t.stride()) == (of.shape, call.x.dtype, of.y.stride)
    channels = [stage.c_out for stage in call.stages if stage.norm]
    for vectors, c in zip(own.stats, channels, strict=True):
        assert (vectors.shape, vectors.dtype, vectors.is_contiguous()) == ((4, call.groups, c), acc, True)
    for name, given in tensors_of(call).items():
        if name in own.gradients:
            t, like = own.gradients[name], torch.empty_like(given)
            like = empty_gradient(given) if name == "x" else like
            assert (t.shape, t.dtype, t.stride()) == (like.shape, like.dtype, like.stride()), name


def assert_accurate(
    call: TrainCall, dy: Tensor, engine: str, bounds: Bounds | None = None, needs: Needs = lambda name: True
) -> Passes:
    """Compare an engine with float64 in both ways; return what it computed."""
    bounds = bounds or BOUNDS[call.x.dtype]
    with ops.use_engine(engine), ops.recording() as choices:
        own = passes(call, dy, needs)
    assert {choice.engine for choice in choices} == {engine}
    assert_metadata(call, own)
    assert_own_accuracy(call, dy, own, bounds)
    exact = named(passes_of("reference", in_float64(call), dy.double(), needs))
    plain = errors(named(passes_of("reference", call, dy, needs)), exact)
    for name, off in errors(named(own), exact).items():
        allowed = max(2 * plain[name], bounds.whole)
        assert off <= allowed, f"{name}: error {off:.1e}, the reference's {plain[name]:.1e}"
    return own
