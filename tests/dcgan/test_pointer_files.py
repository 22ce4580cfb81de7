"""Run folders with symlinks, without (exFAT, network drives, Windows), and copied with symlinks followed."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dcgan import checkpoint as checkpoints
from dcgan import files, pretrained
from dcgan.checkpoint import Checkpoint, CheckpointError, Folder
from dcgan.cli.app import app
from dcgan.data import cache
from dcgan.errors import RunError
from dcgan.networks import Architecture
from kernels.cpu import buffers
from tests.support import train_runs

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Architecture(latent_dim=6, channels=1, features_g=4, features_d=4, image_size=32)
KINDS = ["links", "texts", "copied"]


def make_checkpoint(step: int, score: float | None = None) -> Checkpoint:
    """Make a checkpoint whose Generator's first weight is filled with ``step``."""
    generator = SMALL.generator("reference").state_dict()
    generator["main.0.weight"].fill_(step)
    return Checkpoint(SMALL, generator, SMALL.discriminator("reference").state_dict(), step=step, score=score)


def step_of(path: Path, **arguments: Any) -> int:
    return int(pretrained.generator(path, **arguments).main[0].weight.flatten()[0])  # type: ignore[index,union-attr]


def forbid_symlinks(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted") if error is None else error

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)


Later = Callable[[Path], Path]


@pytest.fixture
def later(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Later:
    """Return a function that maps a run's folder to the folder as it is found later."""
    if request.param == "texts":
        forbid_symlinks(monkeypatch)

    def found(folder: Path) -> Path:
        if request.param != "copied":
            return folder
        return Path(shutil.copytree(folder, tmp_path / "copied", symlinks=False))

    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def numbered(*steps: int) -> list[str]:
    return [f"step-{step:09d}.pt" for step in steps]


# --- pointer files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "link", "text", "file"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EPERM, "exFAT"),
        OSError(errno.EOPNOTSUPP, "a network drive"),
        OSError(errno.EINVAL, "WinError 1314"),
        NotImplementedError("symbolic links"),
    ],
    ids=["EPERM", "EOPNOTSUPP", "EINVAL", "NotImplementedError"],
)
def test_a_text_file_replaces_an_unsupported_symlink(
    error: Exception, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "last.pt"
    if before == "link":
        link.symlink_to("step-000000001.pt")
    elif before in ("text", "file"):
        link.write_text("step-000000001.pt\n" if before == "text" else "x" * 1000)
    forbid_symlinks(monkeypatch, error)
    files.point(link, "step-000000002.pt")
    assert not link.is_symlink()
    assert link.read_bytes() == b"step-000000002.pt\n"
    assert files.read_pointer(link) == tmp_path / "step-000000002.pt"
    assert names(tmp_path) == ["last.pt"]
    monkeypatch.undo()
    files.point(link, "step-000000003.pt")
    assert link.is_symlink()
    assert files.read_pointer(link) == tmp_path / "step-000000003.pt"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "../step-000000001.pt",
        "/step-000000001.pt",
        "a\\step-000000001.pt",
        "C:step-000000001.pt",
        "last.pt",
        ".step-000000001.pt",
        "step-000000001.pt\nmore",
        "step-000000001.pt" + 300 * " ",
        "\0",
        "step-000000001.pth",
        "step-x.pt",
    ],
)
def test_only_the_name_of_a_checkpoint_in_the_same_folder_is_followed(text: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "checkpoints")
    for step in (1, 2):
        folder.save(make_checkpoint(step))
    checkpoints.write(make_checkpoint(3), tmp_path / "step-000000001.pt")
    last = folder.path / "last.pt"
    last.unlink()
    last.write_text(text)
    assert folder.last() == folder.path / "step-000000002.pt"
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        pretrained.generator(last)


@pytest.mark.parametrize("text", ["step-000000001.pt", "step-000000001.pt\n", "step-000000001.pt\r\n"])
def test_a_text_file_of_another_program_is_read(text: str, tmp_path: Path) -> None:
    """Git writes the first form where symlinks are not supported; a Windows editor writes the last."""
    folder = Folder(tmp_path)
    for step in (1, 2):
        folder.save(make_checkpoint(step))
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").write_bytes(text.encode())
    assert folder.last() == tmp_path / "step-000000001.pt"
    assert step_of(tmp_path / "last.pt") == 1


@pytest.mark.parametrize("later", ["links", "texts"], indirect=True)
def test_a_dangling_pointer_is_ignored(later: Later, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for step in (1, 2):
        folder.save(make_checkpoint(step, 1.0))
    (tmp_path / "step-000000002.pt").unlink()
    assert folder.last() == tmp_path / "step-000000001.pt"
    assert folder.best() is None
    with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
        pretrained.generator(tmp_path / "last.pt")


# --- lifecycle of a folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("later", KINDS, indirect=True)
@pytest.mark.parametrize("resumed", [True, False])
def test_pointers_and_retention(resumed: bool, later: Later, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "checkpoints", keep=2)
    for step, score in ((1, 2.0), (2, 1.0), (3, 4.0), (4, 3.0)):
        folder.save(make_checkpoint(step, score))
    assert names(folder.path) == ["best.pt", "last.pt", *numbered(2, 3, 4)]

    again = Folder(later(folder.path), keep=2)
    for which, step in (("last", 4), ("best", 2)):
        assert step_of(again.path / f"{which}.pt") == step
        assert step_of(again.path, which=which) == step
        assert checkpoints.read(again.path / f"{which}.pt").step == step
    if resumed:
        found, path = again.resume(lambda _: None)
        assert (found.step, path) == (4, again.path / "step-000000004.pt")
        assert again.best() == again.path / "step-000000002.pt"
        assert all(files.read_pointer(again.path / name) is not None for name in ("last.pt", "best.pt"))
        assert names(again.path) == ["best.pt", "last.pt", *numbered(2, 3, 4)]
    again.save(make_checkpoint(5, 1.5))
    assert step_of(again.path, which="best") == 2
    assert step_of(again.path, which="last") == 5
    again.save(make_checkpoint(6, 0.5))
    for step in (7, 8, 9):
        again.save(make_checkpoint(step, 0.75))
        assert names(again.path) == ["best.pt", "last.pt", *numbered(*sorted({6, step - 1, step}))]
    assert step_of(again.path, which="best") == 6
    assert step_of(again.path, which="last") == 9


@pytest.mark.parametrize("mark", [True, False])
def test_copies_without_the_original_checkpoints(mark: bool, tmp_path: Path) -> None:
    """Only last.pt and best.pt of a folder were kept."""
    for name, step in (("last.pt", 4), ("best.pt", 2)):
        checkpoints.write(make_checkpoint(step, float(step)), tmp_path / name)
    folder = Folder(tmp_path)
    assert folder.last() == tmp_path / "last.pt"
    found, path = folder.resume(lambda _: None, mark)
    assert found.step == 4
    assert path == tmp_path / "step-000000004.pt"
    assert names(tmp_path) == ["best.pt", "last.pt", *(numbered(2, 4) if mark else [])]
    assert step_of(tmp_path, which="best") == 2
    assert step_of(tmp_path, which="last") == 4


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("damaged", ["copy", "step"])
def test_the_intact_one_of_a_checkpoint_and_its_copy_is_used(
    damaged: str, mark: bool, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "checkpoints")
    for step in (1, 2):
        folder.save(make_checkpoint(step))
    again = Folder(Path(shutil.copytree(folder.path, tmp_path / "copied", symlinks=False)))
    path = again.path / ("last.pt" if damaged == "copy" else "step-000000002.pt")
    path.write_bytes(path.read_bytes()[:-100])
    found, _ = again.resume(lambda _: None, mark)
    assert found.step == 2
    if mark:
        assert checkpoints.read(again.path / "step-000000002.pt").step == 2
        assert again.last() == again.path / "step-000000002.pt"


def test_another_checkpoint_of_the_same_step_is_not_overwritten(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.save(make_checkpoint(1))
    own = (tmp_path / "step-000000001.pt").read_bytes()
    other = make_checkpoint(1)
    other.config = {"lr": 3}
    checkpoints.write(other, tmp_path / "best.pt")
    folder.resume(lambda _: None)
    assert (tmp_path / "step-000000001.pt").read_bytes() == own
    assert checkpoints.read(tmp_path / "best.pt").config == {"lr": 3}
    assert folder.best() == tmp_path / "best.pt"


def test_a_pointer_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    folder.save(make_checkpoint(1))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "point", full)
    for act in (lambda: folder.save(make_checkpoint(2)), lambda: folder.resume(lambda _: None)):
        with pytest.raises(RunError, match=r"cannot write into .*: No space left on device"):
            act()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("later", KINDS, indirect=True)
def test_train_resume_and_generate(later: Later, tmp_path: Path) -> None:
    def command(*arguments: str) -> None:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output

    given = {key: value for key, value in train_runs.TINY.items() if not isinstance(value, bool)}
    options = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command("train", *options, "--no-tensorboard", "--out", str(tmp_path / "whole"))
    command("train", *options, "--no-tensorboard", "--out", str(tmp_path / "run"), "--epochs", "1")
    out = later(tmp_path / "run")
    for source in (out, out / "checkpoints" / "last.pt"):
        command("generate", str(source), "-n", "4", "--out", str(tmp_path / "four.png"), "--force")
    command("train", "--resume", "--out", str(out), "--epochs", "2")
    a, b = vars(train_runs.final(out)), vars(train_runs.final(tmp_path / "whole"))
    train_runs.assert_same(a["generator"], b["generator"], "generator")
    train_runs.assert_same(a["optimizer_d"], b["optimizer_d"], "optimizer_d")
    assert len(list((out / "checkpoints").glob("step-*"))) <= 4
    assert not list(out.rglob(".*.tmp"))


# --- systems without some features --------------------------------------------------------------------------


def test_folders_are_not_opened_on_systems_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **more)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", refuse)
    forbid_symlinks(monkeypatch)
    folder = Folder(tmp_path / "checkpoints")
    folder.save(make_checkpoint(1, 1.0))
    assert folder.resume(lambda _: None)[0].step == 1


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_a_drive_that_cannot_synchronise_folders(
    number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if passes:
        files.sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            files.sync_folder(tmp_path)


def test_memory_on_a_system_without_the_mmap_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows :mod:`mmap` has neither mapping nor protection flags."""
    for name in [name for name in vars(mmap) if name.startswith(("MAP_", "PROT_", "MADV_"))]:
        monkeypatch.delattr(mmap, name)
    buffers.release()
    buffer = buffers.empty((1 << 20,), (1,)).fill_(3)
    assert buffer.sum() == 3 << 20
    del buffer
    buffers.release()

    images = list(torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2).numpy())
    for _ in range(2):
        found = cache.load_or_build(tmp_path / "some.images", "key", lambda: images, (3, 2, 2), pytest.fail)
        assert found is not None
        assert torch.equal(found.pixels.flatten(), torch.arange(24, dtype=torch.uint8))
        found.pixels.zero_()  # does not reach the file
        del found
