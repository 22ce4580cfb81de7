"""A network in training as one operator: its results and derivatives, compared with PyTorch's modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcgan.kernels import ops, reference
from dcgan.kernels.spec import TrainBackward, TrainCall
from dcgan.kernels.train_chain import track_, train_chain
from tests.support import native
from tests.support.networks import NETWORKS, assert_equal_results, results
from tests.support.tolerance import relative
from tests.support.train_chains import (
    AFFINE,
    LAST_ACTS,
    MIDDLE_ACTS,
    NATIVE,
    OP,
    REFERENCE,
    Eager,
    Engine,
    Layer,
    arguments,
    assert_matches_eager,
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
SMALL = (
    Layer(UP, 3, 3, 1, 0, norm=True, act="relu"),
    Layer(UP, 2, norm=True, affine="gamma", act="leaky_relu"),
    Layer(DOWN, 3, act="leaky_relu", bias=True),
    Layer(UP, 2, norm=True, affine="neither", act="none"),
    Layer(UP, 1, act="tanh", bias=True),
)
"""From one pixel; both kinds of convolutions, with different BatchNorms and with a bias."""


def small_call(batch: int = 4, groups: int = 1, dtype: torch.dtype = torch.float64) -> TrainCall:
    """Return a call of SMALL whose tensors require gradients."""
    chain = chain_of(build(3, SMALL)).to(dtype)
    chain.groups = groups
    return chain.call(torch.randn(batch, 3, 1, 1, dtype=dtype, requires_grad=True))


# --- results ------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 5])
def test_reference_networks(kind: str, channels: int, batch: int, engine: Engine) -> None:
    network, x = reference_network(kind, channels), reference_input(kind, batch, channels)
    assert_matches_eager(network, x, engine, steps=2)


SHAPES: dict[str, tuple[tuple[int, int, int, int], list[Layer]]] = {
    "one layer": ((2, 3, 5, 7), [Layer(DOWN, 2, act="tanh")]),
    "one up layer of one pixel": ((3, 5, 1, 1), [Layer(UP, 3, 4, 1, 0, act="sigmoid", bias=True)]),
    "odd maps down": (
        (3, 1, 13, 9),
        [
            Layer(DOWN, 4, act="leaky_relu", bias=True),
            Layer(DOWN, 3, norm=True, act="relu"),
            Layer(DOWN, 1, 2, 1, 0, bias=True),
        ],
    ),
    "odd maps up": (
        (2, 3, 3, 5),
        [Layer(UP, 5, norm=True, act="relu"), Layer(UP, 2, norm=True), Layer(UP, 3, act="tanh")],
    ),
    "other kernels": (
        (2, 2, 6, 5),
        [
            Layer(DOWN, 3, (3, 5), 1, 2, norm=True, act="relu"),
            Layer(UP, 4, (5, 4), 3, 2, norm=True, act="leaky_relu"),
            Layer(DOWN, 2, 1, 1, 0, act="sigmoid", bias=True),
        ],
    ),
    "both kinds": ((4, 3, 1, 1), list(SMALL)),
    "stride 1": (
        (3, 2, 4, 5),
        [Layer(DOWN, 3, 3, 1, 1, norm=True, act="relu"), Layer(UP, 2, 3, 1, 1, act="tanh")],
    ),
    "maps of one pixel": (
        (6, 4, 1, 1),
        [Layer(DOWN, 5, 1, 1, 0, norm=True, act="relu"), Layer(UP, 2, 1, 1, 0, act="none")],
    ),
    "one channel": ((2, 1, 4, 4), [Layer(DOWN, 1, norm=True, act="relu"), Layer(UP, 1, act="tanh")]),
    "a large eps": (
        (2, 3, 4, 4),
        [Layer(DOWN, 4, norm=True, act="leaky_relu", eps=0.5), Layer(UP, 3, act="tanh")],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_shapes(name: str, channels_last: bool, engine: Engine) -> None:
    shape, layers = SHAPES[name]
    assert_matches_eager(build(shape[1], layers), torch.randn(shape), engine, channels_last)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("act", MIDDLE_ACTS)
def test_batchnorms(affine: str, act: str, engine: Engine) -> None:
    layers = [Layer(UP, 3, norm=True, affine=affine, act=act), Layer(DOWN, 2, act="tanh")]
    assert_matches_eager(build(2, layers), torch.randn(3, 2, 3, 3), engine)


@pytest.mark.parametrize("act", MIDDLE_ACTS)
@pytest.mark.parametrize("next_norm", [False, True])
def test_layers_without_batchnorm(act: str, next_norm: bool, engine: Engine) -> None:
    middle = Layer(DOWN, 4, 3, 1, 1, norm=next_norm, act=act)
    layers = [Layer(DOWN, 3, act=act), middle, Layer(UP, 2, act="sigmoid")]
    assert_matches_eager(build(2, layers), torch.randn(3, 2, 6, 6), engine)


@pytest.mark.parametrize("act", MIDDLE_ACTS)
@pytest.mark.parametrize("last", LAST_ACTS)
@pytest.mark.parametrize("groups", [1, 3])
def test_biases(act: str, last: str, groups: int, engine: Engine) -> None:
    """In the first layer, above and below a BatchNorm, and in the last layer."""
    layers = [
        Layer(DOWN, 5, act=act, bias=True),
        Layer(UP, 3, act=act, bias=True),
        Layer(DOWN, 4, norm=True, act=act),
        Layer(UP, 7, act=act, bias=True),
        Layer(UP, 3, act=last, bias=True),
    ]
    network = build(2, layers)
    network.groups = groups
    assert_matches_eager(network, torch.randn(3 * groups, 2, 5, 6), engine, channels_last=groups == 1)


@pytest.mark.parametrize("act", LAST_ACTS)
@pytest.mark.parametrize("norm", [False, True])
def test_last_activations(act: str, norm: bool, engine: Engine) -> None:
    layers = [Layer(UP, 3, norm=norm, act="relu"), Layer(UP, 2, act=act)]
    assert_matches_eager(build(2, layers), torch.randn(3, 2, 3, 2), engine)


def test_another_slope(engine: Engine) -> None:
    layers = [
        Layer(DOWN, 3, act="leaky_relu"),
        Layer(DOWN, 4, norm=True, act="leaky_relu"),
        Layer(UP, 2, act="leaky_relu"),
    ]
    assert_matches_eager(build(2, layers, slope=0.05), torch.randn(3, 2, 8, 8), engine)


def test_a_mean_much_larger_than_the_deviation() -> None:
    """The variance is that of deviations from the mean, not E[y²] - E[y]²."""
    network = build(2, [Layer(DOWN, 3, norm=True, act="relu"), Layer(UP, 1, act="tanh")])
    x = 1e4 + torch.randn(4, 2, 6, 6)
    engine = Engine("reference", torch.float64, 1e-8)
    assert_matches_eager(network, x, engine)


@pytest.mark.parametrize("where", ["x", "weight", "gamma", "bias", "dy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(where: str, value: float) -> None:
    """They spread to the same elements as in PyTorch's modules, and not to other groups."""
    layers = [
        Layer(DOWN, 3, act="leaky_relu", bias=True),
        Layer(DOWN, 2, norm=True, act="relu"),
        Layer(UP, 3, norm=True, act="leaky_relu"),
        Layer(UP, 1, 3, 1, 1, act="tanh"),
    ]
    eager = build(2, layers).double()
    eager.groups = 2
    x = torch.randn(4, 2, 12, 12, dtype=torch.float64)
    if where == "x":
        x[3, 1, 6, 5] = value
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if (where, name) in (("weight", "2.weight"), ("gamma", "3.weight"), ("bias", "0.bias")):
                parameter.view(-1)[1] = value

    def loss(y: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        if where == "dy":
            weights[3, 0, 4, 4] = value
        return (y * weights).sum()

    chain = chain_of(eager)
    expected, actual = (results(model, x, loss) for model in (eager, chain))
    assert not all(bool(t.isfinite().all()) for t in expected.values() if t.is_floating_point())
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


# --- groups and running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_groups_are_calls_in_order(groups: int, momentum: float | None, engine: Engine) -> None:
    """Including the running statistics, over several steps."""
    layers = [
        Layer(UP, 4, 3, 1, 0, norm=True, act="relu", momentum=momentum),
        Layer(UP, 3, norm=True, act="leaky_relu", momentum=0.3),
        Layer(UP, 2, act="tanh"),
    ]
    network = build(3, layers)
    network.groups = groups
    assert_matches_eager(network, torch.randn(6, 3, 1, 1), engine, steps=3)


@NETWORKS
def test_groups_of_the_reference_networks(kind: str, engine: Engine) -> None:
    network = reference_network(kind)
    network.groups = 2
    assert_matches_eager(network, reference_input(kind, 4), engine, steps=2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_statistics(groups: int, engine: Engine) -> None:
    """Mean, biased variance, scale and shift, per group and channel, as the eager modules have them."""
    network = build(3, SMALL).double()
    x = torch.randn(4, 3, 1, 1, dtype=torch.float64)
    chain = chain_of(network).to(engine.dtype)
    chain.groups = groups
    with torch.no_grad():
        found = train_chain(chain.call(x.to(engine.dtype)))[1]
    inputs: dict[int, list[Tensor]] = {}
    norms: list[Any] = [m for m in network if isinstance(m, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.register_forward_pre_hook(lambda _, args, i=i: inputs.setdefault(i, []).append(args[0]))
    for part in x.chunk(groups):
        network(part)
    assert len(found) == len(norms)
    for i, (norm, stats) in enumerate(zip(norms, found, strict=True)):
        mean = torch.stack([u.mean((0, 2, 3)) for u in inputs[i]])
        var = torch.stack([u.var((0, 2, 3), unbiased=False) for u in inputs[i]])
        scale = (1 if norm.weight is None else norm.weight) / (var + norm.eps).sqrt()
        shift = torch.zeros_like(mean) + (0 if norm.bias is None else norm.bias)
        expected = torch.stack([mean, var, scale, shift]).detach()
        assert stats.shape == (4, groups, norm.num_features)
        assert stats.dtype == engine.dtype
        assert not stats.requires_grad
        for vector, want in zip(stats, expected, strict=True):
            assert float((vector.double() - want).norm()) <= engine.tolerance * float(expected.norm())


BUFFERS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", BUFFERS, ids=str)
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 0.7, 1.0])
def test_track(dtype: torch.dtype, momentum: float | None) -> None:
    """Each update is rounded once to the buffers' dtype."""
    torch.manual_seed(3)
    groups, channels, count = 3, 5, 7
    stats = torch.randn(4, groups, channels)
    stats[1].abs_()
    mean, var = torch.randn(channels).to(dtype), torch.rand(channels).to(dtype)
    batches = torch.tensor(11)
    expected_mean, expected_var = mean.double(), var.double()
    for group in range(groups):
        weight = 1 / (12 + group) if momentum is None else momentum
        for running, new in (
            (expected_mean, stats[0, group].double()),
            (expected_var, stats[1, group].double() * count / (count - 1)),
        ):
            running.copy_(((1 - weight) * running + weight * new).to(dtype))
    track_([mean], [var], [batches], [stats], [momentum], [count])
    assert batches.item() == 14
    tolerance = 2 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if dtype == torch.float64:
        tolerance = 1e-7  # the statistics are float32
    if dtype in (torch.bfloat16, torch.float16):
        tolerance = torch.finfo(dtype).eps  # a tie of float32 may be rounded the other way
    assert mean.dtype == var.dtype == dtype
    assert relative(mean, expected_mean) <= tolerance
    assert relative(var, expected_var) <= tolerance


def test_track_without_batchnorms() -> None:
    track_([], [], [], [], [], [])


# --- gradients ----------------------------------------------------------------------------------------------


def gradients(call: TrainCall, wanted: list[str], **options: Any) -> dict[str, Tensor]:
    """Return the gradients of a fixed loss for the named tensors of a call."""
    y, _ = train_chain(call)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    tensors = tensors_of(call)
    found = torch.autograd.grad(y, [tensors[name] for name in wanted], dy, **options)
    return dict(zip(wanted, found, strict=True))


NAMES = list(tensors_of(small_call()))


def only(call: TrainCall, wanted: list[str]) -> TrainCall:
    """Return the call with all other tensors detached."""
    tensors = tensors_of(call)
    return with_tensors(call, {n: t if n in wanted else t.detach() for n, t in tensors.items()})


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone_and_all_but_one(name: str, engine: Engine) -> None:
    """Each gradient is the same whether or not the others are required."""
    call = small_call(groups=2, dtype=engine.dtype)
    everything = gradients(call, NAMES)
    others = [other for other in NAMES if other != name]
    for wanted in ([name], others):
        found = gradients(only(call, wanted), wanted)
        for n, gradient in found.items():
            assert relative(gradient, everything[n]) <= engine.tolerance


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[TrainBackward]:
    """Record the calls of the reference's backward."""
    calls: list[TrainBackward] = []
    original = reference.train_backward

    def record(specs: Any, call: TrainBackward, results: Any) -> None:
        calls.append(call)
        original(specs, call, results)

    monkeypatch.setattr(reference, "train_backward", record)
    return calls


@pytest.mark.usefixtures("reference_engine")
@pytest.mark.parametrize(
    "wanted",
    [["x"], ["weight 0"], ["gamma 1", "beta 0"], ["beta 2"], ["beta 4"], ["x", "weight 4"]],
    ids=str,
)
def test_only_the_gradients_asked_for_are_computed(
    wanted: list[str], backward_calls: list[TrainBackward]
) -> None:
    """autograd.grad of some tensors of a network whose tensors all require gradients."""
    call = small_call()
    everything = gradients(call, NAMES)
    found = gradients(call, wanted)
    for name, gradient in found.items():
        assert torch.equal(gradient, everything[name])
    needs = backward_calls[-1]
    found_needs = ["x"] if needs.need_x else []
    for name, column in (
        ("weight", needs.need_weight),
        ("gamma", needs.need_gamma),
        ("beta", needs.need_beta),
    ):
        found_needs += [f"{name} {i}" for i, need in enumerate(column) if need]
    assert sorted(found_needs) == sorted(wanted)


def test_accumulated_gradients_of_all_tensors(engine: Engine) -> None:
    """y.backward() accumulates into .grad of leaves."""
    call = small_call(dtype=engine.dtype)
    expected = gradients(call, NAMES)
    for _ in range(2):
        y, _ = train_chain(call)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
    for name, t in tensors_of(call).items():
        assert t.grad is not None
        assert relative(t.grad, 2 * expected[name]) <= engine.tolerance


def test_without_gradients(engine: Engine) -> None:
    """Nothing requires one; under no_grad and in inference mode. The results are the same."""
    call = small_call(dtype=engine.dtype)
    want, want_stats = train_chain(call)
    assert want.requires_grad
    detached = only(call, [])
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            for keep in (True, False):
                y, stats = train_chain(
                    (detached if context is torch.enable_grad else call)._replace(keep=keep)
                )
                assert not y.requires_grad
                assert torch.equal(y, want)
                assert all(torch.equal(a, b) for a, b in zip(stats, want_stats, strict=True))
    assert y.is_inference()


def test_keep_does_not_disable_gradients() -> None:
    """Where a gradient is required, the forward keeps what the backward needs in any case."""
    call = small_call()
    expected = gradients(call, NAMES)
    found = gradients(call._replace(keep=False), NAMES)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_what_the_forward_keeps() -> None:
    call = small_call()
    with torch.no_grad():
        y, saved, stats, packed = OP(*arguments(call))
        assert [t.shape[1] for t in saved] == [3, 2, 3, 2]
        assert [t.shape for t in stats] == [(4, 1, 3), (4, 1, 2), (4, 1, 2)]
        bare, saved, stats, packed = OP(*arguments(call._replace(keep=False)))
        assert (saved, packed.numel(), len(stats)) == ([], 0, 3)
        assert torch.equal(bare, y)


def test_statistics_are_not_differentiable() -> None:
    _, stats = train_chain(small_call())
    assert not any(t.requires_grad for t in stats)


def test_the_same_weight_in_two_layers(engine: Engine) -> None:
    """Its gradient is the sum of both layers'; also in second derivatives."""
    network = build(
        3,
        [
            Layer(DOWN, 3, 3, 1, 1, norm=True, act="relu"),
            Layer(DOWN, 3, 3, 1, 1, norm=True, act="leaky_relu"),
            Layer(UP, 3, 3, 1, 1, act="tanh"),
        ],
    )
    convolutions: list[Any] = [m for m in network if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    norms: list[Any] = [m for m in network if isinstance(m, nn.BatchNorm2d)]
    for convolution in convolutions[1:]:
        convolution.weight = convolutions[0].weight
    norms[1].weight = norms[0].bias
    assert len(list(network.parameters())) == 4
    x = torch.randn(3, 3, 4, 4)
    assert_matches_eager(network, x, engine)

    if engine.dtype == torch.float64:
        eager, x = network.double(), x.double()
        want, found = (penalty_gradients(model, x) for model in (eager, chain_of(eager)))
        assert_equal_results(found, want)


def test_backward_twice(engine: Engine) -> None:
    call = small_call(dtype=engine.dtype)
    tensors = list(tensors_of(call).values())
    y, _ = train_chain(call)
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(y.sum(), tensors)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), tensors)


@pytest.mark.parametrize("name", ["x", "weight 0", "weight 3", "gamma 1", "beta 0", "y"])
def test_a_saved_tensor_modified_in_place(name: str) -> None:
    call = small_call()
    y, _ = train_chain(call)
    loss = y.square().sum()
    with torch.no_grad():
        {**tensors_of(call), "y": y}[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_result_without_activation_may_be_modified_in_place() -> None:
    """The backward does not need y."""
    call = small_call()
    call = call._replace(stages=[*call.stages[:-1], call.stages[-1]._replace(act="none")])
    expected = gradients(call, ["x"])["x"]
    y, _ = train_chain(call)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    (x,) = torch.autograd.grad(y.mul_(2), call.x, dy)
    assert relative(x, 2 * expected) < 1e-14


def test_inputs_are_not_modified(engine: Engine) -> None:
    """In-place activations do not reach the arguments, and no output shares memory with one."""
    identity = [Layer(DOWN, 3, 1, 1, 0, act="relu"), Layer(DOWN, 3, 1, 1, 0, act="leaky_relu")]
    for layers in (SMALL, identity):
        call = chain_of(build(3, layers)).to(engine.dtype).call(torch.randn(4, 3, 1, 1).to(engine.dtype))
        before = {name: t.detach().clone() for name, t in tensors_of(call).items()}
        given = {t.untyped_storage().data_ptr() for t in tensors_of(call).values()}
        with torch.no_grad():
            y, stats = train_chain(call)
            for t in (y, *stats):
                assert t.untyped_storage().data_ptr() not in given
                t.zero_()
        for name, t in tensors_of(call).items():
            assert torch.equal(t, before[name]), name


def test_saved_tensor_hooks_and_checkpoints() -> None:
    """Activations may be offloaded, and the forward repeated in the backward."""
    call = small_call()
    expected = gradients(call, NAMES)
    with torch.autograd.graph.save_on_cpu():
        assert all(torch.equal(g, expected[n]) for n, g in gradients(call, NAMES).items())

    def run(x: Tensor) -> Tensor:
        return train_chain(call._replace(x=x))[0]

    y: Any = checkpoint(run, call.x, use_reentrant=False)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    assert torch.equal(torch.autograd.grad(y, call.x, dy)[0], expected["x"])


# --- second derivatives -------------------------------------------------------------------------------------


def as_function(call: TrainCall) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return y as a function of the call's tensors, and those tensors."""
    names = list(tensors_of(call))

    def function(*values: Tensor) -> Tensor:
        return train_chain(with_tensors(call, dict(zip(names, values, strict=True))))[0]

    return function, list(tensors_of(call).values())


def penalty_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a penalty on all first gradients, ‖∂(Σy²)‖² + Σy."""
    x = x.detach().clone().requires_grad_()
    tensors = {"input": x, **dict(model.named_parameters())}
    y = model(x)
    first = torch.autograd.grad(y.square().sum(), list(tensors.values()), create_graph=True)
    loss = sum((g.square().sum() for g in first), y.sum())
    second = torch.autograd.grad(loss, list(tensors.values()))
    return {f"gradient of {name}": g for name, g in zip(tensors, second, strict=True)}


@pytest.mark.usefixtures("reference_engine")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("act", LAST_ACTS)
def test_first_and_second_derivatives(groups: int, act: str) -> None:
    """Against finite differences, along random directions (fast_mode)."""
    call = small_call(groups=groups)
    call = call._replace(stages=[*call.stages[:-1], call.stages[-1]._replace(act=act)])
    function, inputs = as_function(call)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.usefixtures("reference_engine")
def test_every_entry_of_the_jacobian() -> None:
    layers = [
        Layer(UP, 2, 2, 1, 0, norm=True, act="leaky_relu"),
        Layer(DOWN, 1, 2, 1, 0, act="tanh", bias=True),
    ]
    call = chain_of(build(2, layers)).double().call(torch.randn(3, 2, 1, 1).double().requires_grad_())
    function, inputs = as_function(call)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("reference_engine")
@NETWORKS
@pytest.mark.parametrize("groups", [1, 2])
def test_a_gradient_penalty(kind: str, groups: int) -> None:
    eager = reference_network(kind).double()
    eager.groups = groups
    x = reference_input(kind, 2).double()
    want, found = (penalty_gradients(model, x) for model in (eager, chain_of(eager)))
    assert_equal_results(found, want, 1e-10)


@pytest.mark.usefixtures("reference_engine")
def test_create_graph_gives_the_same_first_derivatives() -> None:
    """create_graph runs other operators, with the same first derivatives."""
    call = small_call(groups=2)
    once, twice = gradients(call, NAMES), gradients(call, NAMES, create_graph=True)
    for name in NAMES:
        assert twice[name].requires_grad
        assert relative(twice[name], once[name]) < 1e-12


@pytest.mark.usefixtures("reference_engine")
def test_create_graph_under_autocast() -> None:
    """The backward of a float32 forward is in float32, as PyTorch's is, wherever it is called."""
    call = small_call(dtype=torch.float32)
    want = gradients(call, ["x"], create_graph=True)["x"]
    y, _ = train_chain(call)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(y, call.x, dy, create_graph=True)
    assert torch.equal(found, want)


@pytest.mark.usefixtures("reference_engine")
def test_a_vectorised_jacobian() -> None:
    """torch.autograd's vmap over dy."""
    call = small_call(batch=2)
    rows: Any = torch.autograd.functional.jacobian(
        lambda x: train_chain(call._replace(x=x))[0].flatten(), call.x.detach(), vectorize=True
    )
    y, _ = train_chain(call)
    for i, row in enumerate(rows):
        (expected,) = torch.autograd.grad(y.flatten()[i], call.x, retain_graph=True)
        assert float((row - expected).norm()) < 1e-12


# --- random networks ----------------------------------------------------------------------------------------


@st.composite
def random_networks(draw: st.DrawFn, fast: bool) -> tuple[Eager, Tensor, bool]:
    """Draw one to four layers, x of up to three groups, and y's layout.

    Args:
        fast: draw layers that the native engine covers, and no small epsilons, since in float32 a BatchNorm
            of values that hardly differ would magnify rounding errors.
    """
    c_in = draw(st.integers(1, 5))
    groups, size = draw(st.integers(1, 3)), (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    x_shape = (groups * draw(st.integers(1, 3)), c_in, *size)
    count = draw(st.integers(1, 4))
    layers: list[Layer] = []
    h, w = size
    for i in range(count):
        last = i + 1 == count
        k_h, k_w, s, p = 4, 4, 2, 1
        if not fast:
            k_h, k_w, s, p = (draw(st.integers(*ends)) for ends in ((1, 4), (1, 4), (1, 2), (0, 1)))
        transposed = draw(st.booleans())
        if transposed:
            h, w = (h - 1) * s - 2 * p + k_h, (w - 1) * s - 2 * p + k_w
        else:
            h, w = (h + 2 * p - k_h) // s + 1, (w + 2 * p - k_w) // s + 1
        assume(h > 0 and w > 0)
        norm = not last and draw(st.booleans())
        assume(not norm or x_shape[0] // groups * h * w > 1)
        affine, act = draw(st.sampled_from(AFFINE)), draw(st.sampled_from(LAST_ACTS if last else MIDDLE_ACTS))
        eps = draw(st.sampled_from([1e-2, 1e-1] if fast else [1e-5, 1e-3, 1e-1]))
        momentum = draw(st.sampled_from([None, 0.0, 0.1, 1.0]))
        channels, bias = draw(st.integers(1, 5)), not norm and draw(st.booleans())
        layers.append(Layer(transposed, channels, (k_h, k_w), s, p, norm, affine, act, eps, momentum, bias))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    eager = build(c_in, layers, slope=draw(st.sampled_from([0.0, 0.2, 1.0])))
    eager.groups = groups
    return eager, torch.randn(x_shape), draw(st.booleans())


def near_a_kink(eager: Eager, x: Tensor, margin: float) -> bool:
    """Return whether rounding may decide the sign of an activation's input.

    That includes 0 after a BatchNorm, of a constant without a shift; a 0 without a BatchNorm is exact.
    """
    model = copy.deepcopy(eager).double()
    with torch.no_grad():
        for part in x.double().chunk(eager.groups):
            norm, values = False, part
            for module in model:
                if isinstance(module, nn.ReLU | nn.LeakyReLU):
                    near = values.abs() < margin if norm else (values.abs() < margin) & (values != 0)
                    if bool(near.any()):
                        return True
                norm, values = isinstance(module, nn.BatchNorm2d), module(values)
    return False


def check_random_network(drawn: tuple[Eager, Tensor, bool], engine: Engine, margin: float) -> None:
    eager, x, channels_last = drawn
    assume(not near_a_kink(eager, x, margin))
    with ops.use_engine(engine.name):
        assert_matches_eager(eager, x, engine, channels_last)


# A BatchNorm of a few values that hardly differ multiplies rounding errors by up to eps^-1/2.
IN_FLOAT64 = REFERENCE._replace(tolerance=1e-8), 1e-7
IN_FLOAT32 = NATIVE._replace(tolerance=2e-4), 1e-4


@settings(max_examples=60)
@given(random_networks(fast=False))
def test_random_networks(drawn: tuple[Eager, Tensor, bool]) -> None:
    check_random_network(drawn, *IN_FLOAT64)


@native.NEEDED
@settings(max_examples=60)
@given(random_networks(fast=True))
def test_random_networks_on_the_native_engine(drawn: tuple[Eager, Tensor, bool]) -> None:
    check_random_network(drawn, *IN_FLOAT32)


@pytest.mark.slow
@settings(max_examples=2000)
@given(random_networks(fast=False))
def test_many_random_networks(drawn: tuple[Eager, Tensor, bool]) -> None:
    check_random_network(drawn, *IN_FLOAT64)


@pytest.mark.slow
@native.NEEDED
@settings(max_examples=2000)
@given(random_networks(fast=True))
def test_many_random_networks_on_the_native_engine(drawn: tuple[Eager, Tensor, bool]) -> None:
    check_random_network(drawn, *IN_FLOAT32)
