"""The results of the steps: a few lines, failures first, then tables; and one archive with everything."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import output

LINES = 60  # printed per stage
WIDTH = 160
FAILURES = 24  # lines for failures if the tables need the rest
NAMED = 4  # skipped items that are named
PHASES = ("forward", "dgrad", "wgrad")
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
            more = f" and {len(self.missed) - NAMED} more" if len(self.missed) > NAMED else ""
            parts.append(f"not reached in time: {', '.join(self.missed[:NAMED])}{more}")
        return f"== {self.name}: {'; '.join(parts) or 'done'}"


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; an incomplete line of a killed process is skipped."""
    found = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


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
    heading = output.table(f"{what}, images/s", ["provider"], [f"{batch} {dtype}" for dtype, batch in cases])
    for name in dict.fromkeys(row["provider"] for row in measured):
        heading.add_row(name, *(_rate(by.get((name, *case))) for case in cases))

    def best(ours: bool, case: tuple[str, int]) -> float | None:
        rates = [row["images_per_s"] for key, row in by.items() if key[1:] == case and row["ours"] == ours]
        return max((rate for rate in rates if rate is not None), default=None)

    ratios = []
    for case in cases:
        own, other = best(True, case), best(False, case)
        ratios.append(output.times(None if own is None or other is None else own / other))
    heading.add_row("ours / best other", *ratios)
    notes = [
        f"{_case(row)} {row['provider']}, a baseline: failed: {row['reason']}"
        for row in measured
        if row["status"] == "failed" and not row["ours"]
    ]
    return render(heading) + notes


def _rate(row: dict[str, Any] | None) -> str:
    if row is None:
        return output.NOTHING
    if row["images_per_s"] is None:
        return str(row["status"]).upper()
    return output.rate(row["images_per_s"])


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
    heading = output.table(
        "kernels, µs, ours / cuDNN's convolution alone", ["layer", "batch"], [*PHASES, "pack"]
    )
    for layer in sorted(layers, key=lambda key: (key[3], key[2], key[0] != "G")):
        network, name, batch, dtype = layer
        cells = [
            " / ".join(_us(by.get((*layer, phase, who))) for who in ("ours", "cudnn")) for phase in PHASES
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
        return output.NOTHING
    return f"{row['us']:.1f}" if "us" in row else str(row["status"]).upper()


# --- the archive --------------------------------------------------------------------------------------------

ARCHIVE = "gpu.tar.gz"
MAX_BYTES = 16 << 20
MAX_LOG = 512 << 10  # bytes kept of each log, from its end, where errors are
ORDER = (".md", ".jsonl", ".json", ".txt")
"""Archive order, most important first; other files are last. Within a kind, small files come first."""
CLAIMS = "claims"
"""Folders with the claims of test processes (see :mod:`.suite`), which are left out."""


def archive(folder: Path, limit: int = MAX_BYTES) -> tuple[Path, list[str]]:
    """Pack the output directory of a stage. Return the path and the names of the files that did not fit."""

    def rank(path: Path) -> tuple[int, int, str]:
        kind = ORDER.index(path.suffix) if path.suffix in ORDER else len(ORDER)
        return kind, path.stat().st_size, str(path)

    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ARCHIVE]
    left_out = []
    size = 1024
    with tarfile.open(folder / ARCHIVE, "w:gz") as packed:
        for file in sorted(files, key=rank):
            name = file.relative_to(folder)
            if CLAIMS in name.parts:
                continue
            data = file.read_bytes()
            if file.suffix == ".txt" and len(data) > MAX_LOG:
                data = f"(the last {MAX_LOG} bytes of {len(data)})\n".encode() + data[-MAX_LOG:]
            # An upper bound: compressed together with the others it takes less.
            bound = len(zlib.compress(data)) + 512
            if size + bound > limit:
                left_out.append(str(name))
                continue
            size += bound
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size, entry.mtime = len(data), int(file.stat().st_mtime)
            packed.addfile(entry, io.BytesIO(data))
    return folder / ARCHIVE, left_out
