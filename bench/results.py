"""Outcomes as data: one JSON object a provider and case (or layer, or step), with the machine it ran on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import machine
from bench.cases import Case
from bench.ceiling import Ceiling
from bench.flops import Work
from bench.race import Outcome

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """One case's race, with what its figures are held against."""

    case: Case
    work: Work
    ceiling: Ceiling
    outcomes: list[Outcome]

    def images_per_s(self, outcome: Outcome, column: str = "warm") -> float | None:
        """From the median time of a call; None if it was not timed."""
        spread = outcome.spreads.get(column)
        return None if spread is None else self.case.batch / spread.median

    @property
    def ceiling_images_per_s(self) -> float:
        return self.ceiling.images_per_s(self.work)

    @property
    def memory_images_per_s(self) -> float:
        return self.ceiling.memory_images_per_s(self.work, self.case.batch, self.case.torch_dtype.itemsize)

    def fastest_baseline(self) -> float | None:
        """images/s of the fastest provider that is not this project's; None if none was timed."""
        rates = [self.images_per_s(o) for o in self.outcomes if not o.provider.ours]
        return max((rate for rate in rates if rate is not None), default=None)

    def ranked(self) -> list[Outcome]:
        """Fastest first, then those without times in their given order."""
        return sorted(self.outcomes, key=lambda o: -(self.images_per_s(o) or 0.0))


def common(kind: str, load: float | None = None) -> dict[str, Any]:
    """What every JSON object says besides its figures. ``kind`` is what they are: ``race`` or a command.

    ``load`` is the machine's load before it was measured: how far times can be trusted.
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


def rows(reports: Iterable[Report], load: float | None = None, kind: str = "race") -> list[dict[str, Any]]:
    """The JSON objects of ``reports``. Rates are images/s and FLOP/s, times seconds, memory bytes."""
    shared = common(kind, load)
    return [shared | row(report, outcome) for report in reports for outcome in report.ranked()]


def kind(row: dict[str, Any]) -> str:
    """What a row's figures are; only races were written before rows said so."""
    return str(row.get("kind", "race"))


def row(report: Report, outcome: Outcome) -> dict[str, Any]:
    """One provider's figures in one case."""
    rate = report.images_per_s(outcome)
    baseline = report.fastest_baseline()
    return {
        "case": report.case.to_json(),
        "provider": outcome.provider.name,
        "ours": outcome.provider.ours,
        "status": outcome.status,
        "reason": outcome.reason or None,
        "note": outcome.note or None,
        # JSON knows no infinity: an answer of the wrong shape or not finite has no error to name.
        "error": None if outcome.error in (None, float("inf")) else outcome.error,
        "tolerance": outcome.tolerance or report.case.tolerance,
        "times": {
            column: asdict(spread) | {"images_per_s": report.case.batch / spread.median}
            for column, spread in outcome.spreads.items()
        },
        "images_per_s": rate,
        "flops_per_s": None if rate is None else rate * report.work.flops,
        "ratio_to_fastest_baseline": None if rate is None or baseline is None else rate / baseline,
        "share_of_ceiling": None if rate is None else rate / report.ceiling_images_per_s,
        "peak_bytes": outcome.peak_bytes,
        "work": asdict(report.work),
        "ceiling": report.ceiling.to_json()
        | {
            "images_per_s": report.ceiling_images_per_s,
            "memory_images_per_s": report.memory_images_per_s,
        },
    }


def append(path: Path, objects: Sequence[dict[str, Any]]) -> None:
    """Adds one line an object to a file, which it makes if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for item in objects:
            file.write(json.dumps(item, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. Raises ValueError if a line is no row of this schema."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number} is no result of schema {SCHEMA}")
        found.append(row)
    return found
