"""Time budget of a benchmark stage: no new work begins once it is used up, and skipped work is reported."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_NAMED = 8  # skipped items that the report names


class Budget:
    """Time in which work may begin; work that has begun is finished."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + 60 * minutes
        self.left: list[str] = []

    @property
    def seconds(self) -> float:
        """Remaining seconds in which work may begin; 0 once the budget is used up."""
        return max(self._end - self._clock(), 0.0)

    def allows(self, what: str) -> bool:
        """Return whether ``what`` may begin; if not, record it as skipped."""
        if self.seconds > 0:
            return True
        self.left.append(what)
        return False

    def report(self) -> str:
        """Return a line that names the skipped work."""
        more = f" and {len(self.left) - MAX_NAMED} more" if len(self.left) > MAX_NAMED else ""
        return f"not reached in time: {', '.join(self.left[:MAX_NAMED]) or 'nothing'}{more}"
