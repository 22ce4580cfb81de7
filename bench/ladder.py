"""``python -m bench ladder``: one layer optimized step by step, from seven naive loops to the native engine.

Each step is checked against float64 before it is timed. Rates always count the multiply-adds of the direct
convolution, even if a step does fewer or more, so that they are comparable; the ceiling is the FMA peak.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bench import cases, ceiling, machine, native, options, records, table
from bench.blocks import Block, blocks
from bench.cases import Case, float64, relative_error
from bench.stats import Spread
from bench.timing import Timed, interleaved, torch_threads
from bench.usage import UsageError, positive
from dcgan.kernels.call import Stage
from dcgan.kernels.cpu import Geometry, algorithm_selection, library

HELP = "optimize one layer step by step, from naive loops to the native engine"

SOURCE = Path(__file__).with_name("ladder.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
LAYER = 3
NAIVE_IMAGES = 4  # of the batch, as the naive loops take a second per image
TOLERANCE = 5e-6  # for a layer, as in bench.accuracy

ENGINE = {
    "dense": "matrix product",
    "narrow": "all taps of a pixel as one panel",
    "direct": "polyphase implicit GEMM",
    "f2": "Winograd F(2×2, 2×2)",
    "f4": "Winograd F(4×4, 2×2)",
}


@dataclass(frozen=True)
class Step:
    """One implementation of the layer, with an input in its memory format."""

    name: str
    run: Callable[[Tensor], Tensor]
    x: Tensor
    threads: int
    products: float | None
    """Multiply-adds relative to the direct convolution; None if unknown."""
    baseline: bool = False
    """Whether it is a PyTorch baseline instead of a step."""


@dataclass(frozen=True)
class Measured:
    step: Step
    error: float
    flops: float
    """FLOP of the direct convolution on the step's images."""
    spread: Spread

    @property
    def rate(self) -> float:
        return self.flops / self.spread.median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_network(parser)
    options.add_sizes(parser)
    add(
        "--layer",
        type=positive,
        default=LAYER,
        metavar="N",
        help=f"index of the layer in the network, from 1 ({LAYER})",
    )
    add("--batch", type=positive, default=64, help="batch size (64)")
    options.add_threads(parser)
    options.add_timing(parser, "each step", 2.0, rounds=4)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check, time and print all steps. Return the exit status: 1 if a step gives wrong results."""
    native.required()
    case = Case(args.network, args.batch, "float32", "cpu", args.threads, options.sizes(args, args.network))
    layers = blocks(case.network())
    if args.layer > len(layers):
        listed = ", ".join(f"{i} {block.name}" for i, block in enumerate(layers, 1))
        raise UsageError(f"argument --layer: the {args.network} network has {listed}; got {args.layer}")
    block = layers[args.layer - 1]
    naive = build()
    out, load = table.console(), machine.load()
    with torch.no_grad():
        ladder = steps(block, args.batch, args.threads, naive)
        measured, peaks, wrong = measure_steps(block, ladder, args.seconds, args.rounds)
    out.print(ladder_table(f"{_title(case, block)} · {library.isa()}", measured, peaks))
    for line in ceiling_lines(block, args.batch, peaks):
        out.print(line, markup=False, soft_wrap=True)
    for line in wrong:
        out.print(f"WRONG: {line}", style="bold red", markup=False)
    if args.json is not None:
        about = {"case": case.to_json(), "layer": block.name, "transposed": block.stage.transposed}
        about["isa"] = library.isa()
        records.append(args.json, rows(measured, peaks, records.common("ladder", load) | about))
    return int(bool(wrong))


def _title(case: Case, block: Block) -> str:
    kind = "transposed convolution" if block.stage.transposed else "convolution"
    return f"{block.name} {kind} · {cases.title(case.command, case.sizes)} · batch {case.batch} · float32"


# --- the first two steps ------------------------------------------------------------------------------------


class _Layer(ctypes.Structure):
    """The struct ``Layer`` of ladder.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in (
            *("transposed", "images", "c_in", "c_out"),
            *("height", "width", "kernel", "stride", "padding"),
        )
    )


def build() -> ctypes.CDLL:
    """Compile ladder.cpp for this machine and load it. Raises UsageError if that fails."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:  # a loaded library needs no file
        target = Path(folder) / "ladder.so"
        command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(target))
        except OSError as error:
            raise UsageError(f"ladder.cpp needs a C++ compiler; CXX is {compiler!r}: {error}") from error
        except subprocess.CalledProcessError as error:
            raise UsageError(f"{shlex.join(command)}:\n{error.stderr.strip()}") from error


def _compiled(function: Any, g: Geometry, weight: Tensor, x: Tensor, nhwc: bool) -> Tensor:
    layer = _Layer(g.transposed, len(x), g.c_in, g.c_out, g.height, g.width, g.kernel, g.stride, g.padding)
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    y = torch.empty(len(x), g.c_out, *g.output, memory_format=memory_format)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, weight, y))
    function(ctypes.byref(layer), *pointers)
    return y


# --- the steps ----------------------------------------------------------------------------------------------


def steps(block: Block, batch: int, threads: int, naive: ctypes.CDLL) -> list[Step]:
    """Return the steps from naive loops to the engine's choice on all threads, then the eager baselines."""
    g, convolution = block.geometry, block.convolution
    weight = convolution.weight.detach().contiguous()
    x = torch.randn(batch, *block.input_shape, generator=torch.Generator().manual_seed(0))
    nhwc = x.contiguous(memory_format=torch.channels_last)
    stage = Stage(g.transposed, weight, stride=g.stride, padding=g.padding)

    def engine(algorithm: str, threads: int) -> Step:
        chain = native.Chain([stage], x.shape, [algorithm], threads)
        return Step(ENGINE[algorithm], chain, nhwc, threads, products(g, algorithm))

    def compiled(function: Any, nhwc: bool) -> Callable[[Tensor], Tensor]:
        return functools.partial(_compiled, function, g, weight, nhwc=nhwc)

    few = x[:NAIVE_IMAGES].contiguous()
    filled = "zeros inserted, im2col, blocked GEMM" if g.transposed else "im2col, blocked GEMM"
    found = [
        Step("seven loops", compiled(naive.ladder_naive, False), few, 1, 1.0),
        Step(filled, compiled(naive.ladder_im2col, True), nhwc, 1, products(g, "im2col")),
        *(engine(algorithm, 1) for algorithm in algorithm_selection.candidates(g)),
    ]
    if threads > 1:
        found.append(engine(native.chosen_algorithm(g, batch, threads), threads))
    for count in sorted({1, threads}):
        found.append(Step("PyTorch eager", convolution, x, count, None, baseline=True))
        last = copy.deepcopy(convolution).to(memory_format=torch.channels_last)
        found.append(Step("PyTorch eager, channels_last", last, nhwc, count, None, baseline=True))
    return found


def products(g: Geometry, algorithm: str) -> float:
    """Return the multiply-adds of an algorithm relative to the direct convolution.

    Tiles that extend beyond the map count in full; padding of the last weight panel does not count.
    """
    if algorithm == "im2col":
        height, width = g.output
        return height * width * g.kernel**2 * g.c_in * g.c_out / g.macs
    if algorithm not in ("f2", "f4"):
        return 1.0
    side = 2 if algorithm == "f2" else 4
    height, width = (g.height, g.width) if g.transposed else g.output
    tiles = -(-height // side) * -(-width // side)
    return 4 * tiles * (side + 1) ** 2 * g.c_in * g.c_out / g.macs


def measure_steps(
    block: Block, ladder: Sequence[Step], seconds: float, rounds: int
) -> tuple[list[Measured], dict[int, float], list[str]]:
    """Time all steps with correct results. Return these, the peaks, and a message for each incorrect step.

    The peaks are FMA FLOP/s by number of threads: the best of one measurement per round.
    """
    expected = float64(block.convolution, ladder[-1].x)
    correct: list[tuple[Step, float]] = []
    wrong: list[str] = []
    for step in ladder:
        with torch_threads(step.threads):
            error = max(relative_error(step.run(step.x), expected[: len(step.x)]) for _ in range(2))
        if error <= TOLERANCE:
            correct.append((step, error))
        else:
            wrong.append(f"{step.name}: error {error:.1e} > {TOLERANCE:.0e}")
    peaks = dict.fromkeys(sorted({step.threads for step in ladder}), 0.0)

    def measure_peaks() -> None:
        for threads in peaks:
            peaks[threads] = max(peaks[threads], ceiling.fma(threads))

    spreads = interleaved([Timed(s.run, s.x, s.threads) for s, _ in correct], seconds, rounds, measure_peaks)
    measured = [
        Measured(step, error, block.flops * len(step.x), spread)
        for (step, error), spread in zip(correct, spreads, strict=True)
    ]
    return measured, peaks, wrong


# --- output -------------------------------------------------------------------------------------------------

COLUMNS = ["threads", "ms", "±", "GFLOP/s", "× before", "ceiling", "products", "FMA units", "error"]


def ladder_table(heading: str, measured: Sequence[Measured], peaks: dict[int, float]) -> Table:
    """One row per step, then the baselines. "FMA units" is the utilization by a step's own multiply-adds."""
    shown = table.start(heading, ["", "step"], COLUMNS)
    before: float | None = None
    number = 0
    for found in measured:
        step = found.step
        if step.baseline and number:
            shown.add_section()
        number = 0 if step.baseline else number + 1
        share = found.rate / peaks[step.threads]
        batch = max(len(t.step.x) for t in measured)
        milliseconds = found.spread.median * 1e3 * batch / len(step.x)
        shown.add_row(
            "" if step.baseline else str(number),
            Text(step.name, style="" if step.baseline else "bold"),
            str(step.threads),
            table.rate(milliseconds),
            table.percent(found.spread.relative),
            table.rate(found.rate / 1e9),
            table.times(None if step.baseline or before is None else found.rate / before),
            table.percent(share),
            table.NOTHING if step.products is None else f"{step.products:.2f}",
            table.percent(None if step.products is None else share * step.products),
            f"{found.error:.1e}",
        )
        before = found.rate
    return shown


def ceiling_lines(block: Block, batch: int, peaks: dict[int, float]) -> list[str]:
    listed = " and ".join(f"{flops / 1e9:,.0f} GFLOP/s on {cases.threads(n)}" for n, flops in peaks.items())
    lines = [
        f"ceiling: {listed}, float32 FMA peak; GFLOP/s are those of the direct convolution "
        f"({block.flops * batch / 1e9:.3g} GFLOP); Winograd, with fewer products, may exceed the ceiling"
    ]
    if batch > NAIVE_IMAGES:
        lines.append(
            f"the seven loops ran on {NAIVE_IMAGES} of the {batch} images; their ms are scaled to all images"
        )
    return lines


def rows(
    measured: Sequence[Measured], peaks: dict[int, float], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the JSON records in step order: FLOP/s of the direct convolution, times in seconds."""
    return [
        common
        | {
            "step": found.step.name,
            "mark": found.step.baseline,
            "threads": found.step.threads,
            "images": len(found.step.x),
            "products": found.step.products,
            "error": found.error,
            "times": asdict(found.spread),
            "flops_per_s": found.rate,
            "ceiling": {"flops": peaks[found.step.threads], "measure": "float32 FMA peak"},
        }
        for found in measured
    ]
