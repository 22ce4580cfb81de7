"""``python -m dcgan.kernels.gpu.tools.predict``: predict the cost of training on an H100 without one.

Every layer and phase of a training step is compiled for sm_90 at its default tile. Registers and shared
memory give the occupancy in CTAs/SM, the grid gives the waves, and :mod:`..cost_model` gives the time. A
kernel marked "+ prologue" follows a standalone prologue kernel. The column "alt. prologue" is the time with
the other prologue placement: standalone where the default is fused, fused where it is standalone.
``--measured`` fills the last column from the results of ``make gpu``.

A step is two forwards and backwards of D, on real and generated images, then a forward and a backward of G
through D. The gradients of D's weights in G's backward, which are never used, are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

from .. import cost_model, offline, tuning
from ..tiles import SHARED_LIMIT, Problem, Tile
from .layers import PRECISIONS, Launches, Layer, Shape, networks, positive, training

CAPABILITY = 90
KEEP = 10  # tiles per problem that are worth timing; each takes a second or two to compile
COLUMNS = (
    *("layer", "phase", "kernel", "M", "N", "K", "GFLOP", "MB", "tile", "CTAs", "regs", "KB", "CTAs/SM"),
    *("waves", "bound", "µs", "roofline", "share", "alt. prologue", "measured"),
)


def predict(
    layer: Layer, tile: Tile, sms: int = cost_model.SM_COUNT, resources: cost_model.Resources | None = None
) -> tuple[cost_model.Prediction, float]:
    """Predict a layer: its product, and the seconds of all its launches.

    These include standalone prologues, and the reduction of partial sums.
    """
    it, problem = layer.product(), layer.problem
    if not tile.fused:
        it, problem = it.materialized(run=False), problem.without_prologue()
    partial = layer.kernel.partial(it.spec, tile, sms)
    splits = partial[0] if partial is not None and it.spec.kind == "wgrad" else 1
    prediction = cost_model.predict(problem, tile, splits, resources, sms)
    seconds = prediction.seconds
    if not tile.fused:
        seconds += cost_model.standalone_prologue_seconds(layer.problem, shared=False)
    if partial is not None:
        seconds += cost_model.reduction_seconds(problem, partial)
    return prediction, seconds


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


class Row(NamedTuple):
    """One layer in one phase. ``seconds`` includes the standalone prologue and reduction kernels.

    ``alternative`` is the time with the other prologue placement, from estimated resources, as it is not
    compiled.
    """

    network: str
    layer: Layer
    tile: Tile
    launches: Launches
    resources: cost_model.Resources
    prediction: cost_model.Prediction
    seconds: float
    alternative: float | None


def predicted(network: str, layer: Layer, sms: int = cost_model.SM_COUNT, compiled: bool = True) -> Row:
    """Predict a layer at its default tile, with the resources of its sm_90 code or estimated ones."""
    problem = layer.problem
    tile = default_tile(layer, sms, CAPABILITY) if compiled else tuning.estimate(problem, sms)
    launches = layer.launches(tile, sms)
    if compiled:
        report = offline.inspect(launches.product, CAPABILITY)
        resources = cost_model.Resources(report.registers, report.shared)
    else:
        seen = problem if tile.fused else problem.without_prologue()
        resources = cost_model.estimate_resources(seen, tile)
    other = replace(tile, fused=not tile.fused)
    possible = problem.has_prologue and (tile.fused or cost_model.fits(problem, other))
    alternative = predict(layer, other)[1] if possible else None
    return Row(network, layer, tile, launches, resources, *predict(layer, tile, sms, resources), alternative)


def rows(networks: Mapping[str, Sequence[Shape]], batch: int, dtype: str, compiled: bool = True) -> list[Row]:
    """Predict every layer and phase of a training step of networks given as shapes, by name."""
    found: list[Row] = []
    for name, shapes in networks.items():
        for layer in training(shapes, batch, dtype, input_gradient=name == "D"):
            # wgrad reads the du that dgrad's standalone prologue materialized; the first layer's dgrad runs
            # only in G's update.
            if layer.phase == "wgrad" and layer.name != shapes[0].name and not found[-1].tile.fused:
                layer = layer.with_shared_du()
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
    weight, pack = layer.product().weight, layer.kernel.pack
    if weight is None or pack is None:
        return 0
    with _Counter() as counter:
        pack(weight)
    return int(counter.launches)


def _measured(path: Path) -> dict[tuple[Any, ...], float]:
    """Read measured times in µs by (network, layer, phase, batch, dtype). Raises ValueError or OSError."""
    keys = ("network", "layer", "phase", "batch", "dtype")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {tuple(line[key] for key in keys): line["ours_us"] for line in lines if "ours_us" in line}
    if not found:
        raise ValueError(f"{path} has no kernel times; make gpu STAGE=kernels writes them")
    return found


def _cells(row: Row, measured: float | None) -> list[str]:
    problem, tile, p = row.layer.problem, row.tile, row.prediction
    prologue = "" if tile.fused else " + prologue"
    splits = row.launches.product.constants.get("SPLITS", 1)
    copies = f"{problem.copies}·" if problem.copies > 1 else ""
    narrow = f"1×1×{tile.block_k} w{tile.num_warps}"
    return [
        f"{row.network} {row.layer.name}",
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
        kernels += runs * len(list(row.launches.ordered()))
        packing += runs * packing_launches(row.layer)
    return Step(seconds, roofline, kernels, packing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table and the totals of a step per batch size."""
    parser = argparse.ArgumentParser(prog="python -m dcgan.kernels.gpu.tools.predict", description=__doc__)
    add = parser.add_argument
    add("--batch", type=positive, nargs="+", default=[64, 256, 1024], help="batch sizes (64 256 1024)")
    add("--dtype", choices=("bfloat16", "float16", "tf32"), default="bfloat16", help="dtype (bfloat16)")
    add("--channels", type=positive, default=1, help="channels of the image (1)")
    add("--measured", type=Path, metavar="JSONL", help="measured times, written by make gpu")
    add("--out", type=Path, metavar="MD", help="also write the tables to this file")
    args = parser.parse_args(arguments)
    try:
        measured = {} if args.measured is None else _measured(args.measured)
    except (OSError, ValueError) as error:
        parser.error(f"--measured: {error}")
    flops = cost_model.FLOPS[PRECISIONS[args.dtype]]
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
        found = rows(networks(args.channels), batch, args.dtype)
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


if __name__ == "__main__":
    sys.exit(main())
