"""``python -m bench scale``: the drop-in's images/s and memory by batch and by threads.

Every point is a process of its own, checked against float64, then timed in bursts that all points take in
turn. Beside what a process's memory grew by stand the native engine's own parts of it: the weights as its
algorithms read them, and its workspace, which holds what is between two layers for a block of images, however
many images there are.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import cases, machine, native, options, results, table
from bench.blocks import blocks
from bench.cases import Case, Materials
from bench.ceiling import Ceiling
from bench.flops import count
from bench.providers import PROVIDERS
from bench.race import Outcome, Settings, contest, measure_ceiling
from bench.results import Report
from bench.usage import positive

HELP = "images/s and memory by batch and threads"
BATCHES = [1 << i for i in range(11)]
COLUMNS = [
    "images/s",
    "±",
    "× 1 thread",
    "GFLOP/s",
    "ceiling",
    "workspace MB",
    "weights MB",
    "peak MB",
    "error",
]


def default_threads() -> list[int]:
    """Powers of two up to the cores, and the cores."""
    cores = machine.cores()
    return [*(n for n in (1 << i for i in range(cores.bit_length())) if n < cores), cores]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_network(parser)
    options.add_sizes(parser)
    add("--batch", nargs="+", type=positive, default=BATCHES, metavar="N", help="(1 2 4 … 1024)")
    add(
        "--threads",
        nargs="+",
        type=positive,
        default=default_threads(),
        metavar="N",
        help="(1 2 4 … all cores)",
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
        results.append(args.json, rows(reports, load))
    return int(any(report.outcomes[0].status != "ok" for report in reports))


def measure(points: Sequence[Case], settings: Settings, progress: Console) -> list[Report]:
    """One report a point, of the drop-in alone."""

    def log(line: str) -> None:
        progress.print(f"  {line}", style="dim", markup=False)

    ceilings: dict[int, Ceiling] = {}

    def measure_ceilings() -> None:  # before and after: what disturbs can only lower it
        log("measuring the machine's ceiling")
        for case in {case.threads: case for case in points}.values():
            ceilings[case.threads] = measure_ceiling(case).or_better(ceilings.get(case.threads))

    measure_ceilings()
    log("computing the answers in float64")
    largest = max(points, key=lambda case: case.batch)
    whole = Materials.of(largest)
    entries = [(case, PROVIDERS["fast"]) for case in points]
    outcomes = contest(entries, lambda case: whole.first(case.batch), settings, log)
    measure_ceilings()
    work = count(largest.skeleton(), largest.input_shape)
    return [
        Report(case, work, ceilings[case.threads], [outcome])
        for case, outcome in zip(points, outcomes, strict=True)
    ]


def chain(case: Case) -> native.Chain:
    """The case's network as the native engine runs it; for its sizes."""
    stages = [block.stage for block in blocks(case.skeleton().eval())]
    return native.Chain(stages, (case.batch, *case.input_shape), threads=case.threads)


def maps(case: Case) -> int:
    """Bytes of the largest two adjacent maps: what a forward layer by layer has to hold."""
    sizes = [block.input_floats for block in blocks(case.skeleton().eval())]
    return 4 * case.batch * max(a + b for a, b in itertools.pairwise(sizes))


def scale_table(reports: Sequence[Report], all_reports: Sequence[Report]) -> Table:
    """One count of threads: a row a batch."""
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
    """What the workspace of the largest batch spares."""
    case = report.case
    return [
        f"workspace: {chain(case).workspace / 1e6:,.0f} MB at batch {case.batch}; "
        f"the two largest adjacent maps of such a batch would take {maps(case) / 1e6:,.0f} MB"
    ]


def rows(reports: Sequence[Report], load: float | None) -> list[dict[str, Any]]:
    """A race's rows, with what the native engine takes for itself."""
    shared = results.common("scale", load)
    found = []
    for report in reports:
        sizes = chain(report.case)
        memory = {
            "workspace_bytes": sizes.workspace,
            "packed_bytes": sizes.packed_bytes,
            "maps_bytes": maps(report.case),
        }
        found.append(shared | results.row(report, report.outcomes[0]) | memory)
    return found
