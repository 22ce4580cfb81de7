"""Steps are read in order, each once, while a device is some steps ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from dcgan.checkpoint import Folder
from dcgan.data import Images
from dcgan.errors import RunError
from dcgan.training import readings
from dcgan.training.readings import NotFiniteLoss, Position, Readings, Row
from dcgan.training.run import Run, follow
from dcgan.training.settings import Settings
from dcgan.training.step import Result
from dcgan.training.stop import Stop

CPU = torch.device("cpu")


def position(step: int) -> Position:
    return Position(step // 3, step % 3, step, 8 * step)


def result(*values: float) -> Result:
    return Result(*map(torch.tensor, values))


@pytest.fixture
def _ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "AHEAD", {"cpu": 4})


@pytest.mark.usefixtures("_ahead")
def test_the_last_few_steps_are_left_for_the_next_time() -> None:
    unread = Readings(CPU)
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


def test_on_a_cpu_every_step_is_read() -> None:
    unread = Readings(CPU)
    unread.add(position(0), position(1), result(1, 1, 0, 0))
    assert len(unread.read(everything=False)) == 1


def test_a_loss_that_is_not_finite_is_named_with_its_step() -> None:
    unread = Readings(CPU)
    for step in range(5):
        loss = float("inf") if step == 3 else 1.0
        unread.add(position(step), position(step + 1), result(1.0, loss, 0.5, 0.5))
    with pytest.raises(NotFiniteLoss, match=r"loss_g is inf at step 4 \(epoch 2, batch 1\)"):
        unread.read(everything=True)


class Told:
    """A watcher."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.calls: list[int] = []

    def steps(self, rows: list[Row]) -> None:
        self.rows += rows
        self.calls.append(len(rows))

    def samples(self, images: Any, position: Any) -> None:
        assert self.rows[-1].step == position.step, "a grid is of what has been told"

    def score(self, value: float, position: Any) -> None: ...


def lived(out: Path, stop: Stop | None = None, **given: Any) -> tuple[Told, Run]:
    names = runs.TINY.keys() - {"dataset", "limit", "device"}
    settings = Settings.of({name: runs.TINY[name] for name in names} | {"checkpoint_interval": 0} | given)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (44, 1, 32, 32), dtype=torch.uint8, generator=random)
    run, told = Run(settings, Images(pixels, "fake"), CPU), Told()
    follow(run, Folder(out), told, stop or Stop())
    return told, run


@pytest.mark.parametrize("log_interval", [1, 2, 5])
def test_a_run_tells_the_same_whether_the_device_is_ahead(
    log_interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, _ = lived(tmp_path / "a", log_interval=log_interval)
    monkeypatch.setattr(readings, "AHEAD", {"cpu": 3})
    later, _ = lived(tmp_path / "b", log_interval=log_interval)
    assert later.rows == at_once.rows
    assert [row.step for row in later.rows] == list(range(1, runs.STEPS + 1))
    assert all(later.calls), "nobody is told of nothing"


@pytest.mark.usefixtures("_ahead")
def test_stopped_everything_is_told_and_saved(tmp_path: Path) -> None:
    stop = Stop()
    step = TellsToStop(stop, 4)
    told, run = lived_with(tmp_path, stop, step)
    assert run.position.step == 4
    assert [row.step for row in told.rows] == [1, 2, 3, 4]
    assert Folder(tmp_path).resume(print)[0].step == 4


class TellsToStop:
    """A signal that comes while a step is taken."""

    def __init__(self, stop: Stop, at: int) -> None:
        self.stop, self.at, self.count = stop, at, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.stop.signal = 15


def lived_with(out: Path, stop: Stop, each: TellsToStop) -> tuple[Told, Run]:
    original = Run.step

    def step(self: Run, real: Any, noise: Any) -> Result:
        each()
        return original(self, real, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        return lived(out, stop, log_interval=2)


@pytest.mark.usefixtures("_ahead")
def test_a_nan_stops_the_run_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, steps = Run.step, []

    def step(self: Run, real: Any, noise: Any) -> Result:
        steps.append(None)
        found = original(self, real, noise)
        return found._replace(loss_d=found.loss_d * float("nan")) if len(steps) == 3 else found

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(RunError, match=r"loss_d is nan at step 3 \(epoch 1, batch 3\)\. There is no"):
        lived(tmp_path, log_interval=1)
    assert len(steps) <= 3 + 4
