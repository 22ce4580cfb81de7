"""``python -m dcgan.kernels.gpu.tools.predict_inference``: predict inference on a GPU without one.

Every product is compiled for sm_90 at its default tile and predicted as :mod:`.predict` does. A replay is a
CUDA graph that copies the input in, runs ``prepare`` (:mod:`..prepare`) and the products, and copies the
output out. The products are dependent launches, whose gain, a shorter gap before each, is assumed. Measured
times are those of an earlier commit on an H200, the Generator's next to cuDNN in a CUDA graph and to
torch.compile with mode="reduce-overhead".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .. import cost_model
from ..cost_model import Gpu
from .layers import PRECISIONS, Pass, inference_layers, networks
from .predict import COLUMNS, Row, cells, markdown, measured_of, parser_of, predicted

BASELINES = ("cudnn", "compile")
TOTAL_COLUMNS = (
    *("network", "batch", "launches", "products µs", "prepare µs", "copies µs", "replay µs", "images/s"),
    *("roofline µs", "measured before µs", "fastest baseline µs", "baseline / predicted"),
)


class Replay(NamedTuple):
    """A replay of one network; times are in seconds."""

    launches: int
    """Without the copies."""
    products: float
    prepare: float
    copies: float
    roofline: float

    @property
    def seconds(self) -> float:
        """The time of the whole replay."""
        return self.products + self.prepare + self.copies


def replay(rows: Sequence[Row], gpu: Gpu) -> Replay:
    """Sum the products of a network and what surrounds them."""
    first, last = rows[0].layer, rows[-1].layer
    item = cost_model.ITEM_SIZE[first.problem.precision]
    ends = math.prod((first.spec.images, *first.spec.x.size)), math.prod(last.spec.shape)
    return Replay(
        len(rows) + 1,
        sum(row.seconds for row in rows),
        cost_model.prepare_seconds(),
        sum(cost_model.sweep_seconds(2 * item * elements, gpu) for elements in ends),
        sum(row.prediction.roofline for row in rows),
    )


def _total_cells(
    network: str, batch: int, it: Replay, before: float | None, baseline: float | None
) -> list[str]:
    times = it.products, it.prepare, it.copies, it.seconds
    return [
        network,
        str(batch),
        str(it.launches),
        *(f"{1e6 * time:,.1f}" for time in times),
        f"{batch / it.seconds:,.0f}",
        f"{1e6 * it.roofline:,.1f}",
        *("–" if one is None else f"{one:,.0f}" for one in (before, baseline)),
        "–" if baseline is None else f"{1e-6 * baseline / it.seconds:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the totals of both networks and the tables of their products."""
    parser = parser_of(
        "python -m dcgan.kernels.gpu.tools.predict_inference", __doc__, (1, 8, 64, 256, 1024, 4096)
    )
    args = parser.parse_args(arguments)
    measured, gpu = measured_of(parser, args.measured), cost_model.GPUS[args.gpu]
    title = (
        f"# Predicted: inference on an {gpu.name}, {args.dtype}, {args.channels} channel(s)\n\nThe columns "
        f"are those of a training step's prediction. {gpu.flops(PRECISIONS[args.dtype]) / 1e12:.0f} TFLOP/s, "
        f"{gpu.hbm / 1e12:.1f} TB/s; a gap of {1e6 * cost_model.LAUNCH_GAP:.1f} µs before a launch, "
        f"{1e6 * cost_model.DEPENDENT_GAP:.1f} µs (assumed) before a dependent one."
    )
    totals, sections = [], []
    for network, shapes in networks(args.channels).items():
        for batch in args.batch:
            layers = inference_layers(shapes, batch, args.dtype)
            of = Pass(network, batch)
            rows = [predicted(of, layer, gpu, not args.estimated) for layer in layers]
            body = [
                cells(row, [measured.layer(row, args.dtype, provider) for provider in ("ours", "cudnn")])
                for row in rows
            ]
            sections += [f"### {network}, {batch} image{'s' if batch > 1 else ''}", markdown(COLUMNS, body)]
            key = batch, args.dtype
            timed = measured.generation if network == "G" else {}
            baselines = [timed[(*key, one)] for one in BASELINES if (*key, one) in timed]
            before = timed.get((*key, "ours"))
            totals.append(
                _total_cells(network, batch, replay(rows, gpu), before, min(baselines, default=None))
            )
    text = "\n\n".join(
        [title, "## Replays", markdown(TOTAL_COLUMNS, totals), "## Product by product", *sections]
    )
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
