"""Recurring calls of a network in eval are captured in CUDA graphs, which are simulated here.

Launches are recorded in place of compilation, and not executed.
"""

from __future__ import annotations

import gc
import itertools
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import chain, weight_cache
from dcgan.kernels.capturing import Replay
from dcgan.kernels.gpu import inference
from tests.support.chains import KINDS, freeze_weights, small_chain
from tests.support.recorded_launches import (
    NO_COMPILATION,
    REPORTED,
    SOON,
    Case,
    Made,
    SimulatedCuda,
    captures,
    captures_as_on_cuda,
    check_call,
    check_equal,
    logged,
    new,
)

pytestmark = pytest.mark.usefixtures("recorder", "no_grad", "empty_weight_cache")


@KINDS
def test_a_recurring_call_is_captured(kind: str, backend: type[SimulatedCuda]) -> None:
    """By call number CAPTURED_CALL of its kind, which is the first replay; others do not count."""
    case = Case(kind)
    expected = case()
    ordinary = new()
    for n in range(2, inference.CAPTURED_CALL + 4):
        case(case.x[:1]) if n < 4 else None
        new()
        y = case()
        captured = n >= inference.CAPTURED_CALL
        first = n == inference.CAPTURED_CALL
        assert logged(backend) == ["capture"] * first + ["replay"] * captured
        check_equal(ordinary, new())
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)


@SOON
def test_a_replay_copies_x_in_and_y_out(backend: type[SimulatedCuda]) -> None:
    """Its launches read and write the graph's memory; results are new memory."""
    case = Case("up")
    ys = [case() for _ in range(4)]
    graphs = [one.graph for one in case.run._network._prepared.values()]
    new()
    ys.append(case())
    call = new()
    (graph,) = graphs
    assert isinstance(graph, Replay)
    check_call(call, graph._input, graph._output, case.stages)
    assert len({y.data_ptr() for y in ys} | {graph._output.data_ptr()}) == 6
    assert graph._input.data_ptr() != case.x.data_ptr()
    assert torch.equal(graph._input, case.x)


@SOON
def test_unfrozen_weights_are_not_captured(backend: type[SimulatedCuda]) -> None:
    """They would be packed at every replay, which takes longer than the launches."""
    x, stages = small_chain("up")
    run = chain.Chain(stages)
    for _ in range(5):
        run(x)
    assert logged(backend) == []
    owner = freeze_weights(stages)
    for _ in range(3):
        run(x)
    assert logged(backend) == ["capture", "replay", "replay"]
    del owner


@SOON
def test_the_number_of_graphs_is_bounded(
    backend: type[SimulatedCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_GRAPHS", 3)
    case = Case("up", batch=6)
    for _ in range(4):
        for n in range(1, 7):
            case(case.x[:n])
            assert len(new()) == 5
    log = logged(backend)
    assert log.count("capture") == 3
    assert log.count("replay") == 3 * 3
    other = Case("up")
    for _ in range(2):
        other()
    assert logged(backend) == ["capture", "replay"], "the bound is a network's"


@SOON
def test_large_graphs_are_not_captured(backend: type[SimulatedCuda], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that count are those of the maps and the result."""
    case = Case("up", batch=4)
    y = case()
    specs, item = case.prepared._specs, 4
    sizes = [spec.images * math.prod(spec.y.size) * item for spec in specs]
    assert sizes[-1] == y.numel() * item
    size = case.prepared.bytes
    assert size >= y.numel() * item + max(a + b for a, b in itertools.pairwise(sizes[:-1]))
    monkeypatch.setattr(inference, "MAX_GRAPH_BYTES", size - 1)
    for _ in range(4):
        case()
    assert logged(backend) == []
    monkeypatch.setattr(inference, "MAX_GRAPH_BYTES", size)
    other = Case("up", batch=4)
    for _ in range(2):
        other()
    assert logged(backend) == ["capture", "replay"]


@SOON
def test_large_batches_are_not_captured(
    backend: type[SimulatedCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_IMAGES_CAPTURED", 2)
    case = Case("up")
    for _ in range(4):
        case()
    assert logged(backend) == []
    for _ in range(2):
        case(case.x[:2])
    assert logged(backend) == ["capture", "replay"]


@SOON
@pytest.mark.parametrize(("value", "captured"), [("0", False), ("1", True), ("", True)])
def test_the_environment_turns_graphs_off(
    value: str, captured: bool, backend: type[SimulatedCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCGAN_GRAPHS", value)
    case = Case("up")
    for _ in range(4):
        case()
    assert ("capture" in logged(backend)) == captured
    assert captures_as_on_cuda(case.x) == captured


def test_only_small_batches_on_a_gpu_are_captured() -> None:
    assert not inference.captures(torch.zeros(1, 3, 4, 4))
    assert captures_as_on_cuda(torch.zeros(inference.MAX_IMAGES_CAPTURED, 1))
    assert not captures_as_on_cuda(torch.zeros(inference.MAX_IMAGES_CAPTURED + 1, 1))


def test_cpu_calls_are_never_captured(backend: type[SimulatedCuda], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "captures", captures)
    case = Case("up")
    for _ in range(2 * inference.CAPTURED_CALL):
        case()
    assert logged(backend) == []


@SOON
def test_a_graph_within_a_graph_is_not_captured(backend: type[SimulatedCuda]) -> None:
    case = Case("up")
    networks: dict[Any, Any] = {}
    with weight_cache.collecting(networks):
        for _ in range(5):
            case()
    assert logged(backend) == []


@SOON
@pytest.mark.parametrize("failure", ["before", "after"])
def test_a_failed_capture_warns_once_and_is_not_tried_again(
    failure: str, backend: type[SimulatedCuda]
) -> None:
    """By any network; the calls are launched as before, that which failed included."""
    backend.failure = failure
    case = Case("up")
    case()
    ordinary = new()
    with pytest.warns(UserWarning, match=r"could not be captured.*DCGAN_GRAPHS=0: no"):
        y = case()
    call = new()
    check_call(call, case.x, y, case.stages)
    check_equal(ordinary, call)
    assert not captures_as_on_cuda(case.x)
    other = Case("down")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for it in (case, other):
            for n in (1, 2, 3) * 3:
                x = it.x[:n]
                y = it(x)
                check_call(new(), x, y, it.stages)
    assert logged(backend) == ["capture"]


@SOON
@pytest.mark.parametrize("name", ["weight", "mean"])
def test_a_moved_tensor_drops_the_graph(name: str, backend: type[SimulatedCuda]) -> None:
    """The next calls are launched, and captured again when they recur."""
    case = Case("up")
    for _ in range(2):
        case()
    new()
    assert logged(backend) == ["capture", "replay"]
    graph = weakref.ref(case.prepared.graph)
    assert graph() is not None
    tensor: Tensor = getattr(case.stages[0], name)
    tensor.data = tensor.data.clone()
    y = case()
    assert logged(backend) == []
    check_call(new(), case.x, y, case.stages)
    gc.collect()
    assert graph() is None
    case()
    assert logged(backend) == ["capture", "replay"]
    found = case.prepared.graph
    assert found is not None
    check_call(new(), found._input, found._output, case.stages)


@SOON
@pytest.mark.parametrize("name", REPORTED)
def test_a_changed_weight_keeps_the_graph(
    name: str, backend: type[SimulatedCuda], expired: list[int]
) -> None:
    """A replay reads what the host reports before it."""
    case = Case("up")
    for _ in range(3):
        case()
    assert logged(backend) == ["capture", "replay", "replay"]
    expired.clear()
    new()
    REPORTED[name](case)
    case()
    assert expired == [0], "before the replay's launches"
    case()
    assert len(expired) == 1
    assert logged(backend) == ["replay", "replay"]


@pytest.mark.parametrize("turned_off", [False, True])
def test_the_description_counts_launches(turned_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And mentions graphs where calls are captured."""
    x = torch.zeros(2, 3, 4, 4)
    assert chain.described(x, 5) == "one operator: 6 launches per call"
    monkeypatch.setattr(inference, "captures", captures_as_on_cuda)
    if turned_off:
        monkeypatch.setenv("DCGAN_GRAPHS", "0")
    text = chain.described(x, 4)
    assert text.startswith("one operator: 5 launches per call")
    assert ("CUDA graph" in text) != turned_off
    assert (f"from call {inference.CAPTURED_CALL} with" in text) != turned_off


# --- a graph's own networks ---------------------------------------------------------------------------------


@NO_COMPILATION
def test_a_graph_has_networks_of_its_own(expired: list[int], made: Made) -> None:
    """Within ``collecting``: packed in buffers that its owner keeps, and whose changes the owner reports."""
    case, other = Case("up"), Case("down")
    case()
    call = new()
    networks: dict[Any, Any] = {}
    assert weight_cache.networks_of_graph() is None
    for _ in range(2):
        with weight_cache.collecting(networks) as kept:
            assert weight_cache.networks_of_graph() is networks
            case()
            own = new()
            other()
            new()
        assert kept == []
    assert weight_cache.networks_of_graph() is None
    assert list(networks) == [case.run, other.run]
    assert other.run._network is None
    assert made.counts() == (3, 3)
    assert own[0].tensors["buffers"] != call[0].tensors["buffers"]
    assert own[0].tensors["state_ptr"] != call[0].tensors["state_ptr"]
    expired.clear()
    case.stages[0].weight.mul_(2)
    with weight_cache.collecting(networks):
        case()
    assert expired == []
    for network in list(networks.values()):
        network.follow(case.freeze)
    del network
    assert len(expired) == 1
    assert not any(network.moved() for network in networks.values())
    case.stages[0].weight.data = case.stages[0].weight.data.clone()
    assert [network.moved() for network in networks.values()] == [True, False]
    networks.clear()
    assert made.alive() == (1, 1)


def test_collecting_ends_when_its_body_raises() -> None:
    with pytest.raises(KeyError), weight_cache.collecting({}):
        raise KeyError
    assert weight_cache.networks_of_graph() is None
    assert not hasattr(weight_cache._local, "tensors")
