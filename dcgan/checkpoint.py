"""Checkpoints of a run: a file holds everything needed to resume; a folder keeps the last few and the best.

A file is a dict of tensors and plain values written by ``torch.save``, so ``torch.load(path,
weights_only=True)`` reads it. Nothing in it is ever executed, and a class that it names is imported only if
the user names it too, or the settings of the run whose folder he gives do. It is written under a temporary
name, synchronised to disk and renamed, so a checkpoint's name never refers to a partial file.

``last.pt`` and ``best.pt`` are pointer files: symlinks, or where symlinks are not supported, one-line text
files that contain the checkpoint's name. In a folder that was copied with symlinks followed they are full
copies of the checkpoints. Such copies are read directly and become pointer files again when the run is
resumed.
"""

from __future__ import annotations

import errno
import filecmp
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgan import file_diagnosis
from dcgan.errors import InputError, RunError, check_integers
from dcgan.files import point, read_pointer, replacing, reporting_errors, sweep, sync_folder
from dcgan.networks import Architecture

FORMAT = "dcgan-kernels checkpoint"
VERSION = 1
LAST, BEST = "last.pt", "best.pt"
_STEP_NAME = re.compile(r"step-\d+\.pt")

State = dict[str, Any]


class CheckpointError(InputError):
    """The file is not a checkpoint, is damaged, or is a checkpoint of something else."""


@dataclass
class Checkpoint:
    """The complete state of a run after a step.

    Args:
        architecture: architecture of both networks.
        generator, discriminator: state dicts.
        optimizer_g, optimizer_d: state dicts; empty if only the networks are needed.
        ema: the state dict of the Generator's moving average.
        scaler: the GradScaler's state dict.
        epoch: number of completed epochs.
        batch: number of completed batches of the current epoch.
        step: total number of steps over all epochs.
        images: number of real images seen.
        random: RNG states, by name.
        config: the run's configuration as plain values.
        dataset_size: number of images of the dataset; 0 if unknown.
        score: score of the Generator, lower is better; None if it was not measured.
        score_name: what the score is, for example the name of a distance; scores of different names are not
            compared.
    """

    architecture: Architecture
    generator: State
    discriminator: State
    optimizer_g: State = field(default_factory=dict)
    optimizer_d: State = field(default_factory=dict)
    ema: State | None = None
    scaler: State | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    random: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dataset_size: int = 0
    score: float | None = None
    score_name: str = "pixel_frechet_distance"


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint atomically: an existing file at ``path`` stays until the new one is on disk.

    Raises:
        RunError: the file cannot be written (disk full, folder missing); the message gives the reason.
    """
    content = vars(checkpoint) | {"format": FORMAT, "version": VERSION}
    content["architecture"] = checkpoint.architecture.to_dict()
    try:
        with replacing(path, durable=True) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save turns some write failures into a RuntimeError
        why = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"cannot write the checkpoint {path}: {why}. Earlier checkpoints are as they were."
        ) from error


def read(path: Path) -> Checkpoint:
    """Read a file written by :func:`write`; its tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or not the checkpoint of a run.
    """
    return parse(load(path, whole=True), path)


def parse(content: Any, path: Path) -> Checkpoint:
    """Convert the result of :func:`load` to a checkpoint. Raises CheckpointError if it is not one."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a dcgan run")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {content.get('version')!r}; "
            f"only version {VERSION} can be read"
        )
    try:
        architecture = Architecture.of(content["architecture"])
        added = {"score_name": Checkpoint.score_name, "dataset_size": 0}  # since the first version
        content = added | content
        values = {f.name: content[f.name] for f in fields(Checkpoint)}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged checkpoint: {error}") from error
    return Checkpoint(**values | {"architecture": architecture})


def load(path: Path, whole: bool = False) -> Any:
    """Load a file onto the CPU by ``torch.load(path, weights_only=True)``, so that no code in it is executed.

    Args:
        path: any file written by ``torch.save``, or a pointer file to one.
        whole: verify the archive's checksums first, which PyTorch does not do.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or contains more than tensors and
            plain values. The message says which and, if possible, gives a line of code that makes a loadable
            file.
    """
    path = resolve_pointer(path)
    try:
        if whole:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        with path.open("rb") as file:  # given a path, torch.load would choose the format by the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # the zip and pickle parsers may raise anything on bytes of another format
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek in a truncated file
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        raise CheckpointError(f"{path} {file_diagnosis.explain(path, error)}") from error


def resolve_pointer(path: Path) -> Path:
    """Return the checkpoint named by ``path`` if that is a text pointer file, else ``path`` itself."""
    target = None if path.is_symlink() else read_pointer(path)
    return path if target is None or _STEP_NAME.fullmatch(target.name) is None else target


class Folder:
    """The checkpoints of a run: the last ``keep``, the best, and pointers ``last.pt`` and ``best.pt``.

    Args:
        path: the folder; it is created when the first checkpoint is written.
        keep: number of most recent checkpoints to keep, at least 1.

    Raises:
        InputError: ``keep`` is not a positive integer.
    """

    def __init__(self, path: Path, keep: int = 3) -> None:
        check_integers(1, keep=keep)
        self.path, self.keep = path, keep
        self._best_score: tuple[str, float] | None = None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint, update ``last.pt`` and, for a new best score, ``best.pt``; delete old ones.

        Raises:
            RunError: it cannot be written; earlier checkpoints and both pointer files are unchanged.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            sweep(self.path)
        path = self._step_path(checkpoint.step)
        write(checkpoint, path)
        with self._writing():
            self._update_pointers(path, checkpoint)
            pointed_at = {self._target(LAST), self._target(BEST)}
            for old in self._step_files()[self.keep :]:
                if old not in pointed_at:
                    old.unlink(missing_ok=True)
            sync_folder(self.path)
        return path

    def last(self) -> Path | None:
        """Return the checkpoint that ``last.pt`` points at, or else the one with the highest step."""
        target = self._target(LAST)
        return target if target is not None else next(iter(self._step_files()), None)

    def best(self) -> Path | None:
        """Return the checkpoint that ``best.pt`` points at, if any."""
        return self._target(BEST)

    def resume(self, say: Callable[[str], None], mark: bool = True) -> tuple[Checkpoint, Path]:
        """Return the newest intact checkpoint and its path.

        Args:
            say: receives a message about each newer checkpoint that is damaged.
            mark: also update the pointer files, because the process that wrote the checkpoint may have been
                killed before it did. Pass False in a process that must not write.

        Raises:
            CheckpointError: there is no intact checkpoint.
            RunError: the pointer files cannot be written.
        """
        copies = self._copies()
        if mark:
            with self._writing():
                for copy, path in copies.items():
                    self._replace_copy(copy, path)
        failures: dict[Path, str] = {}
        files = [(path, path) for path in self._step_files()]
        files += [(path, copy) for copy, path in copies.items()]
        for path, file in sorted(files, key=lambda one: one[0], reverse=True):  # a copy after its original
            try:
                found = read(file)
            except CheckpointError as error:
                failures[path] = str(error)
                continue
            failures.pop(path, None)
            for failure in failures.values():
                say(f"{failure}; going back to the previous checkpoint, {path.name}")
            if mark:
                with self._writing():
                    self._update_pointers(path, found)
            return found, path
        raise CheckpointError("; ".join([f"no checkpoint to resume from in {self.path}", *failures.values()]))

    def _writing(self) -> AbstractContextManager[None]:
        return reporting_errors(f"into {self.path}")

    def _step_path(self, step: int) -> Path:
        return self.path / f"step-{step:09d}.pt"

    def _step_files(self) -> list[Path]:
        """Return all checkpoints, highest step first."""
        return sorted(self.path.glob("step-*.pt"), reverse=True)

    def _copies(self) -> dict[Path, Path]:
        """Return the full checkpoints found in place of pointer files, each with its regular path."""
        found = {}
        for copy in (self.path / LAST, self.path / BEST):
            if self._target(copy.name) == copy:
                with suppress(CheckpointError):
                    found[copy] = self._step_path(read(copy).step)
        return found

    def _replace_copy(self, copy: Path, path: Path) -> None:
        """Move the content of ``copy`` to ``path`` and make ``copy`` a pointer file.

        Does nothing if ``path`` is already a different, intact checkpoint.
        """
        if path.exists() and not filecmp.cmp(copy, path, shallow=False):
            with suppress(CheckpointError):
                read(path)
                return
        with replacing(path, durable=True) as file, copy.open("rb") as content:
            shutil.copyfileobj(content, file)
        point(copy, path.name)

    def _target(self, pointer: str) -> Path | None:
        """Return what the pointer file refers to: itself if it is a full copy, None if nothing is there."""
        link = self.path / pointer
        if not link.is_symlink() and zipfile.is_zipfile(link):
            return link
        target = read_pointer(link) if link.is_symlink() else resolve_pointer(link)
        return target if target is not None and target != link and target.exists() else None

    def _update_pointers(self, path: Path, checkpoint: Checkpoint) -> None:
        point(self.path / LAST, path.name)
        if checkpoint.score is not None and self._is_best(checkpoint.score_name, checkpoint.score):
            point(self.path / BEST, path.name)
            self._best_score = checkpoint.score_name, checkpoint.score

    def _is_best(self, name: str, score: float) -> bool:
        if self._best_score is None and (best := self.best()) is not None:
            with suppress(CheckpointError):
                found = read(best)
                if found.score is not None:
                    self._best_score = found.score_name, found.score
        if self._best_score is None or self._best_score[0] != name:
            return True
        return score <= self._best_score[1]
