"""A network in eval on the Triton engine: what each call launches, and what is prepared for it.

Launches are recorded, by a driver or in place of compilation, and not executed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from dcgan import fast
from dcgan.kernels import chain, ops
from dcgan.kernels.gpu import inference, launcher
from tests.support.chains import KINDS, small_chain
from tests.support.recorded_launches import (
    NO_COMPILATION,
    Case,
    Made,
    check_call,
    check_equal,
    check_memory,
    hooks,
    new,
    unaligned,
    use_stream,
)

pytestmark = pytest.mark.usefixtures("recorder", "no_grad", "empty_weight_cache")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("up", torch.float32),
        ("down", torch.bfloat16),
        *(
            pytest.param(kind, dtype, marks=pytest.mark.slow)
            for kind, dtype in (("up", torch.bfloat16), ("down", torch.float32), ("down", torch.float16))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("dependent", [False, True], ids=["sm_80", "sm_90"])
def test_the_second_call_equals_the_first(
    kind: str, dtype: torch.dtype, dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton binds the arguments of the first call; later ones pass addresses to the compiled kernels."""
    monkeypatch.setattr(inference, "starts_early", lambda device: dependent)
    case = Case(kind, dtype)
    xs = [case.x, *(torch.randn_like(case.x) for _ in range(2))]
    calls, ys = [], []
    for x in xs:
        ys.append(case(x))
        calls.append(new())
    for x, y, call in zip(xs, ys, calls, strict=True):
        check_call(call, x, y, case.stages)
        check_equal(call, calls[0])
        assert [launch.dependent for launch in call] == [False, *[dependent] * len(case.stages)]
        assert call[0].others["DEPENDENTS"] == dependent
    assert len({y.data_ptr() for y in ys}) == len(ys)
    check_memory(case.prepared, calls[0], ys[0])


@NO_COMPILATION
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5, 64])
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_each_call_launches_prepare_and_one_product_per_layer(
    kind: str, dtype: torch.dtype, batch: int, channels_last: bool
) -> None:
    case = Case(kind, dtype, batch)
    case.channels_last = channels_last
    first = case()
    calls = [new()]
    with ops.recording() as choices:
        y = case(case.x.clone())
    calls.append(new())
    assert [choice.engine for choice in choices] == ["triton"] * len(case.stages)
    assert (y.shape, y.stride(), y.dtype) == (first.shape, first.stride(), dtype)
    check_call(calls[0], case.x, first, case.stages)
    check_equal(*calls)
    check_memory(case.prepared, calls[1], y)


def test_launch_hooks_are_called_if_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler adds them at any time; later calls pass on none as long as there are none."""
    case = Case("up")
    case()
    hooks.clear()
    call = new()
    case()
    assert hooks == [(None, None)] * 5
    check_equal(call, new())
    hooks.clear()
    enter = triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(enter, "calls", [lambda metadata: None])
    case()
    assert [given for given, _ in hooks] == [enter] * 5
    check_equal(call, new())


@KINDS
@NO_COMPILATION
def test_one_layer_alone(kind: str) -> None:
    """There is no map between layers, and the workspace is empty."""
    x, stages = small_chain(kind)
    run = chain.Chain(stages[:1])
    for _ in range(2):
        y = run(x)
        check_call(new(), x, y, stages[:1])


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["G", "D"])
@NO_COMPILATION
def test_the_default_networks_launch_six_kernels(kind: str, dtype: torch.dtype, batch: int) -> None:
    network: Any = (fast.Generator() if kind == "G" else fast.Discriminator()).to(dtype).eval()
    shape = (100, 1, 1) if kind == "G" else (1, 64, 64)
    calls = []
    stages = fast.stages(list(network.main.named_children()))
    for _ in range(3):
        x = torch.randn(batch, *shape).to(dtype)
        y = network(x)
        calls.append(new())
        assert len(calls[-1]) == 6
        check_call(calls[-1], x, y.view(batch, -1, *(y.shape[2:] or (1, 1))), stages)
        check_equal(calls[0], calls[-1])
    sizes = tuple(stage.weight.numel() for stage in stages)
    assert calls[0][0].others["SIZES"] == sizes, "weights of a network in eval mode are frozen"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["G", "D"])
def test_the_second_call_of_a_default_network_equals_the_first(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "starts_early", lambda device: True)
    network: Any = (fast.Generator() if kind == "G" else fast.Discriminator()).bfloat16().eval()
    x = torch.randn(2, *((100, 1, 1) if kind == "G" else (1, 64, 64))).bfloat16()
    stages = fast.stages(list(network.main.named_children()))
    calls = []
    for _ in range(2):
        y = network(x)
        calls.append(new())
        check_call(calls[-1], x, y.view(2, -1, *(y.shape[2:] or (1, 1))), stages)
    check_equal(*calls)


@NO_COMPILATION
def test_logits_share_nothing_with_probabilities() -> None:
    """Only the last product's activation differs, and each has its own packed weights."""
    network = fast.Discriminator(features=4, image_size=32).eval()
    x = torch.randn(2, 1, 32, 32)
    network(x)
    probabilities = new()
    network.logits(x)
    logits = new()
    acts = [[launch.others["SPEC"].y.act for launch in call[1:]] for call in (probabilities, logits)]
    assert acts[0][:-1] == acts[1][:-1]
    assert (acts[0][-1], acts[1][-1]) == ("sigmoid", "none")
    assert probabilities[0].tensors["buffers"] != logits[0].tensors["buffers"]


# --- what needs a new preparation ---------------------------------------------------------------------------

Change = Callable[[Case, pytest.MonkeyPatch], Tensor]
"""Changes a setting, or returns another x."""


def of_other_batch(case: Case, patch: pytest.MonkeyPatch) -> Tensor:
    return case.x[:2]


def of_other_strides(case: Case, patch: pytest.MonkeyPatch) -> Tensor:
    return case.x.to(memory_format=torch.channels_last)


def of_other_alignment(case: Case, patch: pytest.MonkeyPatch) -> Tensor:
    return unaligned(case.x)


def of_other_output(case: Case, patch: pytest.MonkeyPatch) -> Tensor:
    patch.setattr(case, "channels_last", False)
    return case.x


def of_other_stream(case: Case, patch: pytest.MonkeyPatch) -> Tensor:
    use_stream(patch, 7)
    return case.x


def of_other_precision(case: Case, patch: pytest.MonkeyPatch) -> Tensor:
    patch.setattr(case, "precision", "ieee" if case.precision == "tf32" else "tf32")
    return case.x


@NO_COMPILATION
@pytest.mark.parametrize(
    "change",
    [
        of_other_batch,
        of_other_strides,
        of_other_alignment,
        of_other_output,
        of_other_stream,
        of_other_precision,
    ],
    ids=lambda change: change.__name__.removeprefix("of_other_"),
)
def test_each_kind_of_call_is_prepared_once(change: Change, made: Made) -> None:
    """Launches are never those of another kind; the first kind stays prepared; only streams share nothing."""
    case = Case("up" if change is of_other_output else "down")
    first = case()
    call = new()
    case()
    check_equal(call, new())
    assert made.counts() == (1, 1)
    plans = len(launcher._plans)
    with pytest.MonkeyPatch.context() as patch:
        x = change(case, patch)
        for _ in range(2):
            y = case(x)
            other = new()
            check_call(other, x, y, case.stages, precision=case.precision)
            assert made.counts() == (2, 2 if change is of_other_stream else 1)
    if change is of_other_alignment:
        assert len(launcher._plans) == plans + 1, "only the first product reads x"
    if change is of_other_stream:
        assert other[0].tensors["buffers"] != call[0].tensors["buffers"]
        assert other[0].tensors["state_ptr"] != call[0].tensors["state_ptr"]
    for x in (case.x, case.x.clone()):
        y = case(x)
        again = new()
        check_equal(call, again)
        check_call(again, x, y, case.stages)
    assert made.counts()[0] == 2
    assert y.stride() == first.stride()


@NO_COMPILATION
def test_autocast_packs_the_weights_in_its_dtype(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    """It is as for a GPU, where a Chain casts x itself; without autocast, the first preparation is used."""
    bypass = ops.can_bypass_dispatcher
    monkeypatch.setattr(ops, "can_bypass_dispatcher", lambda x, autocast: bypass(x, autocast=True))
    case = Case("down")
    case()
    call = new()
    for i in range(2):
        for n, cast in enumerate((torch.float16, torch.bfloat16), 2):
            with torch.autocast("cpu", cast):
                y = case()
            other = new()
            assert y.dtype == cast
            check_call(other, case.x.to(cast), y, case.stages, other[1].tensors["x"][0])
            assert other[0].tensors["weights"] == call[0].tensors["weights"], "no cast copy of a weight"
            assert made.counts() == ((3, 3) if i else (n, n))
        case()
        check_equal(call, new())
    assert made.counts() == (3, 3)


@NO_COMPILATION
def test_another_dtype_is_prepared_for(made: Made) -> None:
    """Of x and all weights: a network that has been converted, at unchanged places in the modules."""
    case = Case("down")
    case()
    new()
    for stage in case.stages:
        stage.weight.data = stage.weight.data.bfloat16()
    with pytest.raises(TypeError, match="dtype"):
        case()
    x = case.x.bfloat16()
    for _ in range(2):
        y = case(x)
        check_call(new(), x, y, case.stages)
    assert made.alive() == (1, 1)
