"""Graceful stop on SIGINT or SIGTERM: the current step is finished and saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """A stop request: ``signal`` is the number of the signal received, 0 if none."""

    def __init__(self) -> None:
        self.signal = 0

    @property
    def status(self) -> int:
        """The conventional exit status of a process ended by the signal: 130 or 143."""
        return 128 + self.signal


@contextlib.contextmanager
def recording_signals() -> Iterator[Stop]:
    """Inside, record the first signal instead of acting on it; a second one has its previous effect at once.

    Only the main thread can handle signals; in other threads nothing is recorded.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def record(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for each in signals:
            signal.signal(each, before[each])

    for number in signals:
        signal.signal(number, record)
    try:
        yield stop
    finally:
        for number in signals:
            signal.signal(number, before[number])
