"""torch.compile traces the drop-ins without a graph break, matches eager, and does not recompile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrizations

from dcgan import fast, training_layers
from dcgan.batchnorm import SyncBatchNorm2d
from dcgan.kernels import ops, weight_cache
from tests.support.networks import (
    MODES,
    NETWORKS,
    assert_equal_results,
    drop_in,
    norms,
    reference,
    replace_norms,
    results,
    sample,
    set_on_norms,
)
from tests.support.tolerance import relative

ROUNDING = 1e-11  # in float64: Inductor fuses and reorders operations


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, backend: str, **options: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


def assert_compiled_matches_eager(kind: str, training: bool, backend: str) -> None:
    eager = drop_in(reference(kind, features=2)).train(training)
    model = copy.deepcopy(eager)
    fast = compiled(model, backend)
    for step in range(3):
        x = sample(eager)
        # Only the first call may compile.
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            actual = results(fast, x)
        expected = results(eager, x)
        actual = {n.replace("_orig_mod.", ""): t for n, t in actual.items()}
        assert_equal_results(actual, expected, ROUNDING)
        assert actual["output"].stride() == expected["output"].stride()


@NETWORKS
@MODES
def test_aot_eager(kind: str, training: bool) -> None:
    assert_compiled_matches_eager(kind, training, "aot_eager")


@NETWORKS
def test_inductor(kind: str) -> None:
    """Forward and backward, with the running statistics updated in the graph."""
    assert_compiled_matches_eager(kind, True, "inductor")


@pytest.mark.slow
@NETWORKS
def test_inductor_in_eval_mode_with_gradients(kind: str) -> None:
    assert_compiled_matches_eager(kind, False, "inductor")


@NETWORKS
def test_inductor_for_inference(kind: str) -> None:
    eager = drop_in(reference(kind, features=2)).eval()
    fast = compiled(copy.deepcopy(eager), "inductor")
    x = sample(eager)
    with torch.no_grad():
        expected, actual = eager(x), fast(x)
    assert relative(actual, expected) < ROUNDING
    assert actual.stride() == expected.stride()


class Graphs:
    """A backend that runs the graphs as they are, and lists the operators of this project in them."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        compilers = {"fw_compiler": self._listing(self.forward), "bw_compiler": self._listing(self.backward)}
        return aot_autograd(**compilers)(graph, inputs)

    def _listing(self, found: list[str]) -> Any:
        def compiler(graph: Any, inputs: Any) -> Any:
            names = (getattr(node.target, "name", str)() for node in graph.graph.nodes if node.op != "output")
            found.extend(name.removeprefix("dcgan::") for name in names if name.startswith("dcgan::"))
            # Functionalization wraps an operator that mutates its arguments.
            wrapped = (str(node.args[0]) for node in graph.graph.nodes if "auto_functionalized" in str(node))
            found.extend(name.removeprefix("dcgan.") for name in wrapped)
            return make_boxed_func(graph.forward)

        return compiler


@NETWORKS
def test_a_network_in_training_is_one_operator_in_one_graph(kind: str) -> None:
    eager = drop_in(reference(kind, features=2))
    graphs = Graphs()
    model = copy.deepcopy(eager)
    x = sample(eager)
    with ops.use_engine("reference"):
        actual, expected = results(torch.compile(model, backend=graphs, fullgraph=True), x), results(eager, x)
    actual = {n.replace("_orig_mod.", ""): t for n, t in actual.items()}
    assert_equal_results(actual, expected, ROUNDING)
    assert graphs.count == 1
    assert [name for name in graphs.forward if "track" not in name] == ["train_chain"]
    assert len([name for name in graphs.forward if "track" in name]) == 1
    assert graphs.backward == ["train_chain_backward"]


CHANGES: dict[str, Any] = {
    "momentum None": set_on_norms(momentum=None),
    "momenta": set_on_norms(momentum=0.7, eps=0.1),
    "not tracked": set_on_norms(track_running_stats=False),
    "no statistics": replace_norms(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    "not affine": replace_norms(lambda c: nn.BatchNorm2d(c, affine=False)),
    "SyncBatchNorm2d": SyncBatchNorm2d.convert,
    "some frozen": lambda m: m.main[:3].requires_grad_(False),
    "all frozen": lambda m: m.requires_grad_(False),
    # Layer by layer:
    "one norm in eval mode": lambda m: norms(m)[-1][1].eval(),
    "dropout": lambda m: m.main.insert(3, nn.Dropout(0.0)),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.main[3 if m.main[1].training else 2]),
    "ELU": lambda m: m.main.insert(2, nn.ELU()),
}


IN_EVERY_RUN = {("D", "momentum None"), ("D", "some frozen"), ("D", "one norm in eval mode")}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if (kind, name) in IN_EVERY_RUN else pytest.mark.slow)
        for kind in "GD"
        for name in CHANGES
    ],
)
def test_changed_networks_in_training(kind: str, name: str) -> None:
    """One graph for forward, backward and running statistics, of every kind of network."""
    eager = reference(kind, features=2)
    CHANGES[name](eager.double())
    eager = drop_in(eager.double())
    model = copy.deepcopy(eager)
    fast = compiled(model, "aot_eager")
    with ops.use_engine("reference"):
        for step in range(3):
            x = sample(eager)
            with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
                actual = results(fast, x)
            actual = {n.replace("_orig_mod.", ""): t for n, t in actual.items()}
            assert_equal_results(actual, results(eager, x), ROUNDING)


@NETWORKS
def test_a_compiled_network_does_not_depend_on_what_runs_beside_it(kind: str) -> None:
    """It is not compiled again when another network, or the same, runs with other shapes in between."""
    model, other = (drop_in(reference(kind, features=2)) for _ in range(2))
    fast, x = compiled(model, "aot_eager"), sample(model)
    with ops.use_engine("reference"):
        fast(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (2, 3, 7):
                other(sample(other, batch)).sum().backward()
                fast(x).sum().backward()


@NETWORKS
def test_layer_by_layer_is_seen(kind: str) -> None:
    graphs = Graphs()
    model = drop_in(reference(kind, features=2))
    fast, x = torch.compile(model, backend=graphs, fullgraph=True), sample(model)
    with ops.use_engine("reference"):
        first = fast(x)
        with training_layers.layer_by_layer():
            second = fast(x)
    assert relative(second, first) < ROUNDING
    assert graphs.forward.count("train_chain") == 1
    assert sum("fused" in name for name in graphs.forward) == 4


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_images(groups: int) -> None:
    graphs = Graphs()
    eager = drop_in(reference("D", features=2))
    model = copy.deepcopy(eager)
    fast, x = torch.compile(model.logits_of_groups, backend=graphs, fullgraph=True), sample(eager, 4)
    with ops.use_engine("reference"):
        actual, expected = fast(x, groups), eager.logits_of_groups(x, groups)
    assert relative(actual, expected) < ROUNDING
    assert graphs.forward.count("train_chain") == 1
    assert_equal_results(dict(model.named_buffers()), dict(eager.named_buffers()), ROUNDING)


@NETWORKS
@MODES
def test_dynamic_batch_size(kind: str, training: bool) -> None:
    """With dynamic=True, one graph serves every batch size above 1."""
    eager = drop_in(reference(kind, features=2)).train(training)
    fast = compiled(copy.deepcopy(eager), "aot_eager", dynamic=True)
    x = sample(eager, 4)
    assert relative(fast(x), eager(x)) < ROUNDING
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (3, 7, 2):
            x = sample(eager, batch)
            assert relative(fast(x), eager(x)) < ROUNDING


def test_weights_changed_in_eval_are_seen_without_recompiling() -> None:
    """The compiled graph reads the live parameters and statistics."""
    model = drop_in(reference("G", features=2)).eval()
    fast = compiled(model, "aot_eager")
    z = sample(model)
    with torch.no_grad():
        previous = fast(z)
        with torch.compiler.set_stance("fail_on_recompile"):
            for parameter in (model.main[0].weight, model.main[1].weight, model.main[1].running_mean):
                parameter.mul_(1.5)
                assert relative(fast(z), copy.deepcopy(model)(z)) < ROUNDING
                assert relative(fast(z), previous) > 1e-6
                previous = fast(z)


@MODES
def test_under_autocast(training: bool) -> None:
    """The autocast rule is traced, and no fake tensor enters the weight cache.

    Both use one engine: the graph casts the weights at each call, and whether the native engine is chosen
    depends on whether the cast weights are cached.
    """
    eager = drop_in(reference("G", features=2, dtype=torch.float32)).train(training)
    fast = compiled(copy.deepcopy(eager), "aot_eager")
    z = sample(eager)

    def run(model: Any) -> Tensor:
        with (
            ops.use_engine("reference"),
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.set_grad_enabled(training),
        ):
            y: Tensor = model(z)
        return y

    for _ in range(2):
        actual, expected = run(fast), run(eager)
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected)
    if training:
        actual.float().sum().backward()
        expected.float().sum().backward()
        for p, q in zip(fast.parameters(), eager.parameters(), strict=True):
            assert p.grad.dtype == torch.float32
            assert torch.equal(p.grad, q.grad)


def test_a_complete_training_step() -> None:
    """Both networks, the loss and the backward are compiled as one graph."""
    g, d = drop_in(reference("G", features=2)), drop_in(reference("D", features=2))
    z = sample(g)

    def loss(g: Any, d: Any, z: Tensor) -> Tensor:
        image = g(z)
        found: Tensor = -(d(image).log().mean() + (1 - d(image.detach())).log().mean())
        return found

    copies = copy.deepcopy((g, d))
    expected = loss(g, d, z)
    expected.backward()
    actual = torch.compile(loss, backend="aot_eager", fullgraph=True)(*copies, z)
    actual.backward()
    assert relative(actual, expected) < ROUNDING
    for model, other in zip((g, d), copies, strict=True):
        assert_equal_results(
            {n: p.grad for n, p in other.named_parameters()},
            {n: p.grad for n, p in model.named_parameters()},
            ROUNDING,
        )
        assert_equal_results(dict(other.named_buffers()), dict(model.named_buffers()), ROUNDING)


@torch.no_grad()
def test_on_a_gpu_a_compiled_network_caches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors may be in a CUDA graph's memory pool, so only eager calls fill the cache."""
    monkeypatch.setattr(weight_cache, "_is_cuda", lambda weight: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(weight_cache, "_entries", {})

    def cached() -> int:
        return sum(len(entry.derived) for entry in weight_cache._entries.values())

    generator = fast.Generator(8, features=4, image_size=32).eval()
    z = torch.randn(3, 8)
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    images = [compiled(z) for _ in range(2)]
    assert not cached()
    image = generator(z)
    assert cached()
    assert all(torch.equal(found, image) for found in images)
    before = cached()
    compiled(z)
    assert cached() == before
