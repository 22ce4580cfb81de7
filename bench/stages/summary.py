"""Summaries of the steps in a few lines: failures first, then tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import table
from bench.layers import PHASES

LINES = 60  # printed per stage
WIDTH = 160
FAILURES = 24  # lines for failures if the tables need the rest
NAMED = 4  # skipped items that are named
TRAINED = PHASES[1:]
ENTRY = ("network", "layer", "phase", "batch", "dtype")


@dataclass
class Summary:
    """The summary of a step."""

    name: str
    line: str = ""
    """Its outcome."""
    failures: list[str] = field(default_factory=list)
    """One line each."""
    shown: list[str] = field(default_factory=list)
    """Lines of tables and notes."""
    missed: list[str] = field(default_factory=list)
    """Work that was skipped for lack of time."""
    ends: bool = False
    """Whether the remaining steps should be skipped."""

    @property
    def heading(self) -> str:
        parts = [self.line] if self.line else []
        if self.failures:
            parts.append(f"{len(self.failures)} FAILED")
        if self.missed:
            parts.append(f"not reached in time: {join_names(self.missed)}")
        return f"== {self.name}: {'; '.join(parts) or 'done'}"


def join_names(names: Sequence[str]) -> str:
    """Join the first names, with the number of further ones."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def lines(summaries: Sequence[Summary]) -> list[str]:
    """Return all lines of the summaries, failures first."""
    failures = [f"FAILED {one.name}: {failure}" for one in summaries for failure in one.failures]
    return failures + [line for one in summaries for line in (one.heading, *one.shown)]


def fit_lines(summaries: Sequence[Summary], whole: str, limit: int = LINES) -> list[str]:
    """Return at most ``limit`` lines, with every heading; ``whole`` is the file with the rest."""
    all_lines = lines(summaries)
    if len(all_lines) > limit:
        failures = [line for line in all_lines if line.startswith("FAILED ")]
        room = limit - len(summaries) - 1
        tables = sum(len(one.shown) for one in summaries)
        kept = failures[: max(min(FAILURES, room), room - tables)]
        room -= len(kept)
        body = []
        for one in summaries:
            body += [one.heading, *one.shown[:room]]
            room -= len(one.shown[:room])
        all_lines = [*kept, *body, f"({len(all_lines) - len(kept) - len(body)} lines more in {whole})"]
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in all_lines]


# --- tables -------------------------------------------------------------------------------------------------


def render(shown: Table) -> list[str]:
    """Render a table as lines, without blank ones."""
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False).print(shown)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def failures_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each wrong result, and for each of ours that failed."""
    return [
        f"{_case(row)} {row['provider']}: {row['status']}: {row['reason']}"
        for row in rows
        if row.get("status") == "wrong" or (row.get("status") == "failed" and row["ours"])
    ]


def race_lines(rows: Sequence[dict[str, Any]], what: str) -> list[str]:
    """Return a table of images/s by provider and batch, with the ratio of our best to the best baseline."""
    measured = [row for row in rows if "status" in row]
    if not measured:
        return []
    cases = sorted({(row["case"]["dtype"], row["case"]["batch"]) for row in measured})
    by = {(row["provider"], row["case"]["dtype"], row["case"]["batch"]): row for row in measured}
    heading = table.start(f"{what}, images/s", ["provider"], [f"{batch} {dtype}" for dtype, batch in cases])
    for name in dict.fromkeys(row["provider"] for row in measured):
        heading.add_row(name, *(_rate(by.get((name, *case))) for case in cases))

    def best(ours: bool, case: tuple[str, int]) -> float | None:
        rates = [row["images_per_s"] for key, row in by.items() if key[1:] == case and row["ours"] == ours]
        return max((rate for rate in rates if rate is not None), default=None)

    ratios = []
    for case in cases:
        own, other = best(True, case), best(False, case)
        ratios.append(table.times(None if own is None or other is None else own / other))
    heading.add_row("ours / best other", *ratios)
    notes = [
        f"{_case(row)} {row['provider']}, a baseline: failed: {row['reason']}"
        for row in measured
        if row["status"] == "failed" and not row["ours"]
    ]
    return render(heading) + notes


def _rate(row: dict[str, Any] | None) -> str:
    if row is None:
        return table.NOTHING
    if row["images_per_s"] is None:
        return str(row["status"]).upper()
    return table.rate(row["images_per_s"])


def _case(row: dict[str, Any]) -> str:
    case = row["case"]
    return f"{case['command']} {case['batch']} {case['dtype']}"


def kernel_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of µs, ours / cuDNN's bare convolution; of repeated measurements the last is kept."""
    by = {
        (row["network"], row["layer"], row["batch"], row["dtype"], row["phase"], row["contestant"]): row
        for row in rows
    }
    layers = dict.fromkeys(key[:4] for key in by)
    if not layers:
        return []
    heading = table.start(
        "kernels, µs, ours / cuDNN's convolution alone", ["layer", "batch"], [*TRAINED, "pack"]
    )
    for layer in sorted(layers, key=lambda key: (key[3], key[2], key[0] != "G")):
        network, name, batch, dtype = layer
        cells = [
            " / ".join(_us(by.get((*layer, phase, who))) for who in ("ours", "cudnn")) for phase in TRAINED
        ]
        pack = _us(by.get((*layer, "pack", "ours")))
        heading.add_row(f"{network} {name}", f"{batch} {dtype}", *cells, pack)
    return render(heading)


def wrong_kernels(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each wrong result of ours."""
    return [
        f"{' '.join(str(row[name]) for name in ENTRY)}: wrong: error {row['error']}"
        for row in rows
        if row["contestant"] == "ours" and row["status"] == "wrong"
    ]


def _us(row: dict[str, Any] | None) -> str:
    if row is None:
        return table.NOTHING
    return f"{row['us']:.1f}" if "us" in row else str(row["status"]).upper()
