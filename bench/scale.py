"""``python -m bench scale``: throughput and memory of the drop-in by batch size and thread count.

Every point runs in a separate process, is checked against float64 and then timed in bursts interleaved with
those of the other points. Next to the growth of the process's memory, the table shows the native engine's
share of it: the prepacked weights and the workspace, which holds the intermediate activations of one block of
images, independent of the batch size.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence

from rich.table import Table

from bench import cases, machine, options, output
from bench.blocks import Chain, blocks, require_engine
from bench.cases import Case
from bench.machine import Ceiling
from bench.options import SIZES, positive
from bench.output import COLUMNS, Column, Row, megabytes, times
from bench.providers import PROVIDERS
from bench.race import Settings, measure_ceiling, race

HELP = "measure images/s and memory by batch size and thread count"
BATCHES = [1 << i for i in range(11)]


def default_threads() -> list[int]:
    """Return the powers of two below the number of cores, and the number of cores."""
    cores = machine.cores()
    return [*(n for n in (1 << i for i in range(cores.bit_length())) if n < cores), cores]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add(parser, "network", *SIZES, "json")
    options.add_batches(parser, BATCHES, "1 2 4 … 1024")
    text = "thread counts (default: 1 2 4 … all cores)"
    counts = default_threads()
    parser.add_argument("--threads", nargs="+", type=positive, default=counts, metavar="N", help=text)
    options.add_timing(parser, "each point", 1.5, rounds=3)


def run(args: argparse.Namespace) -> int:
    require_engine()
    sizes = options.sizes(args, args.network)
    points = [
        Case(args.network, batch, "float32", "cpu", threads, sizes)
        for threads in sorted(set(args.threads))
        for batch in sorted(set(args.batch))
    ]
    out, load = output.console(), machine.load()
    rows = measure(points, Settings(args.seconds, args.rounds))
    for threads, group in itertools.groupby(rows, lambda row: int(row["case"]["threads"])):
        here = list(group)
        heading = f"{cases.title(args.network, sizes)} · float32 · cpu, {cases.threads(threads)}"
        out.print(scale_table(heading, here, rows))
        # Compare the workspace of the largest batch with the memory of a layer-by-layer forward.
        last = here[-1]
        workspace = (
            f"workspace: {last['workspace_bytes'] / 1e6:,.0f} MB at batch {last['case']['batch']}; "
            f"its two largest adjacent activations would take {last['maps_bytes'] / 1e6:,.0f} MB"
        )
        for line in [output.ceiling_lines(last)[0], workspace, ""]:
            out.print(line, markup=False, soft_wrap=True)
    shared = output.common("scale", load)
    output.append(args.json, [row | shared for row in rows])
    return int(any(row["status"] != "ok" for row in rows))


def measure(points: Sequence[Case], settings: Settings) -> list[Row]:
    """Measure the drop-in at every point; one row each, with the memory sizes of the native engine."""
    ceilings: dict[int, Ceiling] = {}

    # Measured before and after the race, keeping the higher: disturbances only lower it.
    def measure_ceilings() -> None:
        output.log("measuring the machine's ceiling")
        for case in {case.threads: case for case in points}.values():
            ceilings[case.threads] = measure_ceiling(case, ceilings.get(case.threads))

    measure_ceilings()
    output.log("computing the reference results in float64")
    largest = max(points, key=lambda case: case.batch)
    whole = largest.materials()
    entries = [(case, PROVIDERS["fast"]) for case in points]
    outcomes = race(entries, settings, output.log, lambda case: whole.first(case.batch))
    measure_ceilings()
    rows = []
    for case, outcome in zip(points, outcomes, strict=True):
        (row,) = output.race_rows(case, largest.work(), ceilings[case.threads], [outcome])
        sizes = chain(case)
        row |= {"workspace_bytes": sizes.workspace, "packed_bytes": sizes.packed_bytes}
        rows.append(row | {"maps_bytes": layerwise_bytes(case)})
    return rows


def chain(case: Case) -> Chain:
    """Return the case's network as the native engine runs it, to query its memory sizes."""
    stages = [block.stage for block in blocks(case.skeleton().eval())]
    return Chain(stages, (case.batch, *case.input_shape), threads=case.threads)


def layerwise_bytes(case: Case) -> int:
    """Return the bytes of the two largest adjacent activations, which a layer-by-layer forward must hold."""
    sizes = [math.prod(block.input_shape) for block in blocks(case.skeleton().eval())]
    return 4 * case.batch * max(a + b for a, b in itertools.pairwise(sizes))


def scale_table(heading: str, here: Sequence[Row], rows: Sequence[Row]) -> Table:
    """Return the table of one thread count, with one line per batch size; ``rows`` are all rows."""
    alone = {row["case"]["batch"]: row["images_per_s"] for row in rows if row["case"]["threads"] == 1}

    def speed_up(row: Row) -> str:
        base = alone.get(row["case"]["batch"])
        return times(None if base is None else row["images_per_s"] / base)

    columns: dict[str, Column] = {
        **{name: COLUMNS[name] for name in ("images/s", "±")},
        "× 1 thread": speed_up,
        **{name: COLUMNS[name] for name in ("GFLOP/s", "ceiling")},
        "workspace MB": lambda row: megabytes(row["workspace_bytes"]),
        "packed MB": lambda row: megabytes(row["packed_bytes"]),
        "peak MB": lambda row: megabytes(row["peak_bytes"]),
        "error": COLUMNS["error"],
    }
    shown = output.table(heading, [], ["batch", *columns], note=True)
    for row in here:
        output.add_timed(shown, str(row["case"]["batch"]), row, columns)
    return shown
