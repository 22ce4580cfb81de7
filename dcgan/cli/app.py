"""The Typer application that bundles all commands."""

from __future__ import annotations

import typer

from dcgan.cli import evaluate, export, generate, theory, train

app = typer.Typer(
    name="dcgan",
    help="Train, sample, evaluate and export DCGANs with hand-written kernels.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.command)
app.command("generate")(generate.command)
app.command("eval")(evaluate.command)
app.command("export")(export.command)
app.command("theory")(theory.command)


def main() -> None:
    app()
