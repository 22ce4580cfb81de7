"""``dcgan eval``: score a Generator's images against real ones, with a real-vs-real floor."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dcgan.choices import DATASETS, MIN_IMAGES
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
from dcgan.errors import InputError, RunError
from dcgan.files import writing

if TYPE_CHECKING:
    from dcgan.evaluation import Evaluator, Scores
    from dcgan.pretrained import Pretrained

OVERLAPS = {
    "precision": "Precision: generated images near real ones",
    "recall": "Recall: real images near generated ones",
    "density": "Density: how many real ones those are near to",
    "coverage": "Coverage: real images with a generated one nearby",
}
"""The scores besides the distances, each with its label."""


@reporting
def command(
    context: typer.Context,
    source: Source,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="<name>",
            autocompletion=lambda incomplete: [name for name in DATASETS if name.startswith(incomplete)],
            help=f"Dataset of real images: {', '.join(DATASETS[:-1])} or {DATASETS[-1]}. From a run's own "
            "dataset, only the images that the run was trained on (its classes and limit) are compared with.",
            show_default="that of the run",
        ),
    ] = None,
    dataroot: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            help="Folder that holds the dataset.",
            show_default="that of the run, or data for another dataset",
        ),
    ] = None,
    num: Annotated[
        int,
        typer.Option(
            parser=integer(MIN_IMAGES),
            metavar="<integer>",
            help="Number of images to generate, and maximum number of real images to compare them with.",
        ),
    ] = 10_000,
    features: Annotated[
        Literal["auto", "inception", "digits", "pixels"],
        typer.Option(
            metavar="<name>",
            help="Features in which images are compared. inception: the features of FID and KID; their "
            "weights (91 MB) are downloaded if they are missing. digits: a small classifier of the dataset "
            "itself (mnist, fashion-mnist, digits). pixels: images averaged to 8×8. auto: inception if its "
            "weights file is present, else digits if the dataset supports it, else pixels.",
        ),
    ] = "auto",
    seed: Annotated[
        int,
        typer.Option(
            parser=integer(0),
            metavar="<integer>",
            help="RNG seed for the noise and for choosing real images.",
        ),
    ] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    engine: GeneratorEngine = "auto",
    which: Which = "last",
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="Score every checkpoint that the run has kept, oldest first, instead of one."
        ),
    ] = False,
    ema: Ema = True,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="<path>", dir_okay=False, help="Also write the results to this JSON file."
        ),
    ] = None,
    netG_module: NetGModule = None,
    netG_args: NetGArgs = None,
) -> None:
    """Score generated images against real ones.

    The scores are the Fréchet and the kernel distance, and precision, recall,
    density and coverage. The floor is the scores of other real images: the test
    split of the dataset, or half of it if it has no test split. A Generator
    cannot be expected to do better if the floor has as many images; with fewer,
    the floor's Fréchet distance is higher and its coverage lower.
    """
    typed = context.get_parameter_source("which")
    if every and typed is not None and typed.name == "COMMANDLINE":
        raise InputError(f"--all scores every checkpoint, so it excludes --which {which}")
    files = _checkpoints(source) if every else [source]
    args = arguments("--netG-args", netG_args)
    if json_file is not None:  # it is made at the end, so that a failure leaves no empty folder
        output_folder(next(path for path in json_file.absolute().parents if path.exists()), "--json")

    from dcgan import pretrained  # from here on, so that the errors above come at once
    from dcgan.evaluation import Evaluator

    target_device = choose_device(device)
    found = pretrained.read(source, "generator", ema=ema, which=which, module=netG_module, args=args)
    network = found.sampler(engine, target_device)
    sizes = {name: getattr(found.architecture, name) for name in ("image_size", "channels")}
    selection = _selection(source, dataset, dataroot) | sizes
    scoring: dict[str, Any] = {"features": features, "num": num, "seed": seed, "batch_size": batch_size}
    evaluator = Evaluator.load(**selection, **scoring, device=target_device, say=typer.echo)
    real, held_out = evaluator.real, evaluator.held_out
    typer.echo(_described_all(files, source, found) if every else described(found))
    typer.echo(f"Features: {evaluator.features.about}")
    chosen = {name: selection[name] for name in ("classes", "limit") if selection.get(name) is not None}
    words = "".join(f", {name} {value}" for name, value in chosen.items())
    typer.echo(f"Real images: {len(real):,} of {real.dataset} ({real.what}{words})")
    fewer = "; fewer images make its Fréchet distance higher and its coverage lower"
    typer.echo(f"Floor: {len(held_out):,} other real images ({held_out.what}){fewer * (len(held_out) < num)}")

    results: dict[str, Any] = {
        "features": evaluator.features.name,
        "frechet": evaluator.features.frechet,
        "kernel": evaluator.features.kernel,
        **evaluator.features.facts,
        "dataset": real.dataset,
        **chosen,
        "seed": seed,
        "device": target_device.type,
        "engine": engine,
        "real": real.what,
        "floor": held_out.what,
    }
    with forced(engine):
        if every:
            all_scores: list[tuple[Pretrained, Scores | None]] = []
            gone: list[Path] = []
            own: dict[str, Any] = {}
            if found.foreign is not None:  # of which a file alone does not suffice
                own = {"module": found.foreign.spec, "args": found.foreign.args}
            with typer.progressbar(files, label=f"Scoring {_counted(files)}", file=sys.stderr) as bar:
                for file in bar:
                    try:
                        one = pretrained.read(file, "generator", ema=ema, **own)
                    except InputError:
                        if file.exists():
                            raise
                        gone.append(file)
                        continue
                    scores: Scores | None = None
                    with contextlib.suppress(RunError):  # its images contain NaN
                        scores = evaluator.of(one.sampler(engine, target_device))
                    all_scores.append((one, scores))
            for file in gone:
                typer.echo(f"{file} is gone, the run has deleted it meanwhile", err=True)
            floor = evaluator.floor()
            finite = [(scores.frechet, one) for one, scores in all_scores if scores is not None]
            best = min(finite, key=itemgetter(0), default=(0.0, None))[1]
            typer.echo(f"Fréchet: {evaluator.features.frechet}\nKernel: {evaluator.features.kernel}\n")
            typer.echo(_table_of_checkpoints(all_scores, floor, best))
            if len(finite) < len(all_scores):
                typer.echo("–: images that contain NaN, since the training has diverged")
            if best is not None:
                typer.echo(f"* the lowest Fréchet distance: {described(best)}")
            results |= {
                "checkpoints": [
                    _identity(one) | {"scores": None if scores is None else asdict(scores)}
                    for one, scores in all_scores
                ],
                "best": None if best is None else str(best.file),
                "scores": {"floor": asdict(floor)},
            }
        else:
            try:
                generated = evaluator.of(network)
            except RunError as error:
                raise RunError(f"{found.file}: {error}") from error
            floor = evaluator.floor()
            typer.echo("\n" + _table(evaluator, generated, floor))
            results |= _identity(found) | {"scores": {"generated": asdict(generated), "floor": asdict(floor)}}
    if json_file is not None:
        output_folder(json_file.parent, "--json")
        with writing(json_file) as output:
            output.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
        typer.echo(f"Wrote {json_file}")


def _checkpoints(source: Path) -> list[Path]:
    """Return all checkpoints in the folder of a run, oldest first."""
    inner = source / "checkpoints"
    files = sorted((inner if inner.is_dir() else source).glob("step-*.pt"))
    if not files:
        raise InputError(f"--all requires the folder of a run with checkpoints, got {str(source)!r}")
    return files


def _selection(source: Path, dataset: str | None, dataroot: Path | None) -> dict[str, Any]:
    """Return which real images to load: those of the run unless another dataset is given."""
    from dcgan.settings import of_run

    run = of_run(source)
    if run is None and dataset is None:
        raise InputError(
            f"--dataset is required, because no config.yaml of a run says what {str(source)!r} was trained "
            f"on: give one of {', '.join(DATASETS)}"
        )
    if run is None or dataset not in (None, run.dataset):
        return {"dataset": dataset, "dataroot": dataroot or Path("data")}
    own = run.model_dump(include={"dataset", "classes", "limit", "workers"})
    return own | {"dataroot": dataroot or Path(run.dataroot)}


def _counted(files: list[Path]) -> str:
    return "1 checkpoint" if len(files) == 1 else f"{len(files)} checkpoints"


def _described_all(files: list[Path], source: Path, found: Pretrained) -> str:
    """Return how many checkpoints are scored, and which class is imported for all of them."""
    text = f"{_counted(files)} of {source}"
    if found.config is not None and found.foreign is not None:
        text += f", imported from {found.foreign.spec} as {found.config} says"
    return text


def _identity(found: Pretrained) -> dict[str, Any]:
    return {"generator": str(found.file), "step": found.step, "moving_average": found.averaged}


def _table(evaluator: Evaluator, generated: Scores, floor: Scores) -> str:
    """Return one row per score with its full name, at most 80 characters wide."""
    rows = [
        ("", "generated", "floor"),
        ("Number of images", f"{generated.images[1]:,}", f"{floor.images[1]:,}"),
        (evaluator.features.frechet, f"{generated.frechet:.4g}", f"{floor.frechet:.4g}"),
        (evaluator.features.kernel, f"{generated.kernel:.3g}", f"{floor.kernel:.3g}"),
        ("  ± over random subsets", f"{generated.kernel_std:.2g}", f"{floor.kernel_std:.2g}"),
    ]
    for name, label in OVERLAPS.items():
        rows.append((label, f"{getattr(generated, name):.3f}", f"{getattr(floor, name):.3f}"))
    width = max(len(label) for label, _, _ in rows)
    lines = [f"{label:{width}}{value:>10}{of_floor:>10}" for label, value, of_floor in rows]
    return "\n".join([*lines, "Distances: lower is better. The other four: higher is better."])


def _table_of_checkpoints(
    found: list[tuple[Pretrained, Scores | None]], floor: Scores, best: Pretrained | None
) -> str:
    """Return one row per checkpoint, at most 80 characters wide; the best is marked, no scores are dashes."""
    titles = "".join(f"{name.capitalize():>{len(name) + 2}}" for name in OVERLAPS)
    lines = [f"  {'step':>8} {'epoch':>6}{'Fréchet':>10}{'Kernel':>10}{titles}"]

    def line(mark: str, step: str, epoch: str, scores: Scores | None) -> str:
        formats = {"frechet": (10, ".4g"), "kernel": (10, ".3g")}
        formats |= {name: (len(name) + 2, ".3f") for name in OVERLAPS}
        values = (
            f"{'–' if scores is None else format(getattr(scores, name), digits):>{width}}"
            for name, (width, digits) in formats.items()
        )
        return f"{mark:2}{step:>8} {epoch:>6}{''.join(values)}"

    lines += [line("*" * (one is best), str(one.step), str(one.epoch), scores) for one, scores in found]
    return "\n".join([*lines, line("", "floor", "", floor)])
