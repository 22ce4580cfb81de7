"""Reporting of a run: console progress, metrics, sample grids, a loss plot and an animation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from dcgan.errors import InputError
from dcgan.files import replacing, reporting_errors, sweep
from dcgan.generation import save_grid, write_animation
from dcgan.training.loss_readback import Position, Row
from dcgan.training.run import Run

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples", "tensorboard"
LINE_INTERVAL = 10.0
"""Seconds between progress lines when the console is not a terminal."""
MAX_FRAMES = 100
"""Maximum number of frames in the animation; they are evenly spaced and include the last grid."""


class Report:
    """Writes into a run's folder and to the console; a :class:`dcgan.training.run.Watcher`.

    ``metrics.jsonl`` has one line per step and one per score; a resumed run first drops the lines of steps
    that it will repeat. ``samples/`` holds the sample grids, and ``tensorboard/`` all of this as events.

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
            BarColumn(bar_width=10),  # narrow enough for the text to fit into 80 columns
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._start_time, self._start_images = time.perf_counter(), run.position.images
        self._last_line_time, self._start_step = self._start_time, run.position.step
        self._task: TaskID | None = None

    def __enter__(self) -> Report:
        self._progress.start()
        self._task = self._progress.add_task("", total=self._run.steps, completed=self._run.position.step)
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._metrics.close()
        if self._events is not None:
            self._events.close()

    # --- called by the run ----------------------------------------------------------------------------------

    def steps(self, rows: list[Row]) -> None:
        self._write([row._asdict() for row in rows])
        row = rows[-1]
        rate = self._rate(row.images)
        if self._events is not None:
            for logged in rows:
                for tag, value in _scalars(logged).items():
                    self._events.add_scalar(tag, value, logged.step)
            self._events.add_scalar("images per second", rate, row.step)
        settings = self._run.settings
        line = (
            f"[{row.epoch}/{settings.epochs}][{row.batch}/{len(self._run.feed)}] {rate:.0f} img/s "
            f"Loss_D {row.loss_d:.2f} Loss_G {row.loss_g:.2f} D(x) {row.d_x:.2f} D(G(z)) {row.d_g_z:.2f}"
        )
        assert self._task is not None
        self._progress.update(self._task, completed=row.step, description=line.replace("[", r"\["))
        now = time.perf_counter()
        if self._progress.disable and (
            now - self._last_line_time >= LINE_INTERVAL
            or row.batch == len(self._run.feed)
            or row.step == self._start_step + 1
        ):
            self._last_line_time = now
            remaining = (
                (self._run.steps - row.step) * (now - self._start_time) / (row.step - self._start_step)
            )
            self.say(f"{line} ETA {_duration(remaining)}")

    def samples(self, images: Tensor, position: Position) -> None:
        scale = max(1, 64 // images.shape[-1])
        with reporting_errors(f"samples into {self._out}"):
            save_grid(images, self._out / SAMPLES / f"step-{position.step:09d}.png", scale=scale)
        if self._events is not None:
            self._events.add_images("samples", (images.clamp(-1, 1) + 1) / 2, position.step)
            self._events.flush()

    def score(self, value: float, position: Position) -> None:
        self._write([{"step": position.step, "epoch": position.epoch, "pixel_frechet_distance": value}])
        if self._events is not None:
            self._events.add_scalar("pixel Fréchet distance", value, position.step)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    # --- at the end -----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the loss plot and the animation of the sample grids."""
        rows = [row for row in read_metrics(self._out / METRICS) if "loss_d" in row]
        plot(rows, len(self._run.feed), self._out / "losses.png")
        animate(sorted((self._out / SAMPLES).glob("step-*.png")), self._out / "samples.gif")

    # --- helpers --------------------------------------------------------------------------------------------

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with reporting_errors(str(self._out / METRICS)):
            for line in lines:
                self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()

    def _rate(self, images: int) -> float:
        return (images - self._start_images) / (time.perf_counter() - self._start_time)


def _scalars(row: Row) -> dict[str, float]:
    return {"loss/D": row.loss_d, "loss/G": row.loss_g, "D/x": row.d_x, "D/G(z)": row.d_g_z}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


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
    """Plot the losses, D(x) and D(G(z)) by epoch: raw values, and a moving average over 1/40 of the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
