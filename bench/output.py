"""What the commands write: JSON objects, one per provider and case (or layer, or step), and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import machine
from bench.cases import Case, Work
from bench.machine import Ceiling
from bench.race import Outcome
from bench.timing import Spread

SCHEMA = 1
NOTE_WIDTH = 30
PIPED_WIDTH = 150  # a pipe has no width; rich would take 80 and wrap
NOTHING = "–"

Row = dict[str, Any]
"""A JSON object."""


# --- JSON objects -------------------------------------------------------------------------------------------


def common(kind: str, load: float | None = None) -> Row:
    """Return the fields that all JSON objects share.

    ``kind`` is ``race`` or the name of a command. ``load`` is the machine's load average before the
    measurement, which shows how far its times can be trusted.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "load": load,
    }


def race_rows(case: Case, work: Work, ceiling: Ceiling, outcomes: Sequence[Outcome]) -> list[Row]:
    """Return a row for each provider of a case, the fastest first, those without times last.

    Figures are in images/s, FLOP/s, seconds and bytes. The ceiling's ``images_per_s`` is the compute bound of
    direct convolution at the measured peak, which Winograd may exceed; ``memory_images_per_s`` is the
    bandwidth bound: each inter-layer tensor written and read once, without caches.
    """
    rates = [case.batch / o.spreads["warm"].median if o.spreads else None for o in outcomes]
    timed = zip(rates, outcomes, strict=True)
    baseline = max((rate for rate, o in timed if rate is not None and not o.provider.ours), default=None)
    bound = ceiling.flops / work.flops
    moved = work.bytes_per_image(case.batch, case.torch_dtype.itemsize)
    roofs = {"images_per_s": bound, "memory_images_per_s": ceiling.bandwidth / moved}
    found = [
        {
            "kind": case.kind,
            "case": asdict(case),
            "provider": outcome.provider.name,
            "ours": outcome.provider.ours,
            "status": outcome.status,
            "reason": outcome.reason or None,
            "note": outcome.note or None,
            # JSON has no infinity: an output of the wrong shape or with non-finite values has no error.
            "error": None if outcome.error in (None, math.inf) else outcome.error,
            "tolerance": outcome.tolerance or case.tolerance,
            "times": {
                column: asdict(spread) | {"images_per_s": case.batch / spread.median}
                for column, spread in outcome.spreads.items()
            },
            "images_per_s": rate,
            "flops_per_s": None if rate is None else rate * work.flops,
            "ratio_to_fastest_baseline": None if rate is None or baseline is None else rate / baseline,
            "share_of_ceiling": None if rate is None else rate / bound,
            "peak_bytes": outcome.peak_bytes,
            "work": asdict(work),
            "ceiling": asdict(ceiling) | roofs,
        }
        for rate, outcome in zip(rates, outcomes, strict=True)
    ]
    return sorted(found, key=lambda row: -(row["images_per_s"] or 0.0))


def append(path: Path | None, objects: Iterable[Row]) -> None:
    """Append one line per object to a file, if there is one, creating it and its folder if needed."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(item, allow_nan=False) + "\n" for item in objects)


def read(path: Path) -> list[Row]:
    """Return the rows of a file. Raises ValueError if a line is not a row of this schema."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number} is not a result of schema {SCHEMA}")
        found.append(row)
    return found


# --- tables -------------------------------------------------------------------------------------------------


def console(stderr: bool = False) -> Console:
    """Return a console wide enough for a table, whether or not the output is piped."""
    found = Console(stderr=stderr, highlight=False)
    if not found.is_terminal:
        found.width = PIPED_WIDTH
    return found


def log(line: str, indent: str = "  ") -> None:
    """Print a line about the progress to stderr."""
    console(stderr=True).print(indent + line, style="dim", markup=False)


def table(title: str, left: Sequence[str], right: Sequence[str], note: bool = False) -> Table:
    """Return an empty table with the text columns ``left`` and the right-aligned columns ``right``.

    ``note`` adds a last column for explanations, which are cut off.
    """
    heading = Text(title, no_wrap=True, overflow="ignore")  # may be wider than the table
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=heading, title_justify="left")
    for column in left:
        made.add_column(column, no_wrap=True)
    for column in right:
        made.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    if note:
        made.add_column("", no_wrap=True, max_width=NOTE_WIDTH)
    return made


def rate(value: float | None) -> str:
    """Format a figure (images/s, ms, MB) with at least three digits and thousands separators."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f}%"


def megabytes(size: float | None) -> str:
    return rate(None if size is None else size / 1e6)


Column = Callable[[Row], str]
"""Formats one figure of a timed provider, from its row."""

COLUMNS: dict[str, Column] = {
    "images/s": lambda row: rate(row["images_per_s"]),
    "±": lambda row: percent(Spread.of(row["times"]["warm"]).relative),
    "steps": lambda row: str(row["times"]["warm"]["count"]),
    "cold L2": lambda row: rate(row["times"].get("cold", {}).get("images_per_s")),
    "CUDA graph": lambda row: rate(row["times"].get("graph", {}).get("images_per_s")),
    "GFLOP/s": lambda row: f"{row['flops_per_s'] / 1e9:,.0f}",
    "× baseline": lambda row: times(row["ratio_to_fastest_baseline"]),
    "ceiling": lambda row: percent(row["share_of_ceiling"]),
    "peak MB": lambda row: NOTHING if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
    "memory": lambda row: percent(row["memory_share"]),
    "error": lambda row: NOTHING if row["error"] is None else f"{row['error']:.1e}",
}
ONLY = {"steps": "train", "memory": "train", "cold L2": "race on cuda", "CUDA graph": "race on cuda"}
"""Columns that not every table has, and the cases that have them."""


def race_table(title: str, rows: Sequence[Row]) -> Table:
    """Return the table of one case; providers without times show the reason."""
    kinds = (None, rows[0]["kind"], f"{rows[0]['kind']} on {rows[0]['case']['device']}")
    columns = {name: column for name, column in COLUMNS.items() if ONLY.get(name) in kinds}
    made = table(title, ["provider"], list(columns), note=True)
    eager = next((row["peak_bytes"] for row in rows if row["provider"] == "eager"), None)
    for row in rows:
        peak = row["peak_bytes"]
        share = {"memory_share": peak / eager if eager and peak is not None else None}
        add_timed(made, _name(row), row | share, columns)
    return made


def add_timed(shown: Table, label: str | Text, row: Row, columns: Mapping[str, Column]) -> None:
    """Add a line: the label, the columns if the provider was timed, and the explanation."""
    cells = [column(row) if row["times"] else NOTHING for column in columns.values()]
    shown.add_row(label, *cells, Text(_explanation(row), overflow="ellipsis"))


def _name(row: Row) -> Text:
    return Text(row["provider"], style="bold" if row["ours"] else "")


def _explanation(row: Row) -> str:
    """Return why there are no times, or the note on what ran if there are."""
    word = {"wrong": "WRONG: ", "failed": "FAILED: "}.get(row["status"], "")
    return word + (row["reason"] or row["note"] or "")


def failures(rows: Sequence[Row]) -> list[str]:
    """Return the reasons of failures in full, as they may be cut off in the table."""
    return [f"{row['provider']}: {_explanation(row)}" for row in rows if row["status"] == "failed"]


def ceiling_lines(row: Row) -> list[str]:
    """Return the legend of the ceiling column; of the others in training, or the memory-bandwidth limit."""
    ceiling = row["ceiling"]
    limit = (
        f"ceiling: {rate(ceiling['images_per_s'])} images/s by direct convolution "
        f"({ceiling['flops'] / 1e9:,.0f} GFLOP/s, {ceiling['measure']}; "
        f"{row['work']['flops'] / 1e9:.3g} GFLOP per image); Winograd may exceed it"
    )
    if row["kind"] == "train":
        return [
            limit,
            "memory:  peak during steps minus the memory after importing PyTorch, and its ratio to eager's; "
            "memory used while compiling is not counted",
            "error:   relative error of a network's gradient against float64; "
            f"{row['tolerance']:.0e} is allowed",
        ]
    return [
        limit,
        f"memory:  {rate(ceiling['memory_images_per_s'])} images/s "
        f"({ceiling['bandwidth'] / 1e9:,.1f} GB/s, copy) if every tensor moved once and no cache helped",
    ]


def print_race(title: str, rows: Sequence[Row]) -> None:
    """Print the table of one case, its failures and its legend."""
    out = console()
    out.print(race_table(title, rows))
    for line in [*failures(rows), *ceiling_lines(rows[0]), ""]:
        out.print(line, markup=False, soft_wrap=True)


def summary_table(races: Sequence[Sequence[Row]]) -> Table:
    """Return images/s by provider and case, with the providers in the order of the first case."""
    cases = [rows[0]["case"] for rows in races]
    made = table("images/s", ["provider"], [f"{case['batch']} {case['dtype']}" for case in cases])
    for first in races[0]:
        rates = [r["images_per_s"] for rows in races for r in rows if r["provider"] == first["provider"]]
        if any(rates):
            made.add_row(_name(first), *map(rate, rates))
    made.add_section()
    made.add_row("ceiling", *(rate(rows[0]["ceiling"]["images_per_s"]) for rows in races))
    return made
