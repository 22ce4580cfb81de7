"""Helpers shared by the commands: option parsers, output paths and one-line error reports."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from dcgan import choices, extras
from dcgan.errors import InputError, RunError

if TYPE_CHECKING:
    import torch

    from dcgan.pretrained import Pretrained

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
    allowed = {str(n): n for n in choices.IMAGE_SIZES}
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
Which = Annotated[choices.Which, typer.Option(help="Checkpoint to use if FROM is the folder of a run.")]
Ema = Annotated[
    bool,
    typer.Option(
        "--ema/--no-ema",
        help="Use the moving average of the Generator's weights if the file contains one.",
    ),
]
BatchSize = Annotated[int, typer.Option(parser=integer(1), metavar="<integer>", help="Images per batch.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Device to run on. auto: the GPU if there is one, else the CPU."),
]
GeneratorEngine = Annotated[
    choices.Engine,
    typer.Option(
        metavar="<name>",
        help="Engine that runs the Generator: native (C++, CPU), triton (GPU), reference (PyTorch's own), or "
        "auto, the fastest that supports it.",
    ),
]

MODULE_METAVAR, ARGS_METAVAR = "<module:class>", "<key=value,…>"
NetGModule = Annotated[
    str | None,
    typer.Option(
        "--netG-module",
        metavar=MODULE_METAVAR,
        help="Class of a Generator of your own, pkg.module:Class or path/to/file.py:Class. Not needed for "
        "the folder of a run, whose config.yaml names it; required for any other file that holds one, since "
        "nothing that such a file names is imported.",
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
    import yaml

    from dcgan.settings import parse_yaml

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


# --- errors -------------------------------------------------------------------------------------------------

_spellings: ContextVar[Mapping[str, str]] = ContextVar("spellings", default=MappingProxyType({}))
"""What the user knows each argument of the running command by: its option as typed, or a key of a file."""

_LIBRARY = {"root": "dataroot", "latent_dim": "nz"}
"""Arguments of the library that have another name on the command line."""

_ARGUMENT = re.compile(
    r"""(\w+)(?=
    (?:\ (?:'[^']*'|"[^"]*"|[\w-]+))?
    (?::\ |\ (?:must|is|requires|needs?|supports?|does\ not\ exist|cannot\ be\ read)\b))""",
    re.VERBOSE,
)
"""An argument at the start of a message: 'lr must …', "root 'x' does not exist", 'dtype tf32 requires …'."""


def spelling(name: str) -> str:
    """Return what the user knows an argument by: its option as typed on the command line.

    An option that was not typed has its first name; outside a command, the name stays as it is.
    """
    return _spellings.get().get(_LIBRARY.get(name, name), name)


def respell(spellings: Mapping[str, str]) -> None:
    """Let messages name some arguments of the running command otherwise, for example as keys of a file."""
    if _spellings.get():
        _spellings.set({**_spellings.get(), **spellings})


def spelled(message: str) -> str:
    """Return an error's message with the argument that it begins with as the user knows it.

    With it, other arguments whose names contain an underscore are translated, for they are no English words.
    """
    found = _ARGUMENT.match(message)
    if found is None or spelling(found[1]) == found[1]:
        return message
    rest = re.sub(r"(?<= )\w+_\w+(?=[ ,;]|$)", lambda word: spelling(word[0]), message[found.end() :])
    return spelling(found[1]) + rest


class Command(TyperCommand):
    """A command that reports a bad value in one line, which names the option as the user typed it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = [arg.partition("=")[0] for arg in args if arg.startswith("-")]
        values = {arg.partition("=")[2] if arg.startswith("-") else arg for arg in args}
        spellings = {}
        for param in self.params:
            names = [*param.opts, *param.secondary_opts]
            if param.name and names[0].startswith("-") and param.name not in values:
                # A message that begins with a word given as a value, say a folder's name, means that.
                spellings[param.name] = next((name for name in reversed(typed) if name in names), names[0])
        try:
            rest = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            message, reason = error.format_message(), error.message.removeprefix("Value error, ")
            if error.param is not None and (name := spellings.get(error.param.name or "")) and reason:
                message = f"{name}{'' if reason.startswith('must ') else ':'} {reason}"
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(2) from None
        _spellings.set(spellings)
        ctx.call_on_close(lambda: _spellings.set(MappingProxyType({})))
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _omit_types_of_switches(self, ctx)
        # rich would also break the lines where the source does
        self.help = "\n\n".join(" ".join(part.split()) for part in (self.help or "").split("\n\n"))
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """The application, whose help shows no types of switches, as that of a :class:`Command`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _omit_types_of_switches(self, ctx)
        super().format_help(ctx, formatter)


def _omit_types_of_switches(command: TyperCommand | TyperGroup, ctx: Any) -> None:
    for param in command.get_params(ctx):
        if getattr(param, "is_flag", False):
            param.metavar = ""


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Make a command report expected errors as one line on stderr.

    The exit code is 2 for an :class:`InputError` or a package that an extra would install, 1 for a
    :class:`RunError`. An InputError names the option as the user typed it; see :func:`spelled`.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (InputError, RunError, ModuleNotFoundError) as error:
            message = extras.advice(error) if isinstance(error, ModuleNotFoundError) else str(error)
            if message is None:
                raise
            typer.echo(f"Error: {spelled(message) if isinstance(error, InputError) else message}", err=True)
            raise typer.Exit(1 if isinstance(error, RunError) else 2) from error

    return run


# --- what a command needs -----------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(engine: choices.Engine) -> Iterator[None]:
    """Run every op in the block on ``engine``; ``auto`` leaves the choice to the environment.

    Raises:
        InputError: the engine does not cover an op in the block.
    """
    from dcgan.kernels import ops

    try:
        with contextlib.nullcontext() if engine == "auto" else ops.use_engine(engine):
            yield
    except ops.EngineError as error:
        raise InputError(f"--engine: {error}") from error


def choose_device(name: str) -> torch.device:
    """Resolve ``--device`` to a concrete device; ``auto`` is the GPU if PyTorch finds one, else the CPU.

    Raises:
        InputError: ``cuda`` was given but PyTorch finds no GPU.
    """
    import torch

    from dcgan.devices import resolve

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return resolve(name)


def described(found: Pretrained) -> str:
    """Return which network was read from which file, which weights, and which class is imported for it."""
    text = f"{found.network.capitalize()} of {found.file}"
    if found.step is not None:
        text += f" (epoch {found.epoch}, step {found.step})"
    if found.averaged:
        text += ", moving average" + (f" of decay {found.decay:g}" if found.decay is not None else "")
    elif found.network == "generator" and found.step is not None:
        why = "--ema uses the average" if found.has_average else "the run keeps no average"
        text += f", weights of that step ({why})"
    if found.config is not None and found.foreign is not None:
        text += f", imported from {found.foreign.spec} as {found.config} says"
    return text


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


def refuse_to_overwrite(targets: Iterable[Path]) -> None:
    """Raise InputError, which names ``--force``, if one of the output files exists."""
    existing = [path for path in targets if path.exists()]
    if existing:
        others = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise InputError(
            f"--out: {existing[0]} exists already{others}; give another --out, or --force to overwrite"
        )


def undoing(folder: Path, *names: str) -> Callable[[], None]:
    """Return a function that undoes what a command is about to make.

    It removes those of ``names`` in ``folder`` that do not exist yet, then ``folder`` and its parents if they
    do not exist yet and are empty. Whatever else is there then may be somebody else's, and stays.
    """
    made = [folder / name for name in names if not os.path.lexists(folder / name)]
    folders = [path for path in (folder, *folder.parents) if not path.exists()]

    def undo() -> None:
        for path in made:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):  # not empty
            for path in folders:
                path.rmdir()

    return undo


@contextlib.contextmanager
def removing_new_folders(folder: Path) -> Iterator[None]:
    """If the block fails, remove ``folder`` and its parents if it has created them and left them empty."""
    undo = undoing(folder)
    try:
        yield
    except BaseException:
        undo()
        raise
