"""Medians and quartiles of call times, which other load on the machine skews less than means."""

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
        """Half the interquartile range divided by the median: the ± column of the tables, as a fraction."""
        return (self.q3 - self.q1) / 2 / self.median


def summarise(times: Sequence[float]) -> Spread:
    """Return the quartiles of ``times``. Raises ValueError if it is empty."""
    if not times:
        raise ValueError("no times to summarise")
    if len(times) == 1:
        return Spread(times[0], times[0], times[0], 1)
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, q1, q3, len(times))
