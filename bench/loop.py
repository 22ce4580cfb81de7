"""``dcgan train`` beside the training step inside it: how much of the step's rate a whole run keeps.

``step`` is TrainStep by itself, the same batch again and again; ``run`` is what ``dcgan train`` does with it:
batches gathered, noise drawn, losses read, written as JSON and TensorBoard events, a progress bar. (Grids and
checkpoints, which come once an epoch or so, are not timed.) Both take bursts in turn, in one process, around
the same networks.

Below it, the Python that a step costs: on a GPU that is hidden behind the device's work as long as all of it
together is shorter than the device's step. ``noise`` and ``telling`` (reading, writing, drawing the bar) are
the run's, ``guards`` is what TrainStep looks at before each replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import forward, options, results, table
from bench.usage import positive
from dcgan.checkpoint import Folder
from dcgan.data import Images
from dcgan.devices import settled
from dcgan.training.report import Report
from dcgan.training.run import Run, follow
from dcgan.training.settings import Settings
from dcgan.training.step import Result
from dcgan.training.stop import Stop

HELP = "dcgan train beside the training step inside it"
DTYPES = ("float32", "tf32", "bfloat16")
BAR = 0.9
"""Of the step's rate, on a GPU."""
IMAGES = 4096
WARM = 8  # steps: the first few of a captured one are eager
COUNTED = 400  # steps whose Python is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", nargs="+", type=positive, default=[64], metavar="N", help="batch sizes (64)")
    add("--dtype", choices=DTYPES, help="(float32; on a GPU bfloat16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    options.add_timing(parser, "each of the two", 6.0)
    options.add_json(parser)


class Writer:
    """A run in a folder, whose checkpoints are not written."""

    def __init__(self, settings: Settings, device: torch.device, out: Path) -> None:
        random = torch.Generator().manual_seed(0)
        size = settings.image_size
        pixels = torch.randint(0, 256, (IMAGES, 1, size, size), dtype=torch.uint8, generator=random)
        self.run = Run(settings, Images(pixels, "fake"), device)
        self._out, self._folder = out, Folder(out / "checkpoints")
        self._folder.save = lambda checkpoint: out  # type: ignore[method-assign]
        self._console = Console(file=(out / "console").open("w"), force_terminal=True)

    def seconds(self, steps: int) -> float:
        """Of so many steps of ``dcgan train``, the last one read."""
        with Report(self._out, self.run, self._console, tensorboard=True) as report:
            return follow(self.run, self._folder, report, Stop(), limit=steps).steps


def timed(call: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of so many calls, the device's included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    wait()
    return time.perf_counter() - start


def measure(
    batch: int, dtype: str, device: torch.device, seconds: float, rounds: int, **more: Any
) -> dict[str, Any]:
    """Both rates in images/s, and microseconds of Python a step; ``more`` settings for the run."""
    given = {"batch_size": batch, "dtype": dtype, "epochs": 10**6, "checkpoint_interval": 0, "score": "none"}
    settings = Settings.of(given | more)
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(settings, device, Path(folder))
        run = writer.run
        real, noise = run.inputs()
        step = run._step
        timed(lambda: step(real, noise), WARM, device)
        each = timed(lambda: step(real, noise), WARM, device) / WARM
        steps = max(3, int(seconds / rounds / each))
        alone: list[float] = []
        whole: list[float] = []
        writer.seconds(steps)
        for _ in range(rounds):
            alone.append(timed(lambda: step(real, noise), steps, device) / steps)
            whole.append(writer.seconds(steps) / steps)
        figures = {
            "step_images_s": batch / statistics.median(alone),
            "run_images_s": batch / statistics.median(whole),
            "ratio": statistics.median(a / b for a, b in zip(alone, whole, strict=True)),
            "guards_us": 1e6 * timed(step._stamp, COUNTED, torch.device("cpu")) / COUNTED,
            "noise_us": 1e6 * timed(lambda: run.feed.noise(0, batch), COUNTED, device) / COUNTED,
        }
        # Telling alone: with a step, and batches, that cost nothing.
        result = Result(*torch.rand(4, device=device))
        run.step = _moving(run, result)  # type: ignore[assignment, method-assign]
        run.inputs = lambda: (real, noise)  # type: ignore[method-assign]
        figures["telling_us"] = 1e6 * writer.seconds(COUNTED) / COUNTED
        return figures


def _moving(run: Run, result: Result) -> Callable[[Any, Any], Result]:
    """A step that only moves on."""

    def step(real: Any, noise: Any) -> Result:
        epoch, batch, count, images = run.position
        run.position = type(run.position)(epoch, batch, count + 1, images + run.feed.size(0))
        return result

    return step


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. 1 where a GPU's run keeps less than BAR of its step's rate."""
    device = settled(forward.find_device(args.device, [args.dtype] if args.dtype else []))
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    out = table.console()
    columns = ["step images/s", "run images/s", "run/step", "noise µs", "guards µs", "telling µs"]
    shown = table.start(f"dcgan train · {dtype} · {device}", ["batch"], columns)
    status, rows = 0, []
    for batch in args.batch:
        figures = measure(batch, dtype, device, args.seconds, args.rounds)
        case = {"batch": batch, "dtype": dtype, "device": device.type}
        rows.append(results.common("loop") | case | figures)
        rates = (figures["step_images_s"], figures["run_images_s"])
        python = (figures["noise_us"], figures["guards_us"], figures["telling_us"])
        shown.add_row(
            str(batch),
            *(f"{rate:,.0f}" for rate in rates),
            f"{figures['ratio']:.3f}",
            *(f"{us:.0f}" for us in python),
        )
        status |= int(device.type == "cuda" and figures["ratio"] < BAR)
    out.print(shown)
    if args.json is not None:
        results.append(args.json, rows)
    return status
