"""``python -m bench ladder``: one layer from seven naive loops to the native engine, step by step.

Each step is checked against float64 before it is timed. Rates count the multiply-adds of the direct
convolution, whatever a step multiplies, so that they compare times; the ceiling is that of the FMA units.
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

from bench import cases, ceiling, machine, native, options, results, table
from bench.blocks import Block, blocks
from bench.cases import Case, float64, relative_error
from bench.stats import Spread
from bench.timing import Timed, in_turn, torch_threads
from bench.usage import UsageError, positive
from dcgan.kernels.call import Stage
from dcgan.kernels.cpu import Geometry, library, select

HELP = "one layer from naive loops to the native engine, step by step"

SOURCE = Path(__file__).with_name("ladder.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
LAYER = 3
NAIVE_IMAGES = 4  # of the batch: the naive loops take a second for each
TOLERANCE = 5e-6  # a layer's, as in bench.accuracy

ENGINE = {
    "dense": "matrix product",
    "narrow": "all taps of a pixel as one panel",
    "direct": "polyphase implicit GEMM",
    "f2": "Winograd F(2×2, 2×2)",
    "f4": "Winograd F(4×4, 2×2)",
}


@dataclass(frozen=True)
class Step:
    """One way to compute the layer, on an input of its own format."""

    name: str
    run: Callable[[Tensor], Tensor]
    x: Tensor
    threads: int
    products: float | None
    """Multiply-adds for one of the direct convolution; None where that is not ours to know."""
    mark: bool = False
    """What one would use instead: not a step."""


@dataclass(frozen=True)
class Measured:
    step: Step
    error: float
    flops: float
    """Of the direct convolution of the step's images."""
    spread: Spread

    @property
    def rate(self) -> float:
        return self.flops / self.spread.median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_network(parser)
    options.add_sizes(parser)
    add("--layer", type=positive, default=LAYER, metavar="N", help=f"of the network, from 1 ({LAYER})")
    add("--batch", type=positive, default=64, help="(64)")
    options.add_threads(parser)
    options.add_timing(parser, "each step", 2.0, rounds=4)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Checks, times and prints. Returns the exit status: 1 if a step is wrong."""
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
        measured, roofs, wrong = climb(block, ladder, args.seconds, args.rounds)
    out.print(ladder_table(f"{_title(case, block)} · {library.isa()}", measured, roofs))
    for line in ceiling_lines(block, args.batch, roofs):
        out.print(line, markup=False, soft_wrap=True)
    for line in wrong:
        out.print(f"WRONG: {line}", style="bold red", markup=False)
    if args.json is not None:
        about = {"case": case.to_json(), "layer": block.name, "transposed": block.stage.transposed}
        about["isa"] = library.isa()
        results.append(args.json, rows(measured, roofs, results.common("ladder", load) | about))
    return int(bool(wrong))


def _title(case: Case, block: Block) -> str:
    kind = "transposed convolution" if block.stage.transposed else "convolution"
    return f"{block.name} {kind} · {cases.title(case.command, case.sizes)} · batch {case.batch} · float32"


# --- the first two steps ------------------------------------------------------------------------------------


class _Layer(ctypes.Structure):
    """``Layer`` of ladder.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in (
            *("transposed", "images", "c_in", "c_out"),
            *("height", "width", "kernel", "stride", "padding"),
        )
    )


def build() -> ctypes.CDLL:
    """ladder.cpp for this machine, compiled and loaded. Raises UsageError if that can't be done."""
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
    """From the naive loops to the engine's choice on all threads; then eager, as marks."""
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
        *(engine(algorithm, 1) for algorithm in select.candidates(g)),
    ]
    if threads > 1:
        found.append(engine(native.picked(g, batch, threads), threads))
    for count in sorted({1, threads}):
        found.append(Step("PyTorch eager", convolution, x, count, None, mark=True))
        last = copy.deepcopy(convolution).to(memory_format=torch.channels_last)
        found.append(Step("PyTorch eager, channels_last", last, nhwc, count, None, mark=True))
    return found


def products(g: Geometry, algorithm: str) -> float:
    """Multiply-adds that an algorithm does for one of the direct convolution.

    Tiles that reach over the map's edge count whole; what fills the last panel of weights does not count.
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


def climb(
    block: Block, ladder: Sequence[Step], seconds: float, rounds: int
) -> tuple[list[Measured], dict[int, float], list[str]]:
    """Every step that is right, timed; the roofs; and what is wrong with the other steps.

    A roof is FLOP/s of the FMA units, by the number of threads: the best of a measurement in every round.
    """
    expected = float64(block.convolution, ladder[-1].x)
    right: list[tuple[Step, float]] = []
    wrong: list[str] = []
    for step in ladder:
        with torch_threads(step.threads):
            error = max(relative_error(step.run(step.x), expected[: len(step.x)]) for _ in range(2))
        if error <= TOLERANCE:
            right.append((step, error))
        else:
            wrong.append(f"{step.name}: error {error:.1e} > {TOLERANCE:.0e}")
    roofs = dict.fromkeys(sorted({step.threads for step in ladder}), 0.0)

    def measure() -> None:
        for threads in roofs:
            roofs[threads] = max(roofs[threads], ceiling.fma(threads))

    spreads = in_turn([Timed(s.run, s.x, s.threads) for s, _ in right], seconds, rounds, measure)
    measured = [
        Measured(step, error, block.flops * len(step.x), spread)
        for (step, error), spread in zip(right, spreads, strict=True)
    ]
    return measured, roofs, wrong


# --- what is shown ------------------------------------------------------------------------------------------

COLUMNS = ["threads", "ms", "±", "GFLOP/s", "× before", "ceiling", "products", "FMA units", "error"]


def ladder_table(heading: str, measured: Sequence[Measured], roofs: dict[int, float]) -> Table:
    """A row a step, then the marks. ``products`` as in :class:`Step`; what they take of the FMA units."""
    shown = table.start(heading, ["", "step"], COLUMNS)
    before: float | None = None
    number = 0
    for found in measured:
        step = found.step
        if step.mark and number:
            shown.add_section()
        number = 0 if step.mark else number + 1
        share = found.rate / roofs[step.threads]
        batch = max(len(t.step.x) for t in measured)
        milliseconds = found.spread.median * 1e3 * batch / len(step.x)
        shown.add_row(
            "" if step.mark else str(number),
            Text(step.name, style="" if step.mark else "bold"),
            str(step.threads),
            table.rate(milliseconds),
            table.percent(found.spread.relative),
            table.rate(found.rate / 1e9),
            table.times(None if step.mark or before is None else found.rate / before),
            table.percent(share),
            table.NOTHING if step.products is None else f"{step.products:.2f}",
            table.percent(None if step.products is None else share * step.products),
            f"{found.error:.1e}",
        )
        before = found.rate
    return shown


def ceiling_lines(block: Block, batch: int, roofs: dict[int, float]) -> list[str]:
    listed = " and ".join(f"{flops / 1e9:,.0f} GFLOP/s on {cases.threads(n)}" for n, flops in roofs.items())
    lines = [
        f"ceiling: {listed}, float32 FMA peak; GFLOP/s are those of the direct convolution "
        f"({block.flops * batch / 1e9:.3g} GFLOP), and Winograd, with fewer products, may exceed it"
    ]
    if batch > NAIVE_IMAGES:
        lines.append(f"the seven loops ran on {NAIVE_IMAGES} of the {batch} images; their ms are for all")
    return lines


def rows(
    measured: Sequence[Measured], roofs: dict[int, float], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """The JSON objects, in the ladder's order: FLOP/s of the direct convolution, times in seconds."""
    return [
        common
        | {
            "step": found.step.name,
            "mark": found.step.mark,
            "threads": found.step.threads,
            "images": len(found.step.x),
            "products": found.step.products,
            "error": found.error,
            "times": asdict(found.spread),
            "flops_per_s": found.rate,
            "ceiling": {"flops": roofs[found.step.threads], "measure": "float32 FMA peak"},
        }
        for found in measured
    ]
