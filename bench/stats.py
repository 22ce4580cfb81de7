"""Medians with their spread: the machine's other work skews call times, so no mean and no deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The quartiles of ``count`` call times, in seconds."""

    median: float
    q1: float
    q3: float
    count: int

    @property
    def relative(self) -> float:
        """Half the interquartile range over the median: the ± of the tables, as a fraction."""
        return (self.q3 - self.q1) / 2 / self.median


def summarise(times: Sequence[float]) -> Spread:
    """Quartiles of ``times``. Raises ValueError if there are none."""
    if not times:
        raise ValueError("no times to summarise")
    if len(times) == 1:
        return Spread(times[0], times[0], times[0], 1)
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, q1, q3, len(times))
