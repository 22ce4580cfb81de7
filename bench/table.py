"""Tables of the reports: one per case, and a summary over batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.race import Outcome
from bench.records import Report

NOTE_WIDTH = 30
PIPED_WIDTH = 150  # a pipe has no width; rich would take 80 and wrap
NOTHING = "–"


def console(stderr: bool = False) -> Console:
    """Return a console wide enough for a table, whether or not the output is piped."""
    found = Console(stderr=stderr, highlight=False)
    if not found.is_terminal:
        found = Console(stderr=stderr, highlight=False, width=PIPED_WIDTH)
    return found


def start(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table with the text columns ``left`` and the right-aligned columns ``right``."""
    heading = Text(title, no_wrap=True, overflow="ignore")  # may be wider than the table
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=heading, title_justify="left")
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    return table


def rate(value: float | None) -> str:
    """Format a figure (images/s, ms, MB) with at least three digits and thousands separators."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f}%"


def race_table(report: Report) -> Table:
    """Return the table of one case, fastest first; providers without times show the reason."""
    cuda = report.case.device == "cuda"
    columns = ["images/s", "±"]
    columns += ["cold L2", "CUDA graph"] if cuda else []
    columns += ["GFLOP/s", "× baseline", "ceiling", "peak MB", "error"]
    table = start(report.case.title, ["provider"], columns)
    table.add_column("", no_wrap=True, max_width=NOTE_WIDTH)
    baseline = report.fastest_baseline()
    for outcome in report.ranked():
        cells = _cells(report, outcome, baseline, cuda)
        cells += [NOTHING] * (len(columns) - len(cells))
        table.add_row(_name(outcome), *cells, Text(explanation(outcome), overflow="ellipsis"))
    return table


def _name(outcome: Outcome) -> Text:
    return Text(outcome.provider.name, style="bold" if outcome.provider.ours else "")


def _cells(report: Report, outcome: Outcome, baseline: float | None, cuda: bool) -> list[str]:
    images = report.images_per_s(outcome)
    if images is None:
        return []
    graphs = [rate(report.images_per_s(outcome, column)) for column in ("cold", "graph")] if cuda else []
    return [
        rate(images),
        percent(outcome.spreads["warm"].relative),
        *graphs,
        f"{images * report.work.flops / 1e9:,.0f}",
        times(None if baseline is None else images / baseline),
        percent(images / report.ceiling_images_per_s),
        NOTHING if outcome.peak_bytes is None else f"{outcome.peak_bytes / 1e6:,.0f}",
        NOTHING if outcome.error is None else f"{outcome.error:.1e}",
    ]


def explanation(outcome: Outcome) -> str:
    """Return why there are no times, or the note on what ran if there are."""
    word = {"wrong": "WRONG: ", "failed": "FAILED: "}.get(outcome.status, "")
    return word + (outcome.reason or outcome.note)


def failures(report: Report) -> list[str]:
    """Return the reasons of failures in full, as they may be cut off in the table."""
    failed = [outcome for outcome in report.outcomes if outcome.status == "failed"]
    return [f"{outcome.provider.name}: {explanation(outcome)}" for outcome in failed]


def ceiling_lines(report: Report) -> list[str]:
    """Return the legend of the ceiling column and the memory-bandwidth limit."""
    ceiling, gflop = report.ceiling, report.work.flops / 1e9
    return [
        f"ceiling: {rate(report.ceiling_images_per_s)} images/s by direct convolution "
        f"({ceiling.flops / 1e9:,.0f} GFLOP/s, {ceiling.measure}; {gflop:.3g} GFLOP per image); "
        "Winograd may exceed it",
        f"memory:  {rate(report.memory_images_per_s)} images/s "
        f"({ceiling.bandwidth / 1e9:,.1f} GB/s, copy) if every tensor moved once and no cache helped",
    ]


def summary_table(reports: Sequence[Report]) -> Table:
    """Return images/s by provider and case, with the providers in the order of the first case."""
    table = start("images/s", ["provider"], [f"{r.case.batch} {r.case.dtype}" for r in reports])
    names = [o.provider.name for o in reports[0].outcomes]
    by_case = [{o.provider.name: o for o in report.outcomes} for report in reports]
    for name in names:
        timed = [report.images_per_s(found[name]) for report, found in zip(reports, by_case, strict=True)]
        if any(value is not None for value in timed):
            table.add_row(_name(by_case[0][name]), *[rate(value) for value in timed])
    table.add_section()
    table.add_row("ceiling", *[rate(report.ceiling_images_per_s) for report in reports])
    return table
