"""``python -m bench inspect``: inspect the machine code of the Triton kernels, without a GPU.

Every layer of both networks is compiled for each architecture, and its machine code is read for registers,
spills, shared memory, the matrix instruction and the width of asynchronous copies. Then follow the kernels
that a compiled network launches on an H100. The exit status is 1 if any check fails.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import shortlist, simulated_gpu
from bench.cases import DTYPES
from bench.layers import Layer, layers, training
from dcgan import fast, models
from dcgan.kernels.gpu import offline, tiles

HELP = "inspect the machine code of the Triton kernels, without a GPU"
HEADINGS = (
    *("kernel", "layer", "phase", "fusion", "dtype", "tile M×N×K", "CTAs", "regs", "spills", "KB"),
    *("matrix", "16-byte copies", "narrower", "loads", "verdict"),
)
SM_COUNTS = {80: 108, 90: 132}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=(80, 90),
        default=[80, 90],
        help="architectures, 80 for sm_80 (80 90)",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="dtypes (all)"
    )
    parser.add_argument("--batch", type=int, default=64, help="batch size; determines the default tile (64)")
    parser.add_argument("--channels", type=int, default=1, help="channels of the image (1)")
    parser.add_argument("--all", action="store_true", help="inspect every tile, not only the default one")


def tiles_of(layer: Layer, arch: int, every: bool) -> list[tiles.Tile]:
    """Return the layer's default tile, or every candidate."""
    if every:
        return shortlist.candidates(layer, tiles.SHARED_LIMIT[arch])
    return [shortlist.default(layer, SM_COUNTS[arch], arch)]


def networks(channels: int) -> tuple[Any, Any]:
    """Return the reference Generator and Discriminator."""
    return models.Generator(channels=channels), models.Discriminator(channels=channels)


def run(args: argparse.Namespace) -> int:
    """Print the tables. Returns 1 if a kernel has a fault."""
    console = Console(width=None if Console().is_terminal else 180)
    wrong = 0
    for arch in args.arch:
        table = Table(title=f"sm_{arch}, batch {args.batch}, reference networks, {args.channels} channel(s)")
        for heading in HEADINGS:
            table.add_column(heading, no_wrap=heading not in ("16-byte copies", "verdict"))
        for dtype in args.dtype:
            torch.backends.cudnn.allow_tf32 = dtype == "tf32"
            for network in networks(args.channels):
                shapes = network, args.batch, DTYPES[dtype]
                for layer in layers(*shapes) + training(*shapes, input_gradient=True):
                    for tile in tiles_of(layer, arch, args.all):
                        faults = _row(table, layer, dtype, tile, arch)
                        # Candidates that spill are listed as such and never selected, so they are not faults.
                        wrong += any(not (args.all and fault.startswith("spills")) for fault in faults)
        console.print(table)
    if 90 in args.arch:
        wrong += _launches(console, args)
    return int(wrong > 0)


def _row(table: Table, layer: Layer, dtype: str, tile: tiles.Tile, arch: int) -> list[str]:
    launch = layer.launches(tile, SM_COUNTS[arch]).product
    report = offline.inspect(launch, arch)
    faults = offline.faults(launch, report, arch)
    narrower = sum(n for size, n in report.async_copies.items() if size < 16)
    table.add_row(
        layer.kernel + ("" if tile.fused else " + prologue"),
        layer.name,
        layer.phase,
        layer.problem.fusion,
        dtype,
        f"{tile.block_m}×{tile.block_n}×{tile.block_k} w{tile.num_warps} s{tile.num_stages}",
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


def _launches(console: Console, args: argparse.Namespace) -> bool:
    """Print what each compiled network, ours and stock, launches in eval and in training on a simulated H100.

    One op of ours is a product; in training it includes reducing per-tile partials and packing the weight.
    """
    table = Table(title=f"torch.compile for a simulated H100, bfloat16, batch {args.batch}")
    for heading in ("network", "phase", "graphs", "our ops", "Inductor's kernels", "aten calls", "largest"):
        table.add_column(heading)
    wrong = False
    for ours, kinds in ((True, fast), (False, models)):
        inputs = {
            "Generator": (kinds.Generator(channels=args.channels), (args.batch, 100)),
            "Discriminator": (
                kinds.Discriminator(channels=args.channels),
                (args.batch, args.channels, 64, 64),
            ),
        }
        for name, (network, shape) in inputs.items():
            network = network.to(torch.bfloat16)
            phases = {"eval": simulated_gpu.launches(network, shape)}
            phases |= simulated_gpu.training_launches(network, shape, input_gradient=name == "Discriminator")
            for phase, counts in phases.items():
                title = f"fast {name}" if ours else f"stock {name}"
                table.add_row(title, phase, *(str(value) for value in counts))
                if ours:
                    wrong |= counts.graphs != 1 or counts.ops != 5 or counts.aten > 0
                    wrong |= counts.largest > 512  # larger than a per-channel vector
    console.print(table)
    return wrong
