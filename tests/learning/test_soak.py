"""2,000 steps of TrainStep give no NaN and leak no memory, by the criterion of :mod:`tests.learning.soak`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learning import soak
from tests.learning.soak import SETTINGS, Soak

GOOD = Soak(
    batches=(16,),
    steps=2000,
    finite=True,
    resident_bytes=(400 << 20, 402 << 20),
    tensors=(100, 100),
    objects=(90_000, 90_010),
    last={"loss_d": 1.0, "loss_g": 1.5, "d_x": 0.6, "d_g_z": 0.3},
    seconds=60.0,
)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(16,), (16, 1, 7, 32, 5)])
def test_2000_steps(sizes: tuple[int, ...]) -> None:
    found = soak.soak(SETTINGS, sizes)
    print(found)
    assert found.steps == 2000
    assert not found.problems


def test_the_slow_test_runs_the_cases_of_the_command() -> None:
    assert soak.batches(SETTINGS) == [(16,), (16, 1, 7, 32, 5)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"finite": False}, "not finite"),
        ({"resident_bytes": (400 << 20, 420 << 20)}, "the process grew by 21.0 MB"),
        ({"tensors": (100, 101)}, "tensors grew from 100 to 101"),
        ({"objects": (90_000, 91_500)}, "objects grew from 90000 to 91500"),
        ({"last": GOOD.last | {"d_x": 0.3}}, "D has given up"),
        ({"last": GOOD.last | {"d_g_z": 0.001}}, "D has won"),
    ],
)
def test_the_criterion(changes: dict[str, Any], problem: str | None) -> None:
    problems = GOOD._replace(**changes).problems
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Settings of a soak of 24 tiny steps, of which the first 12 are warm-up."""
    monkeypatch.setattr(soak, "WARM", 12)
    monkeypatch.setattr(soak, "LAST", 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield replace(SETTINGS, steps=24, features=2, batch=4)
    torch.set_num_threads(threads)


def test_a_short_soak(short: Any) -> None:
    found = soak.soak(short, (4, 1, 3))
    assert found.finite
    assert found.tensors[0] == found.tensors[1] > 0
    assert found.objects[1] - found.objects[0] < soak.OBJECTS
    assert found.resident_bytes[0] > 50 << 20


@pytest.mark.parametrize("what", ["tensor", "nan", "gradient"])
def test_a_faulty_step_is_detected(short: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    kept: list[Tensor] = []
    steps = 0

    class Wrong(soak.TrainStep):
        def __call__(self, real: Tensor, noise: Tensor) -> Any:
            nonlocal steps
            steps += 1
            result = super().__call__(real, noise)
            if what == "tensor":
                kept.append(result.loss_d)
            if what == "nan" and steps == 5:
                result = result._replace(d_x=result.d_x * torch.nan)
            if what == "gradient" and steps == 24:
                next(self.generator.parameters()).data[0] = torch.inf
            return result

    monkeypatch.setattr(soak, "TrainStep", Wrong)
    found = soak.soak(short, (4,))
    assert found.finite == (what == "tensor")
    assert (found.tensors[1] - found.tensors[0] >= 12) == (what == "tensor")
    assert any(("tensors grew" if what == "tensor" else "not finite") in p for p in found.problems)
