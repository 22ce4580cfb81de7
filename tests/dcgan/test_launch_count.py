"""The launches and the memory of a captured training step, and the harness that counts them without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.gpu.tools import predict
from dcgan.kernels.gpu.tools.layers import networks, step_passes
from dcgan.kernels.loss import bce_with_logits, grouped_bce_with_logits
from tests.support import launches
from tests.support.launches import Launched, Memory, Observer

MAX_LAUNCHES = {64: 120, 1024: 150}
MAX_MEMORY = {64: 1.0, 1024: 0.76}
"""Largest peak, as a fraction of that of the reference networks."""


@pytest.fixture(scope="module", params=MAX_LAUNCHES)
def step(request: pytest.FixtureRequest) -> tuple[int, launches.Measured]:
    return request.param, launches.measure(request.param)


def test_a_step_has_few_launches(step: tuple[int, launches.Measured]) -> None:
    batch, measured = step
    assert len(measured.launches) <= MAX_LAUNCHES[batch], measured.totals().most_common()


def test_a_step_runs_on_the_triton_engine(step: tuple[int, launches.Measured]) -> None:
    totals = step[1].totals()
    assert sum(count for name, count in totals.items() if name.endswith("_kernel")) > 60
    assert totals["aten._fused_adam_"] == totals["aten._foreach_add_"] == 2


def test_the_predicted_step_has_these_launches(step: tuple[int, launches.Measured]) -> None:
    batch, measured = step
    passes, shapes = step_passes(batch), networks()
    found = predict.rows(shapes, passes, "bfloat16", compiled=False)
    predicted = predict.step(found, predict.rest(shapes, passes, "bfloat16"))
    assert predicted.launches == len(measured.launches)
    assert 0 < predicted.roofline < predicted.products < predicted.seconds < 0.01


def test_the_peak_of_memory_is_bounded(step: tuple[int, launches.Measured]) -> None:
    batch, measured = step
    assert measured.peak <= MAX_MEMORY[batch] * launches.reference_peak(batch)


# --- the harness --------------------------------------------------------------------------------------------


def observed(function: Callable[[], Any]) -> tuple[list[Launched], Memory]:
    found: list[Launched] = []
    memory = Memory()
    with launches.recording(found), Observer(memory, found):
        function()
    return found, memory


def test_launches_are_recorded_in_order_and_views_have_none() -> None:
    x = torch.ones(2, 3)
    found, _ = observed(lambda: x.t()[1:].contiguous().reshape(-1).mul_(2).sum())
    assert found == [Launched("aten.clone", (2, 2)), Launched("aten.mul_", (4,)), Launched("aten.sum", ())]


def test_empty_tensors_have_no_launch_and_padding_has_two() -> None:
    assert not observed(lambda: torch.zeros(0, 3) + 1)[0]
    found, _ = observed(lambda: torch.nn.functional.pad(torch.empty(3), (1, 1)))
    assert found == [Launched("aten.constant_pad_nd", (5,))] * 2


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)),
        lambda: torch.ones(2, 2) @ torch.ones(2, 2),
        lambda: torch.ones(2).sum().item(),
    ],
    ids=["a convolution", "an unknown operator", "a read on the host"],
)
def test_an_operator_that_must_not_occur_is_an_error(function: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="op must be one whose number of launches is known"):
        observed(function)


@pytest.mark.parametrize("groups", [1, 2])
def test_operators_and_their_backward_are_observed_inside(groups: int) -> None:
    """The loss of groups takes one launch each way, and the probability's absent gradient none."""
    logits = torch.zeros(5000, requires_grad=True)

    def step() -> None:
        if groups == 1:
            bce_with_logits(logits, 0.9)[0].backward()
        else:
            grouped_bce_with_logits(logits, (0.9, 0.0))[0].sum().backward()

    found, memory = observed(step)
    names = [name for name, _ in found if name not in ("aten.sum", "aten.ones_like")]
    assert names == ["bce._bce_kernel", "bce._bce_backward_kernel"]
    assert logits.grad is not None
    assert memory.now == logits.grad.nbytes  # allocated by the operator; loss and probability are freed
    assert ops.engine() == "auto"


def test_a_storage_is_counted_once_until_its_last_view_is_freed() -> None:
    memory = Memory()
    with Observer(memory):
        x = torch.empty(100)
        view = x[50:]
        assert memory.now == memory.peak == 400
        del x
        assert memory.now == 400
        del view
    assert (memory.now, memory.peak) == (0, 400)


def test_a_tensor_that_only_autograd_holds_is_live() -> None:
    weight = torch.ones(100, requires_grad=True)
    memory = Memory()

    def loss() -> Tensor:
        return weight.exp().exp().sum()

    with Observer(memory):
        last = loss()
        assert memory.now == 2 * 400 + 4
        last.backward()
        assert weight.grad is not None
        assert memory.now == 400 + 4
