"""``python -m dcgan.kernels.gpu.tools.predict``: predict the cost of a training step on a GPU without one.

Every layer and phase is compiled for sm_90 at its default tile. Registers and shared memory give the
occupancy in CTAs/SM, the grid gives the waves, and :mod:`..cost_model` gives the time. A kernel marked "+
prologue" follows a standalone prologue kernel. The column "alt. prologue" is the time with the other prologue
placement: standalone where the default is fused, fused where it is standalone. The columns "measured before"
and "cuDNN" are measured times of the same layer and phase, cuDNN's of the convolution alone. In a checkout
they are those of an earlier commit on an H200, from bench/results/h200-kernels.jsonl; ``--measured`` names
another file, for example of ``make gpu``.

A step is D's forward and backward on real and on generated images, G's, and in G's update D's on the
generated images, without weight gradients (:func:`.layers.step_passes`). :func:`rest` lists every other
launch: casts, packing, running statistics, losses and optimizers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ... import coverage
from .. import cost_model, offline, tuning
from ..cost_model import H100, Gpu
from ..tiles import SHARED_LIMIT, Problem, Tile
from .layers import PRECISIONS, Launches, Layer, Pass, Shape, networks, pass_layers, positive, step_passes

CAPABILITY = 90
KEEP = 10  # tiles per problem that are worth timing; each takes a second or two to compile
COLUMNS = (
    *("layer", "phase", "kernel", "M", "N", "K", "GFLOP", "MB", "tile", "CTAs", "regs", "KB", "CTAs/SM"),
    *("waves", "bound", "µs", "roofline", "share", "alt. prologue", "measured before", "cuDNN"),
)
STEP_COLUMNS = (
    *("batch", "D's halves", "launches", "products µs", "prologues, BatchNorm, split-K µs", "rest µs"),
    *(
        "step µs",
        "images/s",
        "roofline µs",
        "images/s",
        "measured before µs",
        "cuDNN µs",
        "cuDNN / predicted",
    ),
)
PROVIDERS = ("ours", "cudnn")
MEASURED = Path(__file__).resolve().parents[3] / "bench/results/h200-kernels.jsonl"


def predict(
    layer: Layer,
    tile: Tile,
    sms: int = cost_model.SM_COUNT,
    resources: cost_model.Resources | None = None,
    gpu: Gpu = H100,
) -> tuple[cost_model.Prediction, float]:
    """Predict a layer: its product, and the seconds of all its launches.

    These include standalone prologues and what follows the product, see :class:`.layers.Launches`.
    """
    it, problem = layer.product(), layer.problem
    if not tile.fused:
        it, problem = it.materialized(run=False), problem.without_prologue()
    partial = layer.kernel.partial(it.spec, tile, sms)
    splits = partial[0] if partial is not None and it.spec.kind == "wgrad" else 1
    prediction = cost_model.predict(problem, tile, splits, resources, sms, gpu, it.spec.dependent)
    seconds = prediction.seconds
    if not tile.fused:
        seconds += cost_model.standalone_prologue_seconds(layer.problem, gpu)
    if it.spec.kind == "wgrad":
        seconds += cost_model.split_k_seconds(problem, splits, gpu)
    elif partial is not None and problem.epilogue == "statistics":
        seconds += cost_model.batchnorm_forward_seconds(partial, it.spec.groups)
    elif partial is not None:
        seconds += cost_model.batchnorm_backward_seconds(partial, it.spec.groups)
        seconds += cost_model.sweep_seconds(apply_bytes(layer), gpu)
    return prediction, seconds


def apply_bytes(layer: Layer) -> int:
    """Return the bytes that ``batchnorm.apply`` moves after a dgrad, 0 after other products."""
    if layer.problem.epilogue != "gradient":
        return 0
    elements = math.prod(layer.spec.shape)
    return cost_model.apply_bytes(elements, layer.problem.precision, layer.x_hat)


def candidates(problem: Problem, shared: int) -> list[Tile]:
    """Return every candidate that fits, with fused and, if there are any, standalone prologues."""
    return [tile for tile in tuning.variants(problem) if cost_model.fits(problem, tile, shared)]


def shortlist(layer: Layer, sms: int, shared: int, keep: int = KEEP) -> list[Tile]:
    """Return the ``keep`` tiles predicted to be fastest, best first."""
    return sorted(candidates(layer.problem, shared), key=lambda tile: predict(layer, tile, sms)[1])[:keep]


def default_tile(layer: Layer, sms: int, capability: int) -> Tile:
    """Return the tile that an untuned GPU of sm_<capability> selects, by compiling for it here."""

    def spills(tile: Tile) -> bool:
        return offline.spills(layer.launches(tile, sms).product, capability)

    return tuning.estimate(layer.problem, sms, SHARED_LIMIT[capability], spills)


def resources_of(report: offline.Report, estimated: cost_model.Resources) -> cost_model.Resources:
    """Return the resources of compiled code; what it does not tell is as estimated."""
    stores = report.stores_by_width
    width = max(stores, key=lambda one: one * stores[one])  # that of the result, not of its partial sums
    epilogue = 0 if report.matrix == "FFMA" else report.epilogue
    compiled = report.registers, report.shared, width
    return cost_model.Resources(*compiled, stalls=estimated.stalls, epilogue=epilogue)


class Row(NamedTuple):
    """One layer in one phase. ``seconds`` includes the kernels before and after the product.

    ``alternative`` is the time with the other prologue placement, from estimated resources, as it is not
    compiled.
    """

    of: Pass
    layer: Layer
    tile: Tile
    launches: Launches
    resources: cost_model.Resources
    prediction: cost_model.Prediction
    seconds: float
    alternative: float | None


def predicted(of: Pass, layer: Layer, gpu: Gpu = H100, compiled: bool = True) -> Row:
    """Predict a layer at its default tile, with the resources of its sm_90 code or estimated ones."""
    problem, sms = layer.problem, cost_model.SM_COUNT
    tile = default_tile(layer, sms, CAPABILITY) if compiled else tuning.estimate(problem, sms)
    launches = layer.launches(tile, sms)
    resources = cost_model.estimate_resources(problem if tile.fused else problem.without_prologue(), tile)
    if compiled:
        resources = resources_of(offline.inspect(launches.product, CAPABILITY), resources)
    other = replace(tile, fused=not tile.fused)
    possible = problem.has_prologue and (tile.fused or cost_model.fits(problem, other))
    alternative = predict(layer, other, gpu=gpu)[1] if possible else None
    return Row(of, layer, tile, launches, resources, *predict(layer, tile, sms, resources, gpu), alternative)


def rows(
    networks: Mapping[str, Sequence[Shape]],
    passes: Iterable[Pass],
    dtype: str,
    gpu: Gpu = H100,
    compiled: bool = True,
) -> list[Row]:
    """Predict every layer and phase of some passes of networks given as shapes, by name."""
    found: list[Row] = []
    for of in passes:
        found += [predicted(of, layer, gpu, compiled) for layer in pass_layers(networks, of, dtype)]
    return found


class Part(NamedTuple):
    """Launches of a training step beside those of its passes."""

    name: str
    launches: int
    seconds: float


def rest(
    networks: Mapping[str, Sequence[Shape]], passes: Sequence[Pass], dtype: str, gpu: Gpu = H100
) -> list[Part]:
    """Return the launches of a training step beside those of its passes.

    Parameters, gradients and the batch are float32, and products in 16 bits run under autocast. ``passes``
    are those of :func:`.layers.step_passes`.
    """
    both, of_g, _ = passes
    together, precision = both.groups > 1, PRECISIONS[dtype]
    g, d = networks["G"], networks["D"]
    item, batch = cost_model.ITEM_SIZE[precision], of_g.images
    images = batch * d[0].c_in * d[0].size ** 2
    weights = {name: 16 * sum(s.c_in * s.c_out for s in shapes) for name, shapes in networks.items()}
    parameters = {
        name: weights[name] + 2 * sum(s.c_out for s in shapes if s.norm) for name, shapes in networks.items()
    }

    def sweep(*sizes: int) -> tuple[int, float]:
        return len(sizes), sum(cost_model.sweep_seconds(size, gpu) for size in sizes)

    def small(count: int) -> tuple[int, float]:
        return sweep(*[0] * count)

    found = []
    if item == 2:
        found.append(Part("cast of noise", *sweep(6 * batch * g[0].c_in)))
    if together:
        sizes = (4 + item) * images, 2 * item * images
        found.append(Part("real and generated images into one batch", *sweep(*sizes)))
    elif item == 2:
        found.append(Part("cast of real images", *sweep(6 * images)))
    packing = sum(cost_model.pack_seconds(weights[name], precision, gpu) for name in "GDD")
    found.append(Part("packing of weights", 3, packing))
    found.append(Part("running statistics", *small(sum(of.runs for of in passes))))
    found.append(Part("losses", *small(6 if together else 8)))
    found.append(Part("derivative of G's last activation", *sweep(3 * item * images)))
    if not together:  # autograd adds the second half's gradient of each parameter to the first's
        tensors = len(d) + 2 * sum(s.norm for s in d)
        _, moved = sweep(12 * parameters["D"])
        found.append(Part("sums of D's gradients", tensors, moved + small(tensors - 1)[1]))
    adam = sum(cost_model.adam_seconds(n) for n in parameters.values())
    found.append(Part("optimizers", 4, adam + small(2)[1]))
    return found


class Measured(NamedTuple):
    """Measured times in µs, of ``ours`` and of ``cudnn``."""

    layers: dict[tuple[Any, ...], float]
    """By (network, layer, phase, batch, dtype, provider)."""
    steps: dict[tuple[Any, ...], float]
    """Of whole steps, by (batch, dtype, provider); cuDNN's as one CUDA graph."""
    generation: dict[tuple[Any, ...], float]
    """Of a call of the Generator in a CUDA graph, by (batch, dtype, provider)."""

    def layer(self, row: Row, dtype: str, provider: str) -> float | None:
        """Return a layer's time; that of a pass over several groups is the sum of theirs."""
        of = row.of
        key = of.network, row.layer.name, row.layer.phase, of.images // of.groups, dtype, provider
        found = self.layers.get(key)
        return None if found is None else of.groups * found


def read_measured(path: Path) -> Measured:
    """Read measured times. Raises ValueError or OSError."""
    keys = ("network", "layer", "phase", "batch", "dtype", "contestant")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row.get("us") is not None]
    layers = {tuple(row[key] for key in keys): row["us"] for row in rows if row["kind"] == "kernels"}
    if not layers:
        raise ValueError(f"{path} has no kernel times; make gpu STAGE=kernels writes them")
    steps, generation = (
        {tuple(row[key] for key in keys[3:]): row["us"] for row in rows if row["kind"] == kind}
        for kind in ("step", "generate")
    )
    return Measured(layers, steps, generation)


def _us(time: float | None) -> str:
    return "–" if time is None else f"{time:.1f}"


def cells(row: Row, measured: Iterable[float | None]) -> list[str]:
    """Return a row of a table with the headings COLUMNS."""
    problem, tile, p = row.layer.problem, row.tile, row.prediction
    prologue = "" if tile.fused else " + prologue"
    splits = row.launches.product.constants.get("SPLITS", 1)
    copies = f"{problem.copies}·" if problem.copies > 1 else ""
    narrow = f"1×1×{tile.block_k} w{tile.num_warps}"
    return [
        f"{row.of.network} {row.layer.name}",
        row.layer.phase,
        f"{row.layer.kernel_name}{prologue}",
        f"{copies}{problem.rows}",
        str(problem.columns),
        str(problem.depth) + (f"/{splits}" if splits > 1 else ""),
        f"{p.flops / 1e9:.2f}",
        f"{p.bytes / 1e6:.1f}",
        narrow if problem.kernel == "dense_narrow" else str(replace(tile, fused=True)),
        str(row.launches.product.programs),
        str(row.resources.registers),
        f"{row.resources.shared / 1024:.0f}",
        str(p.ctas_per_sm),
        f"{p.waves:.2f}",
        p.bound,
        f"{1e6 * row.seconds:.1f}",
        f"{1e6 * p.roofline:.1f}",
        f"{100 * p.roofline / row.seconds:.0f}%",
        _us(None if row.alternative is None else 1e6 * row.alternative),
        *map(_us, measured),
    ]


def markdown(headings: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table with aligned columns."""
    lines = [list(headings), *(list(line) for line in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


class Step(NamedTuple):
    """The totals of a training step; times are in seconds."""

    launches: int
    products: float
    between: float
    """Standalone prologues, BatchNorm's kernels and split-K's reductions."""
    rest: float
    roofline: float
    """Of the products."""

    @property
    def seconds(self) -> float:
        """The time of the whole step."""
        return self.products + self.between + self.rest


def step(found: Iterable[Row], parts: Iterable[Part]) -> Step:
    """Sum the rows of a training step and its other launches."""
    launches, products, between, other, roofline = 0, 0.0, 0.0, 0.0, 0.0
    for row in found:
        runs = row.of.runs
        launches += runs * len(list(row.launches.ordered()))
        products += runs * row.prediction.seconds
        between += runs * (row.seconds - row.prediction.seconds)
        roofline += runs * row.prediction.roofline
    for part in parts:
        launches += part.launches
        other += part.seconds
    return Step(launches, products, between, other, roofline)


def _described(of: Pass) -> str:
    """Return the heading of a pass's table."""
    name = f"{of.network}, {of.images} images"
    if of.groups > 1:
        name += ", both halves in one pass"
    if of.runs > 1:
        name += f", {of.runs} times"
    return name if of.weight_gradients else f"{name}, without weight gradients"


def _step_cells(batch: int, passes: Sequence[Pass], total: Step, before: Sequence[float | None]) -> list[str]:
    cudnn = before[-1]
    return [
        str(batch),
        "one pass" if passes[0].groups > 1 else "two passes",
        str(total.launches),
        *(f"{1e6 * part:,.0f}" for part in (total.products, total.between, total.rest, total.seconds)),
        f"{batch / total.seconds:,.0f}",
        f"{1e6 * total.roofline:,.0f}",
        f"{batch / total.roofline:,.0f}",
        *("–" if one is None else f"{one:,.0f}" for one in before),
        "–" if cudnn is None else f"{1e-6 * cudnn / total.seconds:.2f}",
    ]


def parser_of(prog: str, description: str | None, batches: Sequence[int]) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every prediction has."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add = parser.add_argument
    hint = f"batch sizes ({' '.join(map(str, batches))})"
    add("--batch", type=positive, nargs="+", default=list(batches), help=hint)
    add("--dtype", choices=("bfloat16", "float16", "tf32"), default="bfloat16", help="dtype (bfloat16)")
    add("--channels", type=positive, default=1, help="channels of the image (1)")
    add("--gpu", type=str.lower, choices=tuple(cost_model.GPUS), default="h100", help="the GPU (h100)")
    default = MEASURED if MEASURED.exists() else None
    hint = "measured times, for example kernels.jsonl of make gpu (an H200's, in a checkout)"
    add("--measured", type=Path, metavar="JSONL", default=default, help=hint)
    add("--estimated", action="store_true", help="estimate registers and shared memory instead of compiling")
    add("--out", type=Path, metavar="MD", help="also write the tables to this file")
    return parser


def measured_of(parser: argparse.ArgumentParser, file: Path | None) -> Measured:
    """Return the measured times in the file that ``--measured`` names; exit with an error if it has none."""
    try:
        return Measured({}, {}, {}) if file is None else read_measured(file)
    except (OSError, ValueError) as error:
        parser.error(f"--measured: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of each batch size and the totals of the steps."""
    parser = parser_of("python -m dcgan.kernels.gpu.tools.predict", __doc__, (64, 256, 1024))
    limit = coverage.MAX_IMAGES_TOGETHER
    hint = f"largest batch at which D runs on real and on generated images in one pass ({limit})"
    parser.add_argument("--max-together", type=positive, metavar="N", default=limit, help=hint)
    args = parser.parse_args(arguments)
    measured = measured_of(parser, args.measured)
    gpu = cost_model.GPUS[args.gpu]
    text = [
        f"# Predicted: training on an {gpu.name}, {args.dtype}, {args.channels} channel(s)",
        "GFLOP = 2·M·N·K (times the number of products before M); MB: each operand, output and weight once. "
        f"Rates: {gpu.flops(PRECISIONS[args.dtype]) / 1e12:.0f} TFLOP/s, {gpu.hbm / 1e12:.1f} TB/s HBM "
        f"bandwidth, {cost_model.SHARED_BYTES_PER_CLOCK} bytes of shared memory per clock and SM at "
        f"{cost_model.CLOCK / 1e9:.2f} GHz; {1e6 * cost_model.PIPELINE_LATENCY:.1f} µs before and after a "
        f"program's loop, {1e6 * cost_model.LAUNCH_GAP:.1f} µs launch gap. K/n: split-K with n splits. "
        "“+ prologue”: after a standalone prologue kernel; alt. prologue: µs with the other placement "
        "(fused or standalone). µs includes standalone prologues, BatchNorm's kernels after the product and "
        "the reduction of split-K; roofline is the larger of GFLOP and MB at their rates. Measured before: "
        "the times of the kernels of an earlier commit; cuDNN: the convolution alone, and in the steps "
        "everything, as one CUDA graph.",
    ]
    print("\n\n".join(text))
    shapes, steps = networks(args.channels), []
    for batch in args.batch:
        passes = step_passes(batch, args.max_together)
        found = rows(shapes, passes, args.dtype, gpu, not args.estimated)
        parts = rest(shapes, passes, args.dtype, gpu)
        section = [f"## Batch {batch}"]
        for of in passes:
            body = [
                cells(row, [measured.layer(row, args.dtype, provider) for provider in PROVIDERS])
                for row in found
                if row.of == of
            ]
            section += [f"### {_described(of)}", markdown(COLUMNS, body)]
        body = [[part.name, str(part.launches), f"{1e6 * part.seconds:.1f}"] for part in parts]
        section += ["### The rest", markdown(("what", "launches", "µs"), body)]
        print("\n" + "\n\n".join(section), flush=True)
        text += section
        before = [measured.steps.get((batch, args.dtype, provider)) for provider in PROVIDERS]
        steps.append(_step_cells(batch, passes, step(found, parts), before))
    section = ["## Steps", markdown(STEP_COLUMNS, steps)]
    print("\n" + "\n\n".join(section))
    if args.out is not None:
        args.out.write_text("\n\n".join([*text, *section]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
