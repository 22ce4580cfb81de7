"""``dcgan train``: train from the command line, with one option per field of the settings."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.console import Console

from dcgan.cli.options import forced, output_folder, reporting
from dcgan.errors import InputError
from dcgan.training.settings import Option, Settings, options, read_file, write_file

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"


def train(given: dict[str, Any], out: Path, config: Path | None, resume: bool, dry_run: bool) -> None:
    """Start or resume a training run.

    Args:
        given: the settings given on the command line.
        out: the run's folder.
        config: a settings file, which the settings given override.
        resume: resume the run in ``out``.
        dry_run: take one step and write all outputs of a run.
    """
    from dcgan.training import distributed

    settings, resumed = _settings(given, out, config, resume)
    with distributed.process_group(settings.device) as (share, device):
        _run(settings, out, resumed, dry_run, share, device)


def _settings(given: dict[str, Any], out: Path, config: Path | None, resume: bool) -> tuple[Settings, bool]:
    """Return the run's settings, and whether an existing run is resumed."""
    from_file = {} if config is None else read_file(config)
    there = (out / CONFIG).exists()
    if not resume:
        if there:
            raise InputError(
                f"--out: {out} already holds a run; add --resume to continue it, or choose another folder"
            )
        return Settings.of(from_file, str(config)).updated(given), False
    if not there:
        raise InputError(f"--resume: there is no run in {out}: it has no {CONFIG}")
    before = Settings.of(read_file(out / CONFIG), str(out / CONFIG))
    return before.resumed(from_file | given), True


def _run(settings: Settings, out: Path, resumed: bool, dry_run: bool, share: Any, device: Any) -> None:
    from dcgan import data
    from dcgan.checkpoint import Folder
    from dcgan.evaluation import PixelScore
    from dcgan.training import distributed
    from dcgan.training.report import Report
    from dcgan.training.run import Run, follow
    from dcgan.training.stop import recording_signals

    first = share.rank == 0
    console = Console(quiet=not first)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def load() -> data.Images:
        return data.load(
            settings.dataset,
            Path(settings.dataroot),
            image_size=settings.image_size,
            channels=settings.channels,
            classes=settings.classes,
            workers=settings.workers,
            limit=settings.limit,
            say=say,
        )

    with recording_signals() as stop:
        if first:  # download and fill the cache once, for the other processes too
            output_folder(out)
            images = load()
        distributed.barrier()
        if not first:
            images = load()
        folder = Folder(out / CHECKPOINTS, settings.keep)
        saved = None
        if resumed and (folder.last() is not None):
            saved, path = folder.resume(say, mark=first)
            say(f"Resuming from {path}, after {saved.step} steps")
        run = Run(settings, images, device, share, saved)
        if first:
            write_file(settings, out / CONFIG)
            say(_headline(run))
        score = None
        if settings.score == "pixels" and first:
            score = PixelScore(images.pixels)
        with forced(settings.engine):
            if first:
                with Report(out, run, console, settings.tensorboard) as report:
                    spent = follow(run, folder, report, stop, score=score, limit=1 if dry_run else None)
                    report.finish()
            else:
                follow(run, folder, None, stop, limit=1 if dry_run else None)
    if first:
        if spent.steps:
            say(f"The input pipeline took {spent.inputs / spent.steps:.2%} of the training time")
        state = "Stopped and saved" if stop.signal else "Done"
        say(f"{state} after {run.position.step} steps: {out}")
    if stop.signal:
        raise typer.Exit(stop.status)


def _headline(run: Any) -> str:
    settings, images = run.settings, run.images
    where = str(run.device) if run.share.world == 1 else f"{run.share.world} × {run.device.type}"
    skipped = f", {len(images.skipped)} skipped" if images.skipped else ""
    return (
        f"Training {settings.model} on {len(images)} images of {images.name}{skipped} "
        f"({images.channels}×{settings.image_size}×{settings.image_size}), {settings.epochs} epochs "
        f"in batches of {settings.batch_size}, {settings.dtype} on {where}, engine {settings.engine}"
    )


# --- options ------------------------------------------------------------------------------------------------


def _parameter(name: str, kind: Any, option: Option) -> inspect.Parameter:
    """Return the typer parameter of a setting; its value is None if the option is not given."""
    flag = name.replace("_", "-")
    flags = option.flags or (f"--{flag}",)
    default = getattr(Settings(), name)
    if kind is bool:
        flags = (f"--{flag}/--no-{flag}",)
    shown = False if default is None or default is False else str(default)
    attributes: dict[str, Any] = {"help": option.help_text, "show_default": shown}
    kinds = [k for k in get_args(kind) if k is not type(None)] if _is_union(kind) else [kind]
    base = kinds[0]
    if get_origin(base) is list:
        base = str
        attributes["metavar"] = "A,B,…"
    if base in (int, float):
        attributes |= {"parser": _number(base, option.minimum), "metavar": "N" if base is int else "X"}
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[base | None, typer.Option(*flags, **attributes)],
    )


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (typing.Union, types.UnionType)


def _number(kind: type, minimum: float | None) -> Callable[[str], Any]:
    """Return a typer parser whose error, unlike typer's own, quotes the value given."""
    expected = "an integer" if kind is int else "a number"
    expected += "" if minimum is None else f" of at least {minimum}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or (minimum is not None and value < minimum):
            raise typer.BadParameter(f"must be {expected}, got {text!r}")
        return value

    return parse


def _command(
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
    values = {name: value for name, value in given.items() if value is not None}
    if "classes" in values:
        values["classes"] = [name for name in values["classes"].split(",") if name]
    train(values, out, config, resume, dry_run)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with one option per setting in place of ``**given``."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [_parameter(name, kind, option) for name, (kind, option) in options().items()]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters = [*more, *own]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


command = _with_settings(reporting(_command))
