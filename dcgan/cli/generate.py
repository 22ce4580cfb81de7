"""``dcgan generate``: sample a trained Generator to a grid, image files, an array or an interpolation."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

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
    refuse_to_overwrite,
    removing_new_folders,
    reporting,
)
from dcgan.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

Format = Literal["grid", "files", "npy", "strip", "animation"]

FORMATS: dict[Format, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "grid": ("generated", (".png", ".jpg", ".jpeg"), ("--num", "--columns", "--scale")),
    "files": ("generated", (), ("--num", "--image-type")),
    "npy": ("generated", (".npy",), ("--num",)),
    "strip": ("interpolation", (".png", ".jpg", ".jpeg"), ("--seeds", "--steps", "--columns", "--scale")),
    "animation": ("interpolation", (".gif", ".webp"), ("--seeds", "--steps", "--scale")),
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
        count = "1 image" if self.images == 1 else f"{self.images:,} images"
        return (
            f"{count} in {self.seconds:.2f} s, {self.images / self.seconds:,.0f} images/s "
            "(loading, warm-up and writing excluded)"
        )


def _warm_up(network: nn.Module, batch: int) -> str:
    """Run one batch so that kernels are compiled and weights packed; return which engine ran, and why."""
    from dcgan import fast, generation
    from dcgan.kernels import ops

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
    context: typer.Context,
    source: Source,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            help="Output file, or output folder for --format files; folders are created if needed. The "
            "suffix chooses the type: .png or .jpg (grid, strip), .gif or .webp (animation).",
            show_default="./generated* or ./interpolation.*",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    num: Annotated[
        int,
        typer.Option(
            "--num",
            "-n",
            parser=integer(1),
            metavar="<integer>",
            help="Number of images to generate (grid, files, npy).",
        ),
    ] = 64,
    format: Annotated[
        Format,
        typer.Option(
            metavar="<name>",
            help="Output format. grid: one picture of all images. files: one file per image. npy: a uint8 "
            "array [N, H, W, C]. strip: one picture that interpolates from seed to seed. animation: the same "
            "interpolation as a looping GIF or WebP.",
        ),
    ] = "grid",
    seed: Annotated[
        int,
        typer.Option(
            parser=integer(0),
            metavar="<integer>",
            help="RNG seed for the noise. Image i does not depend on --num or --batch-size.",
        ),
    ] = 0,
    seeds: Annotated[
        Seeds | None,
        typer.Option(
            parser=_seeds,
            metavar="<integer,…>",
            help="RNG seeds to interpolate between, separated by commas (strip, animation); image 0 of each "
            "seed is a keyframe.",
            show_default="--seed and the next three integers",
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            parser=integer(1),
            metavar="<integer>",
            help="Number of images from one seed to the next (strip, animation).",
        ),
    ] = 8,
    truncation: Annotated[
        float | None,
        typer.Option(
            parser=_positive,
            metavar="<number>",
            help="Truncation trick: draw each component of z between minus and plus this number; trades "
            "variety for quality.",
            show_default="no truncation",
        ),
    ] = None,
    batch_size: BatchSize = 64,
    columns: Annotated[
        int | None,
        typer.Option(
            parser=integer(1),
            metavar="<integer>",
            help="Images per row (grid, strip).",
            show_default="8 for grid; strip: one row",
        ),
    ] = None,
    scale: Annotated[
        int,
        typer.Option(
            parser=integer(1),
            metavar="<integer>",
            help="Enlarge images this many times by repeating pixels (grid, strip, animation).",
        ),
    ] = 1,
    image_type: Annotated[
        Literal["png", "jpg"],
        typer.Option("--image-type", help="Type of the files of --format files."),
    ] = "png",
    which: Which = "last",
    ema: Ema = True,
    device: Device = "auto",
    engine: GeneratorEngine = "auto",
    netG_module: NetGModule = None,
    netG_args: NetGArgs = None,
) -> None:
    """Generate images with a trained Generator.

    Under torchrun, --format files splits the work: each process generates
    every WORLD_SIZE-th image. Use -n there, because torchrun takes --num for an
    abbreviation of one of its own options.
    """
    default, suffixes, allowed = FORMATS[format]
    for option in dict.fromkeys(itertools.chain(*(options for _, _, options in FORMATS.values()))):
        typed = context.get_parameter_source(option.removeprefix("--").replace("-", "_"))
        if typed is not None and typed.name == "COMMANDLINE" and option not in allowed:
            raise InputError(
                f"{option} does not apply to --format {format}, which takes {', '.join(allowed)}"
            )
    rank, world = _shard()
    if world > 1 and format != "files":
        raise InputError(
            f"--format {format} cannot be split over WORLD_SIZE={world} processes; use --format files"
        )
    suffix = f".{image_type}"
    target = out or Path(default + "".join(suffixes[:1]))
    args = arguments("--netG-args", netG_args)

    import torch  # from here on, so that the errors above come at once

    from dcgan import generation, pretrained

    with removing_new_folders(target.parent if suffixes else target):
        target = output_file(target, suffixes) if suffixes else output_folder(target)
        mine = range(rank, num, world)
        if not force:
            files = [target / generation.file_name(i, suffix) for i in mine]
            refuse_to_overwrite([target] if suffixes else files)
        target_device = choose_device(device)
        if target_device.type == "cuda" and world > 1:
            target_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        found = pretrained.read(source, "generator", ema=ema, which=which, module=netG_module, args=args)
        network = found.sampler(engine, target_device)
        with forced(engine):
            used = _warm_up(network, min(batch_size, num))
            if format in ("strip", "animation"):
                points = generation.waypoints(
                    seeds or range(seed, seed + 4), found.architecture.latent_dim, truncation=truncation
                )
                loop = format == "animation"
                images = generation.interpolation(network, points, steps, closed=loop, batch=batch_size)
            else:
                images = generation.images(
                    network, num, seed=seed, batch=batch_size, truncation=truncation, shard=(rank, world)
                )
            timed = _Timed(map(generation.to_uint8, images))
            if format == "files":
                generation.write_files(timed, target, mine, suffix)
            elif format == "npy":
                generation.write_npy(timed, target, num)
            elif format == "animation":
                generation.write_animation(timed, target, scale=scale)
            else:
                one_row = (len(points) - 1) * steps + 1 if format == "strip" else 8
                generation.write_grid(timed, target, columns or one_row, scale)

    prefix = f"Rank {rank} of {world}: " if world > 1 else ""
    typer.echo(f"{prefix}{described(found)}; engine {used} on {target_device.type}")
    typer.echo(f"{prefix}{timed.rate()}")
    typer.echo(f"{prefix}Wrote {target}")
    if format == "files" and rank == 0:  # there may be others, for example from an earlier, larger run
        ours = {generation.file_name(i, suffix) for i in range(num)}
        images_in_folder = [path.name for path in target.iterdir() if path.suffix in generation.IMAGES]
        if others := sum(name not in ours for name in images_in_folder):
            files_left = "1 other image file" if others == 1 else f"{others} other image files"
            typer.echo(f"Left {files_left} in {target} unchanged")
