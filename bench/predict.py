"""``python -m bench predict``: predict the cost of training on an H100 without one.

Every layer and phase of a training step is compiled for sm_90 at its default tile. Registers and shared
memory give the occupancy in CTAs/SM, the grid gives the waves, and :mod:`dcgan.kernels.gpu.cost_model` gives
the time. A kernel marked "+ prologue" follows a standalone prologue kernel. The column "alt. prologue" is the
time with the other prologue placement: standalone where the default is fused, fused where it is standalone.
``--measured`` fills the last column from the results of ``make gpu``.

A step is two forwards and backwards of D, on real and generated images, then a forward and a backward of G
through D. The gradients of D's weights in G's backward, which are never used, are not counted.
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
from bench.layers import Launches, Layer, layers, training, with_materialized_du
from bench.usage import UsageError, positive
from dcgan import models
from dcgan.kernels import gpu
from dcgan.kernels.gpu import cost_model, offline, tiles
from dcgan.kernels.gpu.launch import Product

HELP = "predict traffic, FLOPs, occupancy and time of the training kernels on an H100"
CAPABILITY = 90
COLUMNS = (
    *("layer", "phase", "kernel", "M", "N", "K", "GFLOP", "MB", "tile", "CTAs", "regs", "KB", "CTAs/SM"),
    *("waves", "bound", "µs", "roofline", "share", "alt. prologue", "measured"),
)


class Row(NamedTuple):
    """One layer in one phase. ``seconds`` includes the standalone prologue and reduction kernels.

    ``alternative`` is the time with the other prologue placement, from estimated resources, as it is not
    compiled.
    """

    network: str
    layer: Layer
    tile: tiles.Tile
    launches: Launches
    resources: cost_model.Resources
    prediction: cost_model.Prediction
    seconds: float
    alternative: float | None

    @property
    def kernels(self) -> int:
        """Number of kernels without those that pack weights."""
        return len(self.launches.prologues) + 1 + (self.launches.reduction is not None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[64, 256, 1024], help="batch sizes (64 256 1024)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "tf32"), default="bfloat16", help="dtype (bfloat16)"
    )
    parser.add_argument("--channels", type=positive, default=1, help="channels of the image (1)")
    parser.add_argument("--measured", type=Path, metavar="JSONL", help="measured times, written by make gpu")
    parser.add_argument("--out", type=Path, metavar="MD", help="also write the tables to this file")


def networks(channels: int) -> dict[str, models.Generator | models.Discriminator]:
    """Return the reference networks by the letter that names them in the tables."""
    return {"G": models.Generator(channels=channels), "D": models.Discriminator(channels=channels)}


def _times(problem: tiles.Problem, tile: tiles.Tile, launches: Launches) -> tuple[float, float]:
    """Return the predicted seconds of (the product, the reduction after it)."""
    splits = launches.product.constants.get("SPLITS", 1)
    product = cost_model.predict(problem, tile, splits).seconds
    after = 0.0
    if launches.reduction is not None:
        after = cost_model.reduction_seconds(problem, launches.product.arguments["partial_ptr"].shape)
    return product, after


def predicted(network: str, layer: Layer, sms: int = cost_model.SM_COUNT, compiled: bool = True) -> Row:
    """Predict a layer at its default tile, with the resources of its sm_90 code or estimated ones."""
    tile = shortlist.default(layer, sms, CAPABILITY) if compiled else tiles.estimate(layer.problem, sms)
    launches = layer.launches(tile, sms)
    problem = layer.problem if tile.fused else cost_model.without_prologue(layer.problem)
    if compiled:
        report = offline.inspect(launches.product, CAPABILITY)
        resources = cost_model.Resources(report.registers, report.shared)
    else:
        resources = cost_model.estimate_resources(problem, tile)
    splits = launches.product.constants.get("SPLITS", 1)
    prediction = cost_model.predict(problem, tile, splits, resources)
    after = 0.0
    if launches.reduction is not None:
        after = cost_model.reduction_seconds(problem, launches.product.arguments["partial_ptr"].shape)
    before = 0.0 if tile.fused else cost_model.standalone_prologue_seconds(layer.problem, shared=False)
    alternative = None
    if set(cost_model.prologues(layer.problem)) != {"none"}:
        other = tile._replace(fused=not tile.fused)
        if other.fused and not cost_model.fits(layer.problem, other):
            alternative = None
        else:
            seen = layer.problem if other.fused else cost_model.without_prologue(layer.problem)
            alternative = sum(_times(seen, other, layer.launches(other, sms)))
            alternative += (
                0.0 if other.fused else cost_model.standalone_prologue_seconds(layer.problem, shared=False)
            )
    seconds = prediction.seconds + after + before
    return Row(network, layer, tile, launches, resources, prediction, seconds, alternative)


def rows(batch: int, dtype: str, channels: int, compiled: bool = True) -> list[Row]:
    """Predict every layer and phase of a training step."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    found: list[Row] = []
    for name, network in networks(channels).items():
        first = layers(network, batch, DTYPES[dtype])[0].name
        for layer in training(network, batch, DTYPES[dtype], input_gradient=name == "D"):
            previous = found[-1] if found else None
            shared = layer.phase == "wgrad" and previous is not None and previous.layer.phase == "dgrad"
            # wgrad reads the du that dgrad's standalone prologue materialized; the first layer's dgrad runs
            # only in G's update.
            if shared and previous is not None and not previous.tile.fused and previous.layer.name != first:
                layer = with_materialized_du(layer)
            found.append(predicted(name, layer, compiled=compiled))
    return found


def runs_per_step(row: Row, first: bool) -> int:
    """Return how often a training step runs a row. ``first`` marks the network's first layer."""
    if row.network == "G":
        return 1
    if row.layer.phase == "forward":
        return 3
    if row.layer.phase == "wgrad":
        return 2
    return 1 if first else 3


class _Counter(TorchDispatchMode):
    """Count the kernels that aten would launch; padding is a fill and a copy."""

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
    """Return the number of kernels that pack the layer's weight for this phase."""
    if not isinstance(layer.operation, Product):
        return 0
    with _Counter() as counter:
        gpu.kernel_for(layer.operation).pack(layer.operation.weight)
    return int(counter.launches)


def _measured(path: Path | None) -> dict[tuple[Any, ...], float]:
    """Read measured times in µs by (network, layer, phase, batch, dtype)."""
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
    prologue = "" if tile.fused else " + prologue"
    splits = row.launches.product.constants.get("SPLITS", 1)
    copies = f"{problem.copies}·" if problem.copies > 1 else ""
    shape = f"{tile.block_m}×{tile.block_n}×{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    if problem.kernel == "dense_narrow":
        shape = f"1×1×{tile.block_k} w{tile.num_warps}"
    return [
        f"{row.network} {row.layer.name}",
        row.layer.phase,
        f"{row.layer.kernel}{prologue}",
        f"{copies}{problem.rows}",
        str(problem.columns),
        str(problem.depth) + (f"/{splits}" if splits > 1 else ""),
        f"{p.flops / 1e9:.2f}",
        f"{p.bytes / 1e6:.1f}",
        shape,
        str(row.launches.product.programs),
        str(row.resources.registers),
        f"{row.resources.shared / 1024:.0f}",
        str(p.ctas_per_sm),
        f"{p.waves:.2f}",
        p.bound,
        f"{1e6 * row.seconds:.1f}",
        f"{1e6 * p.roofline:.1f}",
        f"{100 * p.roofline / row.seconds:.0f}%",
        "–" if row.alternative is None else f"{1e6 * row.alternative:.1f}",
        "–" if measured is None else f"{measured:.1f}",
    ]


def markdown(headings: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table with aligned columns."""
    lines = [list(headings), *(list(line) for line in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


class Step(NamedTuple):
    """The totals of a training step."""

    products: float  # seconds, including standalone prologues and reductions
    roofline: float  # seconds
    kernels: int
    packing: int


def step(found: list[Row]) -> Step:
    """Sum the rows of a training step."""
    seconds = roofline = 0.0
    kernels = packing = 0
    first = {name: next(row.layer.name for row in found if row.network == name) for name in ("G", "D")}
    for row in found:
        runs = runs_per_step(row, row.layer.name == first[row.network])
        seconds += runs * row.seconds
        roofline += runs * row.prediction.roofline
        kernels += runs * row.kernels
        packing += runs * packing_launches(row.layer)
    return Step(seconds, roofline, kernels, packing)


def run(args: argparse.Namespace) -> int:
    """Print one table and the totals of a step per batch size."""
    measured = _measured(args.measured)
    flops = cost_model.FLOPS[_precision(args.dtype)]
    text = [
        f"# Predicted: training on an H100, {args.dtype}, {args.channels} channel(s)",
        "GFLOP = 2·M·N·K (times the number of products before M); MB: each operand, output and weight once. "
        f"Rates: {flops / 1e12:.0f} TFLOP/s, {cost_model.HBM_BW / 1e12:.1f} TB/s HBM bandwidth, "
        f"{cost_model.L2_TO_SMEM_BW / 1e12:.0f} TB/s L2-to-SMEM bandwidth, "
        f"{cost_model.INSTRUCTIONS_PER_CLOCK} instructions per clock and SM at "
        f"{cost_model.CLOCK / 1e9:.3f} GHz; "
        f"{1e6 * cost_model.PIPELINE_LATENCY:.0f} µs to fill and drain a pipeline, "
        f"{1e6 * cost_model.LAUNCH_GAP:.0f} µs launch gap. K/n: split-K with n splits. "
        "“+ prologue”: after a standalone prologue kernel; alt. prologue: µs with the other placement "
        "(fused or standalone). µs includes standalone prologues and the reduction of partials; roofline is "
        "the larger of GFLOP and MB at their rates.",
    ]
    print("\n\n".join(text))
    for batch in args.batch:
        found = rows(batch, args.dtype, args.channels)
        body = [
            _cells(row, measured.get((row.network, row.layer.name, row.layer.phase, batch, args.dtype)))
            for row in found
        ]
        total = step(found)
        packing = cost_model.pack_seconds(total.packing)
        summary = (
            f"A step of {batch} images takes {1e6 * total.products:.0f} µs in {total.kernels} kernels, plus "
            f"{1e6 * packing:.0f} µs in {total.packing} kernels that pack weights: "
            f"{batch / (total.products + packing):,.0f} images/s. The roofline is "
            f"{1e6 * total.roofline:.0f} µs, {batch / total.roofline:,.0f} images/s. BatchNorm's per-channel "
            "arithmetic and the optimizer are not included."
        )
        section = [f"## Batch {batch}", markdown(COLUMNS, body), summary]
        print("\n" + "\n\n".join(section), flush=True)
        text += section
    if args.out is not None:
        args.out.write_text("\n\n".join(text) + "\n")
    return 0


def _precision(dtype: str) -> str:
    return "tf32" if dtype == "tf32" else "16bit"
