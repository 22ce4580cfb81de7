"""``python -m bench profile``: break down the drop-in's inference time on a CPU by layer.

Each layer runs alone through the native engine, with the algorithm that the engine selects, on the
activations that reach it in the network. The whole network is then timed as the drop-in runs it: one call
that processes the batch in blocks of images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from bench import ceiling, machine, native, options, records, table
from bench.blocks import blocks
from bench.cases import Case
from bench.stats import Spread
from bench.timing import Timed, interleaved, torch_threads
from bench.usage import positive
from dcgan import fast
from dcgan.kernels.cpu import library

HELP = "break down CPU inference time by layer"

TOGETHER = "layers together"
WHOLE = "one call"
COLUMNS = ["ms", "±", "share", "GFLOP/s", "ceiling", "GFLOP", "weights MB"]


@dataclass(frozen=True)
class Part:
    """A layer or the whole network."""

    name: str
    algorithm: str
    flops: int
    """FLOPs of direct convolution for the whole batch."""
    weight_bytes: int
    """Size of the prepacked weights."""
    spread: Spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_network(parser)
    options.add_sizes(parser)
    add = parser.add_argument
    add("--batch", nargs="+", type=positive, default=[64], metavar="N", help="batch sizes (64)")
    options.add_threads(parser)
    options.add_timing(parser, "each layer and the whole", 1.5)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    native.required()
    sizes = options.sizes(args, args.network)
    out, load = table.console(), machine.load()
    for batch in dict.fromkeys(args.batch):
        case = Case(args.network, batch, "float32", "cpu", args.threads, sizes)
        with torch.no_grad(), torch_threads(args.threads):
            parts, roof = measure(case, args.seconds, args.rounds)
        out.print(profile_table(f"{case.title} · {library.isa()}", parts, roof))
        out.print(
            f"ceiling: {roof / 1e9:,.0f} GFLOP/s, float32 FMA peak; rates count the FLOPs of direct "
            "convolution, so Winograd may exceed it",
            soft_wrap=True,
        )
        if args.json is not None:
            records.append(args.json, rows(case, parts, roof, load))
    return 0


def measure(case: Case, seconds: float, rounds: int) -> tuple[list[Part], float]:
    """Time each layer, in order, and last the whole network; also return the peak FMA rate in FLOP/s."""
    network = case.network().requires_grad_(False)
    x = inputs = case.inputs()[0]
    timed: list[Timed] = []
    details: list[tuple[str, str, int, int]] = []
    for block in blocks(network):
        chain = native.Chain([block.stage], x.shape, threads=case.threads)
        timed.append(Timed(chain, x, case.threads))
        (algorithm,) = chain.algorithms
        details.append((block.name, algorithm, case.batch * block.flops, chain.packed_bytes))
        x = chain(x)
    ours = fast.convert(network)
    timed.append(Timed(ours, inputs, case.threads))
    details.append((WHOLE, "", sum(flops for _, _, flops, _ in details), sum(size for *_, size in details)))
    roof = 0.0

    def measure_roof() -> None:
        nonlocal roof
        roof = max(roof, ceiling.fma(case.threads))

    spreads = interleaved(timed, seconds, rounds, measure_roof)
    return [Part(*detail, spread) for detail, spread in zip(details, spreads, strict=True)], roof


def profile_table(heading: str, parts: Sequence[Part], roof: float) -> Table:
    """Build a table of the layers, their sum and the single call; shares are relative to the sum."""
    shown = table.start(heading, ["layer", "algorithm"], COLUMNS)
    *layers, whole = parts
    total = sum(part.spread.median for part in layers)

    def add(name: str, algorithm: str, seconds: float, spread: Spread | None, part: Part) -> None:
        rate = part.flops / seconds
        shown.add_row(
            name,
            algorithm,
            table.rate(1e3 * seconds),
            table.percent(None if spread is None else spread.relative),
            table.percent(seconds / total),
            table.rate(rate / 1e9),
            table.percent(rate / roof),
            table.rate(part.flops / 1e9),
            table.rate(part.weight_bytes / 1e6),
        )

    for part in layers:
        add(part.name, part.algorithm, part.spread.median, part.spread, part)
    shown.add_section()
    add(TOGETHER, "", total, None, whole)
    add(WHOLE, "", whole.spread.median, whole.spread, whole)
    return shown


def rows(case: Case, parts: Sequence[Part], roof: float, load: float | None) -> list[dict[str, Any]]:
    """Return the JSON rows: times in seconds, rates in FLOP/s of direct convolution."""
    shared = records.common("profile", load) | {
        "case": case.to_json(),
        "isa": library.isa(),
        "ceiling": {"flops": roof, "measure": "float32 FMA peak"},
    }
    total = sum(part.spread.median for part in parts[:-1])
    return [
        shared
        | {
            "layer": part.name,
            "algorithm": part.algorithm or None,
            "times": asdict(part.spread),
            "share": part.spread.median / total,
            "flops": part.flops,
            "flops_per_s": part.flops / part.spread.median,
            "weight_bytes": part.weight_bytes,
        }
        for part in parts
    ]
