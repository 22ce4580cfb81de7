"""Packed weights follow every change of a network in eval mode, do not accumulate, and are freed with it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast
from dcgan.kernels import chain, weight_cache
from tests.support import native
from tests.support.changes import CHANGES, NOT_REPEATABLE, other_slope
from tests.support.native import NETWORK, eager64, engines
from tests.support.networks import NETWORKS, fast_network, randomise, reference, sample
from tests.support.tolerance import relative

pytestmark = [native.NEEDED, pytest.mark.usefixtures("one_thread", "no_grad", "empty_weight_cache")]


def assert_accurate(model: Any, x: Tensor) -> Tensor:
    """Check the next two results against eager float64; the second one uses the caches."""
    exact = eager64(model, x)
    for _ in range(2):
        y = model(x)
        assert relative(y, exact) <= NETWORK
    return y


# --- all kinds of changes ----------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(kind: str, name: str) -> None:
    """The very next result is the changed network's, for two batch sizes, each with its own plan."""
    model = fast_network(kind)
    batches = [sample(model, n) for n in (1, 6)]
    assert engines(model, batches[0]) == ["native"] * 4
    for _ in range(1 if name in NOT_REPEATABLE else 3):
        previous = [assert_accurate(model, x) for x in batches]
        CHANGES[name](model)
        for x, before in zip(batches, previous, strict=True):
            y = assert_accurate(model, x)
            assert y.shape != before.shape or not torch.equal(y, before)


def test_never_stale_after_a_slope_change() -> None:
    model = fast_network("D")
    x = sample(model)
    for _ in range(3):
        before = assert_accurate(model, x)
        other_slope(model)
        assert not torch.equal(assert_accurate(model, x), before)


@NETWORKS
def test_an_edit_of_one_weight_repacks_all(kind: str) -> None:
    """Samples may miss some of several edits, so all layers are repacked together to stay consistent."""
    model = fast_network(kind)
    x = sample(model)
    model(x)
    packed = [t for entry in weight_cache._entries.values() for t in entry.derived.values()]
    model.main[0].weight.data.neg_()
    assert_accurate(model, x)
    repacked = [t for entry in weight_cache._entries.values() for t in entry.derived.values()]
    assert len(repacked) == len(packed) == 4
    assert not any(new is old for new in repacked for old in packed)


@NETWORKS
@pytest.mark.parametrize("batch", [1, 6])
def test_a_moving_average_step_by_step(kind: str, batch: int) -> None:
    """Every step is noticed although it changes each weight by only a few float32 roundings."""
    model = fast_network(kind)
    x = sample(model, batch)
    with torch.no_grad():
        for _ in range(20):
            for p in model.parameters():
                p.data.mul_(1 - 1e-6).add_(torch.randn_like(p) * 1e-8)
            y = model(x)
            model.refresh()
            assert torch.equal(y, model(x))


def test_edits_of_few_elements_of_data_need_refresh() -> None:
    """The samples may miss such an edit, as refresh() documents: here one of 2 million elements."""
    model = fast.Generator().eval()
    z = torch.randn(1, 100)
    missed = []
    for i in range(3):
        stale = model(z)
        model.main[3].weight.data[0, i, 0, 0] += 100
        missed.append(torch.equal(model(z), stale))  # with a probability of 1 - 32/131,072
        model.refresh()
        assert not torch.equal(model(z), stale)
    assert any(missed)


def test_weights_written_by_another_process() -> None:
    model = fast_network("G").share_memory()
    z = sample(model)
    before = assert_accurate(model, z)
    process = torch.multiprocessing.get_context("spawn").Process(
        target=_negate, args=(model.main[0].weight.data,)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not torch.equal(assert_accurate(model, z), before)


def _negate(weight: Tensor) -> None:
    weight.neg_()


@NETWORKS
@pytest.mark.parametrize("index", [0, 1, 3])
def test_removing_a_hook_restores_the_chain(kind: str, index: int) -> None:
    model = fast_network(kind)
    x = sample(model)
    before = assert_accurate(model, x)
    seen: list[Tensor] = []
    handle = model.main[index].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    y = model(x)
    assert relative(y, before) < 1e-6
    assert len(seen) == 1
    row = next(row for row in fast.explain(model, x) if row.modules == f"main.{index}")
    assert (row.engine, row.reason) == ("eager", "the module has hooks")
    handle.remove()
    assert torch.equal(assert_accurate(model, x), before)
    assert engines(model, x) == ["native"] * 4


@pytest.mark.skipif(len(native.ISAS) < 2, reason="this CPU supports only one instruction set")
@NETWORKS
def test_another_instruction_set(kind: str) -> None:
    """Each instruction set has its own packed layout and must not read that of another."""
    model = fast_network(kind)
    x = sample(model)
    for isa in (*native.ISAS, *native.ISAS):
        with native.instruction_set(isa):
            assert_accurate(model, x)


def test_two_drop_ins_around_one_network() -> None:
    model = reference("G", dtype=torch.float32).eval()
    first, second = fast.convert(model), fast.convert(model)
    z = sample(model)
    assert torch.equal(assert_accurate(first, z), assert_accurate(second, z))
    CHANGES["copy_"](first)
    assert torch.equal(assert_accurate(second, z), assert_accurate(first, z))
    first.main[3].weight.data.neg_()
    first.refresh()  # also discards what the other network has packed of the shared weights
    assert_accurate(second, z)
    first.train()
    CHANGES["Adam fused"](first)
    first.eval()
    assert_accurate(second, z)
    del first
    gc.collect()
    assert_accurate(second, z)


@NETWORKS
def test_functional_call_with_other_tensors_and_back(kind: str) -> None:
    """Tensors that live for one call must not be confused with later ones by address or id."""
    model = fast_network(kind)
    x = sample(model)
    before = assert_accurate(model, x)
    for _ in range(6):
        other = copy.deepcopy(model)
        randomise(other)
        state = {n: t.clone() for n, t in other.state_dict().items()}
        y = torch.func.functional_call(model, state, (x,))
        assert relative(y, eager64(other, x)) <= NETWORK
        del state, y
        assert torch.equal(model(x), before)
        fast.explain(model, x)
        assert torch.equal(model(x), before)


@NETWORKS
def test_a_copy_has_its_own_cache(kind: str) -> None:
    model = fast_network(kind)
    x = sample(model)
    before = assert_accurate(model, x)
    for clone in (copy.deepcopy(model), copy.copy(model)):
        assert torch.equal(assert_accurate(clone, x), before)
    clone = copy.deepcopy(model)
    CHANGES["copy_"](clone)
    assert_accurate(clone, x)
    assert torch.equal(assert_accurate(model, x), before)


# --- cache size and lifetime -------------------------------------------------------------------------------


class Created:
    """Weak references to objects of one kind."""

    def __init__(self) -> None:
        self.created: list[weakref.ref[Any]] = []

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.created)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Created:
    """Every packed weight."""
    found, pack = Created(), native.run.pack

    def watched(*args: Any, **options: Any) -> Tensor:
        packed: Tensor = pack(*args, **options)
        found.created.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(native.run, "pack", watched)
    return found


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> Created:
    """Every chain, and every plan of one for an input's shape."""
    found = Created()
    for kind in (chain.Chain, native.run.Prepared):
        made = kind.__init__

        def watched(self: Any, *args: Any, made: Any = made) -> None:
            found.created.append(weakref.ref(self))
            made(self, *args)

        monkeypatch.setattr(kind, "__init__", watched)
    return found


def chain_of(model: Any) -> chain.Chain:
    """Return what a network has prepared for its forward, which is a single part."""
    (part,) = model.main._fused_pipeline()._parts.values()
    assert part.state.chain is not None
    found: chain.Chain = part.state.chain
    return found


@NETWORKS
def test_cache_does_not_grow_with_calls(kind: str, packings: Created) -> None:
    """Weights are packed once, for calls and explain."""
    model = fast_network(kind)
    x = sample(model)
    for _ in range(20):
        model(x)
        fast.explain(model, x)
    assert native.packed() == packings.alive() == len(packings.created) == 4


@NETWORKS
def test_cache_does_not_grow_with_batch_sizes(kind: str, packings: Created) -> None:
    """A layer has at most one packed weight per algorithm, and the number of plans is bounded."""
    model = fast_network(kind)
    for _ in range(2):
        for batch in range(1, 2 * chain.Chain._MAX_PREPARED + 3):
            assert_accurate(model, sample(model, batch))
    assert 4 <= native.packed() == packings.alive() == len(packings.created) <= 4 * 3
    assert len(chain_of(model)._prepared) <= chain.Chain._MAX_PREPARED


@NETWORKS
@pytest.mark.parametrize(
    "name", ["Adam fused", "copy_", "data =", "load_state_dict assign", "parameter replaced"]
)
def test_cache_does_not_grow_with_changes(kind: str, name: str, packings: Created) -> None:
    """Stale packed weights are freed, even those for batch sizes that do not occur again."""
    model = fast_network(kind)
    for batch in range(1, 7):
        model(sample(model, batch))
    for _ in range(3):
        CHANGES[name](model)
        model(sample(model, 3))
        assert native.packed() == packings.alive() == 4


@NETWORKS
def test_train_clears_the_cache(kind: str, packings: Created) -> None:
    """Everything is freed, because training needs the memory."""
    model = fast_network(kind)
    for batch in (1, 5, 9):
        model(sample(model, batch))
    assert packings.alive() >= 4
    model.train()
    assert native.packed() == packings.alive() == 0


@NETWORKS
def test_freed_with_the_network(kind: str, packings: Created, chains: Created) -> None:
    model = fast_network(kind)
    for batch in (1, 5, 9):
        model(sample(model, batch))
    assert native.packed() >= 4
    assert chains.alive() == 1 + 3
    gone = weakref.ref(model.main)
    del model
    gc.collect()
    assert gone() is None
    assert packings.alive() == chains.alive() == len(weight_cache._entries) == 0


class Watcher:
    """Holds a network and registers its own method as a hook on it, as a feature extractor does."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0
        model.main[4].register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.calls += 1


@NETWORKS
def test_freed_where_a_hook_refers_to_the_network(kind: str, chains: Created) -> None:
    """The cycle is collected only if no cache holds a strong reference to any part of it."""
    watcher = Watcher(fast_network(kind))
    watcher.model(sample(watcher.model))
    assert watcher.calls == 1
    gone = weakref.ref(watcher.model)
    del watcher
    gc.collect()
    assert gone() is None
    assert chains.created
    assert chains.alive() == 0


@NETWORKS
def test_freed_where_a_layer_refers_to_the_network(kind: str) -> None:
    model = fast_network(kind)
    model.main[0].parents = [model]
    model(sample(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not weight_cache._entries


def test_many_short_lived_networks(packings: Created) -> None:
    for i in range(10):
        model = fast_network("GD"[i % 2])
        assert_accurate(model, sample(model))
    del model
    gc.collect()
    assert len(packings.created) >= 40
    assert packings.alive() == len(weight_cache._entries) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_weights_are_packed_once(autocast: bool, packings: Created) -> None:
    """Packed weights are cached for a bfloat16 network, and under autocast, whose casts are cached too."""
    model = fast_network("G") if autocast else fast_network("G").bfloat16()
    z = sample(model)
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(z)
    assert packings.alive() == len(packings.created) == 4


def test_only_the_first_call_prepares() -> None:
    """Later calls reuse the first call's plan, pointers and packed weights."""
    model = fast_network("G")
    z = sample(model)
    model(z)
    cached = chain_of(model)
    (first,) = cached._prepared.values()
    model(z)
    assert chain_of(model) is cached
    assert list(cached._prepared.values()) == [first]
