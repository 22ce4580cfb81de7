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

from bench import options, output
from dcgan.checkpoint import Folder
from dcgan.data import Images
from dcgan.devices import resolve
from dcgan.settings import Settings
from dcgan.training.reference_step import Result
from dcgan.training.report import Report
from dcgan.training.run import Run, follow
from dcgan.training.stop import Stop

HELP = "compare the throughput of dcgan train with that of its training step"
DTYPES = ("float32", "tf32", "bfloat16")
MIN_RATIO = 0.9
"""Minimum ratio of the run's rate to the step's, on a GPU."""
IMAGES = 4096
WARMUP = 8  # steps: the first few steps run eagerly before the step is captured
OVERHEAD_STEPS = 400  # steps over which the Python overhead is averaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_batches(parser, [64])
    text = "dtype (default: float32; on a GPU bfloat16)"
    parser.add_argument("--dtype", choices=DTYPES, help=text)
    options.add(parser, "device", "json")
    options.add_timing(parser, "the step and the run, each", 6.0)


def timed(call: Callable[[], object], steps: int, device: torch.device) -> float:
    """Return the seconds per call over ``steps`` calls, including the device's time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    wait()
    return (time.perf_counter() - start) / steps


def measure(
    batch: int, dtype: str, device: torch.device, seconds: float, rounds: int, **more: Any
) -> dict[str, Any]:
    """Return both rates in images/s and the Python overhead per step in µs.

    ``more`` is passed on to the settings of the run.
    """
    given = {"batch_size": batch, "dtype": dtype, "epochs": 10**6, "checkpoint_interval": 0, "score": "none"}
    settings, random = Settings.of(given | more), torch.Generator().manual_seed(0)
    shape = IMAGES, 1, settings.image_size, settings.image_size
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    run = Run(settings, Images(pixels, "fake"), device)
    step, inputs = run._step, run.inputs()
    with tempfile.TemporaryDirectory() as name, Path(name, "console").open("w") as file:
        out, folder = Path(name), Folder(Path(name, "checkpoints"))
        folder.save = lambda checkpoint: out  # type: ignore[method-assign]
        console = Console(file=file, force_terminal=True)

        def alone(steps: int) -> float:
            return timed(lambda: step(*inputs), steps, device)

        def whole(steps: int) -> float:
            """Return the seconds per step of ``dcgan train``, including reading the last loss."""
            with Report(out, run, console, tensorboard=True) as report:
                return follow(run, folder, report, Stop(), limit=steps).steps / steps

        alone(WARMUP)
        steps = max(3, int(seconds / rounds / alone(WARMUP)))
        whole(steps)
        times = [(alone(steps), whole(steps)) for _ in range(rounds)]
        step_s, run_s = (statistics.median(own) for own in zip(*times, strict=True))
        guards = timed(step._fingerprint, OVERHEAD_STEPS, torch.device("cpu"))
        noise = timed(lambda: run.feed.noise(0, batch), OVERHEAD_STEPS, device)

        # Time reporting alone: replace the step and the inputs by ones that cost nothing.
        result = Result(*torch.rand(4, device=device))

        def advance(real: Any, noise: Any) -> Result:
            epoch, batch, count, images = run.position
            run.position = type(run.position)(epoch, batch, count + 1, images + run.feed.size(0))
            return result

        run.step = advance  # type: ignore[method-assign]
        run.inputs = lambda: inputs  # type: ignore[method-assign]
        return {
            "step_images_s": batch / step_s,
            "run_images_s": batch / run_s,
            "ratio": statistics.median(a / b for a, b in times),
            "guards_us": 1e6 * guards,
            "noise_us": 1e6 * noise,
            "telling_us": 1e6 * whole(OVERHEAD_STEPS),
        }


def run(args: argparse.Namespace) -> int:
    """Run the command. Return 1 if, on a GPU, the ratio of any batch is below MIN_RATIO, else 0."""
    device = resolve(options.find_device(args.device, [args.dtype] if args.dtype else []))
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    columns = ["step images/s", "run images/s", "run/step", "noise µs", "guards µs", "reporting µs"]
    shown = output.table(f"dcgan train · {dtype} · {device}", ["batch"], columns)
    status, rows = 0, []
    for batch in args.batch:
        figures = measure(batch, dtype, device, args.seconds, args.rounds)
        case = {"batch": batch, "dtype": dtype, "device": device.type}
        rows.append(output.common("loop") | case | figures)
        rates = [f"{figures[name]:,.0f}" for name in ("step_images_s", "run_images_s")]
        python = [f"{figures[name]:.0f}" for name in ("noise_us", "guards_us", "telling_us")]
        shown.add_row(str(batch), *rates, f"{figures['ratio']:.3f}", *python)
        status |= int(device.type == "cuda" and figures["ratio"] < MIN_RATIO)
    output.console().print(shown)
    output.append(args.json, rows)
    return status
