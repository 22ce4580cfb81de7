"""Step results are read in order and exactly once, while the device may run several steps ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcgan.checkpoint import Folder
from dcgan.data import Images
from dcgan.errors import RunError
from dcgan.settings import Settings
from dcgan.training import loss_readback
from dcgan.training.loss_readback import NotFiniteLoss, Position, ResultQueue, Row
from dcgan.training.reference_step import Result
from dcgan.training.run import Run, follow
from dcgan.training.stop import Stop
from tests.support import train_runs

CPU = torch.device("cpu")


def position(step: int) -> Position:
    return Position(step // 3, step % 3, step, 8 * step)


def result(*values: float) -> Result:
    return Result(*map(torch.tensor, values))


@pytest.fixture
def _steps_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_readback, "STEPS_IN_FLIGHT", {"cpu": 4})


@pytest.mark.usefixtures("_steps_in_flight")
def test_steps_in_flight_are_left_for_the_next_read() -> None:
    unread = ResultQueue(CPU)
    seen: list[Row] = []
    counts = []
    for step in range(10):
        unread.add(position(step), position(step + 1), result(step, 0.5, 0.25, 0.75))
        if step % 3 == 2:
            rows = unread.read(everything=False)
            counts.append(len(rows))
            seen += rows
    seen += unread.read(everything=True)
    assert counts == [0, 2, 3]
    assert unread.read(everything=True) == []
    assert [row.step for row in seen] == list(range(1, 11))
    assert seen[3] == Row(4, 2, 1, 32, 3.0, 0.5, 0.25, 0.75)


def test_every_step_is_read_on_a_cpu() -> None:
    unread = ResultQueue(CPU)
    unread.add(position(0), position(1), result(1, 1, 0, 0))
    assert len(unread.read(everything=False)) == 1


def test_the_step_of_a_loss_that_is_not_finite_is_reported() -> None:
    unread = ResultQueue(CPU)
    for step in range(5):
        loss = float("inf") if step == 3 else 1.0
        unread.add(position(step), position(step + 1), result(1.0, loss, 0.5, 0.5))
    with pytest.raises(NotFiniteLoss, match=r"loss_g is inf at step 4 \(epoch 2, batch 1\)"):
        unread.read(everything=True)


class RecordingWatcher:
    """A watcher that records what it receives."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.calls: list[int] = []
        self.grids: list[int] = []

    def steps(self, rows: list[Row]) -> None:
        self.rows += rows
        self.calls.append(len(rows))

    def samples(self, images: Any, position: Any) -> None:
        reported = self.rows[-1].step if self.rows else 0
        assert reported == position.step, "the steps up to a grid are reported first"
        self.grids.append(position.step)

    def scores(self, values: Any, position: Any) -> None: ...

    def saved(self) -> None: ...


def run_training(out: Path, stop: Stop | None = None, **given: Any) -> tuple[RecordingWatcher, Run]:
    names = train_runs.TINY.keys() - {"dataset", "limit", "device"}
    settings = Settings.of(
        {name: train_runs.TINY[name] for name in names} | {"checkpoint_interval": 0} | given
    )
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (44, 1, 32, 32), dtype=torch.uint8, generator=random)
    run, watcher = Run(settings, Images(pixels, "fake"), CPU), RecordingWatcher()
    follow(run, Folder(out), watcher, stop or Stop())
    return watcher, run


@pytest.mark.parametrize("log_interval", [1, 2, 5])
def test_reports_do_not_depend_on_the_steps_in_flight(
    log_interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    immediate, _ = run_training(tmp_path / "a", log_interval=log_interval)
    monkeypatch.setattr(loss_readback, "STEPS_IN_FLIGHT", {"cpu": 3})
    delayed, _ = run_training(tmp_path / "b", log_interval=log_interval)
    assert delayed.rows == immediate.rows
    assert [row.step for row in delayed.rows] == list(range(1, train_runs.STEPS + 1))
    assert all(delayed.calls), "no empty reports"
    assert immediate.grids == delayed.grids == [0, train_runs.STEPS // 2, train_runs.STEPS]


@pytest.mark.usefixtures("_steps_in_flight")
def test_a_stopped_run_is_reported_and_saved_completely(tmp_path: Path) -> None:
    stop = Stop()
    step = StopAt(stop, 4)
    watcher, run = run_training_with_stop(tmp_path, stop, step)
    assert run.position.step == 4
    assert [row.step for row in watcher.rows] == [1, 2, 3, 4]
    assert Folder(tmp_path).resume(print)[0].step == 4


class StopAt:
    """Requests a stop during a given step, like a signal."""

    def __init__(self, stop: Stop, at: int) -> None:
        self.stop, self.at, self.count = stop, at, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.stop.signal = 15


def run_training_with_stop(out: Path, stop: Stop, before_step: StopAt) -> tuple[RecordingWatcher, Run]:
    original = Run.step

    def step(self: Run, real: Any, noise: Any) -> Result:
        before_step()
        return original(self, real, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        return run_training(out, stop, log_interval=2)


@pytest.mark.usefixtures("_steps_in_flight")
def test_a_nan_stops_the_run_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, steps = Run.step, []

    def step(self: Run, real: Any, noise: Any) -> Result:
        steps.append(None)
        found = original(self, real, noise)
        return found._replace(loss_d=found.loss_d * float("nan")) if len(steps) == 3 else found

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(RunError, match=r"loss_d is nan at step 3 \(epoch 1, batch 3\)\. There is no"):
        run_training(tmp_path, log_interval=1)
    assert len(steps) <= 3 + 4
