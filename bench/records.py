"""Outcomes as JSON objects, one per provider and case (or layer, or step), with the machine they ran on."""

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
    """The outcomes of one case, with the work and the ceiling they are compared with."""

    case: Case
    work: Work
    ceiling: Ceiling
    outcomes: list[Outcome]

    def images_per_s(self, outcome: Outcome, column: str = "warm") -> float | None:
        """Return images/s from the median time of a call; None if the provider was not timed."""
        spread = outcome.spreads.get(column)
        return None if spread is None else self.case.batch / spread.median

    @property
    def ceiling_images_per_s(self) -> float:
        return self.ceiling.images_per_s(self.work)

    @property
    def memory_images_per_s(self) -> float:
        return self.ceiling.memory_images_per_s(self.work, self.case.batch, self.case.torch_dtype.itemsize)

    def fastest_baseline(self) -> float | None:
        """Return images/s of the fastest provider that is not this project's; None if none was timed."""
        rates = [self.images_per_s(o) for o in self.outcomes if not o.provider.ours]
        return max((rate for rate in rates if rate is not None), default=None)

    def ranked(self) -> list[Outcome]:
        """Return the outcomes, fastest first, then those without times in their original order."""
        return sorted(self.outcomes, key=lambda o: -(self.images_per_s(o) or 0.0))


def common(kind: str, load: float | None = None) -> dict[str, Any]:
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


def rows(reports: Iterable[Report], load: float | None = None, kind: str = "race") -> list[dict[str, Any]]:
    """Return the JSON objects of ``reports``, in images/s, FLOP/s, seconds and bytes."""
    shared = common(kind, load)
    return [shared | row(report, outcome) for report in reports for outcome in report.ranked()]


def kind(row: dict[str, Any]) -> str:
    """Return the kind of a row; rows without one are races, as the field was added later."""
    return str(row.get("kind", "race"))


def row(report: Report, outcome: Outcome) -> dict[str, Any]:
    """Return the figures of one provider in one case."""
    rate = report.images_per_s(outcome)
    baseline = report.fastest_baseline()
    return {
        "case": report.case.to_json(),
        "provider": outcome.provider.name,
        "ours": outcome.provider.ours,
        "status": outcome.status,
        "reason": outcome.reason or None,
        "note": outcome.note or None,
        # JSON has no infinity: an output of the wrong shape or with non-finite values has no error.
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
    """Append one line per object to a file, creating it and its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for item in objects:
            file.write(json.dumps(item, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
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
