"""``dcgan generate``: images of a trained Generator, as a grid, files, an array or an interpolation."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

from dcgan import fast, generation, pretrained
from dcgan.cli.options import choose_device, forced, integer, output_file, output_folder, reporting
from dcgan.errors import InputError
from dcgan.kernels import ops
from dcgan.networks import Engine

Format = Literal["grid", "files", "npy", "strip", "animation"]

DEFAULT_OUT: dict[Format, str] = {
    "grid": "generated.png",
    "files": "generated",
    "npy": "generated.npy",
    "strip": "interpolation.png",
    "animation": "interpolation.gif",
}
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "grid": (".png",),
    "npy": (".npy",),
    "strip": (".png",),
    "animation": generation.ANIMATIONS,
}
TAKES: dict[Format, tuple[str, ...]] = {
    "grid": ("--num", "--columns"),
    "files": ("--num",),
    "npy": ("--num",),
    "strip": ("--seeds", "--steps", "--columns"),
    "animation": ("--seeds", "--steps"),
}


def _positive(text: str | float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"must be a positive number, got {str(text)!r}")
    return value


class Seeds(tuple[int, ...]):
    """Of ``--seeds``; typer would take a plain tuple or list for an option that is given several times."""


def _seeds(text: str) -> Seeds:
    words = str(text).split(",")
    if len(words) < 2 or not all(word.strip().isdecimal() for word in words):
        raise typer.BadParameter(f"must be at least two integers with commas between them, got {text!r}")
    return Seeds(int(word) for word in words)


def _shard() -> tuple[int, int]:
    """(rank, world) as torchrun says; (0, 1) without it."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    words = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not all(word.isdecimal() for word in words) or not int(words[0]) < int(words[1]):
        raise InputError(
            "RANK and WORLD_SIZE must be integers with 0 ≤ RANK < WORLD_SIZE, "
            f"got {words[0]!r} and {words[1]!r}"
        )
    return int(words[0]), int(words[1])


class _Timed:
    """Passes batches on, counts their images and the seconds it takes to make them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches, self.images, self.seconds = batches, 0, 0.0

    def __iter__(self) -> Iterator[Tensor]:
        batches = iter(self.batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            self.images += len(batch)
            yield batch

    def rate(self) -> str:
        if not self.images:
            return "no images"
        return (
            f"{self.images:,} images in {self.seconds:.2f} s, {self.images / self.seconds:,.0f} images/s "
            "(loading, the first batch's preparations and writing not counted)"
        )


def _prepare(network: nn.Module, batch: int) -> str:
    """Run one batch, so that kernels are compiled and weights packed; says which engine ran, and why."""
    with ops.recording() as choices:
        for images in generation.images(network, batch, batch=batch):
            generation.to_uint8(images)
    used = sorted({f"{c.engine} ({c.reason})" if c.reason else c.engine for c in choices})
    if not used and isinstance(network, fast.Generator):  # its modules are called: explain tells why
        weight = next(network.parameters())
        row = fast.explain(network, weight.new_zeros(batch, network.latent_dim))[0]
        return f"{row.engine} ({row.reason})"
    return ", ".join(used) or "reference"


@reporting
def command(
    source: Annotated[
        Path,
        typer.Argument(metavar="FROM", help="A run's folder, a checkpoint, or a Generator's state dict."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File or, for files, folder to write; its folder is made if missing.",
            show_default="generated.* or interpolation.* here",
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num", "-n", parser=integer(1), metavar="N", help="Number of images.", show_default="64"
        ),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="grid: one PNG. files: a PNG an image. npy: uint8 [N, H, W, C]. "
            "strip: a PNG of the way from seed to seed. animation: the same as a looping GIF or WebP."
        ),
    ] = "grid",
    seed: Annotated[
        int,
        typer.Option(
            parser=integer(0),
            metavar="N",
            help="Of the noise: image i is the same for any --num and --batch-size.",
        ),
    ] = 0,
    seeds: Annotated[
        Seeds | None,
        typer.Option(
            parser=_seeds,
            metavar="A,B,…",
            help="strip, animation: from image 0 of the first to that of the next.",
            show_default="--seed and the next 3",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            parser=integer(1), metavar="N", help="strip, animation: images a leg.", show_default="8"
        ),
    ] = None,
    truncation: Annotated[
        float | None,
        typer.Option(
            parser=_positive, metavar="T", help="Draw z within [-T, T]: better images, less variety."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=integer(1), metavar="N", help="Images at a time.")] = 64,
    columns: Annotated[
        int | None,
        typer.Option(
            parser=integer(1),
            metavar="N",
            help="grid, strip: images a row.",
            show_default="8; a strip's are all in one",
        ),
    ] = None,
    which: Annotated[Literal["last", "best"], typer.Option(help="Of a run's checkpoints.")] = "last",
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="The moving average of the weights, where there is one.")
    ] = True,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: the GPU if any.")] = "auto",
    engine: Annotated[Engine, typer.Option(help="auto: the fastest that covers the network.")] = "auto",
) -> None:
    """Generate images with a trained Generator.

    Under torchrun the format files is shared out: each process makes every WORLD_SIZE-th image. (Write -n
    there: torchrun takes --num for an option of its own.)
    """
    options = {"--num": num, "--seeds": seeds, "--steps": steps, "--columns": columns}
    for option, value in options.items():
        if value is not None and option not in TAKES[format]:
            raise InputError(
                f"{option} means nothing to --format {format}, which takes {', '.join(TAKES[format])}"
            )
    rank, world = _shard()
    if world > 1 and format != "files":
        raise InputError(
            f"--format {format} can't be shared by WORLD_SIZE={world} processes; only files can be"
        )
    where = choose_device(device)
    if where.type == "cuda" and world > 1:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    found = pretrained.read(source, "generator", ema=ema, which=which)
    network = found.module(engine, where)
    target = out or Path(DEFAULT_OUT[format])
    target = output_folder(target) if format == "files" else output_file(target, SUFFIXES[format])

    n = num or 64
    with forced(engine):
        used = _prepare(network, min(batch_size, n))
        if format in ("strip", "animation"):
            points = generation.waypoints(
                seeds or range(seed, seed + 4), found.architecture.latent_dim, truncation=truncation
            )
            loop = format == "animation"
            images = generation.interpolation(network, points, steps or 8, closed=loop, batch=batch_size)
        else:
            images = generation.images(
                network, n, seed=seed, batch=batch_size, truncation=truncation, shard=(rank, world)
            )
        timed = _Timed(map(generation.to_uint8, images))
        if format == "files":
            generation.write_files(timed, target, range(rank, n, world))
        elif format == "npy":
            generation.write_npy(timed, target, n)
        elif format == "animation":
            generation.write_animation(timed, target)
        else:
            generation.write_grid(
                timed, target, columns or (8 if format == "grid" else _row(points, steps or 8))
            )

    said = f"Rank {rank} of {world}: " if world > 1 else ""
    average = ", moving average" if found.averaged else ""
    typer.echo(f"{said}Generator of {found.file}{average}; engine {used} on {where.type}")
    typer.echo(f"{said}{timed.rate()}")
    typer.echo(f"{said}Wrote {target}")
    if format == "files" and rank == 0 and (others := _others(target, n)):
        typer.echo(f"{others} other PNG files were in {target} already, and still are")


def _others(folder: Path, n: int) -> int:
    """PNG files that are none of these n images, such as those of an earlier run of more."""
    ours = {generation.file_name(i) for i in range(n)}
    return sum(path.name not in ours for path in folder.glob("*.png"))


def _row(points: Tensor, steps: int) -> int:
    return (len(points) - 1) * steps + 1
