"""Checkpoints of a run: one file holds all that resuming takes, a folder keeps the last few and the best.

A file is what ``torch.save`` writes of a dict of tensors and plain values, so that
``torch.load(path, weights_only=True)`` reads it; nothing in it is ever executed. It is written beside its
name, synchronised and moved there, so that a name always stands for a whole checkpoint.

``last.pt`` and ``best.pt`` are marks: symbolic links, or where there can be none, text files that hold the
checkpoint's name. A folder that was copied with links followed has whole checkpoints in their places, which
are read as they are, and become marks again when the run is resumed.
"""

from __future__ import annotations

import errno
import filecmp
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgan import foreign
from dcgan.errors import InputError, RunError
from dcgan.files import point, pointed, replacing, sweep, sync_folder
from dcgan.networks import Architecture

FORMAT = "dcgan-kernels checkpoint"
VERSION = 1
LAST, BEST = "last.pt", "best.pt"
_NAME = re.compile(r"step-\d+\.pt")

State = dict[str, Any]


class CheckpointError(InputError):
    """A file that is no checkpoint, a damaged one, or one of something else."""


@dataclass
class Checkpoint:
    """All of a run at one moment.

    Args:
        architecture: of both networks.
        generator, discriminator: state dicts.
        optimizer_g, optimizer_d: state dicts; empty where only the networks are of use.
        ema: the state dict of the Generator's moving average.
        scaler: the GradScaler's state dict.
        epoch: epochs that are complete.
        batch: batches of the next one that are complete.
        step: steps, all epochs together.
        images: real images seen.
        random: states of the random generators, by name.
        config: the run's configuration, plain values.
        score: of the Generator, lower is better; None where it was not measured.
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
    score: float | None = None


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write it, whole or not at all: what was at ``path`` stays until the new file is on the disk.

    Raises:
        RunError: it cannot be written (a full disk, a folder gone); says why.
    """
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    content |= {"format": FORMAT, "version": VERSION, "architecture": asdict(checkpoint.architecture)}
    try:
        with replacing(path, durable=True) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save turns some failures of a write into a RuntimeError
        why = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"cannot write the checkpoint {path}: {why}. Earlier checkpoints are as they were."
        ) from error


def read(path: Path) -> Checkpoint:
    """Read what :func:`write` wrote; tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or no checkpoint of a run.
    """
    return parse(load(path, whole=True), path)


def parse(content: Any, path: Path) -> Checkpoint:
    """What :func:`load` found in ``path`` as a checkpoint. Raises CheckpointError where it is none."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a dcgan run")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {content.get('version')!r}; version {VERSION} can be read"
        )
    names = {f.name for f in fields(Checkpoint)}
    try:
        architecture = Architecture(**content["architecture"])
        values = {name: content[name] for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged checkpoint: {error}") from error
    return Checkpoint(**values | {"architecture": architecture})


def load(path: Path, whole: bool = False) -> Any:
    """``torch.load(path, weights_only=True)`` onto the CPU: tensors and plain values, nothing that runs.

    Args:
        path: any file that ``torch.save`` wrote, or a mark of one.
        whole: check the file's own checksums first, which PyTorch does not.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds more than tensors and plain
            values; says which, and where there is one, the line that makes a file that can be loaded.
    """
    path = followed(path)
    try:
        if whole:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        with path.open("rb") as file:  # of a path, torch.load would go by the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever bytes that are no checkpoint make of zip's and pickle's parsers
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # not a seek beyond a truncated file
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        raise CheckpointError(f"{path} {_why_not(path, error)}") from error


def _why_not(path: Path, error: Exception) -> str:
    found = foreign.described(path)
    if found is not None:
        return f"is {found}"
    return foreign.refused(path, error) or (
        "is not a checkpoint that can be loaded: it is truncated, damaged or of another kind"
    )


def followed(path: Path) -> Path:
    """The checkpoint that a mark kept as text names; ``path`` itself where it is anything else."""
    target = None if path.is_symlink() else pointed(path)
    return path if target is None or _NAME.fullmatch(target.name) is None else target


def _is_whole(path: Path) -> bool:
    try:
        read(path)
    except CheckpointError:
        return False
    return True


def _read_either(path: Path, copies: dict[Path, Path]) -> Checkpoint:
    """The checkpoint of that name, or where it is missing or damaged, a copy of it."""
    try:
        return read(path)
    except CheckpointError:
        for copy, own in copies.items():
            if own == path:
                return read(copy)
        raise


class Folder:
    """One run's checkpoints: the last ``keep`` and the best; ``last.pt`` and ``best.pt`` are marks of them.

    Args:
        path: the folder; made when the first checkpoint is written.
        keep: how many of the last stay, at least 1.

    Raises:
        InputError: ``keep`` is no positive integer.
    """

    def __init__(self, path: Path, keep: int = 3) -> None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise InputError(f"keep must be an integer of at least 1, got {keep!r}")
        self.path, self.keep = path, keep
        self._best: float | None = None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint, mark it last (and best, if its score is), then forget the oldest.

        Raises:
            RunError: it cannot be written; earlier checkpoints and both marks are as they were.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            sweep(self.path)
        path = self._named(checkpoint.step)
        write(checkpoint, path)
        with self._writing():
            self._mark(path, checkpoint.score)
            marked = {self._target(LAST), self._target(BEST)}
            for old in self._all()[self.keep :]:
                if old not in marked:
                    old.unlink(missing_ok=True)
            sync_folder(self.path)
        return path

    def last(self) -> Path | None:
        """The file marked last, or without the mark, that of the highest step."""
        marked = self._target(LAST)
        return marked if marked is not None else next(iter(self._all()), None)

    def best(self) -> Path | None:
        """The file marked best."""
        return self._target(BEST)

    def resume(self, say: Callable[[str], None], mark: bool = True) -> tuple[Checkpoint, Path]:
        """The newest checkpoint that is whole, marked as whoever wrote it may have been killed before doing.

        Args:
            say: told of each damaged one that is newer.
            mark: False in a process that is not to write.

        Raises:
            CheckpointError: there is none.
            RunError: the marks can't be written.
        """
        copies = self._copies()
        if mark:
            with self._writing():
                for copy, path in copies.items():
                    self._adopt(copy, path)
        failures: list[str] = []
        for path in sorted({*self._all(), *copies.values()}, reverse=True):
            try:
                found = _read_either(path, copies)
            except CheckpointError as error:
                failures.append(str(error))
                continue
            for failure in failures:
                say(f"{failure}; going back to {path.name}, the one before")
            if mark:
                with self._writing():
                    self._mark(path, found.score)
            return found, path
        raise CheckpointError(
            f"no checkpoint to resume from in {self.path}" + "".join(f"; {failure}" for failure in failures)
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"cannot write into {self.path}: {error.strerror or error}") from error

    def _named(self, step: int) -> Path:
        return self.path / f"step-{step:09d}.pt"

    def _all(self) -> list[Path]:
        """The highest step first."""
        return sorted(self.path.glob("step-*.pt"), reverse=True)

    def _copies(self) -> dict[Path, Path]:
        """Whole checkpoints in the places of marks, each with the name that is its own."""
        found = {}
        for copy in (self.path / LAST, self.path / BEST):
            if self._target(copy.name) == copy:
                with suppress(CheckpointError):
                    found[copy] = self._named(read(copy).step)
        return found

    def _adopt(self, copy: Path, path: Path) -> None:
        """Make ``copy`` a mark of ``path``, and ``path`` its content, unless it is another checkpoint."""
        if path.exists() and not filecmp.cmp(copy, path, shallow=False) and _is_whole(path):
            return
        with replacing(path, durable=True) as file, copy.open("rb") as content:
            shutil.copyfileobj(content, file)
        point(copy, path.name)

    def _target(self, mark: str) -> Path | None:
        """What is marked: the checkpoint in the mark's own place, where one is there; None for nothing."""
        link = self.path / mark
        if not link.is_symlink() and zipfile.is_zipfile(link):
            return link
        target = pointed(link) if link.is_symlink() else followed(link)
        return target if target is not None and target != link and target.exists() else None

    def _mark(self, path: Path, score: float | None) -> None:
        point(self.path / LAST, path.name)
        if score is not None and self._is_best(score):
            point(self.path / BEST, path.name)
            self._best = score

    def _is_best(self, score: float) -> bool:
        if self._best is None:
            marked = self.best()
            try:
                self._best = None if marked is None else read(marked).score
            except CheckpointError:
                self._best = None
        return self._best is None or score <= self._best
