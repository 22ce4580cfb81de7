"""Packed weights of a network in eval on the Triton engine: where they lie, how long, and what they follow.

Launches are recorded, by a driver or in place of compilation, and not executed.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast
from dcgan.kernels import chain, gpu, weight_cache
from dcgan.kernels.gpu import inference
from dcgan.kernels.gpu.prepare import vectors_of
from tests.support.chains import KINDS, VECTORS, freeze_weights, small_chain
from tests.support.recorded_launches import (
    NO_COMPILATION,
    PREPARE,
    REPORTED,
    SOON,
    Case,
    Launched,
    Made,
    SimulatedCuda,
    check_call,
    check_equal,
    logged,
    new,
    unaligned,
    use_stream,
)

pytestmark = pytest.mark.usefixtures("recorder", "no_grad", "empty_weight_cache")


# --- tensors that move --------------------------------------------------------------------------------------


def every_other(t: Tensor) -> Tensor:
    """Copy a vector with stride 2."""
    return torch.stack([t, t], 1)[:, 0]


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "address": lambda t: t.clone(memory_format=torch.preserve_format),
    "alignment": unaligned,
    "dtype": lambda t: t.bfloat16() if t.ndim == 1 else t.clone(),
    "strides": lambda t: every_other(t) if t.ndim == 1 else t.transpose(0, 1).contiguous().transpose(0, 1),
}


@NO_COMPILATION
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ["weight", *VECTORS])
def test_a_moved_tensor_is_read_where_it_lies_now(name: str, move: str, made: Made) -> None:
    """Everything prepared for its old place is freed."""
    case = Case("down")
    batches = case.x, case.x[:1]
    for x in batches:
        case(x)
    before = new()[0]
    assert made.counts() == (2, 1)
    stage = next(s for s in case.stages if getattr(s, name) is not None)
    tensor: Tensor = getattr(stage, name)
    old = tensor.data
    tensor.data = MOVES[move](old)
    for _ in range(2):
        for x in batches:
            y = case(x)
            call = new()
            check_call(call, x, y, case.stages)
    assert made.counts() == (4, 2)
    assert made.alive() == (2, 1)
    assert old.data_ptr() not in (*call[0].tensors["weights"], *call[0].tensors["vectors"])
    if move == "strides":
        assert call[0].others != before.others


@NO_COMPILATION
@pytest.mark.parametrize("move", MOVES)
def test_a_moved_weight_is_read_by_the_first_call_of_another_shape(move: str, made: Made) -> None:
    """That call finds packed weights that earlier ones have prepared, for the weight's old place."""
    case = Case("down")
    case()
    new()
    weight = case.stages[0].weight
    weight.data = MOVES[move](weight.data)
    x = case.x[:1]
    y = case(x)
    check_call(new(), x, y, case.stages)
    assert made.counts() == (2, 2)


@NO_COMPILATION
@pytest.mark.parametrize(
    ("name", "change"),
    [*itertools.product(VECTORS, ("dtype", "strides")), ("weight", "strides")],
)
def test_a_tensor_may_change_at_its_address(name: str, change: str, made: Made) -> None:
    """Its dtype and strides are constants of the code."""
    case = Case("down")
    stage = next(s for s in case.stages if getattr(s, name) is not None)
    tensor: Tensor = getattr(stage, name)
    tensor.data = torch.stack([tensor, tensor])[0]
    address, before = tensor.data_ptr(), tensor.data
    case()
    call = new()
    if change == "dtype":
        tensor.data = before.view(torch.bfloat16)[: len(before)]
    elif tensor.ndim == 1:
        tensor.data = before.as_strided(before.shape, (2,))
    else:
        tensor.data = before.as_strided(
            before.shape, before.transpose(0, 1).contiguous().transpose(0, 1).stride()
        )
    assert (tensor.data_ptr(), tensor.shape) == (address, before.shape)
    assert (tensor.dtype, tensor.stride()) != (before.dtype, before.stride())
    for _ in range(2):
        y = case()
        now = new()
        check_call(now, case.x, y, case.stages)
        assert made.counts() == (2, 2)
    assert now[0].tensors["weights"] == call[0].tensors["weights"]
    assert change == "dtype" or now[0].others != call[0].others


# --- bounds -------------------------------------------------------------------------------------------------


@NO_COMPILATION
def test_prepared_calls_are_bounded(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    for module in (inference, gpu):
        monkeypatch.setattr(module, "MAX_PREPARED", 3)
    case = Case("up", batch=8)
    for n in (*range(1, 8), 1, 7):
        x = case.x[:n]
        y = case(x)
        check_call(new(), x, y, case.stages)
        assert 1 <= len(case.run._network._prepared) <= 3
        assert 1 <= len(case.run._engines) <= 3
    assert made.alive() == (len(case.run._network._prepared), 1)


@NO_COMPILATION
def test_packed_weights_are_bounded(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    """Each stream has its own, and no call is prepared with packed weights that are no longer followed."""
    monkeypatch.setattr(inference, "MAX_WEIGHTS", 2)
    case = Case("up")
    for stream in (*range(5), 0, 4, 0):
        use_stream(monkeypatch, stream)
        y = case()
        check_call(new(), case.x, y, case.stages)
        network = case.run._network
        assert 1 <= len(network._weights) <= 2
        for prepared in network._prepared.values():
            assert prepared.weights in network._weights.values()
    assert made.alive()[1] <= 2


@NO_COMPILATION
@pytest.mark.parametrize("frozen", [True, False])
def test_deleting_the_chain_frees_its_buffers(frozen: bool, made: Made) -> None:
    """Plans of launches, which are shared by all networks, refer to no tensor."""
    x, stages = small_chain("up")
    owner = freeze_weights(stages) if frozen else nn.Module()
    run = chain.Chain(stages)
    for n in (3, 3, 1, 1):
        run(x[:n])
    (weights,) = run._network._weights.values()
    buffers = [weakref.ref(t) for t in (weights._folded, *weights.packed) if t is not None]
    assert all(reference() is not None for reference in buffers)
    del weights, run
    assert made.alive() == (0, 0)
    assert all(reference() is None for reference in buffers)
    del owner


@NO_COMPILATION
def test_deleting_a_network_frees_its_buffers(made: Made) -> None:
    network = fast.Generator(6, features=4, image_size=32).eval()
    network(torch.randn(2, 6))
    assert made.alive() == (1, 1)
    del network
    assert made.alive() == (0, 0)


@NO_COMPILATION
@KINDS
def test_the_operator_keeps_nothing(kind: str, made: Made) -> None:
    """A compiled program or a graph under capture calls it: weights are packed at every call, even frozen."""
    x, stages = small_chain(kind)
    owner = freeze_weights(stages)
    for i in range(1, 3):
        y = chain.conv_chain(x, stages)
        call = new()
        check_call(call, x, y, stages)
        assert call[0].others["SIZES"] == ()
        assert made.counts() == (i, i)
        assert made.alive() == (0, 0)
    del owner


# --- changed weights ----------------------------------------------------------------------------------------


OTHERS: list[Case] = []
"""Kept alive: frozen weights that are freed are reported to all networks."""


def call_another() -> None:
    OTHERS.append(Case("up"))
    OTHERS[-1]()


UNREPORTED: dict[str, Callable[[Case], Any]] = {
    "nothing": lambda case: None,
    "data in place": lambda case: case.stages[0].weight.data.zero_(),
    "vectors": lambda case: [v.add_(1) for stage in case.stages for v in vectors_of(stage) if v is not None],
    "another network": lambda case: call_another(),
    "an unfrozen tensor": lambda case: weight_cache.invalidate([torch.zeros(3)]),
}


@NO_COMPILATION
@pytest.mark.parametrize("name", REPORTED)
def test_a_change_that_the_host_sees_is_reported_once(name: str, expired: list[int], made: Made) -> None:
    """Before the next call's launches, to the device, and nothing is prepared again; weights stay frozen."""
    case = Case("up")
    case()
    case()
    assert len(expired) == 1, "new weights are packed"
    state = case.weights._state
    assert state is not None
    assert state.tolist() == [-1, 0]
    call = new()[:5]
    for i in range(2, 4):
        state.copy_(torch.tensor([41, 132 * 42]))
        REPORTED[name](case)
        case(case.x[:2])
        assert expired[1:] == [0] * (i - 1), "once, and before the launches"
        assert state.tolist() == [-1, 132 * 42], "the launches are counted on"
        assert all(weight_cache.frozen(stage.weight) for stage in case.stages)
        case(case.x[:2])
        case()
        assert len(expired) == i
        assert new()[-5].tensors == call[0].tensors
    assert made.counts() == (2, 1)


@NO_COMPILATION
@pytest.mark.parametrize("name", UNREPORTED)
def test_nothing_is_reported_without_a_change_that_the_host_sees(name: str, expired: list[int]) -> None:
    """What it does not see, the device finds out by samples; vectors are read at every call."""
    OTHERS.clear()
    case = Case("up")
    case()
    weights = case.weights
    assert weights._state is not None
    weights._state.fill_(41)
    expired.clear()
    for n in (3, 2, 3, 1):
        UNREPORTED[name](case)
        expired.clear()
        case(case.x[:n])
        assert expired == []
    assert weights._state.tolist() == [41, 41]
    assert case.weights is weights


@NO_COMPILATION
def test_every_stream_is_told_of_a_change(expired: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, before its own next call's launches: what another stream may be reading is left alone."""
    case = Case("up")
    for stream in range(3):
        use_stream(monkeypatch, stream)
        case()
    new()
    expired.clear()
    case.stages[0].weight.mul_(2)
    for count, stream in enumerate((1, 0, 2), 1):
        use_stream(monkeypatch, stream)
        for _ in range(2):
            case()
            assert expired == [0] * count
        new()


def check_unchecked(call: Sequence[Launched]) -> None:
    prepare = call[0]
    assert prepare.others["SIZES"] == ()
    assert prepare.tensors["copies"] == (prepare.tensors["folded_ptr"],)
    assert prepare.tensors["state_ptr"] == prepare.tensors["folded_ptr"]


@NO_COMPILATION
@KINDS
def test_unfrozen_weights_are_packed_at_every_call(kind: str, expired: list[int], made: Made) -> None:
    """Until they are frozen: then they are compared, with copies of their own sizes."""
    x, stages = small_chain(kind)
    run = chain.Chain(stages)
    for _ in range(3):
        y = run(x)
        call = new()
        check_call(call, x, y, stages)
        check_unchecked(call)
    assert made.counts() == (1, 1)
    assert not run._network._weights.popitem()[1].checked
    run = chain.Chain(stages)
    run(x)
    stages[0].weight.mul_(2)
    run(x)
    assert [launch.others["SIZES"] for launch in new() if launch.kernel == PREPARE] == [(), ()]

    owner = nn.Module()
    weight_cache.freeze(owner, [stage.weight for stage in stages[:-1]])
    run(x)
    check_unchecked(new())
    weight_cache.freeze(owner, [stage.weight for stage in stages])
    count = made.counts()
    for _ in range(2):
        y = run(x)
        (prepare, *_) = call = new()
        check_call(call, x, y, stages)
        assert prepare.others["SIZES"] == tuple(stage.weight.numel() for stage in stages)
        places = *prepare.tensors["copies"], prepare.tensors["state_ptr"], prepare.tensors["folded_ptr"]
        assert len({*places, *prepare.tensors["weights"]}) == 2 * len(stages) + 2
        assert made.counts() == (count[0] + 1, count[1] + 1)
    assert made.alive() == (1, 1)
    del owner


@SOON
@pytest.mark.parametrize("end", ["thaw", "del"])
def test_weights_that_are_no_longer_frozen_are_packed_at_every_call(
    end: str, backend: type[SimulatedCuda], made: Made
) -> None:
    """By launches: a graph compares them. Calls of other shapes are prepared again, too."""
    x, stages = small_chain("up")
    owner = freeze_weights(stages)
    run = chain.Chain(stages)
    for n in (3, 2, 3):
        run(x[:n])
    assert logged(backend) == ["capture", "replay"]
    assert new()[-5].others["SIZES"]
    if end == "thaw":
        weight_cache.thaw(owner)
    else:
        del owner
        gc.collect()
    for n in (3, 2) * 2:
        y = run(x[:n])
        call = new()
        check_call(call, x[:n], y, stages)
        check_unchecked(call)
    assert logged(backend) == []
    assert made.counts() == (4, 2)
    assert made.alive() == (2, 1)


@NO_COMPILATION
def test_weights_that_are_not_dense_are_packed_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they may be frozen, but a copy of their memory could not be compared with them."""
    monkeypatch.setattr(weight_cache, "_is_cuda", lambda weight: True)
    case = Case("up")
    weight = case.stages[1].weight
    weight.data = torch.stack([weight, weight], -1)[..., 0]
    for _ in range(2):
        y = case()
        call = new()
        check_call(call, case.x, y, case.stages)
        check_unchecked(call)
    assert weight_cache.frozen(weight)


@NO_COMPILATION
def test_weights_without_versions_are_packed_at_every_call() -> None:
    with torch.inference_mode():
        case = Case("up")
        for _ in range(2):
            y = case()
            call = new()
            check_call(call, case.x, y, case.stages)
            check_unchecked(call)


@NO_COMPILATION
def test_buffers_made_in_inference_mode_serve_outside_of_it(made: Made, expired: list[int]) -> None:
    """The state is written from both."""
    case = Case("up")
    with torch.inference_mode():
        case()
    call = new()
    case.stages[0].weight.mul_(2)
    case()
    check_equal(call, new())
    case.stages[0].weight.mul_(2)
    with torch.inference_mode():
        case()
    check_equal(call, new())
    assert len(expired) == 3
    assert made.counts() == (1, 1)
