"""``python -m dcgan.kernels.gpu.tools.inspect``: inspect the kernels' machine code, without a GPU.

Every layer of both networks is compiled for each architecture, and its machine code is read for registers,
spills, shared memory, the matrix instruction and the width of asynchronous copies. The exit status is 1 if
any check fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from .. import offline
from ..tiles import SHARED_LIMIT, Tile
from .layers import DTYPES, SM_COUNTS, Layer, evaluation, networks, positive, training
from .predict import candidates, default_tile

HEADINGS = (
    *("kernel", "layer", "phase", "fusion", "dtype", "tile M×N×K", "CTAs", "regs", "spills", "KB"),
    *("matrix", "16-byte copies", "narrower", "loads", "verdict"),
)


def tiles_of(layer: Layer, arch: int, every: bool) -> list[Tile]:
    """Return the layer's default tile, or every candidate."""
    if every:
        return candidates(layer.problem, SHARED_LIMIT[arch])
    return [default_tile(layer, SM_COUNTS[arch], arch)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Returns 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m dcgan.kernels.gpu.tools.inspect", description=__doc__)
    add = parser.add_argument
    archs = "architectures, 80 for sm_80 (80 90)"
    add("--arch", type=int, nargs="+", choices=(80, 90), default=[80, 90], help=archs)
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="dtypes (all)")
    add("--batch", type=positive, default=64, help="batch size; determines the default tile (64)")
    add("--channels", type=positive, default=1, help="channels of the image (1)")
    add("--all", action="store_true", help="inspect every tile, not only the default one")
    args = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 180)
    wrong = 0
    for arch in args.arch:
        table = Table(title=f"sm_{arch}, batch {args.batch}, reference networks, {args.channels} channel(s)")
        for heading in HEADINGS:
            table.add_column(heading, no_wrap=heading not in ("16-byte copies", "verdict"))
        for dtype in args.dtype:
            for shapes in networks(args.channels).values():
                layers = evaluation(shapes, args.batch, dtype)
                for layer in layers + training(shapes, args.batch, dtype, input_gradient=True):
                    for tile in tiles_of(layer, arch, args.all):
                        faults = _row(table, layer, dtype, tile, arch)
                        # Candidates that spill are listed as such and never selected, so they are not faults.
                        wrong += any(not (args.all and fault.startswith("spills")) for fault in faults)
        console.print(table)
    return int(wrong > 0)


def _row(table: Table, layer: Layer, dtype: str, tile: Tile, arch: int) -> list[str]:
    launch = layer.launches(tile, SM_COUNTS[arch]).product
    report = offline.inspect(launch, arch)
    faults = offline.faults(launch, report, arch)
    narrower = sum(n for size, n in report.async_copies.items() if size < 16)
    table.add_row(
        layer.kernel_name + ("" if tile.fused else " + prologue"),
        layer.name,
        layer.phase,
        layer.problem.fusion,
        dtype,
        str(replace(tile, fused=True)),
        str(launch.programs),
        str(report.registers),
        str(report.spills),
        f"{report.shared / 1024:.0f}",
        report.matrix,
        str(report.async_copies.get(16, 0)),
        str(narrower),
        str(report.loads),
        "; ".join(faults) or "ok",
    )
    return faults


if __name__ == "__main__":
    sys.exit(main())
