"""One layer optimized step by step, from seven naive loops to the native engine.

    python examples/ladder.py --json bench/results/ladder.jsonl

Steps 1 and 2 are in ladder.cpp, which is compiled for this machine; the further ones are the native engine's
algorithms (csrc/), and the last rows PyTorch's. Each is checked against float64 before it is timed. Rates
always count the multiply-adds of the direct convolution, even if a step does fewer or more, so that they are
comparable; the ceiling is the FMA peak. The results in ``--json FILE.jsonl`` are drawn as FILE.png.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cases, machine, options, output
from bench.blocks import Block, Chain, blocks, chosen_algorithm, require_engine
from bench.options import UsageError, positive
from bench.plot import BASELINES, CEILING, OURS, figure, plain
from bench.timing import Spread, Timed, interleaved, torch_threads
from dcgan.kernels.cpu import Geometry, algorithm_selection, library

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
NAIVE_IMAGES = 4  # of the batch, as the naive loops take a second per image
TOLERANCE = 5e-6  # for a layer, as in bench.accuracy
ALGORITHMS = {
    "dense": "matrix product",
    "narrow": "all taps of a pixel as one panel",
    "direct": "polyphase implicit GEMM",
    "f2": "Winograd F(2×2, 2×2)",
    "f4": "Winograd F(4×4, 2×2)",
}
Row = dict[str, Any]


class Step(NamedTuple):
    """One implementation of the layer, with an input in its memory format."""

    name: str
    run: Callable[[Tensor], Tensor]
    x: Tensor
    threads: int
    products: float | None
    """Multiply-adds relative to the direct convolution; None for PyTorch's, where they are unknown."""


# --- the steps ----------------------------------------------------------------------------------------------


def build() -> ctypes.CDLL:
    """Compile ladder.cpp for this machine and load it. Raises UsageError if that fails."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:  # a loaded library needs no file
        target = f"{folder}/ladder.so"
        command = [*shlex.split(compiler), *FLAGS, str(Path(__file__).with_suffix(".cpp")), "-o", target]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(target)
        except OSError as error:
            raise UsageError(f"ladder.cpp needs a C++ compiler; CXX is {compiler!r}: {error}") from error
        except subprocess.CalledProcessError as error:
            raise UsageError(f"{shlex.join(command)}:\n{error.stderr.strip()}") from error


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


def steps(block: Block, batch: int, threads: int, naive: ctypes.CDLL) -> list[Step]:
    """Return the steps from naive loops to the engine's choice on all threads, then the eager baselines."""
    g, convolution = block.geometry, block.convolution
    x = torch.randn(batch, *block.input_shape, generator=torch.Generator().manual_seed(0))
    nhwc = x.contiguous(memory_format=torch.channels_last)
    layer = block._replace(modules=nn.Sequential(convolution)).stage  # without BatchNorm and activation

    def engine(algorithm: str, threads: int) -> Step:
        chain = Chain([layer], x.shape, [algorithm], threads)
        return Step(ALGORITHMS[algorithm], chain, nhwc, threads, products(g, algorithm))

    def cpp(function: Any, memory_format: torch.memory_format) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            sizes = (len(x), g.c_in, g.c_out, g.height, g.width, g.kernel, g.stride, g.padding)
            y = torch.empty(len(x), g.c_out, *g.output, memory_format=memory_format)
            struct = (ctypes.c_int * 9)(g.transposed, *sizes)
            function(struct, *(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, y)))
            return y

        return run

    weight = convolution.weight.contiguous()
    loops = cpp(naive.ladder_naive, torch.contiguous_format)
    im2col = cpp(naive.ladder_im2col, torch.channels_last)
    zeros = "zeros inserted, " if g.transposed else ""
    found = [
        Step("seven loops", loops, x[:NAIVE_IMAGES].contiguous(), 1, 1.0),
        Step(f"{zeros}im2col, blocked GEMM", im2col, nhwc, 1, products(g, "im2col")),
        *(engine(algorithm, 1) for algorithm in algorithm_selection.candidates(g)),
    ]
    if threads > 1:
        found.append(engine(chosen_algorithm(g, batch, threads), threads))
    last = copy.deepcopy(convolution).to(memory_format=torch.channels_last)
    for count in sorted({1, threads}):
        found.append(Step("PyTorch eager", convolution, x, count, None))
        found.append(Step("PyTorch eager, channels_last", last, nhwc, count, None))
    return found


def measure(block: Block, ladder: Sequence[Step], seconds: float, rounds: int) -> tuple[list[Row], list[str]]:
    """Check all steps and time the correct ones. Return a row for each, and a message for each wrong step."""
    expected = cases.float64(block.convolution, ladder[-1].x)
    correct: list[tuple[Step, float]] = []
    wrong: list[str] = []
    for step in ladder:
        with torch_threads(step.threads):
            error = max(cases.relative_error(step.run(step.x), expected[: len(step.x)]) for _ in range(2))
        if error <= TOLERANCE:
            correct.append((step, error))
        else:
            wrong.append(f"{step.name}: error {error:.1e} > {TOLERANCE:.0e}")
    peaks = dict.fromkeys((step.threads for step in ladder), 0.0)

    def measure_peaks() -> None:
        for threads in peaks:
            peaks[threads] = max(peaks[threads], machine.fma(threads))

    timed = [Timed(step.run, step.x, step.threads) for step, _ in correct]
    spreads = interleaved(timed, seconds, rounds, measure_peaks)
    rows = [
        {
            "step": step.name,
            "mark": step.products is None,
            "threads": step.threads,
            "images": len(step.x),
            "products": step.products,
            "error": error,
            "times": asdict(spread),
            "flops_per_s": block.flops * len(step.x) / spread.median,
            "ceiling": {"flops": peaks[step.threads], "measure": "float32 FMA peak"},
        }
        for (step, error), spread in zip(correct, spreads, strict=True)
    ]
    return rows, wrong


# --- table and plot -----------------------------------------------------------------------------------------


def print_table(heading: str, rows: Sequence[Row], gflop: float) -> None:
    """Print one row per step. "FMA units" is the utilization by a step's own multiply-adds."""
    columns = ["threads", "ms", "±", "GFLOP/s", "× before", "ceiling", "products", "FMA units", "error"]
    shown = output.table(heading, ["", "step"], columns)
    batch = max((row["images"] for row in rows), default=0)
    for number, (row, before) in enumerate(zip(rows, [None, *rows], strict=False), 1):
        rate, used = row["flops_per_s"], row["products"]
        if row["mark"] and before and not before["mark"]:
            shown.add_section()
        spread, share = Spread(**row["times"]), rate / row["ceiling"]["flops"]
        shown.add_row(
            "" if row["mark"] else str(number),
            row["step"],
            str(row["threads"]),
            output.rate(spread.median * 1e3 * batch / row["images"]),
            output.percent(spread.relative),
            output.rate(rate / 1e9),
            output.times(None if row["mark"] or not before else rate / before["flops_per_s"]),
            output.percent(share),
            output.NOTHING if used is None else f"{used:.2f}",
            output.percent(None if used is None else share * used),
            f"{row['error']:.1e}",
        )
    output.console().print(shown)
    peaks = {row["threads"]: row["ceiling"]["flops"] / 1e9 for row in rows}
    listed = " and ".join(f"{peak:,.0f} GFLOP/s on {cases.threads(n)}" for n, peak in sorted(peaks.items()))
    print(
        f"ceiling: {listed}, float32 FMA peak; GFLOP/s are those of the direct convolution "
        f"({gflop:.3g} GFLOP); Winograd, with fewer products, may exceed the ceiling"
    )
    if batch > NAIVE_IMAGES:
        print(
            f"the seven loops ran on {NAIVE_IMAGES} of the {batch} images; their ms are scaled to all images"
        )


def panels(rows: Sequence[Row]) -> dict[str, dict[tuple[str, int], Row]]:
    """Group the rows by title, and by step and threads; of repeated measurements, the last is kept."""
    found: dict[str, dict[tuple[str, int], Row]] = {}
    for row in rows:
        case = row["case"]
        network, cpu = cases.title(case["command"], case["sizes"]), f"{row['hardware']['cpu']}, {row['isa']}"
        panel = f"{row['layer']} of {network} · batch {case['batch']} · float32 · {cpu}"
        found.setdefault(panel, {})[row["step"], row["threads"]] = row
    return found


def draw(rows: Sequence[Row], out: Path) -> None:
    """Draw one bar per step, with GFLOP/s and percent of the ceiling for its threads."""
    drawn = panels(rows)
    with figure(out, len(drawn), 1.2 + 0.36 * max(map(len, drawn.values()))) as axes:
        for (panel, bars), ax in zip(drawn.items(), axes[:, 0], strict=True):
            names = []
            for at, ((step, threads), row) in enumerate(bars.items()):
                rate, peak = row["flops_per_s"] / 1e9, row["ceiling"]["flops"] / 1e9
                ax.barh(at, rate, height=0.72, color=BASELINES[5] if row["mark"] else OURS[1])
                label = row["ceiling"]["measure"] if at == 0 else None
                ax.vlines(peak, at - 0.46, at + 0.46, color=CEILING, ls="--", lw=1.4, label=label)
                end = peak if 0.6 * peak < rate < peak else rate  # otherwise the text would overlap the line
                text = f"{output.rate(rate)} GFLOP/s · {rate / peak:.0%}"
                ax.annotate(text, (end, at), (5, 0), textcoords="offset points", va="center", fontsize=8)
                number = "" if row["mark"] else f"{at + 1}  "
                names.append(f"{number}{step}, {cases.threads(threads)}")
            ax.set_yticks(range(len(bars)), names, fontsize=9)
            ax.invert_yaxis()
            ax.margins(x=0.2)
            ax.set_xlabel("GFLOP/s of the direct convolution")
            ax.set_title(panel, loc="left", fontsize=11)
            plain(ax, grid="x")
            ax.legend(frameon=False, fontsize=8, loc="lower right")


# --- the command --------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Check, time and print all steps. Return the exit status: 1 if a step gives wrong results."""
    if args.draw:
        draw(output.read(args.draw), args.draw.with_suffix(".png"))
        return 0
    require_engine()
    sizes = options.sizes(args, args.network)
    case = cases.Case(args.network, args.batch, "float32", "cpu", args.threads, sizes)
    layers = blocks(case.network())
    if args.layer > len(layers):
        listed = ", ".join(f"{i} {block.name}" for i, block in enumerate(layers, 1))
        raise UsageError(f"argument --layer: the {args.network} network has {listed}; got {args.layer}")
    block, naive, load = layers[args.layer - 1], build(), machine.load()
    with torch.no_grad():
        rows, wrong = measure(block, steps(block, args.batch, args.threads, naive), args.seconds, args.rounds)
    kind = "transposed convolution" if block.stage.transposed else "convolution"
    heading = f"{block.name} {kind} · {cases.title(args.network, sizes)} · batch {args.batch} · float32"
    print_table(f"{heading} · {library.isa()}", rows, block.flops * args.batch / 1e9)
    for line in wrong:
        print(f"WRONG: {line}")
    if args.json is not None:
        about = {"case": asdict(case), "layer": block.name, "transposed": block.stage.transposed}
        shared = output.common("ladder", load) | about | {"isa": library.isa()}
        output.append(args.json, [shared | row for row in rows])
        draw(output.read(args.json), args.json.with_suffix(".png"))
    return int(bool(wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a wrong step, 2 for a usage error."""
    parser = argparse.ArgumentParser(description="Optimize one layer from naive loops to the native engine.")
    add = parser.add_argument
    options.add(parser, "network", *options.SIZES, "threads", "json")
    add("--layer", type=positive, default=3, metavar="N", help="index in the network, from 1 (default: 3)")
    add("--batch", type=positive, default=64, help="batch size (default: 64)")
    options.add_timing(parser, "each step", 2.0, rounds=4)
    add("--draw", type=Path, metavar="FILE", help="only draw the results in FILE")
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
