"""What a Chain caches between calls, and when it is freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import chain, ops, weight_cache
from dcgan.kernels.chain import conv_chain
from tests.support import native
from tests.support.chains import KINDS, VECTORS, expected_output, freeze_weights, small_chain
from tests.support.native import LAYER
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("one_thread", "empty_weight_cache")


@native.NEEDED
@KINDS
@pytest.mark.usefixtures("no_grad")
def test_alternating_batch_sizes(kind: str) -> None:
    """Each size has its own plan and possibly its own packed weights; the number of both stays bounded."""
    x, stages = small_chain(kind, batch=40)
    owner, run = freeze_weights(stages), chain.Chain(stages)
    for _ in range(2):
        for batch in (1, 7, *range(1, 41), 1):
            assert relative(run(x[:batch]), expected_output(x[:batch], stages)) <= 2 * LAYER
            assert 1 <= len(run._prepared) <= chain.Chain._MAX_PREPARED
            assert len(stages) <= native.packed() <= 3 * len(stages)
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_alternating_threads_engines_layouts_and_dtypes() -> None:
    """What a Chain caches for one configuration is not used for another."""
    x, stages = small_chain("up")
    owner, run = freeze_weights(stages), chain.Chain(stages)
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
@pytest.mark.skipif(len(native.ISAS) < 2, reason="this machine runs only one instruction set")
@pytest.mark.usefixtures("no_grad")
def test_changing_the_instruction_set_repacks() -> None:
    x, stages = small_chain("up")
    owner, run = freeze_weights(stages), chain.Chain(stages)
    for isa in (*native.ISAS, *native.ISAS):
        with native.instruction_set(isa):
            assert relative(run(x), expected_output(x, stages)) <= 2 * LAYER
            assert relative(conv_chain(x, stages), expected_output(x, stages)) <= 2 * LAYER
    del owner


def move_into_larger_buffer(t: Tensor) -> None:
    """Move t into a buffer of twice its size, of which it is the first half."""
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
    x, stages = small_chain("up")
    vectors = [t for s in stages for n in VECTORS if (t := getattr(s, n)) is not None]
    for t in vectors:
        move_into_larger_buffer(t)
    owner, run = freeze_weights(stages), chain.Chain(stages)
    previous = run(x)
    for t in vectors:
        VECTOR_EDITS[name](t)
        assert relative(run(x), expected_output(x, stages)) <= 2 * LAYER
        assert not torch.equal(run(x), previous)
        previous = run(x)
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_a_weight_with_the_negation_bit() -> None:
    """The dispatcher resolves the negation bit of arguments, but a Chain bypasses it."""
    x, stages = small_chain("up")
    stages[1] = stages[1]._replace(weight=torch._neg_view(stages[1].weight))
    for owner in (None, freeze_weights(stages)):
        with ops.use_engine("native"):
            assert relative(conv_chain(x, stages), expected_output(x, stages)) <= 2 * LAYER
            assert relative(chain.Chain(stages)(x), expected_output(x, stages)) <= 2 * LAYER
        del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_weight_changes_are_detected() -> None:
    """Frozen weights, and others, which are packed at every call."""
    x, stages = small_chain("up")
    owner, run = freeze_weights(stages[:2]), chain.Chain(stages)
    with ops.use_engine("native"):
        for s in stages:
            for edit in (
                lambda w: w.mul_(1.25),
                lambda w: setattr(w, "data", w.flip(2)),
                lambda w: setattr(w, "data", w.contiguous(memory_format=torch.channels_last) * -1),
                lambda w: w.set_(w.transpose(2, 3).clone()),
            ):
                edit(s.weight)
                assert relative(run(x), expected_output(x, stages)) <= 2 * LAYER
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_stale_packed_weights_are_freed() -> None:
    """Even if the batch sizes that used it do not occur again."""
    x, stages = small_chain("up", batch=8)
    owner, run = freeze_weights(stages), chain.Chain(stages)
    packed = []
    for batch in range(1, 9):
        run(x[:batch])
    for entry in weight_cache._entries.values():
        packed += [weakref.ref(t) for t in entry.derived.values()]
    assert len(packed) >= len(stages)
    for s in stages:
        s.weight.mul_(2)
    run(x)
    gc.collect()
    assert [ref() for ref in packed if ref() is not None] == []
    del owner
