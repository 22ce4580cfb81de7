"""torch.compile traces the drop-ins without a graph break, matches eager, and does not recompile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan import fast
from dcgan.kernels import ops, weight_cache
from tests.support.networks import MODES, NETWORKS, assert_equal_results, drop_in, reference, results, sample
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
