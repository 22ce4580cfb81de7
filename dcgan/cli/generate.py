"""``dcgan generate``: sample a trained Generator to a grid, PNG files, an array or an interpolation."""

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
from dcgan.cli.options import (
    BatchSize,
    Device,
    Ema,
    GeneratorEngine,
    NetGArgs,
    NetGModule,
    Source,
    Which,
    arguments,
    choose_device,
    described,
    forced,
    integer,
    output_file,
    output_folder,
    reporting,
)
from dcgan.errors import InputError
from dcgan.kernels import ops

Format = Literal["grid", "files", "npy", "strip", "animation"]

FORMATS: dict[Format, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "grid": ("generated", (".png",), ("--num", "--columns")),
    "files": ("generated", (), ("--num",)),
    "npy": ("generated", (".npy",), ("--num",)),
    "strip": ("interpolation", (".png",), ("--seeds", "--steps", "--columns")),
    "animation": ("interpolation", generation.ANIMATIONS, ("--seeds", "--steps")),
}
"""Default name, allowed suffixes (the first is the default; none for a folder) and options of each format."""


def _positive(text: str | float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"must be a positive number, got {str(text)!r}")
    return value


class Seeds(tuple[int, ...]):
    """The value of ``--seeds``; Typer would treat a plain tuple or list as an option that can be repeated."""


def _seeds(text: str) -> Seeds:
    words = str(text).split(",")
    if len(words) < 2 or not all(word.strip().isdecimal() for word in words):
        raise typer.BadParameter(f"must be at least two integers separated by commas, got {text!r}")
    return Seeds(int(word) for word in words)


def _shard() -> tuple[int, int]:
    """Return (rank, world size) from the environment that torchrun sets; (0, 1) without torchrun."""
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
    """Iterate over batches while counting their images and the seconds spent on generating them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches, self.images, self.seconds = batches, 0, 0.0

    def __iter__(self) -> Iterator[Tensor]:
        start = time.perf_counter()
        for batch in self.batches:
            self.seconds += time.perf_counter() - start
            self.images += len(batch)
            yield batch
            start = time.perf_counter()

    def rate(self) -> str:
        if not self.images:
            return "no images"
        return (
            f"{self.images:,} images in {self.seconds:.2f} s, {self.images / self.seconds:,.0f} images/s "
            "(loading, warm-up and writing excluded)"
        )


def _warm_up(network: nn.Module, batch: int) -> str:
    """Run one batch so that kernels are compiled and weights packed; return which engine ran, and why."""
    with ops.recording() as choices:
        for images in generation.images(network, batch, batch=batch):
            generation.to_uint8(images)
    used = sorted({f"{c.engine} ({c.reason})" if c.reason else c.engine for c in choices})
    if not used and isinstance(network, fast.Generator):  # it fell back to its modules; explain says why
        weight = next(network.parameters())
        row = fast.explain(network, weight.new_zeros(batch, network.latent_dim))[0]
        return f"{row.engine} ({row.reason})"
    return ", ".join(used) or "reference"


@reporting
def command(
    source: Source,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file, or output folder for --format files; folders are created if needed.",
            show_default="./generated* or ./interpolation.*",
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num",
            "-n",
            parser=integer(1),
            metavar="N",
            help="Number of images to generate (grid, files, npy).",
            show_default="64",
        ),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="Output format. grid: one PNG with all images. files: one PNG per image. npy: a uint8 array "
            "[N, H, W, C]. strip: one PNG that interpolates from seed to seed. animation: the same "
            "interpolation as a looping GIF or WebP."
        ),
    ] = "grid",
    seed: Annotated[
        int,
        typer.Option(
            parser=integer(0),
            metavar="N",
            help="RNG seed for the noise. Image i does not depend on --num or --batch-size.",
        ),
    ] = 0,
    seeds: Annotated[
        Seeds | None,
        typer.Option(
            parser=_seeds,
            metavar="A,B,…",
            help="RNG seeds to interpolate between (strip, animation); image 0 of each seed is a keyframe.",
            show_default="--seed and the next three integers",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            parser=integer(1),
            metavar="N",
            help="Number of images from one seed to the next (strip, animation).",
            show_default="8",
        ),
    ] = None,
    truncation: Annotated[
        float | None,
        typer.Option(
            parser=_positive,
            metavar="T",
            help="Truncation trick: draw each component of z from [-T, T]; trades variety for quality.",
            show_default="no truncation",
        ),
    ] = None,
    batch_size: BatchSize = 64,
    columns: Annotated[
        int | None,
        typer.Option(
            parser=integer(1),
            metavar="N",
            help="Images per row (grid, strip).",
            show_default="8 for grid; strip: one row",
        ),
    ] = None,
    which: Which = "last",
    ema: Ema = True,
    device: Device = "auto",
    engine: GeneratorEngine = "auto",
    netG_module: NetGModule = None,
    netG_args: NetGArgs = None,
) -> None:
    """Generate images with a trained Generator.

    Under torchrun, --format files splits the work: each process generates every WORLD_SIZE-th image. (Use -n
    there, because torchrun takes --num for an abbreviation of one of its own options.)
    """
    default, suffixes, allowed = FORMATS[format]
    options = {"--num": num, "--seeds": seeds, "--steps": steps, "--columns": columns}
    for option, value in options.items():
        if value is not None and option not in allowed:
            raise InputError(
                f"{option} does not apply to --format {format}, which takes {', '.join(allowed)}"
            )
    rank, world = _shard()
    if world > 1 and format != "files":
        raise InputError(
            f"--format {format} cannot be split over WORLD_SIZE={world} processes; use --format files"
        )
    target_device = choose_device(device)
    if target_device.type == "cuda" and world > 1:
        target_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    args = arguments("--netG-args", netG_args)
    found = pretrained.read(source, "generator", ema=ema, which=which, module=netG_module, args=args)
    network = found.sampler(engine, target_device)
    target = out or Path(default + "".join(suffixes[:1]))
    target = output_file(target, suffixes) if suffixes else output_folder(target)

    n, steps = num or 64, steps or 8
    with forced(engine):
        used = _warm_up(network, min(batch_size, n))
        if format in ("strip", "animation"):
            points = generation.waypoints(
                seeds or range(seed, seed + 4), found.architecture.latent_dim, truncation=truncation
            )
            loop = format == "animation"
            images = generation.interpolation(network, points, steps, closed=loop, batch=batch_size)
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
            one_row = (len(points) - 1) * steps + 1 if format == "strip" else 8
            generation.write_grid(timed, target, columns or one_row)

    prefix = f"Rank {rank} of {world}: " if world > 1 else ""
    typer.echo(f"{prefix}{described(found)}; engine {used} on {target_device.type}")
    typer.echo(f"{prefix}{timed.rate()}")
    typer.echo(f"{prefix}Wrote {target}")
    if format == "files" and rank == 0:  # there may be others, for example from an earlier, larger run
        ours = {generation.file_name(i) for i in range(n)}
        if others := sum(path.name not in ours for path in target.glob("*.png")):
            typer.echo(f"Left {others} other PNG files in {target} unchanged")
