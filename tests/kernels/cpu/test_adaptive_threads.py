"""The adaptive thread count, on a simulated machine with a simulated clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dcgan.kernels.cpu import adaptive_threads, library
from tests.support import native
from tests.support.float64_reference import op

pytestmark = native.NEEDED


class Machine:
    """A machine whose calls take ``seconds(threads)``; ``limit`` is the thread limit set in the library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.limit, self.calls = 0.0, 0, []
        self.seconds: Callable[[int], float] = lambda threads: 1e-3 / threads
        monkeypatch.setattr(adaptive_threads, "clock", lambda: self.now)
        monkeypatch.setattr(library, "library", lambda: self)

    def dcgan_limit_threads(self, limit: int) -> int:
        self.limit = limit
        return 0

    def call(self, threads: int) -> int:
        count = self.limit or threads
        self.calls.append(count)
        self.now += self.seconds(count)
        return 0

    def run(self, work: adaptive_threads.AdaptiveThreads, threads: int, calls: int) -> list[int]:
        """Return the number of threads that each of the calls ran on."""
        self.calls.clear()
        for _ in range(calls):
            work.run(self.call, threads)
        assert self.limit == 0
        return list(self.calls)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_an_idle_machine_uses_all_threads(machine: Machine, threads: int) -> None:
    """Except for one trial per second, which takes at most 1% of the time."""
    calls = machine.run(adaptive_threads.AdaptiveThreads(threads), threads, 5000)
    fewer = [count for count in calls if count < threads]
    assert len(fewer) <= 1 + machine.now / adaptive_threads.MAX_WAIT
    assert sum(machine.seconds(count) for count in fewer) <= 2.5 * adaptive_threads.SHARE * machine.now
    assert calls[:3] == [threads] * 3


def test_occasional_slow_calls(machine: Machine) -> None:
    """Occasional slow calls, as on every machine, do not change the thread count."""
    slow = itertools.cycle([False] * 9 + [True])
    machine.seconds = lambda threads: (5e-3 if next(slow) else 1e-3) / threads
    calls = machine.run(adaptive_threads.AdaptiveThreads(2), 2, 3000)
    assert calls.count(1) < 0.02 * len(calls)


def neighbor(threads: int) -> float:
    """One of two cores is busy: a call that uses it waits for a time slice."""
    return 1e-3 if threads == 1 else 5e-3


def test_fewer_threads_run_while_a_neighbor_is_busy(machine: Machine) -> None:
    work = adaptive_threads.AdaptiveThreads(2)
    quiet = machine.seconds
    machine.run(work, 2, 100)
    for _ in range(3):
        machine.seconds = neighbor
        calls = machine.run(work, 2, 2000)
        assert calls[: adaptive_threads.PATIENCE + 1].count(1) == 1
        assert calls.count(2) < 0.02 * len(calls)
        machine.seconds = quiet
        begin = machine.now
        machine.run(work, 2, 3000)
        assert machine.run(work, 2, 100).count(2) >= 98
        assert machine.now - begin < 3


def test_a_neighbor_from_the_beginning(machine: Machine) -> None:
    machine.seconds = neighbor
    calls = machine.run(adaptive_threads.AdaptiveThreads(2), 2, 1000)
    assert calls[:4] == [2, 2, 2, 1]
    assert calls.count(2) < 30


def test_partly_busy_cores(machine: Machine) -> None:
    """The count is halved until that no longer helps: 5 of 16 cores are busy."""
    machine.seconds = lambda threads: 1e-3 / threads if threads <= 11 else 5e-3
    calls = machine.run(adaptive_threads.AdaptiveThreads(16), 16, 2000)
    assert calls.count(8) > 0.95 * len(calls)


def test_a_lower_clock_rate(machine: Machine) -> None:
    """At a lower clock rate fewer threads are not faster, and are not tried repeatedly."""
    work = adaptive_threads.AdaptiveThreads(2)
    machine.run(work, 2, 1000)
    machine.seconds = lambda threads: 2e-3 / threads
    assert machine.run(work, 2, 2000).count(1) < 10


def test_an_error_is_raised_and_resets_the_limit(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    work = adaptive_threads.AdaptiveThreads(2)
    machine.run(work, 2, 3)
    monkeypatch.setattr(machine, "dcgan_error", lambda: b"no memory", raising=False)
    with pytest.raises(library.NativeError, match="no memory"):
        work.run(lambda threads: -2, 2)
    assert machine.limit == 0


def layer(transposed: bool) -> Callable[[], list[Tensor]]:
    """Return a function that runs a training layer forward and backward, with sums over all pixels."""
    torch.manual_seed(0)
    x = torch.randn(16, 64, 16, 16)
    weight = torch.randn(64, 64, 4, 4) / 30
    vectors = [torch.randn(64) for _ in range(3)]

    def run() -> list[Tensor]:
        given = [t.detach().clone().requires_grad_() for t in (x, weight, *vectors)]
        y, mean, var = op(transposed)(*given, in_act="relu", stats=True)
        (y.square().sum() + mean.sum() + var.square().sum()).backward()
        return [y, mean, var, *(t.grad for t in given if t.grad is not None)]

    return run


@pytest.mark.parametrize("transposed", [False, True])
def test_fewer_threads_give_the_same_bits(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partitioning of sums does not depend on the thread count: a resumed run ends bitwise the same."""
    run = layer(transposed)
    torch.set_num_threads(4)
    monkeypatch.setattr(adaptive_threads.AdaptiveThreads, "_record", lambda *_: None)
    outcomes = []
    for count in (4, 3, 2, 1):
        adaptive_threads.for_kind.cache_clear()
        monkeypatch.setattr(
            adaptive_threads.AdaptiveThreads,
            "_change",
            lambda self, _, times, n=count: setattr(self, "_count", n),
        )
        outcomes.append(run())
    torch.set_num_threads(native.THREADS)
    adaptive_threads.for_kind.cache_clear()
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))
