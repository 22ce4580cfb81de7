"""``dcgan train``: train from the command line, with one option per field of the settings."""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from dcgan.choices import DATASETS
from dcgan.cli import options
from dcgan.cli.options import ARGS_METAVAR, MODULE_METAVAR, arguments, forced, output_folder, reporting
from dcgan.errors import InputError, counted
from dcgan.settings import CONFIG, Settings, keys_of, read_file, write_file

CHECKPOINTS = "checkpoints"
AT_THE_END = ("losses.png", "samples.gif")
"""Files that the end of a run writes, in addition to those of each step and epoch."""
OUTPUTS = (CONFIG, CHECKPOINTS, "metrics.jsonl", "samples", "tensorboard", *AT_THE_END)
"""What a run writes into its folder."""

GROUPS = {
    "Data": ("dataset", "dataroot", "classes", "limit", "image_size", "channels", "flip", "diffaugment"),
    "Model": (
        *("model", "nz", "ngf", "ndf", "netG", "netD"),
        *("netG_module", "netG_args", "netD_module", "netD_args"),
    ),
    "Optimisation": (
        *("epochs", "batch_size", "lr", "beta1", "loss"),
        *("label_smoothing", "clip", "ema", "sync_batchnorm", "seed"),
    ),
    "Output": (
        *("keep", "score", "eval_every", "eval_num"),
        *("sample_interval", "checkpoint_interval", "log_interval", "tensorboard"),
    ),
    "Hardware": ("device", "engine", "dtype", "compile", "workers"),
}
"""The settings by the group of options that ``--help`` shows them in."""

EXAMPLES = {  # the option names of pytorch/examples, where they differ
    "batch_size": ["--batchSize"],
    "image_size": ["--imageSize"],
    "channels": ["--nc"],
    "epochs": ["--niter"],
    "seed": ["--manualSeed"],
}
EPILOGUE = (
    "The options of pytorch/examples' dcgan are accepted too: --batchSize, --imageSize, --nc, --niter, "
    "--manualSeed, --outf, --cuda, --accel, --mps, --ngpu. A switch --x is turned off by --no-x."
)
ELSEWHERE = {
    "lsun": "export the images of one class, such as bedroom, to a folder, and write --dataset folder "
    "--dataroot FOLDER",
    "lfw": "write --dataset folder --dataroot FOLDER, where FOLDER holds the unpacked lfw.tgz",
    "imagenet": "write --dataset folder --dataroot FOLDER, where FOLDER holds one folder per class; "
    "--classes chooses some of them",
}
"""Datasets of pytorch/examples that are folders of images here, and what to write instead."""

METAVARS: dict[Any, str] = {
    **{int: "<integer>", float: "<number>", str: "<name>"},
    **{list[str]: "<name,…>", dict[str, Any]: ARGS_METAVAR},
    **dict.fromkeys(("dataroot", "netG", "netD"), "<path>"),
    **dict.fromkeys(("netG_module", "netD_module"), MODULE_METAVAR),
}
"""What ``--help`` shows for the value of an option, by the setting's name or else its type."""
MAX_METAVAR = 16
"""Length up to which the allowed values are shown instead; longer lists are in the option's help."""


def train(given: dict[str, Any], out: Path, config: Path | None, resume: bool, dry_run: bool) -> None:
    """Start or resume a training run.

    Args:
        given: the settings given on the command line.
        out: the run's folder. It is created when there is something to write; if the run fails before its
            first step is over, what it has written is removed.
        config: a settings file, which the settings given override.
        resume: resume the run in ``out``.
        dry_run: take one step, write all outputs of a run into a temporary folder, and list them.
    """
    settings = _settings(given, out, config, resume)
    dataroot = Path(settings.dataroot).resolve()
    if settings.dataset == "folder" and dataroot in (out.resolve(), *out.resolve().parents):
        raise InputError(
            f"--out must not be in --dataroot {settings.dataroot!r}, all of whose images are trained on, "
            f"got {str(out)!r}"
        )
    undo = options.undoing(out, *OUTPUTS)
    first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
    if first:
        try:
            output_folder(out)
        finally:
            undo()
        typer.echo(f"Loading {settings.dataset} and PyTorch…")

    from rich.console import Console

    from dcgan import data
    from dcgan.checkpoint import Folder
    from dcgan.training import distributed
    from dcgan.training.report import Report
    from dcgan.training.run import Run, follow
    from dcgan.training.scoring import score_of
    from dcgan.training.stop import recording_signals

    console = Console(quiet=not first)

    said = set()

    def say(line: str) -> None:
        """Print a line, once: an evaluation loads the same images, and would report the same of them."""
        if line in said:
            return
        said.add(line)
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    settings.import_foreign()
    with contextlib.ExitStack() as stack:
        share, device = stack.enter_context(distributed.process_group(settings.device))
        folder, saved = Folder(out / CHECKPOINTS, settings.keep), None
        if resume and folder.last() is not None:
            saved, path = folder.resume(say, mark=False)
            begun = saved.epoch + (saved.batch > 0)
            if begun > settings.epochs:
                raise InputError(
                    f"epochs must be at least {begun}, which the run has reached after "
                    f"{counted(saved.step, 'step')}, got {settings.epochs}"
                )
            if saved.epoch == settings.epochs and _ended(out, path):
                further = f"{_command('train --resume --out', out)} --epochs {2 * saved.epoch}"
                say(f"The run is finished: {counted(saved.step, 'step')} in {counted(saved.epoch, 'epoch')}")
                say(f"To train it further, raise the number of epochs: {further}")
                return
            say(f"Resuming from {path}, after {counted(saved.step, 'step')}")
            if first and not dry_run:
                folder.resume(lambda _: None)
        if not first:  # the first process downloads and fills the cache for all
            distributed.barrier()
        selection = settings.model_dump(include={"image_size", "channels", "classes", "workers", "limit"})
        images = data.load(settings.dataset, Path(settings.dataroot), say=say, **selection)
        if first:
            distributed.barrier()
        run = Run(settings, images, device, share, saved)
        if run.feed.batch_size < settings.batch_size:
            say(
                f"{options.spelling('batch_size')} {settings.batch_size} exceeds the "
                f"{counted(len(images), 'image')}: "
                f"using {run.feed.batch_size}"
            )
        say(_headline(run))
        target, start = out, run.position.step
        if dry_run:
            target = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dcgan-dry-run-")))
            folder = Folder(target / CHECKPOINTS, settings.keep)
        score = score_of(settings, images, run.device, say) if first else None
        try:
            if first:
                write_file(settings, output_folder(target) / CONFIG)
            report = Report(target, run, console, settings.tensorboard) if first else None
            with recording_signals() as stop, forced(settings.engine), report or contextlib.nullcontext():
                spent = follow(run, folder, report, stop, score=score, limit=1 if dry_run else None)
                if report is not None:
                    report.finish()
        except BaseException:
            if first and run.position.step == start:
                undo()
            raise
        if stop.signal:
            resuming = _command("train --resume --out", out)
            say(f"Stopped and saved after {counted(run.position.step, 'step')}; continue with: {resuming}")
            raise typer.Exit(stop.status)
        if spent.steps:
            say(f"The input pipeline took {spent.inputs / spent.steps:.2%} of the training time")
        if dry_run:
            say(f"Done after 1 step. A run without --dry-run writes into {out}:")
            for file in sorted(path for path in target.rglob("*") if path.is_file()):
                say(f"  {file.relative_to(target)}")
        else:
            say(f"Done after {counted(run.position.step, 'step')}: {out}\nNext: {_command('generate', out)}")


def _ended(out: Path, last: Path) -> bool:
    """Return whether the run has written all its files after its last checkpoint."""
    try:
        times = [(out / name).stat().st_mtime_ns for name in AT_THE_END]
        return min(times) >= last.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _command(words: str, folder: Path) -> str:
    """Return a command for the user's shell."""
    return f"dcgan {words} {shlex.quote(str(folder))}"


def _settings(given: dict[str, Any], out: Path, config: Path | None, resume: bool) -> Settings:
    """Return the settings of a new run, or of the existing one in ``out``."""
    path = out / CONFIG
    if resume and not path.exists():
        raise InputError(f"--resume: there is no run in {out}: it has no {CONFIG}")
    if path.exists() and not resume:
        raise InputError(
            f"--out: {out} already holds a run; add --resume to continue it, or choose another folder"
        )
    if not resume and (taken := [name for name in OUTPUTS if os.path.lexists(out / name)]):
        raise InputError(f"--out: {out} already holds {taken[0]}; choose another folder")
    from_file = {} if config is None else read_file(config)
    if config is not None:
        options.respell(
            {name: f"{config}: {key}" for name, key in keys_of(config).items() if name not in given}
        )
        unknown = from_file.keys() - Settings.model_fields.keys()
        Settings.of(dict.fromkeys(unknown), str(config))  # raises if there is one
    if resume:
        return Settings.of(read_file(path), str(path)).resumed(from_file | given)
    return Settings.of(from_file | given)


def _headline(run: Any) -> str:
    settings, images = run.settings, run.images
    where = str(run.device) if run.share.world == 1 else f"{run.share.world} × {run.device.type}"
    skipped = f", {len(images.skipped)} skipped" if images.skipped else ""
    networks = [settings.netG_module or settings.model, settings.netD_module or settings.model]
    what = " and ".join(dict.fromkeys(networks))
    return (
        f"Training {what} on {counted(len(images), 'image')} of {images.name}{skipped} "
        f"({images.channels}×{settings.image_size}×{settings.image_size}):\n"
        f"{counted(settings.epochs, 'epoch')} in batches of {run.feed.batch_size}, "
        f"{settings.dtype} on {where}, engine {settings.engine}"
    )


# --- options ------------------------------------------------------------------------------------------------


class Command(options.Command):
    """The command, whose help shows only the first name of an option."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help at 80 columns; :data:`EPILOGUE` lists the other names."""
        for param in self.params:
            param.opts, param.secondary_opts = param.opts[:1], []
        super().format_help(ctx, formatter)


def _parameter(name: str, field: FieldInfo, group: str) -> inspect.Parameter:
    """Return the typer parameter of a setting; its value is None if the option is not given."""
    kind: Any = field.annotation
    while get_origin(kind) in (Annotated, Union, UnionType):  # X | None, and X with what it allows
        kind = get_args(kind)[0]
    kind = list[str] if get_origin(kind) is list else kind
    flag = name.replace("_", "-")
    metavar = METAVARS.get(name) or METAVARS.get(kind)
    choices = DATASETS if name == "dataset" else get_args(kind) if get_origin(kind) is Literal else ()
    if choices:
        allowed = "|".join(choices)
        metavar = f"<{allowed}>" if len(allowed) <= MAX_METAVAR else METAVARS[str]
        kind = str
    option = typer.Option(
        *([f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}", *EXAMPLES.get(name, [])]),
        help=_help(field, flag),
        show_default=False,
        metavar=metavar,
        parser=_parser(name, kind) if kind in (int, float) or choices else None,
        autocompletion=_completion(choices) if choices else None,
        rich_help_panel=group,
    )
    if kind in (int, float, list[str]):  # typer parses none of them, so that errors quote what was typed
        kind = str
    if kind == dict[str, Any]:
        kind = list[str]
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo, flag: str) -> str:
    """Return the help of a setting: its docstring, and its default unless that says it."""
    text, default = " ".join(str(field.description).split()), field.default
    if default is None:
        return text
    if default is True:
        return f"{text} Default: on; --no-{flag} turns it off."
    return f"{text} Default: {'off' if default is False else default}."


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _parser(name: str, kind: type) -> Callable[[str], Any]:
    """Return a typer parser whose error, unlike typer's own, quotes the value given."""

    def parse(text: str) -> Any:
        value: Any = text  # which the settings reject if it is not a number
        with contextlib.suppress(ValueError):
            value = kind(text)
        try:
            Settings(**{"netG_module": "", name: value})  # with which every image size is allowed
        except InputError as error:
            hint = f"; {ELSEWHERE[text]}" if name == "dataset" and text in ELSEWHERE else ""
            raise typer.BadParameter(str(error).removeprefix(f"{name} ") + hint) from None
        return value

    return parse


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with one option per setting in place of ``**given``."""
    signature = inspect.signature(command, eval_str=True)
    fields = Settings.model_fields
    settings = [_parameter(name, fields[name], group) for group, names in GROUPS.items() for name in names]
    own = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    command.__signature__ = signature.replace(parameters=own + settings)  # type: ignore[attr-defined]
    return command


def _device(device: str | None, accel: bool, cuda: bool, mps: bool, ngpu: int | None) -> str | None:
    """Return the value of ``--device`` that pytorch/examples' options amount to; None if there is none.

    Raises:
        InputError: they contradict each other, or ask for what is not supported; says what to write instead.
    """
    if mps:
        raise InputError("--mps: GPUs of Apple are not supported; write --device cpu instead")
    if ngpu is not None and ngpu > 1:
        raise InputError(
            f"--ngpu must be 0 or 1, got {ngpu}; for {ngpu} GPUs, start one process each: "
            f"torchrun --nproc-per-node {ngpu} -m dcgan train …"
        )
    asked = {"--device": device, "--accel": "auto" if accel else None, "--cuda": "cuda" if cuda else None}
    asked["--ngpu"] = "cpu" if ngpu == 0 else None
    given = {option: value for option, value in asked.items() if value is not None}
    if len(set(given.values()) - {"auto"}) > 1:
        words = [
            f"{option} {value}" if option == "--device" else f"{option} means --device {value}"
            for option, value in given.items()
        ]
        raise InputError(f"{' and '.join(given)} contradict each other: {', '.join(words)}")
    if cuda:
        options.respell({"device": "--cuda"})
    return next((value for value in sorted(given.values(), key="auto".__eq__)), None)


@_with_settings
@reporting
def command(
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "--outf",
            metavar="<path>",
            help="Folder of the run, created when there is something to write. Default: runs/train.",
            show_default=False,
        ),
    ] = Path("runs/train"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out.", show_default=False)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Take one step, list the files that a run writes, and keep none of them.",
            show_default=False,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            help="TOML or YAML file of settings: the options below without their dashes in front. An option "
            "that is given overrides it. Default: none.",
            show_default=False,
        ),
    ] = None,
    accel: Annotated[bool, typer.Option("--accel", hidden=True)] = False,
    cuda: Annotated[bool, typer.Option("--cuda", hidden=True)] = False,
    mps: Annotated[bool, typer.Option("--mps", hidden=True)] = False,
    ngpu: Annotated[int | None, typer.Option("--ngpu", parser=options.integer(0), hidden=True)] = None,
    **given: Any,
) -> None:
    """Train a DCGAN on an image dataset, or resume an interrupted run.

    The run's folder receives config.yaml, checkpoints/, samples/ (one grid per epoch), metrics.jsonl and
    tensorboard/, and at the end losses.png and samples.gif.
    """
    given["device"] = _device(given.get("device"), accel, cuda, mps, ngpu)
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("netG", "netD"):
        if given.get(name) == "":  # the default of pytorch/examples
            del given[name]
    for name, option in (("netG_args", "--netG-args"), ("netD_args", "--netD-args")):
        if (args := arguments(option, given.pop(name, None))) is not None:
            given[name] = args
    for name in ("classes", "diffaugment"):
        if name in given:
            given[name] = [word for word in given[name].split(",") if word]
    train(given, out, config, resume, dry_run)
