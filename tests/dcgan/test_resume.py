"""A run that is killed and resumed ends bit-identical to an uninterrupted one."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcgan import checkpoint as checkpoints
from dcgan import files
from dcgan.errors import InputError
from dcgan.networks import Architecture
from tests.support import train_runs

KINDS: dict[str, dict[str, Any]] = {
    "dcgan": {"ema": 0.9, "sample_interval": 3},
    "augmented": {"ema": 0.999, "flip": True, "diffaugment": ["color", "translation", "cutout"]},
    "reference": {"engine": "reference", "loss": "minimax"},
    "mlp": {"model": "mlp", "clip": 1.0},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of an uninterrupted run of a kind."""

    @functools.cache
    def of(kind: str) -> Path:
        out = tmp_path_factory.mktemp("uninterrupted") / kind
        process = train_runs.start(out, train_runs.TINY | KINDS[kind], False)
        process.join()
        assert process.exitcode == 0
        assert train_runs.final(out).step == train_runs.STEPS
        return out

    return of


def start_or_resume(out: Path, kind: str, before: Callable[[], None] | None = None) -> Any:
    resume = (out / "config.yaml").exists()
    return train_runs.start(out, {} if resume else train_runs.TINY | KINDS[kind], resume, before)


def kill_in_step(number: int) -> None:
    """Make this process kill itself in its n-th step."""
    from dcgan.training.fast_step import TrainStep

    step, count = TrainStep._step, 0

    def counting(self: TrainStep, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        result = step(self, *arguments)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    TrainStep._step = counting  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_during_steps(kind: str, uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    for number in (4, 1, 3, 5):
        process = start_or_resume(out, kind, functools.partial(kill_in_step, number))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start_or_resume(out, kind)
    process.join()
    assert process.exitcode == 0
    train_runs.assert_same_end(out, uninterrupted(kind))


def kill_in_write(what: str, number: int) -> None:
    """Make this process kill itself in its n-th checkpoint write, mid-file or around a move."""
    count = 0

    def killing(function: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **more)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def half(content: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            file.write(b"PK" * 5000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    save = torch.save
    if what == "file":
        torch.save = half
    elif what in ("before the link", "after the link"):
        checkpoints.point = killing(files.point, what.startswith("after"))  # type: ignore[attr-defined]
    else:
        checkpoints.write = killing(checkpoints.write, what == "after the move")


@pytest.mark.parametrize(
    "what", ["file", "before the move", "after the move", "before the link", "after the link"]
)
@pytest.mark.parametrize("number", [1, 3])
def test_killed_during_a_checkpoint_write(
    what: str, number: int, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start_or_resume(out, "dcgan", functools.partial(kill_in_write, what, number))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = start_or_resume(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    train_runs.assert_same_end(out, uninterrupted("dcgan"))
    assert not list((out / "checkpoints").glob(".*"))


def test_killed_at_random_times(uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    """Kill the process 20 times at random times after its start: up to 1.5 s, or more on a busy machine."""
    out, times, kills, starts, span = tmp_path / "run", random.Random(0), 0, 0, 1.5
    reached: set[int] = set()
    while kills < 20 or len(reached) <= 3:
        starts += 1
        assert starts < 60
        if starts % 5 == 0 and len(reached) <= 1:  # the kills hit the start-up
            span *= 1.5
        if (out / "checkpoints" / "last.pt").exists() and train_runs.final(out).step == train_runs.STEPS:
            out = tmp_path / f"run-{starts}"  # the run is complete: start another
        process = start_or_resume(out, "dcgan", slowly)
        process.join(times.uniform(0.0, span))
        train_runs.send_signal(process)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (out / "checkpoints" / "last.pt").exists():
            reached.add(train_runs.final(out).step)
    process = start_or_resume(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    train_runs.assert_same_end(out, uninterrupted("dcgan"))


def test_partial_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for given in (train_runs.TINY | {"epochs": 1}, {"epochs": 2}):
        process = train_runs.start(out, given, out.exists())
        process.join()
        assert process.exitcode == 0
        if "dataset" in given:
            for folder in (out, out / "samples", out / "checkpoints"):
                (folder / ".step-000000001.png.1.tmp").write_bytes(b"half")
    assert not list(out.rglob(".*.tmp"))


def slowly() -> None:
    """Slow the steps down, so that more kills hit a step than the start-up."""
    from dcgan.training.fast_step import TrainStep

    step = TrainStep._step

    def waiting(self: TrainStep, *arguments: Any) -> Any:
        time.sleep(0.02)
        return step(self, *arguments)

    TrainStep._step = waiting  # type: ignore[method-assign]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(
    number: int, status: int, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start_or_resume(out, "dcgan", functools.partial(signal_in_step, number, 5))
    process.join()
    assert process.exitcode == status
    assert train_runs.final(out).step == 5
    process = start_or_resume(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    train_runs.assert_same_end(out, uninterrupted("dcgan"))


def signal_in_step(which: int, number: int) -> None:
    from dcgan.training.fast_step import TrainStep

    step, count = TrainStep._step, 0

    def counting(self: TrainStep, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), which)
        return step(self, *arguments)

    TrainStep._step = counting  # type: ignore[method-assign]


def test_a_damaged_last_checkpoint_falls_back_to_the_previous_one(
    uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start_or_resume(out, "dcgan", functools.partial(kill_in_step, 8))
    process.join()
    last = (out / "checkpoints" / "last.pt").resolve()
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    process = start_or_resume(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    train_runs.assert_same_end(out, uninterrupted("dcgan"))


@pytest.mark.parametrize(
    ("other", "was", "now"),
    [
        ({"features_g": 8}, "features_g=8", "features_g=64"),
        ({"channels": 3, "image_size": 32}, "channels=3, image_size=32", "channels=1, image_size=64"),
        ({"model": "mlp"}, "model='mlp'", "model='dcgan'"),
    ],
    ids=["one", "two", "the model"],
)
def test_the_differences_between_architectures_are_reported(
    other: dict[str, Any], was: str, now: str
) -> None:
    from dcgan.training.run import Run

    run: Any = types.SimpleNamespace(architecture=Architecture())
    message = f"^the checkpoint has {was}, the run has {now}$"
    with pytest.raises(InputError, match=message):
        Run._check(run, checkpoints.Checkpoint(Architecture(**other), {}, {}))
