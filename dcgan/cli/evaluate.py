"""``dcgan eval``: how far a Generator's images are from real ones, and real ones from each other."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dcgan.cli.options import choose_device, forced, integer, output_folder, reporting
from dcgan.errors import RunError
from dcgan.files import replacing
from dcgan.networks import Engine

MINIMUM = 10
"""dcgan.evaluation's, which takes too long to import for ``--help``."""


@reporting
def command(
    source: Annotated[
        Path,
        typer.Argument(metavar="FROM", help="A run's folder, a checkpoint, or a Generator's state dict."),
    ],
    dataset: Annotated[str, typer.Option(metavar="NAME", help="The real images, as for train.")],
    dataroot: Annotated[Path, typer.Option(metavar="PATH", help="The folder the dataset is in.")] = Path(
        "data"
    ),
    num: Annotated[
        int,
        typer.Option(
            parser=integer(MINIMUM), metavar="N", help="Images to generate, and at most to compare with."
        ),
    ] = 10_000,
    features: Annotated[
        Literal["auto", "inception", "digits", "pixels"],
        typer.Option(
            help="What images are compared by. auto: inception where its weights are at hand, "
            "else digits where the dataset is one of digits or the like, else pixels."
        ),
    ] = "auto",
    seed: Annotated[
        int, typer.Option(parser=integer(0), metavar="N", help="Of the noise and the choice of images.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(parser=integer(1), metavar="N", help="Images at a time.")] = 64,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: the GPU if any.")] = "auto",
    engine: Annotated[Engine, typer.Option(help="What runs the Generator.")] = "auto",
    which: Annotated[
        Literal["last", "best"], typer.Option(help="Of a run's folder, which checkpoint.")
    ] = "last",
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="The moving average of the weights, where there is one.")
    ] = True,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the results here as well."),
    ] = None,
) -> None:
    """Score generated images against real ones: Fréchet and kernel distance, and their floor.

    The floor is the same distance between two disjoint sets of real images: the dataset's train and test
    splits, or its halves. Nothing generated can be expected below it.
    """
    from dcgan import evaluation, generation, pretrained

    where = choose_device(device)
    if json_file is not None:
        output_folder(json_file.parent, "--json")
    found = pretrained.read(source, "generator", ema=ema, which=which)
    generator, sizes = found.module(engine, where), found.architecture
    train, test = evaluation.parts(
        dataset, dataroot, image_size=sizes.image_size, channels=sizes.channels, say=typer.echo
    )
    chosen = evaluation.choose(features, train, test, where, typer.echo)
    typer.echo(f"Generator of {found.file}{', moving average' if found.averaged else ''}")
    typer.echo(f"Features: {chosen.about}")

    real, other = train.choose(num, seed), test.choose(num, seed)
    of_real, of_other = (chosen.of(part.batches(batch_size)) for part in (real, other))
    with forced(engine):
        of_generated = chosen.of(generation.images(generator, num, seed=seed, batch=batch_size))
    rows = {
        "generated": (f"{num:,} generated", evaluation.compare(of_real, of_generated, seed)),
        "floor": (f"{len(other):,} real ({other.what})", evaluation.compare(of_real, of_other, seed)),
    }
    typer.echo(f"Distance to {len(real):,} real images ({dataset}, {real.what}) of:")
    for title, scores in rows.values():
        typer.echo(f"  {title}")
        typer.echo(f"    {chosen.frechet}: {scores.frechet:.4g}")
        typer.echo(f"    {chosen.kernel}: {scores.kernel:.4g} ± {scores.kernel_std:.2g}")
    if json_file is not None:
        results: dict[str, Any] = {
            "features": chosen.name,
            "frechet": chosen.frechet,
            "kernel": chosen.kernel,
            **chosen.facts,
            "generator": str(found.file),
            "moving_average": found.averaged,
            "dataset": dataset,
            "seed": seed,
            "device": where.type,
            "engine": engine,
            "real": real.what,
            "floor": other.what,
            "scores": {name: asdict(scores) for name, (_, scores) in rows.items()},
        }
        try:
            with replacing(json_file) as file:
                file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write {json_file}: {error.strerror}") from error
        typer.echo(f"Wrote {json_file}")
