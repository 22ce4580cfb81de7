"""Packed weights and folded vectors of a network in eval on the Triton engine, bit by bit.

A launch packs all of them or none, after every change that it finds. All memory starts as NaN, and packed
weights lie between margins of NaN.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from dcgan.kernels import chain, weight_cache
from dcgan.kernels.gpu import packing
from dcgan.kernels.spec import Stage
from tests.interpreter.cases import DTYPES, NAN
from tests.support.chains import KINDS, freeze_weights, small_chain, stage
from tests.support.inference import (
    OTHER_VECTORS,
    PROGRAMS,
    Packing,
    copies,
    same_bits,
    some_fast,
    with_vectors,
)

pytestmark = pytest.mark.usefixtures("inference_engine", "no_grad", "empty_weight_cache")


def mixed_dtypes(stages: list[Stage]) -> list[Stage]:
    """Return the stages with weights of all dtypes in turn."""
    found = zip(stages, itertools.cycle(DTYPES))
    return [s._replace(weight=s.weight.to(dtype)) for s, dtype in found]


@pytest.mark.usefixtures("margins")
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("of_weights", [*DTYPES, "mixed"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@KINDS
def test_packed_weights(kind: str, dtype: torch.dtype, of_weights: Any, checked: bool) -> None:
    """Every bit is that of aten and of ``packing.pack``, from weights of any dtype and memory format."""
    x, stages = small_chain(kind, dtype)
    _, stages = small_chain(kind, torch.float32 if of_weights == "mixed" else of_weights)
    stages = mixed_dtypes(stages) if of_weights == "mixed" else stages
    stages[1] = stages[1]._replace(weight=stages[1].weight.contiguous(memory_format=torch.channels_last))
    it = Packing.of_products(x, stages, checked)
    it.weights.prepare()
    assert it.current()
    for s, layout, packed in zip(stages, it.layouts, it.weights.packed, strict=True):
        assert torch.equal(packed, packing.pack([(s.weight, layout)], dtype)[0])
    assert not checked or it.copied()
    assert it.packs() is not checked


@pytest.mark.usefixtures("margins")
@pytest.mark.parametrize("name", some_fast(OTHER_VECTORS, ("float32", "bfloat16 of stride 2")))
def test_folded_vectors(name: str) -> None:
    """Every combination of vectors, and more channels than are folded at a time, to float32's accuracy."""
    every = ["".join(g) for n in range(5) for g in itertools.combinations("csbn", n)]
    stages = [stage(False, 2, 7, 1, given=given) for given in every]
    stages += [stage(True, 1, 1030, 1, given="csbn"), stage(False, 1, 2051, 1, given="bn")]
    stages[-1] = stages[-1]._replace(eps=0.25)
    stages = with_vectors(stages, OTHER_VECTORS[name])
    it = Packing(stages)
    for factor in (1.0, -2.0):
        for s in stages:
            for v in (s.bias, s.scale, s.shift, s.mean):
                if v is not None and v.stride(0):
                    v.data.mul_(factor)  # vectors are read in every launch
        it.weights.prepare()
        for s, scale, shift in zip(stages, it.weights.scales, it.weights.shifts, strict=True):
            want_scale, want_shift = chain.fold_epilogue(s, torch.float64)
            assert (scale is None, shift is None) == (want_scale is None, want_shift is None)
            size = torch.ones(s.c_out) if want_scale is None else want_scale.abs()
            if scale is not None and want_scale is not None:
                assert scale.dtype == torch.float32
                assert ((scale - want_scale).abs() <= 8 * 2**-24 * size).all()
            if shift is not None and want_shift is not None:
                assert shift.dtype == torch.float32
                offset = sum(v.double().abs() for v in (s.bias, s.mean) if v is not None)
                terms = size * offset + (0 if s.shift is None else s.shift.double().abs())
                assert ((shift - want_shift).abs() <= 8 * 2**-24 * terms).all()
    assert it.packs() is False


# --- when weights are packed --------------------------------------------------------------------------------


def large_network(dtype: torch.dtype = torch.float32) -> list[Stage]:
    """Return layers of more, and of fewer, than 32 lines, and of several tiles to pack."""
    stages = [stage(True, 20, 18, 3), stage(False, 5, 7, 1), stage(False, 12, 15)]
    return [s._replace(weight=s.weight.to(dtype)) for s in stages]


NETWORKS_OF_WEIGHTS: dict[str, Callable[[], list[Stage]]] = {
    "float32": large_network,
    "bfloat16": lambda: large_network(torch.bfloat16),
    "mixed": lambda: mixed_dtypes(large_network()),
}


@pytest.mark.usefixtures("margins")
@pytest.mark.parametrize("of_weights", some_fast(NETWORKS_OF_WEIGHTS, ("float32", "mixed")))
def test_packed_once_unless_edited(of_weights: str) -> None:
    """An edit packs in two launches, of which the second renews the copy; others write no packed weight."""
    stages = NETWORKS_OF_WEIGHTS[of_weights]()
    it = Packing(stages, torch.bfloat16)
    assert it.packs()
    assert it.copied()
    assert not any(it.packs() for _ in range(3))
    for edited in (*([s] for s in stages), stages):
        before = [copy.clone() for copy in copies(it.weights)]
        for s in edited:
            s.weight.data.neg_()  # one bit of each element
        assert it.packs(), "the launch after the edit"
        assert all(map(same_bits, copies(it.weights), before))
        assert it.packs(), "the launch that renews the copy"
        assert it.copied()
        assert not any(it.packs() for _ in range(3))


@pytest.mark.usefixtures("margins")
@pytest.mark.parametrize("of_weights", some_fast(NETWORKS_OF_WEIGHTS, ("mixed",)))
def test_edits_in_successive_launches(of_weights: str) -> None:
    """Whatever the other edits, each launch packs the present values, and those that end last are kept."""
    stages = NETWORKS_OF_WEIGHTS[of_weights]()
    it = Packing(stages, torch.float16)
    for edits in (1, 2, 3, 4):
        for i in range(edits):
            stages[i % 3].weight.data.mul_(-1.25)
            assert it.packs()
        it.weights.prepare()
        assert it.current()
        it.weights.prepare()
        assert it.current()
        assert it.copied()
        assert not it.packs()


def test_an_edit_that_is_taken_back() -> None:
    """By the next launch the weights equal their copy again, but the packed weights do not."""
    stages = large_network()
    it = Packing(stages)
    it.weights.prepare()
    for _ in range(2):
        stages[0].weight.data.neg_()
        assert it.packs()
        stages[0].weight.data.neg_()
        assert it.packs()
        assert it.copied()
        assert not it.packs()


def test_bits_are_compared() -> None:
    """A NaN equals itself, and -0 does not equal 0."""
    for dtype in DTYPES:
        s = stage(False, 40, 20, 1, dtype=dtype)
        s.weight.zero_()
        s.weight[::2] = NAN
        s.weight[1] = float("inf")
        it = Packing([s], dtype)
        assert it.packs()
        assert not any(it.packs() for _ in range(3))
        s.weight.data[3::2] = -0.0
        assert it.packs()


def test_what_the_host_sees_is_not_sampled() -> None:
    """One element of many, after a bump of its version or of the cache's epoch: packed and copied at once."""
    stages = large_network()
    it = Packing(stages)
    froze: list[int] = []
    follow = functools.partial(it.weights.follow, lambda: froze.append(1))

    def element() -> Tensor:
        weight = random.choice(stages).weight
        return weight.view(-1)[random.randrange(weight.numel()) :][:1]

    def with_version() -> None:
        element().add_(1)

    def invalidated() -> None:
        owner = freeze_weights(stages)
        element().data.add_(1)
        weight_cache.invalidate([s.weight for s in stages])
        del owner

    def thawed() -> None:
        owner = freeze_weights(stages)
        element().data.add_(1)
        weight_cache.thaw(owner)

    assert it.packs()
    for edit in (with_version, invalidated, thawed, with_version):
        follow()
        assert not it.packs()
        froze.clear()
        edit()
        follow()
        assert froze == [1]
        assert it.packs()
        assert it.copied()
        follow()
        assert froze == [1]
        assert not it.packs()


def test_unchecked_weights_are_packed_in_every_launch() -> None:
    it = Packing(mixed_dtypes(large_network()), torch.bfloat16, checked=False)
    assert all(it.packs() for _ in range(3))


# --- programs of one launch ---------------------------------------------------------------------------------


@contextlib.contextmanager
def in_order(order: Sequence[int], before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Run the programs of every launch in an order, with a call of ``before`` in front of each."""
    builder: Any = interpreter.interpreter_builder
    select = builder.set_grid_idx

    def reordered(x: int, y: int, z: int) -> None:
        before()
        select(order[x], y, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", reordered)
        yield


ORDERS = {
    "reversed": [4, 3, 2, 1, 0],
    "last first": [4, 0, 1, 2, 3],
    "mixed": [2, 4, 1, 0, 3],
}


def edited(stages: list[Stage], share: float) -> None:
    """Edit a share of the first weight, in one place and without a version, so that some launches miss it."""
    weight = stages[0].weight.data.view(-1)
    weight[: int(share * len(weight))].neg_()


@pytest.mark.usefixtures("margins")
@pytest.mark.parametrize("order", some_fast(ORDERS, ("reversed", "mixed")))
@pytest.mark.parametrize("of_weights", some_fast(NETWORKS_OF_WEIGHTS, ("mixed",)))
def test_programs_decide_alike_in_any_order(order: str, of_weights: str) -> None:
    """A launch packs all tiles or none, even where it depends on the sampled lines whether it does."""
    stages = NETWORKS_OF_WEIGHTS[of_weights]()
    it = Packing(stages)

    def packs() -> bool:
        return it.packs(in_order(ORDERS[order]))

    assert packs()
    assert it.copied()
    outcomes = []
    for _ in range(12):
        edited(stages, 0.03)
        outcomes.append(packs())  # raises if a launch packs some tiles
        if outcomes[-1]:
            assert packs()
        else:
            edited(stages, 0.03)  # taken back
        assert it.copied()
    assert set(outcomes) == {True, False}


@pytest.mark.parametrize("case", ["first", "unchanged", "edited", "renewing"])
@pytest.mark.parametrize("of_weights", some_fast(NETWORKS_OF_WEIGHTS, ("mixed",)))
def test_programs_decide_alike_whatever_others_have_stored(case: str, of_weights: str) -> None:
    """Before each program the state is one that programs which run at the same time may have left.

    Some of them have counted themselves, and some have stored what they have decided.
    """
    stages = NETWORKS_OF_WEIGHTS[of_weights]()
    it = Packing(stages)
    state = it.weights.launch.tensors["state_ptr"]
    assert isinstance(state, Tensor)
    if case != "first":
        assert it.packs()
    if case in ("edited", "renewing"):
        stages[0].weight.data.neg_()
    if case == "renewing":
        assert it.packs()
    before = state.clone()
    kept = [copy.clone() for copy in copies(it.weights)]
    wanted = it.packs()
    assert wanted is (case != "unchanged")
    after = state.clone()
    assert int(after[1] - before[1]) == PROGRAMS
    possible = itertools.product((before[0], after[0]), range(int(before[1]), int(after[1])))
    for due, counted in possible:
        for copy, old in zip(copies(it.weights), kept, strict=True):
            copy.copy_(old)

        def leave(due: Tensor = due, counted: int = counted) -> None:
            state[0], state[1] = due, counted

        assert it.packs(in_order(range(PROGRAMS), leave)) is wanted
        assert int(state[0]) == int(after[0])
        assert it.copied() is (case != "edited")
        state.copy_(after)
