"""The arguments of train_chain: layouts, dtypes and autocast, the engine chosen, and errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan.kernels import cpu, ops
from dcgan.kernels.reference import accumulator_dtype
from dcgan.kernels.spec import ConvSpec, TrainCall, TrainStage
from dcgan.kernels.train_chain import specs, track_, train_chain
from tests.support.native_training import strided
from tests.support.networks import NETWORKS, results
from tests.support.tolerance import relative, unit
from tests.support.train_chains import (
    BACKWARD_OP,
    OP,
    Eager,
    Engine,
    Layer,
    arguments,
    build,
    chain_of,
    engine,
    reference_input,
    reference_network,
    tensors_of,
    with_tensors,
)

__all__ = ["engine"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")

UP, DOWN = True, False
LAYERS = (
    Layer(UP, 4, norm=True, act="relu"),
    Layer(DOWN, 3, act="leaky_relu", bias=True),
    Layer(UP, 5, norm=True, affine="beta", act="leaky_relu"),
    Layer(UP, 2, act="tanh", bias=True),
)


def call_of(dtype: torch.dtype = torch.float64, batch: int = 4, **options: Any) -> TrainCall:
    """Return a call of LAYERS whose tensors require gradients."""
    call = (
        chain_of(build(3, LAYERS)).to(dtype).call(torch.randn(batch, 3, 3, 2, dtype=dtype).requires_grad_())
    )
    return call._replace(**options)


def gradients(call: TrainCall, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Return y and the gradients of all tensors of a call."""
    y, _ = train_chain(call)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) if dy is None else dy
    tensors = tensors_of(call)
    found = torch.autograd.grad(y, list(tensors.values()), dy)
    return {"y": y.detach(), **dict(zip(tensors, found, strict=True))}


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_strides_are_those_of_a_new_tensor(
    channels_last: bool, channels: int, size: tuple[int, int], count: int, engine: Engine
) -> None:
    """Exactly, including size-1 dimensions, whatever the input's strides are."""
    before = [Layer(UP, 4, norm=True, act="relu")] if count == 2 else []
    chain = chain_of(build(3, [*before, Layer(DOWN, channels, act="tanh")]), channels_last).to(engine.dtype)
    h, w = size if before else (2 * size[0], 2 * size[1])
    x = torch.randn(2, 3, h, w, dtype=engine.dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        for call in (chain.call(given), chain.call(given)._replace(keep=False)):
            y, _ = train_chain(call)
            c, (h, w) = channels, size
            assert y.shape == (2, c, h, w)
            assert y.stride() == ((h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1))


def test_saved_maps_are_channels_last(engine: Engine) -> None:
    call = call_of(engine.dtype, channels_last=False)
    with torch.no_grad():
        y, saved, _, _ = OP(*arguments(call))
    assert y.is_contiguous()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in saved)


def with_other_strides(t: Tensor) -> dict[str, Tensor]:
    """Copies of ``t`` with other strides, and NaN between its elements."""
    big = torch.full([s + 3 for s in t.shape], float("nan"), dtype=t.dtype)
    inner = tuple(slice(1, s + 1) for s in t.shape)
    big[inner] = t
    last = t.ndim - 1
    return {
        "slice": big[inner],
        "step": strided(t),
        "transposed": t.transpose(0, last).contiguous().transpose(0, last),
        "offset": torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
    }


@pytest.mark.parametrize("kind", ["slice", "step", "transposed", "offset"])
def test_inputs_of_any_strides(kind: str, engine: Engine) -> None:
    """The gradients of parameters have their parameters' strides, if those are dense."""
    call = call_of(engine.dtype, groups=2)
    expected = gradients(call)
    odd = {
        name: with_other_strides(t.detach())[kind].requires_grad_() for name, t in tensors_of(call).items()
    }
    found = gradients(with_tensors(call, odd))
    for name, want in expected.items():
        assert relative(found[name], want) <= engine.tolerance, name


@pytest.mark.parametrize("nhwc", [True, False])
def test_gradients_have_the_strides_of_their_tensors(nhwc: bool, engine: Engine) -> None:
    layout = torch.channels_last if nhwc else torch.contiguous_format
    call = call_of(engine.dtype)
    dense = {
        n: t.detach().contiguous(memory_format=layout).requires_grad_() if t.ndim == 4 else t
        for n, t in tensors_of(call).items()
    }
    call = with_tensors(call, dense)
    found = gradients(call)
    for name, t in tensors_of(call).items():
        assert (found[name].shape, found[name].stride()) == (t.shape, t.stride()), name


def test_output_gradients_of_any_strides(engine: Engine) -> None:
    call = call_of(engine.dtype)
    dy = torch.randn(train_chain(call)[0].shape, dtype=engine.dtype)
    want = gradients(call, dy)
    for odd in with_other_strides(dy).values():
        for name, gradient in gradients(call, odd).items():
            assert relative(gradient, want[name]) <= engine.tolerance, name
    ones = torch.ones((), dtype=engine.dtype)
    want = gradients(call, ones.expand_as(dy).contiguous())
    for name, gradient in gradients(call, ones.expand_as(dy)).items():
        assert relative(gradient, want[name]) <= engine.tolerance, name


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_an_empty_batch(groups: int, channels_last: bool, engine: Engine) -> None:
    """y is empty, of the right shape; statistics are NaN, as torch.mean's; gradients are zero."""
    call = call_of(engine.dtype, groups=groups, channels_last=channels_last)
    shape = train_chain(call._replace(groups=1))[0].shape
    call = call._replace(x=call.x.detach()[:0].requires_grad_())
    y, stats = train_chain(call)
    assert y.shape == (0, *shape[1:])
    assert all(s.shape[:2] == (4, groups) and bool(s[:2].isnan().all()) for s in stats)
    for options in ({}, {"create_graph": True}):
        tensors = tensors_of(call)
        found = torch.autograd.grad(train_chain(call)[0].sum(), list(tensors.values()), **options)
        for (name, t), gradient in zip(tensors.items(), found, strict=True):
            assert gradient.shape == t.shape
            if not options:
                assert not bool(gradient.any()), name


def test_running_statistics_after_an_empty_batch(engine: Engine) -> None:
    """As nn.BatchNorm2d, which counts the batch and changes nothing else."""
    network = build(3, LAYERS)
    chain = chain_of(network).to(engine.dtype)
    before = {n: b.clone() for n, b in chain.named_buffers()}
    x = torch.randn(0, 3, 3, 2)
    chain(x.to(engine.dtype))
    network(x)
    for (name, want), found in zip(network.named_buffers(), chain.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert found.item() == want.item() == 1
        else:
            assert torch.equal(found, before[name])
            assert torch.equal(found.float(), want)


# --- dtypes -------------------------------------------------------------------------------------------------

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def wide_parameters(call: TrainCall) -> TrainCall:
    """Return the call with float32 parameters of the same values."""
    wide = {n: t.detach().float().requires_grad_() for n, t in tensors_of(call).items() if n != "x"}
    return with_tensors(call, wide)


@HALF
@pytest.mark.parametrize("wide", [False, True], ids=["16-bit weights", "float32 weights"])
@pytest.mark.usefixtures("reference_engine")
def test_dtypes(dtype: torch.dtype, wide: bool) -> None:
    """y has x's dtype, statistics the accumulator's, and gradients their tensors'."""
    call = call_of(dtype)
    call = wide_parameters(call) if wide else call
    y, stats = train_chain(call)
    assert y.dtype == dtype
    assert all(s.dtype == torch.float32 for s in stats)
    found = gradients(call)
    for name, t in tensors_of(call).items():
        assert found[name].dtype == t.dtype == (torch.float32 if wide and name != "x" else dtype), name


@HALF
@pytest.mark.usefixtures("reference_engine")
def test_float32_weights_are_rounded_to_16_bits(dtype: torch.dtype) -> None:
    """The result is that of rounded weights; their gradients and those of gamma and beta are unrounded."""
    call = call_of(dtype)
    wide = wide_parameters(call)
    narrow_results, wide_results = gradients(call), gradients(wide)
    assert torch.equal(wide_results["y"], narrow_results["y"])
    for name, gradient in narrow_results.items():
        assert torch.equal(wide_results[name].to(dtype), gradient), name
    assert any(not torch.equal(g.to(dtype).float(), g) for n, g in wide_results.items() if "weight" in n)
    shifted = {
        n: (t.detach() * (1 + unit(dtype) / 8)).requires_grad_()
        for n, t in tensors_of(wide).items()
        if "weight" in n
    }
    assert torch.equal(gradients(with_tensors(wide, shifted))["y"], narrow_results["y"])


class UnderAutocast(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(x)  # type: ignore[no-any-return]


def errors(network: Eager, x: Tensor, dtype: torch.dtype, wide: bool) -> tuple[list[float], list[float]]:
    """Return the relative errors of the operator's results and of eager's, against float64.

    The network's parameters are rounded to ``dtype``; ``wide`` ones are then in float32, as under autocast.
    """
    x = x.to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.to(dtype))
    exact = list(results(copy.deepcopy(network).double(), x.double()).values())
    found = []
    for model in (chain_of(network), copy.deepcopy(network)):
        model = UnderAutocast(model, dtype) if wide else model.to(dtype)
        values = results(model, x).values()
        pairs = [(a, b) for a, b in zip(values, exact, strict=True) if b.is_floating_point()]
        found.append([relative(a, b) for a, b in pairs])
    ours, eager = found
    return ours, eager


@HALF
@pytest.mark.parametrize("wide", [False, True], ids=["16-bit weights", "float32 weights"])
@pytest.mark.usefixtures("reference_engine")
def test_errors_of_smooth_networks_are_about_those_of_eager(dtype: torch.dtype, wide: bool) -> None:
    """Each result's; there is no kink, at which one rounding error would change a derivative by 1."""
    layers = [
        Layer(UP, 12, norm=True),
        Layer(UP, 8, norm=True, affine="gamma"),
        Layer(DOWN, 6, bias=True),
        Layer(UP, 3, act="tanh", bias=True),
    ]
    for _ in range(3):
        ours, eager = errors(build(8, layers), torch.randn(8, 8, 4, 4), dtype, wide)
        for mine, theirs in zip(ours, eager, strict=True):
            assert mine <= 1.5 * theirs + unit(dtype)


@HALF
@NETWORKS
@pytest.mark.parametrize("wide", [False, True], ids=["16-bit weights", "float32 weights"])
@pytest.mark.usefixtures("reference_engine")
def test_errors_of_the_reference_networks_are_about_those_of_eager(
    dtype: torch.dtype, kind: str, wide: bool
) -> None:
    """In the geometric mean over all results and 8 networks.

    Which derivatives change at a kink is a matter of chance, by which a network's mean varies by a factor of
    up to e^0.5 (its standard deviation), and that of 8 by e^0.2.
    """
    ratios: list[float] = []
    for seed in range(8):
        torch.manual_seed(seed)
        network, x = reference_network(kind, features=4), reference_input(kind, 6)
        ours, eager = errors(network, x, dtype, wide)
        ratios += [
            math.log((a + unit(dtype) / 8) / (b + unit(dtype) / 8)) for a, b in zip(ours, eager, strict=True)
        ]
    assert math.exp(sum(ratios) / len(ratios)) < 1.5


def test_vectors_of_other_dtypes(engine: Engine) -> None:
    """gamma and beta may have any floating dtype, and so their gradients."""
    call = call_of(engine.dtype)
    wanted = gradients(call)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        vectors = {
            n: t.detach().to(dtype).requires_grad_() for n, t in tensors_of(call).items() if t.ndim == 1
        }
        found = gradients(with_tensors(call, vectors))
        for name in vectors:
            assert found[name].dtype == dtype
            assert relative(found[name], wanted[name]) < 0.1


# --- autocast -----------------------------------------------------------------------------------------------


@HALF
@pytest.mark.usefixtures("reference_engine")
def test_autocast(dtype: torch.dtype) -> None:
    """x is cast; parameters stay float32, and so are all gradients."""
    call = call_of(torch.float32, groups=2)
    with torch.autocast("cpu", dtype=dtype):
        y, stats = train_chain(call)
    assert y.dtype == dtype
    assert all(s.dtype == torch.float32 for s in stats)
    by_hand = call._replace(x=call.x.detach().to(dtype).requires_grad_())
    want, want_stats = train_chain(by_hand)
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(stats, want_stats, strict=True))
    dy = torch.randn(y.shape).to(dtype)
    tensors = tensors_of(call)
    found = torch.autograd.grad(y, list(tensors.values()), dy)
    expected = gradients(by_hand, dy)
    for name, gradient in zip(tensors, found, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name].float()), name


@pytest.mark.usefixtures("reference_engine")
def test_autocast_of_16_bit_weights_and_of_float64() -> None:
    call = call_of(torch.float32)
    narrow = {n: t.detach().bfloat16().requires_grad_() for n, t in tensors_of(call).items() if t.ndim == 4}
    mixed = with_tensors(call, {n: t for n, t in narrow.items() if n != "x"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(mixed)
        assert found["y"].dtype == torch.bfloat16
        assert found["weight 0"].dtype == torch.bfloat16
        assert train_chain(call_of(torch.float64))[0].dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert train_chain(call)[0].dtype == torch.float32
        with pytest.raises(TypeError, match=r"weight must be torch.float64 .* got torch.bfloat16 in layer 0"):
            train_chain(mixed._replace(x=call.x.double()))
    with torch.autocast("cpu", dtype=torch.float16):
        found = gradients(mixed)
    assert found["y"].dtype == torch.float16
    assert found["weight 0"].dtype == torch.bfloat16


# --- engines ------------------------------------------------------------------------------------------------


def test_the_chosen_engines_are_recorded() -> None:
    """One choice per layer, in the forward and in the backward."""
    call = call_of(torch.float32)
    with ops.use_engine("reference"), ops.recording() as choices:
        train_chain(call)[0].sum().backward()
    names = [ops.NAMES[layer.transposed] for layer in LAYERS]
    assert [c.op for c in choices] == [*names, *(f"{name}_backward" for name in names)]
    assert {c.engine for c in choices} == {"reference"}
    call = call_of(torch.float64)
    with ops.recording() as choices:
        train_chain(call)
    assert all(c.engine == "reference" and "float64" in c.reason for c in choices)


def test_a_layer_that_an_engine_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference runs the whole network; the choice of each layer says why."""
    call = call_of(torch.float32)

    def why_not(spec: ConvSpec, *_: Any, **__: Any) -> str | None:
        return "five channels" if spec.y.size[0] == 5 else None

    monkeypatch.setattr(cpu, "why_not", why_not)
    with ops.recording() as choices:
        train_chain(call)
    reasons = [c.reason for c in choices]
    assert {c.engine for c in choices} == {"reference"}
    assert reasons[2] == "native: five channels"
    assert reasons[0] == reasons[3] == "the reference runs another layer (native: five channels)"


def test_a_forced_engine_that_does_not_cover_the_call_is_an_error() -> None:
    with ops.use_engine("triton"), pytest.raises(ops.EngineError, match="engine 'triton' is forced"):
        train_chain(call_of(torch.float64))


# --- errors -------------------------------------------------------------------------------------------------


def stage(**changes: Any) -> TrainStage:
    given: dict[str, Any] = {"transposed": False, "weight": torch.ones(3, 3, 4, 4), **changes}
    return TrainStage(**given)


def normed(**changes: Any) -> TrainStage:
    return stage(norm=True, act="relu", **changes)


X = torch.ones(4, 3, 16, 16)
INVALID: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layers": ({"stages": []}, ValueError, r"stages must hold at least one layer, got none"),
    "x of 3 dimensions": ({"x": X[0]}, ValueError, r"x must be \[N, C, H, W\], got \[3, 16, 16\]"),
    "x of no dimension": ({"x": X.sum()}, ValueError, r"x must be \[N, C, H, W\], got \[\]"),
    "x of integers": (
        {"x": X.int()},
        TypeError,
        r"x must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "channels of x": (
        {"x": torch.ones(4, 5, 16, 16)},
        ValueError,
        r"x has 5 channels, but weight \[C_out, C_in, kH, kW\] = \[3, 3, 4, 4\] expects 3, in layer 0",
    ),
    "channels of a layer": (
        {1: stage(transposed=True, weight=torch.ones(2, 3, 4, 4))},
        ValueError,
        r"x has 3 channels, but weight \[C_in, C_out, kH, kW\] = \[2, 3, 4, 4\] expects 2, in layer 1",
    ),
    "dimensions of a weight": (
        {1: stage(weight=torch.ones(3, 3))},
        ValueError,
        r"weight must have 4 dimensions, got \[3, 3\], in layer 1",
    ),
    "a weight of 1 dimension": (
        {1: stage(transposed=True, weight=torch.ones(3), norm=True, gamma=torch.ones(3))},
        ValueError,
        r"weight must have 4 dimensions, got \[3\], in layer 1",
    ),
    "dtype of a weight": (
        {1: stage(weight=torch.ones(3, 3, 4, 4).double())},
        TypeError,
        r"weight must be torch.float32 or torch.float32 for x of torch.float32, got torch.float64 in layer 1",
    ),
    "16-bit weights of float32": (
        {0: normed(weight=torch.ones(3, 3, 4, 4).bfloat16())},
        TypeError,
        r"weight must be .*torch.float32 for x of torch.float32, got torch.bfloat16 in layer 0",
    ),
    "weights of another 16-bit dtype": (
        {"x": X.half(), 0: normed(weight=torch.ones(3, 3, 4, 4).bfloat16())},
        TypeError,
        r"weight must be torch.float16 or torch.float32 for x of torch.float16, got torch.bfloat16",
    ),
    "device of a weight": (
        {1: stage(weight=torch.ones(3, 3, 4, 4, device="meta"))},
        ValueError,
        r"weight must be on x's device cpu, got meta, in layer 1",
    ),
    "stride": ({1: stage(stride=0)}, ValueError, r"stride must be at least 1 .* got 0 and 1, in layer 1"),
    "padding": ({1: stage(padding=-1)}, ValueError, r"padding at least 0, got 2 and -1, in layer 1"),
    "slope": ({"slope": -0.5}, ValueError, r"slope must not be negative, got -0.5"),
    "a map too small": (
        {"x": X[:, :, :4, :4], "stages": [stage(), stage(), stage(padding=0)]},
        ValueError,
        r"x \[4, 3, 1, 1\] is too small for a 4×4 kernel with stride 2 and padding 0, in layer 2",
    ),
    "groups": ({"groups": 3}, ValueError, r"groups must divide the 4 images of x, got 3"),
    "more groups than images": ({"groups": 8}, ValueError, r"groups must divide the 4 images of x, got 8"),
    "no groups": ({"groups": 0}, ValueError, r"groups must divide the 4 images of x, got 0"),
    "negative groups": ({"groups": -2}, ValueError, r"groups must divide the 4 images of x, got -2"),
    "BatchNorm in the last layer": (
        {2: normed()},
        ValueError,
        r"norm must be False in the last layer, as no layer follows that would apply it",
    ),
    "act of the last layer": (
        {2: stage(act="gelu")},
        ValueError,
        r"act must be one of \(.*'tanh', 'sigmoid'\) in the last layer, got 'gelu' in layer 2",
    ),
    "act of another layer": (
        {1: stage(act="tanh")},
        ValueError,
        r"act must be one of \('none', 'relu', 'leaky_relu'\) in every layer but the last, "
        r"got 'tanh' in layer 1",
    ),
    "act of a layer with a BatchNorm": (
        {0: normed()._replace(act="sigmoid")},
        ValueError,
        r"act must be one of .* in every layer but the last, got 'sigmoid' in layer 0",
    ),
    **{
        f"{name} {given}: {what}": (
            {i: make(**{name: vector})},
            error,
            message.format(name=name) + f" in layer {i}",
        )
        for name, given, i, make in (
            ("gamma", "of a BatchNorm", 0, normed),
            ("beta", "of a BatchNorm", 0, normed),
            ("beta", "as a bias", 1, stage),
        )
        for what, vector, error, message in (
            (
                "length",
                torch.ones(4),
                ValueError,
                r"{name} must be \[3\], one value per channel, got \[4\]",
            ),
            (
                "dimensions",
                torch.ones(3, 1),
                ValueError,
                r"{name} must be \[3\], one value per channel, got \[3, 1\]",
            ),
            (
                "dtype",
                torch.ones(3).int(),
                TypeError,
                r"{name} must be floating point, got torch.int32",
            ),
            (
                "device",
                torch.ones(3, device="meta"),
                ValueError,
                r"{name} must be on x's device cpu, got meta",
            ),
        )
    },
    "gamma without a BatchNorm": (
        {1: stage(gamma=torch.ones(3))},
        ValueError,
        r"gamma must be None in a layer without a BatchNorm, got one in layer 1",
    ),
}


def invalid_call(name: str) -> TrainCall:
    """Return a valid call with the changes of INVALID; integers stand for layers."""
    changes = INVALID[name][0]
    stages = [changes.get(i, (normed, stage, stage)[i]()) for i in range(3)]
    others = {key: value for key, value in changes.items() if isinstance(key, str)}
    return TrainCall(X, stages)._replace(**others)


def test_the_call_is_valid_without_changes() -> None:
    first = normed(gamma=torch.ones(3), beta=torch.ones(3))
    call = TrainCall(X, [first, stage(beta=torch.ones(3)), stage(act="tanh")])
    assert train_chain(call)[0].shape == (4, 3, 2, 2)


@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("how", ["plain", "gradient", "fake", "transform"])
def test_invalid_arguments_are_named(name: str, how: str) -> None:
    """Also where gradients are required, in fake tensors as compiled graphs use, and under torch.func."""
    _, error, message = INVALID[name]
    call = invalid_call(name)
    if how == "gradient":
        call = call._replace(x=call.x.double().requires_grad_().to(call.x.dtype))
    elif how == "fake" and "device" not in name:
        call = with_tensors(call, {n: t.to("meta") for n, t in tensors_of(call).items()})
    run = torch.func.vmap if how == "transform" else map_first
    with ops.use_engine("reference"), pytest.raises(error, match=message):
        run(lambda x: train_chain(call._replace(x=x))[0])(call.x[None])


def map_first(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return f of the first item, as :func:`torch.func.vmap` of a single item, but without a transform."""
    return lambda x: f(x[0])


def test_an_argument_is_checked_again_after_a_valid_call() -> None:
    """Checks are cached by shapes; those of gamma and beta are not part of the key."""
    valid = TrainCall(X, [normed(gamma=torch.ones(3)), stage()])
    for _ in range(2):
        train_chain(valid)
        with pytest.raises(ValueError, match=r"gamma must be \[3\]"):
            train_chain(valid._replace(stages=[normed(gamma=torch.ones(2)), stage()]))
        with pytest.raises(ValueError, match="groups must divide"):
            train_chain(valid._replace(groups=3))


def test_calls_that_differ_in_a_bias_alone(engine: Engine) -> None:
    """With one and without, in turn: neither runs what is prepared for the other."""
    call = call_of(engine.dtype)
    bare = call._replace(stages=[*call.stages[:-1], call.stages[-1]._replace(beta=None)])
    zero = torch.zeros_like(call.stages[-1].beta)  # type: ignore[arg-type]
    zeros = call._replace(stages=[*call.stages[:-1], call.stages[-1]._replace(beta=zero)])
    for _ in range(2):
        biased, without, with_zeros = (train_chain(c)[0].detach() for c in (call, bare, zeros))
        assert torch.equal(without, with_zeros)
        assert call.stages[-1].beta is not None
        shifted = (without.atanh() + call.stages[-1].beta.detach()[:, None, None]).tanh()
        assert relative(biased, shifted) <= 10 * engine.tolerance
        assert [specs(c)[-1].y.shifted for c in (call, bare)] == [True, False]


@pytest.mark.parametrize("name", ["running_mean", "running_var", "batches", "momentum", "count"])
def test_invalid_arguments_of_track(name: str) -> None:
    given: dict[str, Any] = {
        "running_mean": [torch.zeros(3)],
        "running_var": [torch.ones(3)],
        "batches": [torch.tensor(0)],
        "stats": [torch.ones(4, 1, 3)],
        "momentum": [0.1],
        "count": [8],
    }
    track_(**given)
    with pytest.raises(ValueError, match=f"{name} must have one entry per BatchNorm, 1, got 0"):
        track_(**{**given, name: []})
    with pytest.raises(ValueError, match=r"count must be at least 2 .*, got \[1\]"):
        track_(**{**given, "count": [1]})
    assert given["batches"][0].item() == 1


def test_the_backward_ignores_gradients_of_absent_vectors() -> None:
    call = call_of(torch.float64)
    with torch.no_grad(), ops.use_engine("reference"):
        y, saved, stats, packed = OP(*arguments(call))
        needs = [True] * (1 + 3 * len(LAYERS))
        dx, weights, gammas, betas = BACKWARD_OP(y, y, saved, stats, packed, needs, *arguments(call))
    assert dx.shape == call.x.shape
    assert [t.numel() for t in gammas] == [4, 0, 0, 0]
    assert [t.numel() for t in betas] == [4, 3, 5, 2]
    assert all(g.shape == s.weight.shape for g, s in zip(weights, call.stages, strict=True))
    assert {t.dtype for t in (*weights, dx)} == {accumulator_dtype(torch.float64)}
