"""``dcgan eval``: score a Generator's images against real ones, with a real-vs-real floor."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dcgan import evaluation, generation, pretrained
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
    output_folder,
    reporting,
)
from dcgan.evaluation.real import MIN_IMAGES
from dcgan.files import writing


@reporting
def command(
    source: Source,
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Dataset of real images; takes the same names as dcgan train --dataset.",
        ),
    ],
    dataroot: Annotated[Path, typer.Option(metavar="PATH", help="Folder that holds the dataset.")] = Path(
        "data"
    ),
    num: Annotated[
        int,
        typer.Option(
            parser=integer(MIN_IMAGES),
            metavar="N",
            help="Number of images to generate, and maximum number of real images to compare them with.",
        ),
    ] = 10_000,
    features: Annotated[
        Literal["auto", "inception", "digits", "pixels"],
        typer.Option(
            help="Features in which images are compared. inception: the features of FID and KID. digits: a "
            "small classifier of the dataset itself (mnist, fashion-mnist, digits). pixels: images averaged "
            "to 8×8. auto: inception if its weights file is present, else digits if the dataset supports it, "
            "else pixels."
        ),
    ] = "auto",
    seed: Annotated[
        int,
        typer.Option(
            parser=integer(0), metavar="N", help="RNG seed for the noise and for choosing real images."
        ),
    ] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    engine: GeneratorEngine = "auto",
    which: Which = "last",
    ema: Ema = True,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", dir_okay=False, help="Also write the results to this JSON file."
        ),
    ] = None,
    netG_module: NetGModule = None,
    netG_args: NetGArgs = None,
) -> None:
    """Score generated images against real images by Fréchet and kernel distance.

    The floor is the same distance between two disjoint sets of real images: the train and test splits of the
    dataset, or its two halves if it has no test split. A Generator cannot be expected to score below it.
    """
    target_device = choose_device(device)
    if json_file is not None:
        output_folder(json_file.parent, "--json")
    args = arguments("--netG-args", netG_args)
    found = pretrained.read(source, "generator", ema=ema, which=which, module=netG_module, args=args)
    generator, sizes = found.sampler(engine, target_device), found.architecture
    train, test = evaluation.parts(
        dataset, dataroot, image_size=sizes.image_size, channels=sizes.channels, say=typer.echo
    )
    chosen = evaluation.choose(features, train, test, target_device, typer.echo)
    typer.echo(described(found))
    typer.echo(f"Features: {chosen.about}")

    real, held_out = train.choose(num, seed), test.choose(num, seed)
    real_features, held_out_features = (chosen.of(part.batches(batch_size)) for part in (real, held_out))
    with forced(engine):
        generated_features = chosen.of(generation.images(generator, num, seed=seed, batch=batch_size))
    rows = {
        "generated": (f"{num:,} generated", evaluation.compare(real_features, generated_features, seed)),
        "floor": (
            f"{len(held_out):,} real ({held_out.what})",
            evaluation.compare(real_features, held_out_features, seed),
        ),
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
            "device": target_device.type,
            "engine": engine,
            "real": real.what,
            "floor": held_out.what,
            "scores": {name: asdict(scores) for name, (_, scores) in rows.items()},
        }
        with writing(json_file) as file:
            file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
        typer.echo(f"Wrote {json_file}")
