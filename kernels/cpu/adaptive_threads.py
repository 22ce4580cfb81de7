"""The adaptive thread count: a call runs on all threads, or on fewer while other processes use the cores.

A parallel region ends with its slowest thread. If another process occupies one of two cores, the thread
scheduled there sleeps for a time slice (milliseconds) while the others spin, in each of the twenty regions of
a call of one millisecond: with one busy neighbor on two cores, the call takes ten times as long as on one
thread. No OpenMP wait policy helps: threads that sleep immediately cost 20% on an idle machine.

So calls are timed. For each kind of call (a chain, a layer's product, with its shape) the fastest time is
recorded. When three calls in a row take more than 1.5 times that, one is tried on half the threads, then on a
quarter, and so on. A faster count is kept, and all threads are tried again after 50 ms, then at growing
intervals of up to one second. Since a neighbor may have been there from the beginning, half the threads are
tried once a second anyway, for at most 1% of the time. The partitioning of the work does not depend on the
thread count, so neither do the results.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

from . import library

SLOW = 1.5  # a call is slow beyond this multiple of the fastest time
PATIENCE = 3  # consecutive slow calls before a trial of fewer threads; fast trials before keeping more
BETTER = 0.85  # a trial is faster below this fraction of the usual time
MIN_WAIT, MAX_WAIT = 0.05, 1.0  # seconds until all threads are tried again
SHARE = 0.01  # max fraction of the time spent on trials of fewer threads while no call is slow

clock = time.perf_counter


class AdaptiveThreads:
    """The thread count of one kind of call, at most ``max_threads``."""

    def __init__(self, max_threads: int) -> None:
        self._max = max_threads
        self._wait = MIN_WAIT
        self._next = 0.0  # time of the next trial of another thread count
        self._trial: int | None = None  # thread count that the next call tries
        self._trial_times: list[float] = []
        self._change(max_threads, [])

    def _change(self, count: int, times: list[float]) -> None:
        self._count = count  # threads that calls run on
        self._recent = times  # times of the last calls on that many threads
        self._fastest = min(times, default=float("inf"))

    def run(self, call: Callable[..., int], *arguments: Any) -> None:
        """Run ``call(*arguments)`` of the library on the current thread count; NativeError if it fails."""
        if self._max == 1:
            library.checked(call(*arguments))
            return
        trial = self._trial
        count = self._count if trial is None else trial
        if count < self._max:
            library.library().dcgan_limit_threads(count)
        begin = clock()
        result = call(*arguments)
        end = clock()
        if count < self._max:
            library.library().dcgan_limit_threads(0)
        library.checked(result)
        if trial is None:
            self._record(end - begin, end)
        else:
            self._judge(trial, end - begin, end)

    def _record(self, seconds: float, now: float) -> None:
        self._recent = [*self._recent[1 - PATIENCE :], seconds]
        self._fastest = min(seconds, self._fastest)
        if len(self._recent) < PATIENCE:
            return
        slow = min(self._recent) > SLOW * self._fastest
        due = now >= self._next
        if self._count > 1 and (slow or (due and self._count == self._max)):
            self._next = max(self._next, now + max(MAX_WAIT, seconds / SHARE))
            self._try(self._count // 2)
        elif due and self._count < self._max:
            self._try(self._max)

    def _try(self, count: int) -> None:
        self._trial, self._trial_times = count, []

    def _judge(self, trial: int, seconds: float, now: float) -> None:
        self._trial = None
        self._trial_times.append(seconds)
        usual = sorted(self._recent)[len(self._recent) // 2]
        more, better = trial > self._count, seconds < BETTER * usual
        if better and more and len(self._trial_times) < PATIENCE:
            self._trial = trial  # one fast call may be chance
        elif better:
            self._change(trial, self._trial_times)
            if more:
                self._wait = max(MIN_WAIT, self._wait / 4)
                self._next = now + MAX_WAIT
            else:
                self._next = now + self._wait
                if trial > 1:
                    self._try(trial // 2)
        elif more:
            self._wait = min(2 * self._wait, MAX_WAIT)
            self._next = now + self._wait
        else:
            self._fastest = usual  # calls are slower for another reason: accept the usual time as the fastest


@functools.lru_cache(maxsize=1024)
def for_kind(kind: Hashable, threads: int) -> AdaptiveThreads:
    """Return the thread count of one kind of call, shared by all its calls."""
    return AdaptiveThreads(threads)
