"""``dcgan train``: train from the command line, with one option per field of the settings."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.console import Console

from dcgan.cli.options import ARGS_METAVAR, arguments, forced, output_folder, reporting
from dcgan.errors import InputError
from dcgan.training.settings import Settings, read_file, write_file

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
EXAMPLES = {  # the option names of pytorch/examples, where they differ
    "batch_size": ["--batchSize"],
    "image_size": ["--imageSize"],
    "channels": ["--nc"],
    "epochs": ["--niter"],
    "seed": ["--manualSeed"],
}
METAVARS: dict[Any, str] = {int: "N", float: "X", list[str]: "A,B,…", dict[str, Any]: ARGS_METAVAR}


def train(given: dict[str, Any], out: Path, config: Path | None, resume: bool, dry_run: bool) -> None:
    """Start or resume a training run.

    Args:
        given: the settings given on the command line.
        out: the run's folder.
        config: a settings file, which the settings given override.
        resume: resume the run in ``out``.
        dry_run: take one step and write all outputs of a run.
    """
    from dcgan import data
    from dcgan.checkpoint import Folder
    from dcgan.evaluation import PixelScore
    from dcgan.training import distributed
    from dcgan.training.report import Report
    from dcgan.training.run import Run, follow
    from dcgan.training.stop import recording_signals

    settings = _settings(given, out, config, resume)
    settings.import_foreign()
    with distributed.process_group(settings.device) as (share, device), recording_signals() as stop:
        first = share.rank == 0
        console = Console(quiet=not first)

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        if first:
            output_folder(out)
        else:  # the first process downloads and fills the cache for all
            distributed.barrier()
        selection = settings.model_dump(include={"image_size", "channels", "classes", "workers", "limit"})
        images = data.load(settings.dataset, Path(settings.dataroot), say=say, **selection)
        if first:
            distributed.barrier()
        folder = Folder(out / CHECKPOINTS, settings.keep)
        saved = None
        if resume and folder.last() is not None:
            saved, path = folder.resume(say, mark=first)
            say(f"Resuming from {path}, after {saved.step} steps")
        run = Run(settings, images, device, share, saved)
        if first:
            write_file(settings, out / CONFIG)
            say(_headline(run))
        score = PixelScore(images.pixels) if first and settings.score == "pixels" else None
        report = Report(out, run, console, settings.tensorboard) if first else None
        with forced(settings.engine), report or contextlib.nullcontext():
            spent = follow(run, folder, report, stop, score=score, limit=1 if dry_run else None)
            if report is not None:
                report.finish()
        if spent.steps:
            say(f"The input pipeline took {spent.inputs / spent.steps:.2%} of the training time")
        say(f"{'Stopped and saved' if stop.signal else 'Done'} after {run.position.step} steps: {out}")
        if stop.signal:
            raise typer.Exit(stop.status)


def _settings(given: dict[str, Any], out: Path, config: Path | None, resume: bool) -> Settings:
    """Return the settings of a new run, or of the existing one in ``out``."""
    path = out / CONFIG
    if resume and not path.exists():
        raise InputError(f"--resume: there is no run in {out}: it has no {CONFIG}")
    if path.exists() and not resume:
        raise InputError(
            f"--out: {out} already holds a run; add --resume to continue it, or choose another folder"
        )
    from_file = {} if config is None else read_file(config)
    base = Settings.of(read_file(path), str(path)) if resume else Settings()
    new = Settings.of(base.to_dict() | from_file, str(config)).updated(given)
    return base.resumed(from_file | given) if resume else new


def _headline(run: Any) -> str:
    settings, images = run.settings, run.images
    where = str(run.device) if run.share.world == 1 else f"{run.share.world} × {run.device.type}"
    skipped = f", {len(images.skipped)} skipped" if images.skipped else ""
    networks = [settings.netG_module or settings.model, settings.netD_module or settings.model]
    what = " and ".join(dict.fromkeys(networks))
    return (
        f"Training {what} on {len(images)} images of {images.name}{skipped} "
        f"({images.channels}×{settings.image_size}×{settings.image_size}), {settings.epochs} epochs "
        f"in batches of {settings.batch_size}, {settings.dtype} on {where}, engine {settings.engine}"
    )


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the typer parameter of a setting; its value is None if the option is not given."""
    kind: Any = field.annotation
    while get_origin(kind) in (Annotated, Union, UnionType):  # X | None, and X with what it allows
        kind = get_args(kind)[0]
    flag = name.replace("_", "-")
    option = typer.Option(
        *([f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}", *EXAMPLES.get(name, [])]),
        help=" ".join(str(field.description).split()),
        show_default=False if field.default is None or field.default is False else str(field.default),
        metavar=METAVARS.get(kind),
        parser=_parser(name, kind) if kind in (int, float) else None,
    )
    if kind in METAVARS:
        kind = list[str] if kind == dict[str, Any] else str
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parser(name: str, kind: type) -> Callable[[str], Any]:
    """Return a typer parser whose error, unlike typer's own, quotes the value given."""

    def parse(text: str) -> Any:
        value: Any = text  # which the settings reject if it is not a number
        with contextlib.suppress(ValueError):
            value = kind(text)
        try:
            Settings(**{"netG_module": "", name: value})  # with which every image size is allowed
        except InputError as error:
            raise typer.BadParameter(str(error).removeprefix(f"{name} ")) from None
        return value

    return parse


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with one option per setting in place of ``**given``."""
    signature = inspect.signature(command, eval_str=True)
    settings = [_parameter(*item) for item in Settings.model_fields.items()]
    own = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    command.__signature__ = signature.replace(parameters=settings + own)  # type: ignore[attr-defined]
    return command


@_with_settings
@reporting
def command(
    *,
    out: Annotated[
        Path, typer.Option("--out", "--outf", help="Folder of the run; created if missing.")
    ] = Path("runs/train"),
    config: Annotated[
        Path | None, typer.Option(help="TOML or YAML file of settings; command-line options override it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take one step and write all outputs of a run.")
    ] = False,
    **given: Any,
) -> None:
    """Train a DCGAN on an image dataset, or resume an interrupted run.

    The run's folder receives config.yaml, checkpoints/, samples/ (one grid per epoch), metrics.jsonl,
    tensorboard/, and at the end losses.png and samples.gif. The option names of pytorch/examples are
    accepted as well: --batchSize, --imageSize, --niter, --nc, --manualSeed, --outf.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, option in (("netG_args", "--netG-args"), ("netD_args", "--netD-args")):
        if (args := arguments(option, given.pop(name, None))) is not None:
            given[name] = args
    if "classes" in given:
        given["classes"] = [name for name in given["classes"].split(",") if name]
    train(given, out, config, resume, dry_run)
