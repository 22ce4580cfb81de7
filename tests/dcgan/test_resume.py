"""A run that is killed and resumed ends with the same bits as one that is not."""

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
import runs
import torch

from dcgan import checkpoint as checkpoints
from dcgan import files
from dcgan.errors import InputError
from dcgan.networks import Architecture

KINDS: dict[str, dict[str, Any]] = {
    "dcgan": {"ema": 0.9, "sample_interval": 3},
    "reference": {"engine": "reference", "loss": "minimax"},
    "mlp": {"model": "mlp", "clip": 1.0},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an uninterrupted run of a kind."""

    @functools.cache
    def of(kind: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / kind
        process = runs.start(out, runs.TINY | KINDS[kind], False)
        process.join()
        assert process.exitcode == 0
        assert runs.final(out).step == runs.STEPS
        return out

    return of


def go_on(out: Path, kind: str, before: Callable[[], None] | None = None) -> Any:
    resume = (out / "config.yaml").exists()
    return runs.start(out, {} if resume else runs.TINY | KINDS[kind], resume, before)


def die_in_step(number: int) -> None:
    """Kill this process in its n-th step."""
    from dcgan.training.fused import TrainStep

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
def test_killed_in_steps(kind: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    for number in (4, 1, 3, 5):
        process = go_on(out, kind, functools.partial(die_in_step, number))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = go_on(out, kind)
    process.join()
    assert process.exitcode == 0
    runs.assert_same_end(out, whole(kind))


def die_in_write(what: str, number: int) -> None:
    """Kill this process in its n-th checkpoint write: half-way through the file, or around a move."""
    count = 0

    def dying(function: Callable[..., Any], after: bool) -> Callable[..., Any]:
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
        checkpoints.point = dying(files.point, what.startswith("after"))  # type: ignore[attr-defined]
    else:
        checkpoints.write = dying(checkpoints.write, what == "after the move")


@pytest.mark.parametrize(
    "what", ["file", "before the move", "after the move", "before the link", "after the link"]
)
@pytest.mark.parametrize("number", [1, 3])
def test_killed_in_a_checkpoint_write(
    what: str, number: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = go_on(out, "dcgan", functools.partial(die_in_write, what, number))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = go_on(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    runs.assert_same_end(out, whole("dcgan"))
    assert not list((out / "checkpoints").glob(".*"))


def test_killed_at_random_moments(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """20 times, each some way into what the process does, however fast this machine is."""
    out, moments, kills, lives = tmp_path / "run", random.Random(0), 0, 0
    reached: set[int] = set()
    while kills < 20:
        lives += 1
        assert lives < 60
        if (out / "checkpoints" / "last.pt").exists() and runs.final(out).step == runs.STEPS:
            out = tmp_path / f"run-{lives}"  # it got to the end: again
        process = go_on(out, "dcgan", slowly)
        waited = moments.uniform(0.0, 1.5)
        process.join(waited)
        runs.kill(process)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (out / "checkpoints" / "last.pt").exists():
            reached.add(runs.final(out).step)
    process = go_on(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    runs.assert_same_end(out, whole("dcgan"))
    assert len(reached) > 3


def test_what_killed_processes_left_half_written_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for folder in (out, out / "samples", out / "checkpoints"):
        folder.mkdir()
        (folder / ".step-000000001.png.1.tmp").write_bytes(b"half")
    process = go_on(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    assert not list(out.rglob(".*.tmp"))


def slowly() -> None:
    """Steps of this run take no time; a kill is to come within one more often than before all."""
    from dcgan.training.fused import TrainStep

    step = TrainStep._step

    def waiting(self: TrainStep, *arguments: Any) -> Any:
        time.sleep(0.02)
        return step(self, *arguments)

    TrainStep._step = waiting  # type: ignore[method-assign]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(
    number: int, status: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = go_on(out, "dcgan", functools.partial(signal_in_step, number, 5))
    process.join()
    assert process.exitcode == status
    assert runs.final(out).step == 5
    process = go_on(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    runs.assert_same_end(out, whole("dcgan"))


def signal_in_step(which: int, number: int) -> None:
    from dcgan.training.fused import TrainStep

    step, count = TrainStep._step, 0

    def counting(self: TrainStep, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), which)
        return step(self, *arguments)

    TrainStep._step = counting  # type: ignore[method-assign]


def test_a_damaged_last_checkpoint_is_said_and_the_one_before_taken(
    whole: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = go_on(out, "dcgan", functools.partial(die_in_step, 8))
    process.join()
    last = (out / "checkpoints" / "last.pt").resolve()
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    process = go_on(out, "dcgan")
    process.join()
    assert process.exitcode == 0
    runs.assert_same_end(out, whole("dcgan"))


@pytest.mark.parametrize(
    ("other", "was", "now"),
    [
        ({"features_g": 8}, "features_g=8", "features_g=64"),
        ({"channels": 3, "image_size": 32}, "channels=3, image_size=32", "channels=1, image_size=64"),
        ({"model": "mlp"}, "model='mlp'", "model='dcgan'"),
    ],
    ids=["one", "two", "the model"],
)
def test_architectures_are_told_apart_by_what_differs(other: dict[str, Any], was: str, now: str) -> None:
    from dcgan.training.run import Run

    run: Any = types.SimpleNamespace(architecture=Architecture())
    message = f"^the checkpoint is of {was}, the run is of {now}$"
    with pytest.raises(InputError, match=message):
        Run._check(run, checkpoints.Checkpoint(Architecture(**other), {}, {}))
