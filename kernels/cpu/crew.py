"""How many threads run a call: all of them, or fewer while other processes have the cores.

Threads of a parallel region wait for the last of them. Where one of two cores is another process's for a
while, the thread that was to run there sleeps for a time slice, milliseconds, and the others spin in each of
the twenty regions of a call of one millisecond: a busy neighbour on two cores makes it ten times slower than
one thread alone is. No wait policy of OpenMP's helps: threads that sleep at once cost 20% on a quiet machine.

So calls are timed. Of a kind of call (a chain, a layer's product, with its shape) the fastest time is known,
and when three in a row take half as long again, one is tried on half the threads, and so on down; where that
is faster it stays, and all threads are tried again after 50 ms, then ever less often, down to once a second.
Since a neighbour may have been there from the beginning, half the threads are tried once a second anyway,
for at most 1% of the time. How the work is cut does not change with it, and so neither do results.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

from . import library

SLOW = 1.5  # times the fastest
PATIENCE = 3  # slow calls before fewer threads are tried, fast ones before more are trusted
BETTER = 0.85  # of the time with another number of threads, to change to this one
FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0  # seconds until all threads are tried again
SHARE = 0.01  # of the time that trials of fewer threads may take while nothing is slow

clock = time.perf_counter


class Crew:
    """The threads of one kind of call, at most ``most``."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._wait = FIRST_WAIT
        self._next = 0.0  # when to try another number of threads, by the clock
        self._trial: int | None = None  # threads that the next call tries
        self._tried: list[float] = []
        self._change(most, [])

    def _change(self, count: int, times: list[float]) -> None:
        self._count = count  # of threads that calls run on
        self._recent = times  # of the last calls with that many
        self._fastest = min(times, default=float("inf"))

    def run(self, call: Callable[..., int], *arguments: Any) -> None:
        """``call(*arguments)`` of the library, on a number of threads, timed; NativeError where it fails."""
        if self._most == 1:
            library.checked(call(*arguments))
            return
        trial = self._trial
        count = self._count if trial is None else trial
        if count < self._most:
            library.library().dcgan_limit_threads(count)
        begin = clock()
        result = call(*arguments)
        end = clock()
        if count < self._most:
            library.library().dcgan_limit_threads(0)
        library.checked(result)
        if trial is None:
            self._took(end - begin, end)
        else:
            self._judge(trial, end - begin, end)

    def _took(self, seconds: float, now: float) -> None:
        self._recent = [*self._recent[1 - PATIENCE :], seconds]
        self._fastest = min(seconds, self._fastest)
        if len(self._recent) < PATIENCE:
            return
        slow = min(self._recent) > SLOW * self._fastest
        due = now >= self._next
        if self._count > 1 and (slow or (due and self._count == self._most)):
            self._next = max(self._next, now + max(LONGEST_WAIT, seconds / SHARE))
            self._try(self._count // 2)
        elif due and self._count < self._most:
            self._try(self._most)

    def _try(self, count: int) -> None:
        self._trial, self._tried = count, []

    def _judge(self, trial: int, seconds: float, now: float) -> None:
        self._trial = None
        self._tried.append(seconds)
        usual = sorted(self._recent)[len(self._recent) // 2]
        more, better = trial > self._count, seconds < BETTER * usual
        if better and more and len(self._tried) < PATIENCE:
            self._trial = trial  # once may be chance
        elif better:
            self._change(trial, self._tried)
            if more:
                self._wait = max(FIRST_WAIT, self._wait / 4)
                self._next = now + LONGEST_WAIT
            else:
                self._next = now + self._wait
                if trial > 1:
                    self._try(trial // 2)
        elif more:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            self._next = now + self._wait
        else:
            self._fastest = usual  # it is as fast as it gets now, for another reason


@functools.lru_cache(maxsize=1024)
def of(kind: Hashable, threads: int) -> Crew:
    """The crew of calls of one kind."""
    return Crew(threads)
