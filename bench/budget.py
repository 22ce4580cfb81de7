"""A stage's time: no new work once it is up, and what was left out is said."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Minutes in which work may begin; what has begun is finished."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + 60 * minutes
        self.left: list[str] = []

    def allows(self, what: str) -> bool:
        """Whether ``what`` may begin; if not, it is remembered as left out."""
        if self._clock() < self._end:
            return True
        self.left.append(what)
        return False

    def report(self) -> str:
        """A line that says what was left out."""
        return f"not reached in time: {', '.join(self.left) or 'nothing'}"
