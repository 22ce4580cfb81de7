"""``dcgan export``: convert a trained network to a format that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dcgan.choices import Network
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
    output_folder,
    refuse_to_overwrite,
    removing_new_folders,
    reporting,
)
from dcgan.errors import InputError

Format = Literal["safetensors", "onnx", "torch-export", "huggingface"]

SUFFIXES: dict[Format, str] = {
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "huggingface": "",  # a folder
}


@reporting
def command(
    source: Source,
    to: Annotated[
        Format,
        typer.Option(
            metavar="<name>",
            help="Format to export. safetensors: the weights and the network's sizes. onnx: a model for ONNX "
            "Runtime and other runtimes. torch-export: a PyTorch program (.pt2). huggingface: a folder for "
            "from_pretrained and the Hugging Face Hub, with a model card written from the run. The result is "
            "compared with PyTorch before it is kept (onnx: if ONNX Runtime is installed).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            help="File to write, or for --to huggingface the folder; folders are created if needed.",
            show_default="./generator* or ./discriminator*",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Overwrite an existing file, or an earlier export's files in the folder."
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="<name>",
            help="Also upload the folder of --to huggingface to this repository of the Hub, USER/NAME, which "
            "is created if needed. Log in by `hf auth login` before.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        Network, typer.Option(metavar="<name>", help="Network to export: generator or discriminator.")
    ] = "generator",
    batch: Annotated[
        int | None,
        typer.Option(
            parser=integer(1),
            metavar="<integer>",
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
    """Export a trained network as safetensors, ONNX, a torch.export program or a Hugging Face folder."""
    if batch is not None and to in ("safetensors", "huggingface"):
        raise InputError(f"--batch does not apply to --to {to}, which stores only weights; omit --batch")
    if push is not None and to != "huggingface":
        raise InputError(f"--push requires --to huggingface, got --to {to}")
    classes = {"generator": (netG_module, netG_args), "discriminator": (netD_module, netD_args)}
    chosen, option = classes.pop(network), "--netG-args" if network == "generator" else "--netD-args"
    if any(map(any, classes.values())):
        given, needed = ("--netD", "discriminator") if network == "generator" else ("--netG", "generator")
        raise InputError(f"{given}-module and {given}-args require --network {needed}, got {network!r}")
    target = out or Path(network + SUFFIXES[to])
    _check_unused(target, to, force)

    from dcgan import export, pretrained

    if to == "huggingface":
        from dcgan import hub

        if push is not None:
            hub.check_repository(push, "--push")
    args = arguments(option, chosen[1])
    found = pretrained.read(source, network, ema=ema, which=which, module=chosen[0], args=args)
    if to == "huggingface":
        loaded = hub.network_of(found)
        with removing_new_folders(target.parent):
            output_folder(target.parent)
            size = hub.write(loaded, target)
        typer.echo(described(found))
        typer.echo(f"Wrote {target}: {size / 1e6:.1f} MB")
        if push is not None:
            hub.push(loaded, push)
            typer.echo(f"Pushed to https://huggingface.co/{push}")
        return

    module = found.module("reference")
    example = found.input_shape(module)
    with removing_new_folders(target.parent):
        output_file(target, (SUFFIXES[to],))
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


def _check_unused(target: Path, to: Format, force: bool) -> None:
    """Raise InputError if ``target`` exists and must not be overwritten, or is of the wrong kind."""
    if to == "huggingface" and target.exists() and not target.is_dir():
        raise InputError(f"--out must be a folder for --to huggingface, got the file {str(target)!r}")
    used = any(target.iterdir()) if to == "huggingface" and target.is_dir() else target.is_file()
    if used and to == "huggingface" and (other := _unlike_an_export(target)):
        raise InputError(f"--out: {target} {other}, so it is no earlier export; give another --out")
    if used and not force:
        refuse_to_overwrite([target])


def _unlike_an_export(folder: Path) -> str | None:
    """Return what shows that a folder with files is none that ``--to huggingface`` has written."""
    card = folder / "README.md"
    if not (folder / "model.safetensors").is_file():
        return "has files, but no model.safetensors"
    if card.exists() and "library_name: dcgan-kernels" not in card.read_text(errors="replace"):
        return "has a README.md that is no model card of dcgan-kernels"
    return None
