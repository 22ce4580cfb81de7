"""``python -m bench scale``: throughput and memory of the drop-in by batch size and thread count.

Every point runs in a separate process, is checked against float64 and then timed in bursts interleaved with
those of the other points. Next to the growth of the process's memory, the table shows the native engine's
share of it: the prepacked weights and the workspace, which holds the intermediate activations of one block of
images, independent of the batch size.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import cases, machine, native, options, records, table
from bench.blocks import blocks
from bench.cases import Case, Materials
from bench.ceiling import Ceiling
from bench.flops import count
from bench.providers import PROVIDERS
from bench.race import Outcome, Settings, measure_ceiling, race_entries
from bench.records import Report
from bench.usage import positive

HELP = "measure images/s and memory by batch size and thread count"
BATCHES = [1 << i for i in range(11)]
COLUMNS = [
    "images/s",
    "±",
    "× 1 thread",
    "GFLOP/s",
    "ceiling",
    "workspace MB",
    "packed MB",
    "peak MB",
    "error",
]


def default_threads() -> list[int]:
    """Return the powers of two below the number of cores, and the number of cores."""
    cores = machine.cores()
    return [*(n for n in (1 << i for i in range(cores.bit_length())) if n < cores), cores]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_network(parser)
    options.add_sizes(parser)
    add(
        "--batch",
        nargs="+",
        type=positive,
        default=BATCHES,
        metavar="N",
        help="batch sizes (default: 1 2 4 … 1024)",
    )
    add(
        "--threads",
        nargs="+",
        type=positive,
        default=default_threads(),
        metavar="N",
        help="thread counts (default: 1 2 4 … all cores)",
    )
    options.add_timing(parser, "each point", 1.5, rounds=3)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    native.required()
    sizes = options.sizes(args, args.network)
    points = [
        Case(args.network, batch, "float32", "cpu", threads, sizes)
        for threads in sorted(set(args.threads))
        for batch in sorted(set(args.batch))
    ]
    out, progress = table.console(), table.console(stderr=True)
    load = machine.load()
    reports = measure(points, Settings(args.seconds, args.rounds), progress)
    for threads in dict.fromkeys(case.threads for case in points):
        here = [report for report in reports if report.case.threads == threads]
        out.print(scale_table(here, reports))
        for line in [*table.ceiling_lines(here[-1])[:1], *workspace_lines(here[-1]), ""]:
            out.print(line, markup=False, soft_wrap=True)
    if args.json is not None:
        records.append(args.json, rows(reports, load))
    return int(any(report.outcomes[0].status != "ok" for report in reports))


def measure(points: Sequence[Case], settings: Settings, progress: Console) -> list[Report]:
    """Measure the drop-in at every point; one report each."""

    def log(line: str) -> None:
        progress.print(f"  {line}", style="dim", markup=False)

    ceilings: dict[int, Ceiling] = {}

    # Measured before and after the race, keeping the higher: disturbances only lower it.
    def measure_ceilings() -> None:
        log("measuring the machine's ceiling")
        for case in {case.threads: case for case in points}.values():
            ceilings[case.threads] = measure_ceiling(case).or_better(ceilings.get(case.threads))

    measure_ceilings()
    log("computing the reference results in float64")
    largest = max(points, key=lambda case: case.batch)
    whole = Materials.of(largest)
    entries = [(case, PROVIDERS["fast"]) for case in points]
    outcomes = race_entries(entries, lambda case: whole.first(case.batch), settings, log)
    measure_ceilings()
    work = count(largest.skeleton(), largest.input_shape)
    return [
        Report(case, work, ceilings[case.threads], [outcome])
        for case, outcome in zip(points, outcomes, strict=True)
    ]


def chain(case: Case) -> native.Chain:
    """Return the case's network as the native engine runs it, to query its memory sizes."""
    stages = [block.stage for block in blocks(case.skeleton().eval())]
    return native.Chain(stages, (case.batch, *case.input_shape), threads=case.threads)


def layerwise_bytes(case: Case) -> int:
    """Return the bytes of the two largest adjacent activations, which a layer-by-layer forward must hold."""
    sizes = [block.input_floats for block in blocks(case.skeleton().eval())]
    return 4 * case.batch * max(a + b for a, b in itertools.pairwise(sizes))


def scale_table(reports: Sequence[Report], all_reports: Sequence[Report]) -> Table:
    """Return the table of one thread count, with one row per batch size."""
    case = reports[0].case
    heading = f"{cases.title(case.command, case.sizes)} · {case.dtype} · cpu, {cases.threads(case.threads)}"
    shown = table.start(heading, [], ["batch", *COLUMNS])
    shown.add_column("", no_wrap=True, max_width=table.NOTE_WIDTH)
    alone = {r.case.batch: r.images_per_s(r.outcomes[0]) for r in all_reports if r.case.threads == 1}
    for report in reports:
        outcome = report.outcomes[0]
        cells = _cells(report, outcome, alone.get(report.case.batch))
        cells += [table.NOTHING] * (len(COLUMNS) - len(cells))
        shown.add_row(str(report.case.batch), *cells, table.explanation(outcome))
    return shown


def _cells(report: Report, outcome: Outcome, alone: float | None) -> list[str]:
    images = report.images_per_s(outcome)
    if images is None:
        return []
    sizes = chain(report.case)
    return [
        table.rate(images),
        table.percent(outcome.spreads["warm"].relative),
        table.times(None if alone is None else images / alone),
        f"{images * report.work.flops / 1e9:,.0f}",
        table.percent(images / report.ceiling_images_per_s),
        table.rate(sizes.workspace / 1e6),
        table.rate(sizes.packed_bytes / 1e6),
        table.NOTHING if outcome.peak_bytes is None else table.rate(outcome.peak_bytes / 1e6),
        table.NOTHING if outcome.error is None else f"{outcome.error:.1e}",
    ]


def workspace_lines(report: Report) -> list[str]:
    """Compare the workspace of the largest batch with the memory of a layer-by-layer forward."""
    case = report.case
    return [
        f"workspace: {chain(case).workspace / 1e6:,.0f} MB at batch {case.batch}; "
        f"its two largest adjacent activations would take {layerwise_bytes(case) / 1e6:,.0f} MB"
    ]


def rows(reports: Sequence[Report], load: float | None) -> list[dict[str, Any]]:
    """Return the rows of the race, with the memory sizes of the native engine."""
    shared = records.common("scale", load)
    found = []
    for report in reports:
        sizes = chain(report.case)
        memory = {
            "workspace_bytes": sizes.workspace,
            "packed_bytes": sizes.packed_bytes,
            "maps_bytes": layerwise_bytes(report.case),
        }
        found.append(shared | records.row(report, report.outcomes[0]) | memory)
    return found
