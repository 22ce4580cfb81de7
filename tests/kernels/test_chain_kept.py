"""What a Chain keeps from call to call, and when it lets go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import native
import pytest
import torch
from chains import KINDS, VECTORS, kept, made, stated
from native import LAYER
from tolerance import relative
from torch import Tensor

from dcgan.kernels import chain, ops, weights
from dcgan.kernels.chain import conv_chain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_entries", {})


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@native.NEEDED
@KINDS
@pytest.mark.usefixtures("no_grad")
def test_batches_of_many_sizes_in_turn(kind: str) -> None:
    """Each has its own plan, some their own packed weights; both stay bounded."""
    x, stages = made(kind, batch=40)
    owner, run = kept(stages), chain.Chain(stages)
    for _ in range(2):
        for batch in (1, 7, *range(1, 41), 1):
            assert relative(run(x[:batch]), stated(x[:batch], stages)) <= 2 * LAYER
            assert 1 <= len(run._prepared) <= chain.Chain._MOST
            assert len(stages) <= native.packed() <= 3 * len(stages)
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_other_threads_engines_layouts_and_dtypes_in_turn() -> None:
    """What a Chain remembers of one call is not taken for another."""
    x, stages = made("up")
    owner, run = kept(stages), chain.Chain(stages)
    y = run(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(x), y)
    torch.set_num_threads(1)
    assert run(x, False).is_contiguous()
    assert torch.equal(run(x, False), y)
    with ops.use_engine("reference"), ops.recording() as choices:
        assert relative(run(x), y) < 1e-5
    assert {c.engine for c in choices} == {"reference"}
    with ops.recording() as choices:
        assert torch.equal(run(x), y)
    assert [c.engine for c in choices] == ["native"] * 4
    with pytest.raises(TypeError, match="weight must have x's dtype"):
        run(x.bfloat16())
    del owner


@native.NEEDED
@pytest.mark.skipif(len(native.ISAS) < 2, reason="one instruction set here")
@pytest.mark.usefixtures("no_grad")
def test_another_instruction_set_is_another_packing() -> None:
    x, stages = made("up")
    owner, run = kept(stages), chain.Chain(stages)
    for isa in (*native.ISAS, *native.ISAS):
        with native.instruction_set(isa):
            assert relative(run(x), stated(x, stages)) <= 2 * LAYER
            assert relative(conv_chain(x, stages), stated(x, stages)) <= 2 * LAYER
    del owner


def make_room(t: Tensor) -> None:
    """Room for twice as many elements, of which the first half is t."""
    t.set_(torch.stack([t.flip(0), t.square() + 0.5], 1).flatten(), 0, t.shape)


VECTOR_EDITS: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda t: t.mul_(1.5),
    "data in place": lambda t: t.data.add_(0.25),
    "set_": lambda t: t.set_(t.clone() * 0.5),
    "data =": lambda t: setattr(t, "data", t.flip(0)),
    "data = of another dtype": lambda t: setattr(t, "data", t.double() * 2),
    "other strides at the same address": lambda t: t.set_(t.untyped_storage(), 0, t.shape, (2,)),
}


@native.NEEDED
@pytest.mark.parametrize("name", VECTOR_EDITS)
@pytest.mark.usefixtures("no_grad")
def test_vectors_are_read_at_every_call(name: str) -> None:
    x, stages = made("up")
    vectors = [t for s in stages for n in VECTORS if (t := getattr(s, n)) is not None]
    for t in vectors:
        make_room(t)
    owner, run = kept(stages), chain.Chain(stages)
    previous = run(x)
    for t in vectors:
        VECTOR_EDITS[name](t)
        assert relative(run(x), stated(x, stages)) <= 2 * LAYER
        assert not torch.equal(run(x), previous)
        previous = run(x)
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_a_weight_that_is_negated_by_a_flag() -> None:
    """Its memory holds other values; the operator's dispatcher settles that, which a Chain goes around."""
    x, stages = made("up")
    stages[1] = stages[1]._replace(weight=torch._neg_view(stages[1].weight))
    for owner in (None, kept(stages)):
        with ops.use_engine("native"):
            assert relative(conv_chain(x, stages), stated(x, stages)) <= 2 * LAYER
            assert relative(chain.Chain(stages)(x), stated(x, stages)) <= 2 * LAYER
        del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_weights_are_seen_to_change() -> None:
    """Those that are kept, and those that are not: the latter are packed at every call."""
    x, stages = made("up")
    owner, run = kept(stages[:2]), chain.Chain(stages)
    with ops.use_engine("native"):
        for s in stages:
            for edit in (
                lambda w: w.mul_(1.25),
                lambda w: setattr(w, "data", w.flip(2)),
                lambda w: setattr(w, "data", w.contiguous(memory_format=torch.channels_last) * -1),
                lambda w: w.set_(w.transpose(2, 3).clone()),
            ):
                edit(s.weight)
                assert relative(run(x), stated(x, stages)) <= 2 * LAYER
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_what_was_packed_of_old_weights_is_freed() -> None:
    """Even where the batch sizes that it served do not come again."""
    x, stages = made("up", batch=8)
    owner, run = kept(stages), chain.Chain(stages)
    packed = []
    for batch in range(1, 9):
        run(x[:batch])
    for entry in weights._entries.values():
        packed += [weakref.ref(t) for t in entry.derived.values()]
    assert len(packed) >= len(stages)
    for s in stages:
        s.weight.mul_(2)
    run(x)
    gc.collect()
    assert [ref() for ref in packed if ref() is not None] == []
    del owner
