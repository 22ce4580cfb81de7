"""Helpers shared by the commands: option parsers, output paths and one-line error reports."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import torch
import typer
import yaml

from dcgan import extras, pretrained
from dcgan.devices import resolve
from dcgan.errors import InputError, RunError
from dcgan.kernels import ops
from dcgan.models import IMAGE_SIZES
from dcgan.networks import Engine
from dcgan.training.settings import parse_yaml

P = ParamSpec("P")
R = TypeVar("R")


def integer(minimum: int) -> Callable[[str], int]:
    """Return a parser of integers ≥ ``minimum`` whose error, unlike Typer's own, quotes the value."""

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
    """Parse an image size that the networks support. Typer also passes the default through this."""
    allowed = {str(n): n for n in IMAGE_SIZES}
    if str(text) not in allowed:
        raise typer.BadParameter(f"must be one of {', '.join(allowed)}, got {str(text)!r}")
    return allowed[str(text)]


Source = Annotated[
    Path,
    typer.Argument(
        metavar="FROM",
        help="The network: the folder of a training run, a checkpoint, or a state dict file.",
    ),
]
Which = Annotated[pretrained.Which, typer.Option(help="Checkpoint to use if FROM is the folder of a run.")]
Ema = Annotated[
    bool,
    typer.Option(
        "--ema/--no-ema",
        help="Use the moving average of the Generator's weights if the file contains one.",
    ),
]
BatchSize = Annotated[int, typer.Option(parser=integer(1), metavar="N", help="Images per batch.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Device to run on. auto: the GPU if there is one, else the CPU."),
]
GeneratorEngine = Annotated[
    Engine,
    typer.Option(
        help="Engine that runs the Generator. auto: the fastest engine that supports it. "
        "reference: plain PyTorch."
    ),
]

MODULE_METAVAR, ARGS_METAVAR = "MODULE:CLASS", "KEY=VALUE,…"
NetGModule = Annotated[
    str | None,
    typer.Option(
        "--netG-module",
        metavar=MODULE_METAVAR,
        help="Class of a Generator of your own, pkg.module:Class or path/to/file.py:Class; required if FROM "
        "holds one, since nothing that a file names is imported.",
        show_default=False,
    ),
]
NetGArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--netG-args",
        metavar=ARGS_METAVAR,
        help="Arguments of its constructor, instead of those that FROM records.",
        show_default=False,
    ),
]


def arguments(option: str, texts: Sequence[str] | None) -> dict[str, Any] | None:
    """Parse the texts of an option that can be repeated, ``key=value`` separated by commas; values are YAML.

    A comma separates only if a key and '=' follow, so that a value may be a list, ``widths=[8,16]``.

    Raises:
        InputError: a text has another form, is not valid YAML or gives a key twice.
    """
    if not texts:  # not given
        return None
    found: dict[str, Any] = {}
    for text in re.split(r",(?=\s*\w+\s*=)", ",".join(filter(None, texts))):
        key, equals, value = (part.strip() for part in text.partition("="))
        if not text:
            continue
        if not equals or not key.isidentifier():
            raise InputError(f"{option} must be key=value, separated by commas, got {text!r}")
        if key in found:
            raise InputError(f"{option} must give {key} once, got {', '.join(texts)!r}")
        try:
            found[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise InputError(f"{option} must be key=value with a YAML value, got {text!r}") from error
    return found


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Make a command report expected errors as one line on stderr.

    The exit code is 2 for an :class:`InputError` or a package that an extra would install, 1 for a
    :class:`RunError`.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (InputError, RunError, ModuleNotFoundError) as error:
            message = extras.advice(error) if isinstance(error, ModuleNotFoundError) else str(error)
            if message is None:
                raise
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(1 if isinstance(error, RunError) else 2) from error

    return run


@contextlib.contextmanager
def forced(engine: Engine) -> Iterator[None]:
    """Run every op in the block on ``engine``; ``auto`` leaves the choice to the environment.

    Raises:
        InputError: the engine does not cover an op in the block.
    """
    try:
        with contextlib.nullcontext() if engine == "auto" else ops.use_engine(engine):
            yield
    except ops.EngineError as error:
        raise InputError(f"--engine: {error}") from error


def choose_device(name: str) -> torch.device:
    """Resolve ``--device`` to a concrete device; ``auto`` is the GPU if PyTorch finds one, else the CPU.

    Raises:
        typer.BadParameter: ``cuda`` was given but PyTorch finds no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "got 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'", param_hint="'--device'"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return resolve(name)


def described(found: pretrained.Pretrained) -> str:
    """Return which network was read from which file, and whether it is the moving average."""
    average = ", moving average" if found.averaged else ""
    return f"{found.network.capitalize()} of {found.file}{average}"


def output_folder(path: Path, option: str = "--out") -> Path:
    """Return ``path`` as a writable folder, creating it if it does not exist.

    Raises:
        InputError: the folder cannot be created, is a file, or is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: cannot make the folder {str(path)!r}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{option}: the folder {str(path)!r} is not writable")
    return path


def output_file(path: Path, suffixes: tuple[str, ...], option: str = "--out") -> Path:
    """Return ``path`` as an output file, creating its folder if it does not exist.

    Raises:
        InputError: the suffix is not one of ``suffixes``, ``path`` is a folder, or its folder cannot be
            created or written to.
    """
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} must end in {' or '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir():
        raise InputError(f"{option} must be a file, got the folder {str(path)!r}")
    output_folder(path.parent, option)
    return path
