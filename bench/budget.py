"""A stage's time: no new work once it is up, and what was left out is said."""

from __future__ import annotations

import time
from collections.abc import Callable

NAMED = 8  # of what was left out


class Budget:
    """Minutes in which work may begin; what has begun is finished."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + 60 * minutes
        self.left: list[str] = []

    @property
    def seconds(self) -> float:
        """Those in which work may still begin; 0 once they are up."""
        return max(self._end - self._clock(), 0.0)

    def allows(self, what: str) -> bool:
        """Whether ``what`` may begin; if not, it is remembered as left out."""
        if self.seconds > 0:
            return True
        self.left.append(what)
        return False

    def report(self) -> str:
        """A line that says what was left out."""
        more = f" and {len(self.left) - NAMED} more" if len(self.left) > NAMED else ""
        return f"not reached in time: {', '.join(self.left[:NAMED]) or 'nothing'}{more}"
