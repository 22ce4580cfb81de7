"""``python -m bench loop``: throughput of ``dcgan train`` compared with the bare training step inside it.

``step`` is TrainStep alone, called repeatedly with the same batch. ``run`` is the loop of ``dcgan train``
around it: gathering batches, drawing noise, reading losses, writing them as JSON and TensorBoard events and
updating a progress bar. (Sample grids and checkpoints, written about once per epoch, are not timed.) Both are
timed in interleaved bursts, in one process, on the same networks.

The other columns are the Python overhead per step. On a GPU it is hidden behind the device's work as long as
its total is shorter than the device's step. ``noise`` and ``reporting`` (reading and writing the losses and
updating the progress bar) belong to the run; ``guards`` is the check that TrainStep makes before each replay
of a CUDA graph.
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

from bench import forward, options, records, table
from bench.usage import positive
from dcgan.checkpoint import Folder
from dcgan.data import Images
from dcgan.devices import resolve
from dcgan.training.reference_step import Result
from dcgan.training.report import Report
from dcgan.training.run import Run, follow
from dcgan.training.settings import Settings
from dcgan.training.stop import Stop

HELP = "compare the throughput of dcgan train with that of its training step"
DTYPES = ("float32", "tf32", "bfloat16")
MIN_RATIO = 0.9
"""Minimum ratio of the run's rate to the step's, on a GPU."""
IMAGES = 4096
WARMUP = 8  # steps: the first few steps run eagerly before the step is captured
OVERHEAD_STEPS = 400  # steps over which the Python overhead is averaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", nargs="+", type=positive, default=[64], metavar="N", help="batch sizes (default: 64)")
    add("--dtype", choices=DTYPES, help="dtype (default: float32; on a GPU bfloat16)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda if there is a GPU, else cpu",
    )
    options.add_timing(parser, "the step and the run, each", 6.0)
    options.add_json(parser)


class TimedRun:
    """A training run that reports into a folder but does not write checkpoints."""

    def __init__(self, settings: Settings, device: torch.device, out: Path) -> None:
        random = torch.Generator().manual_seed(0)
        size = settings.image_size
        pixels = torch.randint(0, 256, (IMAGES, 1, size, size), dtype=torch.uint8, generator=random)
        self.run = Run(settings, Images(pixels, "fake"), device)
        self._out, self._folder = out, Folder(out / "checkpoints")
        self._folder.save = lambda checkpoint: out  # type: ignore[method-assign]
        self._console = Console(file=(out / "console").open("w"), force_terminal=True)

    def seconds(self, steps: int) -> float:
        """Return the seconds of ``steps`` steps of ``dcgan train``, including reading the last loss."""
        with Report(self._out, self.run, self._console, tensorboard=True) as report:
            return follow(self.run, self._folder, report, Stop(), limit=steps).steps


def timed(call: Callable[[], object], steps: int, device: torch.device) -> float:
    """Return the seconds of ``steps`` calls, including the device's time."""
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
    """Return both rates in images/s and the Python overhead per step in µs.

    ``more`` is passed on to the settings of the run.
    """
    given = {"batch_size": batch, "dtype": dtype, "epochs": 10**6, "checkpoint_interval": 0, "score": "none"}
    settings = Settings.of(given | more)
    with tempfile.TemporaryDirectory() as folder:
        timed_run = TimedRun(settings, device, Path(folder))
        run = timed_run.run
        real, noise = run.inputs()
        step = run._step
        timed(lambda: step(real, noise), WARMUP, device)
        each = timed(lambda: step(real, noise), WARMUP, device) / WARMUP
        steps = max(3, int(seconds / rounds / each))
        alone: list[float] = []
        whole: list[float] = []
        timed_run.seconds(steps)
        for _ in range(rounds):
            alone.append(timed(lambda: step(real, noise), steps, device) / steps)
            whole.append(timed_run.seconds(steps) / steps)
        figures = {
            "step_images_s": batch / statistics.median(alone),
            "run_images_s": batch / statistics.median(whole),
            "ratio": statistics.median(a / b for a, b in zip(alone, whole, strict=True)),
            "guards_us": 1e6 * timed(step._fingerprint, OVERHEAD_STEPS, torch.device("cpu")) / OVERHEAD_STEPS,
            "noise_us": 1e6
            * timed(lambda: run.feed.noise(0, batch), OVERHEAD_STEPS, device)
            / OVERHEAD_STEPS,
        }
        # Time reporting alone: replace the step and the inputs by ones that cost nothing.
        result = Result(*torch.rand(4, device=device))
        run.step = _advancing(run, result)  # type: ignore[assignment, method-assign]
        run.inputs = lambda: (real, noise)  # type: ignore[method-assign]
        figures["telling_us"] = 1e6 * timed_run.seconds(OVERHEAD_STEPS) / OVERHEAD_STEPS
        return figures


def _advancing(run: Run, result: Result) -> Callable[[Any, Any], Result]:
    """Return a step that computes nothing and only advances the run's position."""

    def step(real: Any, noise: Any) -> Result:
        epoch, batch, count, images = run.position
        run.position = type(run.position)(epoch, batch, count + 1, images + run.feed.size(0))
        return result

    return step


def run(args: argparse.Namespace) -> int:
    """Run the command. Return 1 if, on a GPU, the ratio of any batch is below MIN_RATIO, else 0."""
    device = resolve(forward.find_device(args.device, [args.dtype] if args.dtype else []))
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    out = table.console()
    columns = ["step images/s", "run images/s", "run/step", "noise µs", "guards µs", "reporting µs"]
    shown = table.start(f"dcgan train · {dtype} · {device}", ["batch"], columns)
    status, rows = 0, []
    for batch in args.batch:
        figures = measure(batch, dtype, device, args.seconds, args.rounds)
        case = {"batch": batch, "dtype": dtype, "device": device.type}
        rows.append(records.common("loop") | case | figures)
        rates = (figures["step_images_s"], figures["run_images_s"])
        python = (figures["noise_us"], figures["guards_us"], figures["telling_us"])
        shown.add_row(
            str(batch),
            *(f"{rate:,.0f}" for rate in rates),
            f"{figures['ratio']:.3f}",
            *(f"{us:.0f}" for us in python),
        )
        status |= int(device.type == "cuda" and figures["ratio"] < MIN_RATIO)
    out.print(shown)
    if args.json is not None:
        records.append(args.json, rows)
    return status
