"""train_chain as a PyTorch operator: schemas and fakes, torch.compile, and torch.func's transforms."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from dcgan.kernels import ops
from dcgan.kernels.spec import TrainCall
from dcgan.kernels.train_chain import track_, train_chain
from tests.support.networks import NETWORKS, assert_equal_results, results
from tests.support.tolerance import relative
from tests.support.train_chains import (
    BACKWARD_OP,
    LAST_ACTS,
    OP,
    TRACK_OP,
    Chain,
    Eager,
    Engine,
    Layer,
    arguments,
    assert_close,
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
    Layer(UP, 3, norm=True, act="relu"),
    Layer(DOWN, 2, act="leaky_relu", bias=True),
    Layer(UP, 3, norm=True, affine="gamma", act="leaky_relu"),
    Layer(UP, 1, act="tanh", bias=True),
)
ROUNDING = 1e-11  # in float64: Inductor fuses and reorders operations


def call_of(
    layers: tuple[Layer, ...] = LAYERS, dtype: torch.dtype = torch.float64, batch: int = 4, **options: Any
) -> TrainCall:
    """Return a call whose tensors require gradients."""
    call = (
        chain_of(build(2, layers)).to(dtype).call(torch.randn(batch, 2, 3, 2, dtype=dtype).requires_grad_())
    )
    return call._replace(**options)


# --- schemas and fakes --------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "all kinds of layers": {},
    "groups": {"groups": 2},
    "contiguous": {"channels_last": False},
    "nothing kept": {"keep": False},
    "one layer": {"layers": (Layer(DOWN, 1, act="sigmoid"),)},
    "one layer without activation": {"layers": (Layer(UP, 2),)},
    "one layer with a bias": {"layers": (Layer(UP, 3, bias=True),), "groups": 2},
    "affine": {"layers": (Layer(UP, 3, norm=True), Layer(UP, 2, norm=True, affine="neither"), Layer(UP, 1))},
    # Without a BatchNorm, whose statistics are NaN, which opcheck finds different from NaN.
    "empty": {"batch": 0, "layers": (Layer(UP, 3, act="relu", bias=True), Layer(DOWN, 2))},
}
CONFIGURED = pytest.mark.parametrize("name", CONFIGURATIONS)


@CONFIGURED
def test_opcheck(name: str, engine: Engine) -> None:
    options = {"dtype": engine.dtype, **CONFIGURATIONS[name]}
    torch.library.opcheck(OP, arguments(call_of(**options)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.usefixtures("reference_engine")
def test_opcheck_of_other_dtypes(dtype: torch.dtype, wide: bool) -> None:
    call = call_of(dtype=dtype)
    if wide:
        parameters = {n: t.detach().float().requires_grad_() for n, t in tensors_of(call).items() if n != "x"}
        call = with_tensors(call, parameters)
    torch.library.opcheck(OP, arguments(call))
    torch.library.opcheck(BACKWARD_OP, backward_arguments(call, [True] * (1 + 3 * len(call.stages))))


def test_opcheck_without_the_default_arguments() -> None:
    call = call_of()
    given = arguments(call)[:10]
    torch.library.opcheck(OP, given)
    torch.library.opcheck(OP, given, {"groups": 2, "slope": 0.1})
    for a, b in zip(OP(*given)[1], OP(*arguments(call))[1], strict=True):
        assert torch.equal(a, b)


def backward_arguments(call: TrainCall, needs: list[bool]) -> tuple[Any, ...]:
    call = with_tensors(call, {n: t.detach() for n, t in tensors_of(call).items()})
    y, saved, stats, packed = OP(*arguments(call))
    kept = None if call.stages[-1].act == "none" else y
    return (torch.randn_like(y), kept, saved, stats, packed, needs, *arguments(call))


@pytest.mark.parametrize("name", [n for n in CONFIGURATIONS if n != "nothing kept"])
@pytest.mark.parametrize("all_needed", [True, False])
def test_opcheck_of_the_backward(name: str, all_needed: bool, engine: Engine) -> None:
    call = call_of(**{"dtype": engine.dtype, **CONFIGURATIONS[name]})
    needs = [all_needed or i % 3 == 1 for i in range(1 + 3 * len(call.stages))]
    torch.library.opcheck(BACKWARD_OP, backward_arguments(call, needs))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_track(groups: int, dtype: torch.dtype) -> None:
    channels = (3, 5)
    running = [[torch.randn(c).abs().to(dtype) for c in channels] for _ in range(2)]
    stats = [torch.randn(4, groups, c).abs() for c in channels]
    batches = [torch.tensor(7), torch.tensor(0)]
    torch.library.opcheck(TRACK_OP, (*running, batches, stats, [0.1, -1.0], [8, 32]))


@CONFIGURED
def test_fake_and_meta_tensors_have_the_results_shapes_and_strides(name: str) -> None:
    call = call_of(**CONFIGURATIONS[name])
    meta = with_tensors(call, {n: t.detach().to("meta") for n, t in tensors_of(call).items()})
    with torch.no_grad():
        pairs = list(zip(flat(OP(*arguments(call))), flat(OP(*arguments(meta))), strict=True))
    if call.keep:
        needs = [i % 4 != 3 for i in range(1 + 3 * len(call.stages))]
        real, fake = (BACKWARD_OP(*backward_arguments(c, needs)) for c in (call, meta))
        pairs += zip(flat(real), flat(fake), strict=True)
    for a, b in pairs:
        assert (a.shape, a.stride(), a.dtype, b.device.type) == (b.shape, b.stride(), b.dtype, "meta")


def flat(results: Any) -> list[Tensor]:
    return [t for r in results for t in ([r] if isinstance(r, Tensor) else r)]


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = pytest.mark.usefixtures("_reset_dynamo")


def compiled(model: Any, backend: str, **options: Any) -> tuple[Any, Any]:
    """Return the compiled model, which may not break the graph, and a counter of its graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def assert_compiled_matches(network: Eager, x: Tensor, engine: Engine, backend: str) -> None:
    """Compare results, gradients and running statistics over three steps; only the first may compile."""
    eager = chain_of(network).to(engine.dtype)
    model = copy.deepcopy(eager)
    fast, counter = compiled(model, backend)
    tolerance = max(ROUNDING, engine.tolerance)
    for step in range(3):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            actual = results(fast, x.to(engine.dtype))
        expected = results(eager, x.to(engine.dtype))
        actual = {n.replace("_orig_mod.", ""): t for n, t in actual.items()}
        assert_equal_results(actual, expected, tolerance)
        assert actual["output"].stride() == expected["output"].stride()
    assert counter.frame_count == 1


@COMPILED
@NETWORKS
def test_aot_eager(kind: str, engine: Engine) -> None:
    """One graph, with the running statistics, whose buffers it updates."""
    assert_compiled_matches(reference_network(kind), reference_input(kind, 5), engine, "aot_eager")


@COMPILED
@pytest.mark.parametrize("kind", ["G", "D", "groups"])
def test_inductor(kind: str, engine: Engine) -> None:
    network, x = build(2, LAYERS), torch.randn(6, 2, 3, 2)
    if kind == "groups":
        network.groups = 3
    else:
        network, x = reference_network(kind), reference_input(kind, 5)
    assert_compiled_matches(network, x, engine, "inductor")


@COMPILED
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["G", "groups"])
def test_a_dynamic_batch_size(backend: str, kind: str, engine: Engine) -> None:
    """With dynamic=True, one graph serves every batch size above 1."""
    network = build(2, LAYERS) if kind == "groups" else reference_network(kind)
    network.groups = 2 if kind == "groups" else 1
    eager = chain_of(network).to(engine.dtype)
    model = copy.deepcopy(eager)
    fast, _ = compiled(model, backend, dynamic=True)
    for step, batch in enumerate((4, 6, 10, 2)):
        x = torch.randn(batch, 2, 3, 2) if kind == "groups" else reference_input(kind, batch)
        x = x.to(engine.dtype)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            actual = results(fast, x)
        expected = results(eager, x)
        actual = {n.replace("_orig_mod.", ""): t for n, t in actual.items()}
        assert_equal_results(actual, expected, max(ROUNDING, engine.tolerance))


@COMPILED
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_without_gradients(grad: bool, engine: Engine) -> None:
    """With frozen parameters, and under no_grad."""
    eager = chain_of(build(2, LAYERS)).to(engine.dtype)
    for parameter in eager.parameters():
        parameter.requires_grad_(not grad)
    model = copy.deepcopy(eager)
    fast, _ = compiled(model, "aot_eager")
    x = torch.randn(3, 2, 3, 2, dtype=engine.dtype)
    with torch.set_grad_enabled(grad):
        actual, expected = fast(x), eager(x)
    assert not actual.requires_grad
    assert relative(actual, expected) <= engine.tolerance
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b)


@COMPILED
def test_compiled_under_autocast() -> None:
    """The autocast rule is traced."""
    eager = chain_of(build(2, LAYERS))
    model = copy.deepcopy(eager)
    fast, _ = compiled(model, "aot_eager")
    x = torch.randn(3, 2, 3, 2)
    found = []
    for f in (fast, eager):
        with ops.use_engine("reference"), torch.autocast("cpu", dtype=torch.bfloat16):
            y = f(x)
        assert y.dtype == torch.bfloat16
        with ops.use_engine("reference"):
            y.float().square().sum().backward()
        found.append(y)
    assert torch.equal(*found)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, q.grad)


@COMPILED
def test_the_same_weight_in_two_layers_compiled() -> None:
    network = build(2, [Layer(DOWN, 2, 3, 1, 1, norm=True, act="relu"), Layer(DOWN, 2, 3, 1, 1, act="tanh")])
    network[3].weight = network[0].weight
    x = torch.randn(3, 2, 4, 4)
    with ops.use_engine("reference"):
        assert_compiled_matches(network, x, Engine("reference", torch.float64, ROUNDING), "aot_eager")


# --- torch.func ---------------------------------------------------------------------------------------------

TRANSFORMED = [(groups, act) for groups in (1, 2) for act in LAST_ACTS]


def transformed(groups: int, act: str) -> tuple[Chain, Eager, Tensor]:
    eager = build(2, [*LAYERS[:-1], Layer(UP, 1, act=act, bias=True)]).double()
    eager.groups = groups
    for parameter in eager.parameters():
        parameter.requires_grad_(False)
    for module in eager:
        if isinstance(module, nn.BatchNorm2d):  # transforms reject buffers that are modified
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return chain_of(eager), eager, torch.randn(2 * groups, 2, 3, 2, dtype=torch.float64)


@pytest.mark.parametrize(("groups", "act"), TRANSFORMED)
@pytest.mark.usefixtures("reference_engine")
def test_function_transforms(groups: int, act: str) -> None:
    """grad, jvp, vmap and their compositions agree with those of PyTorch's modules."""
    chain, eager, x = transformed(groups, act)
    weight = chain[0].weight.detach()

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return train_chain(with_tensors(chain.call(x), {"x": x, "weight 0": w}))[0]

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(eager, {"0.weight": w}, (x,))  # type: ignore[no-any-return]

    def loss(f: Any) -> Any:
        return lambda x, w: f(x, w).square().sum()

    many, weights = torch.stack([x, 2 * x, x - 1]), torch.stack([weight, -2 * weight])
    for transform, given in (
        (lambda f: torch.func.grad(loss(f), argnums=(0, 1)), (x, weight)),
        (lambda f: lambda x, w: torch.func.jvp(f, (x, w), (x.flip(0), w.flip(0))), (x, weight)),
        (lambda f: torch.func.vmap(f, (0, None)), (many, weight)),
        (lambda f: torch.func.vmap(f, (None, 0)), (x, weights)),
        (lambda f: torch.func.vmap(torch.func.grad(loss(f), argnums=1), (0, None)), (many, weight)),
        (lambda f: torch.func.jacrev(torch.func.grad(loss(f))), (x, weight)),
    ):
        got, want = transform(ours)(*given), transform(theirs)(*given)
        got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 1e-11


@pytest.mark.usefixtures("reference_engine")
def test_forward_mode() -> None:
    """Tangents are correct; an operator with only a backward would silently return zeros."""
    call = call_of(groups=2)
    names = list(tensors_of(call))

    def function(*values: Tensor) -> Tensor:
        return train_chain(with_tensors(call, dict(zip(names, values, strict=True))))[0]

    inputs = list(tensors_of(call).values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.usefixtures("reference_engine")
def test_transforms_apply_autocast() -> None:
    """As the operator does: bfloat16 x and weights, float32 statistics, and gradients of their dtypes."""
    call = call_of(dtype=torch.float32, groups=2)
    call = with_tensors(call, {n: t.detach() for n, t in tensors_of(call).items()})

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return train_chain(call._replace(x=x))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = run(call.x)
        (other_y, other_stats), (tangent, _) = torch.func.jvp(run, (call.x,), (call.x,))
        dx = torch.func.grad(lambda x: run(x)[0].float().sum())(call.x)
    assert (other_y.dtype, tangent.dtype, dx.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(y, other_y)
    assert all(torch.equal(a, b) for a, b in zip(stats, other_stats, strict=True))


def test_transforms_respect_the_engine() -> None:
    call = call_of(dtype=torch.float32)
    with ops.recording() as choices:
        torch.func.vmap(lambda x: train_chain(call._replace(x=x))[0])(call.x.detach()[None])
    assert [(c.engine, "transform" in c.reason) for c in choices] == [("reference", True)] * len(LAYERS)
    with ops.use_engine("triton"), pytest.raises(ops.EngineError, match="engine 'triton' is forced"):
        torch.func.vmap(lambda x: train_chain(call._replace(x=x))[0])(call.x.detach()[None])


def test_the_operators_under_transforms_are_errors() -> None:
    """Called directly, they do not return wrong derivatives silently."""
    call = call_of()
    given = arguments(with_tensors(call, {n: t.detach() for n, t in tensors_of(call).items()}))[1:]
    x = call.x.detach()
    message = "dcgan::train_chain has no rules for torch.func's transforms and forward-mode AD"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: OP(x, *given)[0].sum())(x)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda x: OP(x, *given)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        OP(torch.autograd.forward_ad.make_dual(x, x), *given)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for dcgan::train_chain"):
        torch.func.vmap(lambda x: OP(x, *given)[0])(x[None])
    running = [torch.zeros(3)], [torch.ones(3)], [torch.tensor(0)]
    with pytest.raises(RuntimeError, match="Batching rule not implemented for dcgan::track_"):
        torch.func.vmap(lambda stats: track_(*running, [stats], [0.1], [8]))(torch.ones(2, 4, 1, 3))


def test_a_backward_inside_vmap() -> None:
    """The forward outside of it: gradients for many dy at once."""
    with ops.use_engine("reference"):
        call = call_of(groups=2)
        y, _ = train_chain(call)
        tensors = list(tensors_of(call).values())
        many = torch.randn(3, *y.shape, dtype=y.dtype)

        def backward(dy: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, tensors, dy, retain_graph=True)

        for batched in (
            torch.func.vmap(backward)(many),
            torch.autograd.grad(y, tensors, many, retain_graph=True, is_grads_batched=True),
        ):
            for i, dy in enumerate(many):
                for found, want in zip(batched, backward(dy), strict=True):
                    assert relative(found[i], want) < 1e-12


def test_close_results_use_the_engines_tolerance() -> None:
    engine = Engine("reference", torch.float64, 1e-3)
    ones = {"output": torch.ones(3, dtype=torch.float64)}
    assert_close({"output": ones["output"] * (1 + 5e-4)}, ones, engine)
    with pytest.raises(AssertionError, match="output: error"):
        assert_close({"output": ones["output"] * (1 + 2e-3)}, ones, engine)
