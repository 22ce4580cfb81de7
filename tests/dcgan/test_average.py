"""The moving average: its warmed-up decay against a float64 recurrence, and its counter.

:mod:`tests.dcgan.test_train_step_options` has it within a training step, :mod:`tests.dcgan.test_resume` in a
resumed run.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dcgan.training.average import MovingAverage


class Drifting(nn.Module):
    """Parameters and buffers of several kinds, which :meth:`move` changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def move(self) -> None:
        for parameter in self.parameters():
            parameter.copy_(torch.randn_like(parameter))
        self.mean.copy_(torch.randn(4))  # type: ignore[operator]
        self.count += 1  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("decay", "updates"), [(0.999, 0), (0.9, 0), (0.0, 0), (0.999, 12_345), (0.5, 7)])
def test_updates(dtype: torch.dtype, decay: float, updates: int) -> None:
    """Float tensors follow the recurrence in float64, whatever the generator's dtype; integers are copied."""
    network = Drifting()
    network.move()
    average = copy.deepcopy(network).to(dtype)
    moving = MovingAverage(average, network, decay, updates)
    expected = {name: value.double().clone() for name, value in average.state_dict().items()}
    for n in range(updates + 1, updates + 31):
        network.move()
        moving.update()
        d = min(decay, (1 + n) / (10 + n))
        for name, value in network.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * value.double()
        for name, value in average.state_dict().items():
            if name == "count":
                assert value == network.count
                assert value.dtype == torch.int64
            else:
                assert value.dtype == dtype
                tolerance = 1e-14 if dtype == torch.float64 else 1e-6
                torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance, msg=name)
    assert moving.updates == updates + 30
    assert not any(value.grad_fn for value in average.parameters())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.floats(0.9, 0.9999))
def test_the_initial_weights_are_forgotten(steps: int, decay: float) -> None:
    """From 0 towards 1, the distance left is the initial weights' share, which the docstring bounds."""
    network, average = nn.Linear(1, 1, dtype=torch.float64), nn.Linear(1, 1, dtype=torch.float64)
    for module, value in ((network, 1.0), (average, 0.0)):
        for parameter in module.parameters():
            nn.init.constant_(parameter, value)
    moving = MovingAverage(average, network, decay)
    for _ in range(steps):
        moving.update()
    share = 1 - float(average.weight.detach())
    exact = math.prod(min(decay, (1 + n) / (10 + n)) for n in range(1, steps + 1))
    assert share == pytest.approx(exact, rel=1e-9, abs=1e-12)
    if (1 + steps) / (10 + steps) <= decay:
        assert share <= (6 / steps) ** 9 + 1e-12


def test_continued() -> None:
    """An average continued from its count has the same bits as one that was not interrupted."""
    network = Drifting()
    states = []
    for _ in range(20):
        network.move()
        states.append(copy.deepcopy(network.state_dict()))
    whole, parts = copy.deepcopy(network), copy.deepcopy(network)
    moving = MovingAverage(whole, network, 0.999)
    first, second = MovingAverage(parts, network, 0.999), MovingAverage(parts, network, 0.999, 9)
    for n, state in enumerate(states):
        network.load_state_dict(state)
        moving.update()
        (first if n < 9 else second).update()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_a_half_precision_generator() -> None:
    """A wider copy of a bfloat16 network averages values that bfloat16 could not."""
    network = nn.Linear(2, 2).bfloat16()
    average = copy.deepcopy(network).float()
    moving = MovingAverage(average, network, 0.999, 100_000)
    before = average.weight.detach().clone()
    with torch.no_grad():
        network.weight += 1
    moving.update()
    expected = before + 0.001 * (network.weight.float() - before)
    torch.testing.assert_close(average.weight.detach(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(average.weight, before)
