"""Reporting of a run: console progress, metrics, sample grids, a loss plot and an animation."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from torch import Tensor

from dcgan.errors import InputError
from dcgan.files import replacing, reporting_errors, sweep
from dcgan.generation import save_grid, write_animation
from dcgan.settings import Settings
from dcgan.training.collapse import CollapseDetector
from dcgan.training.loss_readback import Position, Row
from dcgan.training.run import Run, Values

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples", "tensorboard"
LINE_INTERVAL = 10.0
"""Seconds between progress lines when the console is not a terminal."""
LINE_WIDTH = 100
"""Maximum number of characters of such a line."""
BAR_WIDTH = 10
RATE_WINDOW = 30.0
"""Seconds of training that the rate and the ETA are computed from."""
MAX_FRAMES = 100
"""Maximum number of frames in the animation; they are evenly spaced and include the last grid."""


class _Mark(NamedTuple):
    """How far training had come when steps were reported."""

    seconds: float
    """Training time of this process up to then."""
    step: int
    images: int


class Pace:
    """The recent rate of a run and its remaining time.

    The rate is that of the last :data:`RATE_WINDOW` seconds of training. Time spent on anything else, such as
    samples, scores and checkpoints, does not count as training; its mean per epoch is added to the remaining
    time. The first steps of a process, which also compile and allocate, count only until there are others.

    Args:
        position: where training starts in this process.
        batches: number of steps in an epoch.
        steps: total number of steps of the run.
    """

    def __init__(self, position: Position, batches: int, steps: int) -> None:
        self._batches, self._steps = batches, steps
        self._start = self._epoch_start = _Mark(0.0, position.step, position.images)
        self._recent = deque([self._start])
        self._since = time.perf_counter()
        self._paused, self._epochs = 0.0, 0

    def trained(self, row: Row) -> tuple[float, int] | None:
        """Count the time since the last call as training, of the steps up to ``row``.

        Returns:
            At the end of an epoch the seconds and images of the part of it that this process trained on,
            otherwise None.
        """
        now = time.perf_counter()
        last = self._recent[-1]
        mark = _Mark(last.seconds + now - self._since, row.step, row.images)
        self._since = now
        if self._recent[0] is self._start and last is not self._start:
            self._recent.popleft()
        self._recent.append(mark)
        while self._recent[1].seconds <= mark.seconds - RATE_WINDOW:
            self._recent.popleft()
        if row.batch < self._batches:
            return None
        before, self._epoch_start = self._epoch_start, mark
        self._epochs += 1
        return mark.seconds - before.seconds, mark.images - before.images

    def paused(self) -> None:
        """Count the time since the last call as a pause."""
        now = time.perf_counter()
        if self._recent[-1] is not self._start:  # not what comes once, before the first step
            self._paused += now - self._since
        self._since = now

    @property
    def rate(self) -> float:
        """Images per second."""
        first, last = self._recent[0], self._recent[-1]
        return (last.images - first.images) / (last.seconds - first.seconds)

    @property
    def remaining(self) -> float:
        """Seconds until the end of the run."""
        first, last = self._recent[0], self._recent[-1]
        steps = self._steps - last.step
        step = (last.seconds - first.seconds) / (last.step - first.step)
        return steps * step + math.ceil(steps / self._batches) * self._paused / max(1, self._epochs)


class Report:
    """Writes into a run's folder and to the console; a :class:`dcgan.training.run.Watcher`.

    ``metrics.jsonl`` has one line per step, one per epoch (its training time in this process, without
    samples, scores and checkpoints) and one per score; a resumed run first drops the lines of steps that it
    will repeat. ``samples/`` holds the sample grids, and ``tensorboard/`` all of this as events, together
    with the settings as hyperparameters.

    In a terminal the progress is one line at its bottom, shortened to its width; it disappears if the run is
    interrupted. Elsewhere it is a line after the first steps, every :data:`LINE_INTERVAL` seconds and at the
    end of each epoch.

    Args:
        out: the run's folder.
        run: the run, at its start position.
        console: the console for progress.
        tensorboard: whether to write event files.

    Raises:
        InputError: if TensorBoard is requested but not installed.
        RunError: if the folder cannot be written to.
    """

    def __init__(self, out: Path, run: Run, console: Console, tensorboard: bool) -> None:
        self._out, self._run, self._console = out, run, console
        with reporting_errors(f"into {out}"):
            (out / SAMPLES).mkdir(exist_ok=True)
            for folder in (out, out / SAMPLES):
                sweep(folder)
            _drop_after(out / METRICS, run.position.step)
            self._metrics = (out / METRICS).open("a")
        self._events = _events(out / TENSORBOARD, run.position.step) if tensorboard else None
        self._progress = Progress(
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="crop")
            ),
            console=console,
            disable=not console.is_terminal,
        )
        self._next_line = -math.inf
        self._task: TaskID | None = None
        self._collapse = CollapseDetector(run.images.pixels, 1 - run.settings.label_smoothing)

    def __enter__(self) -> Report:
        self._pace = Pace(self._run.position, len(self._run.feed), self._run.steps)
        self._progress.start()
        self._task = self._progress.add_task("", total=self._run.steps, completed=self._run.position.step)
        if self._events is not None:
            *start, self._session_end = _hyperparameters(self._run.settings)
            for summary in start:
                self._events.file_writer.add_summary(summary)
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.live.transient = not self._run.done
        self._progress.stop()
        self._metrics.close()
        if self._events is not None:
            if self._run.done:
                self._events.file_writer.add_summary(self._session_end)
            self._events.close()

    # --- called by the run ----------------------------------------------------------------------------------

    def steps(self, rows: list[Row]) -> None:
        row, batches = rows[-1], len(self._run.feed)
        epoch = self._pace.trained(row)
        self._write([row._asdict() for row in rows])
        if epoch is not None:
            seconds, images = epoch
            times = {"seconds": seconds, "images_per_second": images / seconds}
            self._write([{"step": row.step, "epoch": row.epoch, **times}])
        if self._events is not None:
            for logged in rows:
                for tag, value in _scalars(logged).items():
                    self._events.add_scalar(tag, value, logged.step)
            self._events.add_scalar("images per second", self._pace.rate, row.step)
        assert self._task is not None
        self._progress.update(self._task, completed=row.step, description=self._line(row, self._text_width))
        now = time.perf_counter()
        if self._progress.disable and (now >= self._next_line or row.batch == batches):
            self._next_line = now + LINE_INTERVAL
            self.say(self._line(row, LINE_WIDTH))
        self._warn(self._collapse.steps(rows))

    def samples(self, images: Tensor, position: Position) -> None:
        scale = max(1, 64 // images.shape[-1])
        with reporting_errors(f"samples into {self._out}"):
            save_grid(images, self._out / SAMPLES / f"step-{position.step:09d}.png", scale=scale)
        if self._events is not None:
            self._events.add_images("samples", (images.clamp(-1, 1) + 1) / 2, position.step)
            self._events.flush()
        self._warn(self._collapse.samples(images, position.step))
        self._pace.paused()

    def scores(self, values: Values, position: Position) -> None:
        self._write([{"step": position.step, "epoch": position.epoch, **values}])
        if self._events is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._events.add_scalar(f"score/{name}", value, position.step)
        if "frechet" in values:
            shares = "".join(f", {name} {values[name]:.2f}" for name in ("precision", "recall"))
            distance = f"Fréchet distance {values['frechet']:.4g} ({values['features']})"
            self.say(f"Epoch {position.epoch}: {distance}{shares}")
        self._pace.paused()

    def saved(self) -> None:
        self._pace.paused()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    # --- at the end -----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the loss plot and the animation of the sample grids."""
        plot(read_metrics(self._out / METRICS), len(self._run.feed), self._out / "losses.png")
        animate(sorted((self._out / SAMPLES).glob("step-*.png")), self._out / "samples.gif")

    # --- helpers --------------------------------------------------------------------------------------------

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with reporting_errors(str(self._out / METRICS)):
            for line in lines:
                self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()

    @property
    def _text_width(self) -> int:
        """Columns of the terminal beside the bar, less two: a ^C at the end must not begin a new line."""
        return self._console.width - BAR_WIDTH - 1 - 2

    def _line(self, row: Row, width: int) -> str:
        """Return the progress in at most ``width`` characters, or its shortest form."""
        rate = self._pace.rate
        place = f"[{row.epoch}/{self._run.settings.epochs}][{row.batch}/{len(self._run.feed)}]"
        speed = f" {rate:,.{0 if rate >= 10 else 1}f} img/s"
        losses = f" Loss_D {row.loss_d:.2f} Loss_G {row.loss_g:.2f}"
        means = f" D(x) {row.d_x:.2f} D(G(z)) {row.d_g_z:.2f}"
        end = f" ETA {_duration(self._pace.remaining)}"
        details = speed + losses + means + end, speed + losses + end, speed + end, speed, ""
        return next((place + each for each in details if len(place + each) <= width), place)

    def _warn(self, message: str | None) -> None:
        if message is not None:
            self.say(message)


def _scalars(row: Row) -> dict[str, float]:
    return {"loss/D": row.loss_d, "loss/G": row.loss_g, "D/x": row.d_x, "D/G(z)": row.d_g_z}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _plain(value: Any) -> int | float | str:
    if isinstance(value, dict):
        value = [f"{key}={each}" for key, each in value.items()]
    return ",".join(value) if isinstance(value, list) else value


def _hyperparameters(settings: Settings) -> list[Any]:
    """Return TensorBoard's summaries of an experiment's definition, its start and its successful end."""
    from torch.utils.tensorboard.summary import hparams

    values = {name: _plain(value) for name, value in settings.to_dict().items() if value is not None}
    scores = {
        "frechet": settings.eval_every > 0,
        "pixel_frechet_distance": not settings.eval_every and settings.score == "pixels",
    }
    return list(hparams(values, {f"score/{name}": 0.0 for name, computed in scores.items() if computed}))


def _events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard is not installed: `pip install tensorboard`, or use --no-tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a ``metrics.jsonl``, without a last line truncated by a crash."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: Path, step: int) -> None:
    """Drop the records of steps after ``step``, which a resumed run repeats."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with replacing(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


def plot(rows: list[dict[str, Any]], batches: int, path: Path) -> None:
    """Plot the losses, D(x) and D(G(z)) by epoch: raw values, and a moving average over 1/40 of the run.

    Only the rows of steps count; without any, nothing is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "loss_d" in row]
    if not rows:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = np.array([row["step"] for row in rows]) / batches
    width = max(1, len(rows) // 40)
    for axes, names in (
        (above, {"loss_d": "D", "loss_g": "G"}),
        (below, {"d_x": "D(x)", "d_g_z": "D(G(z))"}),
    ):
        for name, label in names.items():
            values = np.array([row[name] for row in rows])
            (faint,) = axes.plot(epochs, values, alpha=0.25, linewidth=0.7)
            mean = np.convolve(values, np.ones(width) / width, mode="valid")
            offset = (width - 1) // 2
            axes.plot(epochs[offset : offset + len(mean)], mean, color=faint.get_color(), label=label)
        axes.legend(frameon=False, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
    above.set_ylabel("loss")
    below.set_ylabel("mean probability")
    below.set_xlabel("epoch")
    below.set_ylim(0, 1)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def animate(grids: list[Path], path: Path) -> None:
    """Write an animation of the grids that takes about 8 seconds and holds the last one for 1.5 seconds."""
    if not grids:
        return
    if len(grids) > MAX_FRAMES:
        grids = [grids[round(i * (len(grids) - 1) / (MAX_FRAMES - 1))] for i in range(MAX_FRAMES)]
    milliseconds = max(40, min(500, 8000 // len(grids)))
    last_frames = [grids[-1]] * (1500 // milliseconds)
    write_animation(map(_read, [*grids, *last_frames]), path, milliseconds)


def _read(grid: Path) -> Tensor:
    """Read an image as a batch of one, uint8 [1, 1 or 3, H, W]."""
    with Image.open(grid) as file:
        image = torch.from_numpy(np.asarray(file.convert("RGB")).copy()).permute(2, 0, 1)
    grey = bool((image == image[:1]).all())
    return image[None, :1] if grey else image[None]
