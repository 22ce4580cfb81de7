"""The Typer application that bundles all commands."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from dcgan import __version__
from dcgan.cli import evaluate, export, generate, train
from dcgan.cli.options import Command, Group, reporting
from dcgan.errors import InputError

THEORY = Path(__file__).resolve().parents[2] / "examples" / "theory.py"

app = typer.Typer(
    name="dcgan",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", cls=train.Command, epilog=train.EPILOGUE)(train.command)
app.command("generate", cls=Command)(generate.command)
app.command("eval", cls=Command)(evaluate.command)
app.command("export", cls=Command)(export.command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dcgan {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Train, sample, evaluate and export DCGANs with hand-written kernels."""


@app.command(
    "theory",
    hidden=True,
    deprecated=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
@reporting
def theory(context: typer.Context) -> None:
    """Run examples/theory.py of the checkout, where this command has moved."""
    if not THEORY.is_file():
        raise InputError("dcgan theory is now examples/theory.py of a checkout of dcgan-kernels")
    sys.argv = [str(THEORY), *context.args]
    runpy.run_path(str(THEORY), run_name="__main__")


def main() -> None:
    app()
