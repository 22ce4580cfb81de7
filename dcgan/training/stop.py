"""Stopping when asked to: the step is finished and saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether SIGINT or SIGTERM has come: ``signal`` is its number, 0 while none has."""

    def __init__(self) -> None:
        self.signal = 0

    @property
    def status(self) -> int:
        """The exit status a shell expects of a process that the signal ended: 130 or 143."""
        return 128 + self.signal


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Inside, the first signal is only noted; a second one does at once what it does by default.

    Signals can be had in the main thread alone; elsewhere nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for each in signals:
            signal.signal(each, before[each])

    for number in signals:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number in signals:
            signal.signal(number, before[number])
