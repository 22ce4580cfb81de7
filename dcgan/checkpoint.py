"""Checkpoints of a run: one file holds all that resuming takes, a folder keeps the last few and the best.

A file is what ``torch.save`` writes of a dict of tensors and plain values, so that
``torch.load(path, weights_only=True)`` reads it; nothing in it is ever executed. It is written beside its
name, synchronised and moved there, so that a name always stands for a whole checkpoint.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgan.errors import InputError, RunError
from dcgan.files import point, replacing, sweep, sync_folder
from dcgan.networks import Architecture

FORMAT = "dcgan-kernels checkpoint"
VERSION = 1
LAST, BEST = "last.pt", "best.pt"

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
        path: any file that ``torch.save`` wrote.
        whole: check the file's own checksums first, which PyTorch does not.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        if whole:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever bytes that are no checkpoint make of zip's and pickle's parsers
        if "weights_only" in str(error) or "Unsupported" in str(error):
            why = "it holds more than tensors and plain values, and is not trusted to run code"
        else:
            why = "it is truncated, damaged or of another kind"
        raise CheckpointError(f"{path} is not a checkpoint that can be loaded: {why}") from error


class Folder:
    """One run's checkpoints: the last ``keep`` and the best; ``last.pt`` and ``best.pt`` are links to them.

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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            sweep(self.path)
        except OSError as error:
            raise RunError(f"cannot write into {self.path}: {error.strerror}") from error
        path = self.path / f"step-{checkpoint.step:09d}.pt"
        write(checkpoint, path)
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
        """
        failures: list[str] = []
        for path in self._all():
            try:
                found = read(path)
            except CheckpointError as error:
                failures.append(str(error))
                continue
            for failure in failures:
                say(f"{failure}; going back to {path.name}, the one before")
            if mark:
                self._mark(path, found.score)
            return found, path
        raise CheckpointError(
            f"no checkpoint to resume from in {self.path}" + "".join(f"; {failure}" for failure in failures)
        )

    def _all(self) -> list[Path]:
        """The highest step first."""
        return sorted(self.path.glob("step-*.pt"), reverse=True)

    def _target(self, mark: str) -> Path | None:
        link = self.path / mark
        target = self.path / link.readlink() if link.is_symlink() else None
        return target if target is not None and target.exists() else None

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
