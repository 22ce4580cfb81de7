"""What training should cost on an H100, counted without one: bytes, FLOPs, occupancy, time.

For each layer and phase of a training step, at its default tile, compiled for sm_90: registers and shared
memory give the programs a multiprocessor holds, the grid gives the waves, and :mod:`dcgan.kernels.gpu.model`
the time. ``apart`` is the other way to do a prologue (a pass of its own where it is fused, and the reverse).
``--measured`` fills the last column from what ``make gpu`` wrote.

A step is two forwards and backwards of D, on real and made images, then a forward and a backward of G
through D. The gradients of D's weights in G's backward, which nothing reads, are not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import shortlist
from bench.cases import DTYPES
from bench.layers import Launches, Layer, after_pass, layers, training
from bench.usage import UsageError, positive
from dcgan import models
from dcgan.kernels import gpu
from dcgan.kernels.gpu import model, offline, tiles
from dcgan.kernels.gpu.launch import Product

HELP = "bytes, FLOPs, occupancy and predicted time of training's kernels on an H100"
CAPABILITY = 90
COLUMNS = (
    *("layer", "phase", "kernel", "M", "N", "K", "GFLOP", "MB", "tile", "programs", "regs", "KB", "resident"),
    *("waves", "bound", "µs", "roofline", "share", "apart", "measured"),
)


class Row(NamedTuple):
    """One layer in one phase; ``seconds`` with the kernels before and after the product.

    ``apart`` is the other way's, by guessed resources, since it is not compiled.
    """

    network: str
    layer: Layer
    tile: tiles.Tile
    launches: Launches
    resources: model.Resources
    prediction: model.Prediction
    seconds: float
    apart: float | None

    @property
    def kernels(self) -> int:
        """Kernels, but for the packing of weights."""
        return len(self.launches.passes) + 1 + (self.launches.reduction is not None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "tf32"), default="bfloat16")
    parser.add_argument("--channels", type=positive, default=1, help="of the image")
    parser.add_argument("--measured", type=Path, metavar="JSONL", help="a GPU's times, from make gpu")
    parser.add_argument("--out", type=Path, metavar="MD", help="write the tables there too")


def networks(channels: int) -> dict[str, models.Generator | models.Discriminator]:
    return {"G": models.Generator(channels=channels), "D": models.Discriminator(channels=channels)}


def _times(problem: tiles.Problem, tile: tiles.Tile, launches: Launches) -> tuple[float, float]:
    """(of the product, of the kernels around it) for a problem as the product sees it."""
    splits = launches.product.constants.get("SPLITS", 1)
    product = model.predict(problem, tile, splits).seconds
    after = 0.0
    if launches.reduction is not None:
        after = model.reduction_seconds(problem, launches.product.arguments["partial_ptr"].shape)
    return product, after


def predicted(network: str, layer: Layer, processors: int = model.PROCESSORS, compiled: bool = True) -> Row:
    """The layer at its default tile, with the resources that its code for sm_90 takes, or guessed ones."""
    if compiled:
        tile = shortlist.default(layer, processors, CAPABILITY)
    else:
        tile = tiles.estimate(layer.problem, processors)
    launches = layer.launches(tile, processors)
    problem = layer.problem if tile.fused else model.plain(layer.problem)
    if compiled:
        report = offline.inspect(launches.product, CAPABILITY)
        resources = model.Resources(report.registers, report.shared)
    else:
        resources = model.guess(problem, tile)
    splits = launches.product.constants.get("SPLITS", 1)
    prediction = model.predict(problem, tile, splits, resources)
    after = 0.0
    if launches.reduction is not None:
        after = model.reduction_seconds(problem, launches.product.arguments["partial_ptr"].shape)
    passes = 0.0 if tile.fused else model.pass_seconds(layer.problem, shared=False)
    other = None
    if set(model.prologues(layer.problem)) != {"none"}:
        way = tile._replace(fused=not tile.fused)
        if way.fused and not model.fits(layer.problem, way):
            other = None
        else:
            seen = layer.problem if way.fused else model.plain(layer.problem)
            other = sum(_times(seen, way, layer.launches(way, processors)))
            other += 0.0 if way.fused else model.pass_seconds(layer.problem, shared=False)
    seconds = prediction.seconds + after + passes
    return Row(network, layer, tile, launches, resources, prediction, seconds, other)


def rows(batch: int, dtype: str, channels: int, compiled: bool = True) -> list[Row]:
    """Every layer and phase of a training step."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    found: list[Row] = []
    for name, network in networks(channels).items():
        first = layers(network, batch, DTYPES[dtype])[0].name
        for layer in training(network, batch, DTYPES[dtype], input_gradient=name == "D"):
            before = found[-1] if found else None
            shared = layer.phase == "wgrad" and before is not None and before.layer.phase == "dgrad"
            # The adjoint's pass has written du for both; but the first layer's runs in G's phase alone.
            if shared and before is not None and not before.tile.fused and before.layer.name != first:
                layer = after_pass(layer)
            found.append(predicted(name, layer, compiled=compiled))
    return found


def times_a_step(row: Row, first: bool) -> int:
    """How often a training step runs a row. ``first``: of the network's layers."""
    if row.network == "G":
        return 1
    if row.layer.phase == "forward":
        return 3
    if row.layer.phase == "wgrad":
        return 2
    return 1 if first else 3


class _Counter(TorchDispatchMode):
    """Kernels that aten would launch; a padding is a fill and a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::clone", "aten::copy_", "aten::_to_copy"):
            self.launches += 1
        elif name == "aten::constant_pad_nd":
            self.launches += 2
        return func(*args, **(kwargs or {}))


def packing_launches(layer: Layer) -> int:
    """Kernels that pack the layer's weight for this phase."""
    if not isinstance(layer.operation, Product):
        return 0
    with _Counter() as counter:
        gpu.kernel_for(layer.operation).pack(layer.operation.weight)
    return int(counter.launches)


def _measured(path: Path | None) -> dict[tuple[Any, ...], float]:
    """µs by (network, layer, phase, batch, dtype)."""
    if path is None:
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"--measured: {error}") from error
    keys = ("network", "layer", "phase", "batch", "dtype")
    found = [line for line in lines if all(key in line for key in (*keys, "ours_us"))]
    if not found:
        raise UsageError(f"--measured: {path} has no kernel times; make gpu STAGE=kernels writes them")
    return {tuple(line[key] for key in keys): line["ours_us"] for line in found}


def _cells(row: Row, measured: float | None) -> list[str]:
    problem, tile, p = row.layer.problem, row.tile, row.prediction
    how = {True: "", False: " + pass"}[tile.fused]
    splits = row.launches.product.constants.get("SPLITS", 1)
    copies = f"{problem.copies}·" if problem.copies > 1 else ""
    shape = f"{tile.block_m}×{tile.block_n}×{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    if problem.kernel == "dense_narrow":
        shape = f"1×1×{tile.block_k} w{tile.num_warps}"
    return [
        f"{row.network} {row.layer.name}",
        row.layer.phase,
        f"{row.layer.kernel}{how}",
        f"{copies}{problem.rows}",
        str(problem.columns),
        str(problem.depth) + (f"/{splits}" if splits > 1 else ""),
        f"{p.flops / 1e9:.2f}",
        f"{p.bytes / 1e6:.1f}",
        shape,
        str(row.launches.product.programs),
        str(row.resources.registers),
        f"{row.resources.shared / 1024:.0f}",
        str(p.resident),
        f"{p.waves:.2f}",
        p.bound,
        f"{1e6 * row.seconds:.1f}",
        f"{1e6 * p.roofline:.1f}",
        f"{100 * p.roofline / row.seconds:.0f}%",
        "–" if row.apart is None else f"{1e6 * row.apart:.1f}",
        "–" if measured is None else f"{measured:.1f}",
    ]


def markdown(headings: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table, columns aligned."""
    lines = [list(headings), *(list(line) for line in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


class Step(NamedTuple):
    """A training step's sums."""

    products: float  # seconds, with passes and reductions
    roofline: float
    kernels: int
    packing: int


def step(found: list[Row]) -> Step:
    """The sums of a training step over its rows."""
    seconds = roofline = 0.0
    kernels = packing = 0
    first = {name: next(row.layer.name for row in found if row.network == name) for name in ("G", "D")}
    for row in found:
        times = times_a_step(row, row.layer.name == first[row.network])
        seconds += times * row.seconds
        roofline += times * row.prediction.roofline
        kernels += times * row.kernels
        packing += times * packing_launches(row.layer)
    return Step(seconds, roofline, kernels, packing)


def run(args: argparse.Namespace) -> int:
    """Prints a table a batch and the steps' sums."""
    measured = _measured(args.measured)
    text = [
        f"# Predicted: training on an H100, {args.dtype}, {args.channels} channel(s)",
        "GFLOP = 2·M·N·K (times the copies before M); MB: each operand, output and weight once. "
        f"Rates: {model.FLOPS[_precision(args.dtype)] / 1e12:.0f} TFLOP/s, {model.HBM / 1e12:.1f} TB/s of "
        f"HBM, {model.TILES / 1e12:.0f} TB/s of tiles from L2, {model.LANES} instructions a clock and "
        f"multiprocessor at {model.CLOCK / 1e9:.3f} GHz; {1e6 * model.LATENCY:.0f} µs to fill and drain a "
        f"pipeline, {1e6 * model.GAP:.0f} µs between kernels. K/n: the reduction in n chunks. "
        "µs includes passes and reductions; roofline is the larger of GFLOP and MB at their rates.",
    ]
    print("\n\n".join(text))
    for batch in args.batch:
        found = rows(batch, args.dtype, args.channels)
        body = [
            _cells(row, measured.get((row.network, row.layer.name, row.layer.phase, batch, args.dtype)))
            for row in found
        ]
        total = step(found)
        sums = (
            f"A step of {batch} images: {1e6 * total.products:.0f} µs in {total.kernels} kernels, and "
            f"{total.packing} that pack weights ({1e6 * model.pack_seconds(total.packing):.0f} µs): "
            f"{batch / (total.products + model.pack_seconds(total.packing)):,.0f} images/s; the roofline is "
            f"{1e6 * total.roofline:.0f} µs, {batch / total.roofline:,.0f} images/s. "
            "BatchNorm's per-channel arithmetic and the optimizer are not in it."
        )
        part = [f"## Batch {batch}", markdown(COLUMNS, body), sums]
        print("\n" + "\n\n".join(part), flush=True)
        text += part
    if args.out is not None:
        args.out.write_text("\n\n".join(text) + "\n")
    return 0


def _precision(dtype: str) -> str:
    return "tf32" if dtype == "tf32" else "16bit"
