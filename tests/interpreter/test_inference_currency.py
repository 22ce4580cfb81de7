"""Packed weights of a network in eval on the Triton engine follow every edit of its tensors.

Weights that are constant by declaration are compared by samples of their lines. All memory starts as NaN.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dcgan.kernels import chain, weight_cache
from dcgan.kernels.cpu import value_guard
from dcgan.kernels.gpu import tuning
from dcgan.kernels.spec import Stage
from tests.support.chains import VECTORS, expected_output, freeze_weights, small_chain, stage
from tests.support.inference import (
    FLOAT32,
    Packing,
    allowed,
    assert_accurate,
    some_fast,
    weights_of,
)
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("inference_engine", "no_grad", "empty_weight_cache")


# --- sampled lines ------------------------------------------------------------------------------------------


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch a single program for a network of one layer, where the lines that it compares matter alone."""
    monkeypatch.setattr(tuning, "sm_count", lambda device: 1)


SMALL_WEIGHTS = [
    (1, 1, 1, torch.float32),
    (1, 3, 1, torch.bfloat16),
    (9, 11, 3, torch.float16),
    (16, 32, 1, torch.float32),
    (5, 7, 1, torch.float32),
    (31, 33, 1, torch.bfloat16),
    (16, 4, 4, torch.bfloat16),
]
LARGE_WEIGHTS = [(23, 23, torch.float32), (33, 32, torch.float16), (47, 46, torch.bfloat16)]


def lines(weight: Tensor) -> list[Tensor]:
    return list(weight.data.view(-1).split(64 // weight.element_size()))


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(("c_in", "c_out", "kernel", "dtype"), some_fast(SMALL_WEIGHTS, SMALL_WEIGHTS[:4]))
def test_all_lines_of_a_small_weight_are_compared(
    c_in: int, c_out: int, kernel: int, dtype: torch.dtype
) -> None:
    """Of at most 32 lines, the last of them perhaps incomplete: an edit of any one element is detected."""
    s = stage(False, c_in, c_out, kernel, dtype=dtype)
    assert len(lines(s.weight)) <= value_guard.LINES
    it = Packing([s], dtype)
    it.weights.prepare()
    for line in lines(s.weight):
        line[random.randrange(len(line))].neg_()
        assert it.packs()
        assert it.packs()
        assert not it.packs()


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(("c_in", "c_out", "dtype"), some_fast(LARGE_WEIGHTS, LARGE_WEIGHTS[:2]))
def test_every_line_is_compared_in_some_call(c_in: int, c_out: int, dtype: torch.dtype) -> None:
    """Of more than 32 lines: an edit of one element of any line is detected soon, as lines change by call."""
    s = stage(False, c_in, c_out, 1, dtype=dtype)
    every = lines(s.weight)
    assert value_guard.LINES < len(every) < 70
    it = Packing([s], dtype)
    it.weights.prepare()
    calls = 0
    for line in every:
        line[-1].neg_()
        calls += next(i for i in range(1, 33) if it.packs())
        assert it.packs()
    expected = 1 / (1 - (1 - 1 / len(every)) ** value_guard.LINES)  # calls per edit
    assert 0.6 * expected <= calls / len(every) <= 1.5 * expected


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(
    ("dtype", "share"),
    some_fast(
        itertools.product((torch.float32, torch.bfloat16), (0.01, 0.04, 0.1)),
        [(torch.float32, 0.01)],
    ),
)
def test_partial_edits_are_missed_as_rarely_as_documented(dtype: torch.dtype, share: float) -> None:
    """An edit of a contiguous share f, without a version, is missed by a launch with (1 - f)^32."""
    s = stage(False, 64, 64 if dtype == torch.float32 else 128, 1, dtype=dtype)
    every = lines(s.weight)
    count = round(share * len(every))
    it = Packing([s], dtype)
    it.weights.prepare()
    launched, missed, pending = 80, 0, False
    for _ in range(launched):
        if not pending:
            first = random.randrange(len(every) - count + 1)
            for line in every[first : first + count]:
                line.neg_()
        pending = not it.packs()
        missed += pending
        if not pending:
            assert it.packs()
    probability = (1 - count / len(every)) ** value_guard.LINES
    deviation = (launched * probability * (1 - probability)) ** 0.5
    assert abs(missed - launched * probability) <= 3 * deviation + 1


# --- chains whose tensors change ----------------------------------------------------------------------------


def each_weight(edit: Callable[[Tensor], object]) -> Callable[[list[Stage]], None]:
    def change(stages: list[Stage]) -> None:
        for s in stages:
            edit(s.weight)

    return change


def one_weight(i: int, edit: Callable[[Tensor], object]) -> Callable[[list[Stage]], None]:
    return lambda stages: (edit(stages[i].weight), None)[1]


def each_vector(edit: Callable[[Tensor, str], object]) -> Callable[[list[Stage]], None]:
    def change(stages: list[Stage]) -> None:
        for s in stages:
            for name in VECTORS:
                if (v := getattr(s, name)) is not None:
                    edit(v, name)

    return change


def negate_numpy(weight: Tensor) -> None:
    view = weight.numpy() if weight.dtype == torch.float32 else weight.view(torch.int16).numpy()
    view[:] = -view if weight.dtype == torch.float32 else view ^ -(2**15)


def bump(weight: Tensor) -> None:
    weight[0, 0, 0, 0] = 3.0 if weight[0, 0, 0, 0] < 0 else -3.0


def enlarge(v: Tensor, name: str) -> Tensor:
    return v * (1.5 if name == "var" else -1.25)


EDITS: dict[str, Callable[[list[Stage]], None]] = {
    "data of all weights": each_weight(lambda w: w.data.mul_(-1.5)),
    "data of the first weight": one_weight(0, lambda w: w.data.mul_(-1.5)),
    "data of the last weight": one_weight(-1, lambda w: w.data.mul_(-1.5)),
    "a NumPy view": one_weight(1, negate_numpy),
    "data =": one_weight(2, lambda w: setattr(w, "data", -1.25 * w)),
    "data = in channels_last": each_weight(
        lambda w: setattr(w, "data", (-1.25 * w).contiguous(memory_format=torch.channels_last))
    ),
    "one element": one_weight(-1, bump),
    "copy_": one_weight(1, lambda w: w.copy_(-w)),
    "vectors": each_vector(lambda v, name: v.copy_(enlarge(v, name))),
    "data of vectors": each_vector(lambda v, name: v.data.copy_(enlarge(v, name))),
    "data of vectors =": each_vector(lambda v, name: setattr(v, "data", enlarge(v, name))),
}


def chain_to_edit(dtype: torch.dtype) -> tuple[Tensor, list[Stage]]:
    """Return x and a chain whose results show every edit: no activation saturates."""
    stages = [
        stage(False, 3, 7, given="cb", act="leaky_relu", slope=0.5, dtype=dtype),
        stage(False, 7, 10, given="csbn", act="leaky_relu", slope=0.5, dtype=dtype),
        stage(False, 10, 17, 2, given="bn", stride=1, padding=0, dtype=dtype),
    ]
    return torch.randn(2, 3, 8, 8).to(dtype), stages


FOLLOWED = list(itertools.product(EDITS, ("frozen", "not frozen"), (torch.float32, torch.bfloat16)))
FAST_EDITS = (
    "data of the first weight",
    "a NumPy view",
    "data = in channels_last",
    "copy_",
    "data of vectors",
    "data of vectors =",
)


@pytest.mark.parametrize(
    ("name", "owned", "dtype"),
    some_fast(FOLLOWED, [(name, "frozen", torch.float32) for name in FAST_EDITS]),
)
def test_a_chain_follows_edits(name: str, owned: str, dtype: torch.dtype) -> None:
    """In the next call, whether or not the calls before and after it see an edit as well."""
    x, stages = chain_to_edit(dtype)
    frozen = owned == "frozen"
    owner = freeze_weights(stages) if frozen else None
    run = chain.Chain(stages)
    y = run(x)
    for calls in (1, 0, 2):
        for _ in range(calls):
            y = run(x)
        before = expected_output(x, stages)
        assert relative(y, before) <= allowed(dtype), "in calls that compare only"
        EDITS[name](stages)
        y, wanted = run(x), expected_output(x, stages)
        assert relative(before, wanted) > 2 * allowed(dtype), "the edit shows in the result"
        assert relative(y, wanted) <= allowed(dtype)
    assert weights_of(run).checked is (frozen and not name.startswith("data ="))
    del owner


def test_weights_that_are_not_frozen_are_packed_in_every_call() -> None:
    """An edit of one element of many without a version, in every one of ten calls."""
    x, stages = torch.randn(1, 24, 4, 4), [stage(False, 24, 24)]
    run = chain.Chain(stages)
    for _ in range(10):
        weight = stages[0].weight.data.view(-1)
        weight[random.randrange(len(weight))] += 3.0
        assert relative(run(x), expected_output(x, stages)) <= FLOAT32


def test_weights_that_are_frozen_later_are_compared_from_then_on() -> None:
    x, stages = small_chain("down", batch=1)
    run = chain.Chain(stages)
    run(x)
    assert not weights_of(run).checked
    owner = freeze_weights(stages)
    assert_accurate(run(x), x, stages)
    assert weights_of(run).checked
    stages[1].weight.data.neg_()
    assert_accurate(run(x), x, stages)
    del owner


def test_weights_that_are_no_longer_frozen_are_packed_in_every_call() -> None:
    """Their owner is gone, and with it the promise that they are constant."""
    x, stages = torch.randn(1, 24, 4, 4), [stage(False, 24, 24)]
    owner, run = freeze_weights(stages), chain.Chain(stages)
    for _ in range(2):
        run(x)
    assert weights_of(run).checked
    del owner
    for _ in range(5):
        stages[0].weight.data.view(-1)[random.randrange(24 * 24 * 16)] += 3.0
        assert relative(run(x), expected_output(x, stages)) <= FLOAT32
    assert not weights_of(run).checked


def test_one_call_is_frozen_by_its_owner() -> None:
    """``freeze`` is called before weights are packed, and again after a change that the host sees."""
    x, stages = small_chain("down", batch=1)
    run, owners = chain.Chain(stages), []

    def freeze() -> None:
        owners.append(freeze_weights(stages))

    run(x, True, freeze)
    run(x, True, freeze)
    assert len(owners) == 1
    assert weights_of(run).checked
    weight_cache.thaw(owners[0])
    run(x, True, freeze)
    assert len(owners) == 2
    assert all(weight_cache.frozen(s.weight) for s in stages)
    stages[0].weight.data.neg_()
    assert_accurate(run(x, True, freeze), x, stages)
