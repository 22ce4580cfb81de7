"""Tests of checkpoint files and the folder that manages them."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcgan import checkpoint as checkpoints
from dcgan.checkpoint import Checkpoint, CheckpointError, Folder
from dcgan.errors import RunError
from dcgan.networks import Architecture
from tests.support import train_runs


def make_checkpoint(step: int = 0, score: float | None = None) -> Checkpoint:
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, betas=(0.5, 0.999))
    layer(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return Checkpoint(
        Architecture(features_g=8),
        generator=layer.state_dict(),
        discriminator=layer.state_dict(),
        optimizer_g=optimizer.state_dict(),
        optimizer_d=optimizer.state_dict(),
        step=step,
        random={"cpu": torch.get_rng_state()},
        config={"lr": 1e-3, "classes": ["a"], "ema": None},
        score=score,
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = make_checkpoint(7, 1.5)
    checkpoints.write(saved, tmp_path / "one.pt")
    train_runs.assert_same(vars(checkpoints.read(tmp_path / "one.pt")), vars(saved), "")
    assert list(tmp_path.iterdir()) == [tmp_path / "one.pt"]
    torch.load(tmp_path / "one.pt", weights_only=True)


def test_any_damage_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "one.pt"
    checkpoints.write(make_checkpoint(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        data = next(i for i in archive.infolist() if "/data/" in i.filename and i.file_size >= 24)
    start = data.header_offset + 30 + len(data.filename)
    rng = random.Random(0)
    damaged = [whole[:n] for n in (0, 1, len(whole) // 2, len(whole) - 1)]
    for _ in range(20):
        at = rng.randrange(start, len(whole) - 200)
        damaged.append(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    for content in damaged[:4]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"one\.pt"):
            checkpoints.read(path)
    path.write_bytes(whole)
    expected = vars(checkpoints.read(path))
    for content in damaged[4:]:
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):  # no error: the byte was padding between two records
            train_runs.assert_same(vars(checkpoints.read(path)), expected, "")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_is_not_executed(how: str, tmp_path: Path) -> None:
    path, trap = tmp_path / "evil.pt", tmp_path / "trap"
    if how == "torch":
        torch.save({"format": checkpoints.FORMAT, "generator": Evil(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(trap)))
    for load in (checkpoints.read, checkpoints.load):
        with pytest.raises(CheckpointError, match=r"evil\.pt"):
            load(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "not a checkpoint of a dcgan run"),
        ([1, 2], "not a checkpoint of a dcgan run"),
        ({"format": checkpoints.FORMAT, "version": 99}, "version 99; only version 1 can be read"),
        ({"format": checkpoints.FORMAT, "version": 1}, "damaged checkpoint"),
    ],
)
def test_files_of_another_kind(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(tmp_path / "file.pt")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.pt: No such file"):
        checkpoints.read(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="directory"):
        checkpoints.read(tmp_path)


def test_the_folder_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "checkpoints", keep=2)
    assert folder.last() is None
    assert folder.best() is None
    for step, score in enumerate([5.0, 2.0, None, 3.0, 2.5, None], start=1):
        path = folder.save(make_checkpoint(step, score))
        assert folder.last() == path
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "best.pt",
        "last.pt",
        "step-000000002.pt",
        "step-000000005.pt",
        "step-000000006.pt",
    ]
    assert checkpoints.read(folder.path / "best.pt").step == 2
    assert checkpoints.read(folder.path / "last.pt").step == 6
    again = Folder(folder.path, keep=1)  # reads the best score from the file
    again.save(make_checkpoint(7, 2.2))
    assert checkpoints.read(again.path / "best.pt").step == 2
    again.save(make_checkpoint(8, 1.0))
    assert sorted(p.name for p in again.path.glob("step*")) == ["step-000000008.pt"]


def test_damaged_checkpoints_are_skipped_and_reported(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for step in (1, 2, 3):
        folder.save(make_checkpoint(step))
    for step in (2, 3):
        path = tmp_path / f"step-{step:09d}.pt"
        path.write_bytes(path.read_bytes()[:-100])
    messages: list[str] = []
    found, path = folder.resume(messages.append)
    assert found.step == 1
    assert path.name == "step-000000001.pt"
    assert ["step-000000003" in line for line in messages] == [True, False]
    assert all("going back to the previous checkpoint, step-000000001.pt" in line for line in messages)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        folder.resume(messages.append)


def test_a_full_disk_leaves_existing_files_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.save(make_checkpoint(1, 1.0))
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"step-000000002\.pt: No space left on device\. Earlier checkpoints"):
        folder.save(make_checkpoint(2, 0.5))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert checkpoints.read(tmp_path / "last.pt").step == 1
    assert checkpoints.read(tmp_path / "best.pt").step == 1


def test_temporary_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-000000001.pt.4711.tmp"
    leftover.write_bytes(b"half")
    Folder(tmp_path).save(make_checkpoint(2))
    assert not leftover.exists()
