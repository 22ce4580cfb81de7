"""The weight cache in eval mode is never stale: here for the weights that autocast casts."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast
from dcgan.kernels import weight_cache
from dcgan.models import weights_init
from tests.support import changes
from tests.support.networks import NETWORKS, drop_in, fast_network, randomise, reference, results, sample
from tests.support.tolerance import relative, unit

pytestmark = pytest.mark.usefixtures("one_thread", "empty_weight_cache")


@torch.no_grad()
def run(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y: Tensor = model(x)
    return y


def cached() -> int:
    """Return how many cast weights the cache holds."""
    return sum(
        isinstance(key, torch.dtype) for entry in weight_cache._entries.values() for key in entry.derived
    )


def uncached(model: Any, x: Tensor) -> Tensor:
    """Return the network's output without the cache: all tensors of a copy are new."""
    return run(copy.deepcopy(model), x)


# --- all kinds of weight changes ---------------------------------------------------------------------------


def load_by_the_parent(model: Any) -> None:
    other = nn.ModuleDict({"net": copy.deepcopy(model)})
    randomise(other)
    nn.ModuleDict({"net": model}).load_state_dict(other.state_dict())


def initialize_and_refresh(model: Any) -> None:
    model.apply(weights_init)
    with torch.no_grad():
        torch.Tensor.mul_(model.main[1].weight if hasattr(model.main[1], "weight") else torch.ones(1), 2)
    model.refresh()


def edit_data_and_eval_again(model: Any) -> None:
    model.main[0].weight.data.copy_(torch.randn_like(model.main[0].weight))
    model.eval()


def edit_a_norm(model: Any) -> None:
    norm = next(m for m in model.main if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.data.add_(1)
    norm.weight.data.mul_(-2)


SHARED = (
    "Adam",
    "Adam fused",
    "SGD fused",
    "AdamW foreach",
    "a training step",
    "load_state_dict",
    "load_state_dict of a layer",
    "load_state_dict assign",
    "copy_",
    "data =",
    "data edited in training",
    "parameter replaced",
    "layer replaced",
    "to float64, edited, and back",
)
CHANGES: dict[str, Callable[[Any], None]] = {
    **{name: changes.CHANGES[name] for name in SHARED},
    "load_state_dict of a parent": load_by_the_parent,
    "weights_init, refresh": initialize_and_refresh,
    "data edited, eval()": edit_data_and_eval_again,
    "running statistics and affine": edit_a_norm,
}


@NETWORKS
@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(kind: str, name: str) -> None:
    """The very next forward matches that of a network without a cache."""
    model = fast_network(kind)
    x = sample(model)
    for _ in range(3):
        previous = run(model, x)
        assert torch.equal(run(model, x), previous)
        assert cached() == 4  # one per convolution, so the cache is in use
        CHANGES[name](model)
        assert torch.equal(run(model, x), uncached(model, x))
        assert not torch.equal(run(model, x), previous)


def test_data_edited_in_eval() -> None:
    """Neither a version counter nor a hook reports this edit."""
    model = fast_network("G")
    z = sample(model)
    stale = run(model, z)
    model.main[0].weight.data.copy_(torch.randn_like(model.main[0].weight))
    assert not torch.equal(run(model, z), stale)
    assert torch.equal(run(model, z), uncached(model, z))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.eval(),
        lambda model: model.refresh(),
        lambda model: model.to(torch.float64),
        lambda model: model.load_state_dict(model.state_dict()),
        CHANGES["Adam fused"],
    ],
    ids=["train", "eval", "refresh", "to", "load_state_dict", "optimizer"],
)
def test_the_epoch_advances_immediately(change: Callable[[Any], None]) -> None:
    """It must not wait for the next forward, which a replayed graph does not run."""
    model = fast_network("G")
    run(model, sample(model))
    epoch = weight_cache.epoch()
    change(model)
    assert weight_cache.epoch() > epoch


# --- what is cached ----------------------------------------------------------------------------------------


@NETWORKS
def test_nothing_is_cached_in_training(kind: str) -> None:
    model = fast_network(kind).train()
    run(model, sample(model))
    assert not weight_cache._entries


def test_train_clears_the_cache() -> None:
    model = fast_network("G")
    run(model, sample(model))
    assert cached() == 4
    model.train()
    assert not weight_cache._entries


def test_train_and_to_of_a_parent_module() -> None:
    model = fast_network("G")
    parent = nn.ModuleDict({"g": model})
    run(model, sample(model))
    parent.train()
    assert not weight_cache._entries
    parent.eval()
    run(model, sample(model))
    assert cached() == 4
    parent.to(torch.float64)
    assert cached() == 0


@NETWORKS
def test_freed_with_the_network(kind: str) -> None:
    model = fast_network(kind)
    run(model, sample(model))
    assert cached() == 4
    del model
    gc.collect()
    assert not weight_cache._entries


def test_many_short_lived_networks() -> None:
    for _ in range(10):
        model = fast_network("G")
        run(model, sample(model))
    del model
    gc.collect()
    assert not weight_cache._entries


def test_two_drop_ins_around_one_network() -> None:
    model = reference("G", dtype=torch.float32).eval()
    first, second = fast.convert(model), fast.convert(model)
    z = sample(model)
    assert torch.equal(run(first, z), run(second, z))
    first.train()
    CHANGES["Adam fused"](first)
    first.eval()
    assert torch.equal(run(second, z), uncached(first, z))
    del first
    gc.collect()
    CHANGES["copy_"](second)
    assert torch.equal(run(second, z), uncached(second, z))


def test_the_reference_network_trains_while_a_drop_in_serves() -> None:
    """The drop-in stays in eval mode while the network that shares its modules trains and evaluates."""
    model = reference("G", dtype=torch.float32)
    served = fast.convert(model).eval()
    z = sample(model)
    for _ in range(3):
        run(served, z)
        model.train()
        results(model, z)
        torch.optim.Adam(model.parameters(), lr=0.01, fused=True).step()
        model.eval()
        assert torch.equal(run(served, z), uncached(served, z))


def test_copies_and_loaded_networks_have_their_own_cache() -> None:
    model = fast_network("G")
    z = sample(model)
    before = run(model, z)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for clone in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(run(clone, z), before)
        CHANGES["copy_"](clone)
        assert torch.equal(run(clone, z), uncached(clone, z))
        assert torch.equal(run(model, z), before)


@NETWORKS
def test_the_cache_is_not_used_with_gradients(kind: str) -> None:
    """In eval mode with gradients, the cast is part of the graph: float32 weights get float32 gradients."""
    model = fast_network(kind)
    x = sample(model)
    run(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32
        assert bool(p.grad.any()), name


def test_casts_cached_in_inference_mode_serve_a_differentiated_call() -> None:
    model = fast_network("G").requires_grad_(False)
    z = sample(model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(z)
    assert cached() == 4
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(z).float().square().sum().backward()
    assert z.grad is not None
    assert bool(z.grad.any())


@NETWORKS
@pytest.mark.parametrize("training", [False, True])
def test_autocast_is_as_accurate_as_eager(kind: str, training: bool) -> None:
    model = reference(kind, dtype=torch.float32).train(training)
    x = sample(model, 8)
    exact = copy.deepcopy(model).double()(x.double())
    eager, actual = run(copy.deepcopy(model), x), run(drop_in(model), x)
    assert actual.dtype == eager.dtype
    assert relative(actual, exact) <= 2 * relative(eager, exact) + 4 * unit(torch.bfloat16)


def test_a_parametrized_weight_is_evaluated_only_by_its_layer() -> None:
    """Nothing else may read it, since each read of a spectral norm in training updates it."""
    model = fast_network("D")
    nn.utils.parametrizations.spectral_norm(model.main[2])
    reads = 0

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            nonlocal reads
            reads += 1
            return weight

    nn.utils.parametrize.register_parametrization(model.main[2], "weight", Counting())
    for training in (True, False):
        model.train(training)
        reads = 0
        model(sample(model))
        assert reads == 1
