"""What the commands share: parsers of options, and errors as a person wants to read them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import typer

from dcgan.devices import settled
from dcgan.errors import InputError, RunError
from dcgan.kernels import ops
from dcgan.models import IMAGE_SIZES
from dcgan.networks import Engine

P = ParamSpec("P")
R = TypeVar("R")


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose expected errors are a line on stderr: exit 2 for bad input, 1 for what happened."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except InputError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error
        except RunError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error

    return run


@contextlib.contextmanager
def forced(engine: Engine) -> Iterator[None]:
    """Every op inside on the engine; ``auto`` leaves it to the environment.

    Raises:
        InputError: the engine does not cover what is run.
    """
    try:
        with contextlib.nullcontext() if engine == "auto" else ops.use_engine(engine):
            yield
    except ops.EngineError as error:
        raise InputError(f"--engine: {error}") from error


def integer(minimum: int) -> Callable[[str], int]:
    """A typer parser whose error says, as typer's own does not, what was given."""

    def parse(text: str | int) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise typer.BadParameter(f"must be an integer of at least {minimum}, got {str(text)!r}")
        return value

    return parse


def size(text: str | int) -> int:
    """A typer parser of the image sizes that the networks come in; typer also parses the default."""
    allowed = {str(n): n for n in IMAGE_SIZES}
    if str(text) not in allowed:
        raise typer.BadParameter(f"must be one of {', '.join(allowed)}, got {str(text)!r}")
    return allowed[str(text)]


def choose_device(name: str) -> torch.device:
    """The device, settled; ``auto`` is the GPU where there is one.

    Raises:
        typer.BadParameter: ``cuda`` where PyTorch finds no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "got 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'", param_hint="'--device'"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return settled(name)


def output_folder(path: Path, option: str = "--out") -> Path:
    """The folder, made where it is missing, and let us write into.

    Raises:
        InputError: it cannot be made, is a file, or is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: cannot make the folder {str(path)!r}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{option}: the folder {str(path)!r} is not writable")
    return path


def output_file(path: Path, suffixes: tuple[str, ...], option: str = "--out") -> Path:
    """The file, in a folder that is made where it is missing.

    Raises:
        InputError: another suffix, a folder of this name, or a folder that can't be made or written into.
    """
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} must end in {' or '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir():
        raise InputError(f"{option} must be a file, got the folder {str(path)!r}")
    output_folder(path.parent, option)
    return path
