"""``dcgan export``: convert a trained network to a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dcgan import export, pretrained
from dcgan.cli.options import (
    ARGS_METAVAR,
    MODULE_METAVAR,
    Ema,
    NetGArgs,
    NetGModule,
    Source,
    Which,
    arguments,
    described,
    integer,
    output_file,
    reporting,
)
from dcgan.errors import InputError

Format = Literal["safetensors", "onnx", "torch-export"]

SUFFIXES: dict[Format, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}


@reporting
def command(
    source: Source,
    to: Annotated[
        Format,
        typer.Option(
            help="Format to export. safetensors: the weights and the network's sizes. onnx: a model for ONNX "
            "Runtime and other runtimes. torch-export: a PyTorch program (.pt2). The result is compared with "
            "PyTorch before it is kept (onnx: if ONNX Runtime is installed)."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; its folder is created if needed.",
            show_default="./generator.* or ./discriminator.*",
        ),
    ] = None,
    network: Annotated[
        Literal["generator", "discriminator"], typer.Option(help="Network to export.")
    ] = "generator",
    batch: Annotated[
        int | None,
        typer.Option(
            parser=integer(1),
            metavar="N",
            help="Fixed batch size of an onnx or torch-export file.",
            show_default="dynamic",
        ),
    ] = None,
    which: Which = "last",
    ema: Ema = True,
    netG_module: NetGModule = None,
    netG_args: NetGArgs = None,
    netD_module: Annotated[
        str | None,
        typer.Option(
            "--netD-module",
            metavar=MODULE_METAVAR,
            help="The same for the Discriminator.",
            show_default=False,
        ),
    ] = None,
    netD_args: Annotated[
        list[str] | None,
        typer.Option(
            "--netD-args", metavar=ARGS_METAVAR, help="The same for the Discriminator.", show_default=False
        ),
    ] = None,
) -> None:
    """Export a trained network as safetensors, ONNX or a torch.export program."""
    if to == "safetensors" and batch is not None:
        raise InputError(
            "--batch does not apply to --to safetensors, which stores only weights; omit --batch"
        )
    classes = {"generator": (netG_module, netG_args), "discriminator": (netD_module, netD_args)}
    chosen, option = classes.pop(network), "--netG-args" if network == "generator" else "--netD-args"
    if any(map(any, classes.values())):
        given, needed = ("--netD", "discriminator") if network == "generator" else ("--netG", "generator")
        raise InputError(f"{given}-module and {given}-args require --network {needed}, got {network!r}")
    args = arguments(option, chosen[1])
    found = pretrained.read(source, network, ema=ema, which=which, module=chosen[0], args=args)
    module = found.module("reference")
    example = found.input_shape(module)
    target = output_file(out or Path(network + SUFFIXES[to]), (SUFFIXES[to],))
    if to == "safetensors":
        exported = export.safetensors(module, target, metadata=found.metadata())
    elif to == "onnx":
        exported = export.onnx(module, target, batch=batch, example=example)
    else:
        exported = export.torch_export(module, target, batch=batch, example=example)

    typer.echo(described(found))
    shapes = f", {exported.inputs} → {exported.outputs}" if exported.inputs else ""
    typer.echo(f"Wrote {target}: {exported.size / 1e6:.1f} MB{shapes}")
    if exported.difference is not None:
        typer.echo(
            f"{exported.checked}: largest difference from PyTorch {exported.difference:.1e} of the outputs' "
            f"spread ({export.TOLERANCE:.0e} is allowed)"
        )
    elif exported.checked:
        typer.echo(exported.checked)
