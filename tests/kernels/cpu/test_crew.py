"""How many threads calls run on, by a machine with a clock of its own, not by what this one does."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import native
import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.cpu import crew, library

pytestmark = native.NEEDED


class Machine:
    """Takes ``seconds(threads)`` for each call, by its own clock; ``limit`` is what the library was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.limit, self.calls = 0.0, 0, []
        self.seconds: Callable[[int], float] = lambda threads: 1e-3 / threads
        monkeypatch.setattr(crew, "clock", lambda: self.now)
        monkeypatch.setattr(library, "library", lambda: self)

    def dcgan_limit_threads(self, most: int) -> int:
        self.limit = most
        return 0

    def call(self, threads: int) -> int:
        count = self.limit or threads
        self.calls.append(count)
        self.now += self.seconds(count)
        return 0

    def run(self, work: crew.Crew, threads: int, calls: int) -> list[int]:
        """On how many threads each of the calls ran."""
        self.calls.clear()
        for _ in range(calls):
            work.run(self.call, threads)
        assert self.limit == 0
        return list(self.calls)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_on_a_quiet_machine_all_threads_run(machine: Machine, threads: int) -> None:
    """But for a trial a second, of 1% of the time at most."""
    calls = machine.run(crew.Crew(threads), threads, 5000)
    fewer = [count for count in calls if count < threads]
    assert len(fewer) <= 1 + machine.now / crew.LONGEST_WAIT
    assert sum(machine.seconds(count) for count in fewer) <= 2.5 * crew.SHARE * machine.now
    assert calls[:3] == [threads] * 3


def test_a_call_now_and_then_is_slow(machine: Machine) -> None:
    """As on every machine: it changes nothing."""
    slow = itertools.cycle([False] * 9 + [True])
    machine.seconds = lambda threads: (5e-3 if next(slow) else 1e-3) / threads
    calls = machine.run(crew.Crew(2), 2, 3000)
    assert calls.count(1) < 0.02 * len(calls)


def neighbour(threads: int) -> float:
    """One of two cores is taken: what waits for a thread there waits for a time slice."""
    return 1e-3 if threads == 1 else 5e-3


def test_beside_a_neighbour_fewer_run_and_when_it_goes_all_again(machine: Machine) -> None:
    work = crew.Crew(2)
    quiet = machine.seconds
    machine.run(work, 2, 100)
    for _ in range(3):
        machine.seconds = neighbour
        calls = machine.run(work, 2, 2000)
        assert calls[: crew.PATIENCE + 1].count(1) == 1
        assert calls.count(2) < 0.02 * len(calls)
        machine.seconds = quiet
        begin = machine.now
        machine.run(work, 2, 3000)
        assert machine.run(work, 2, 100).count(2) >= 98
        assert machine.now - begin < 3


def test_a_neighbour_that_was_there_from_the_beginning(machine: Machine) -> None:
    machine.seconds = neighbour
    calls = machine.run(crew.Crew(2), 2, 1000)
    assert calls[:4] == [2, 2, 2, 1]
    assert calls.count(2) < 30


def test_on_many_cores_as_many_as_are_free(machine: Machine) -> None:
    """Halved until it helps no more: 5 of 16 cores are taken."""
    machine.seconds = lambda threads: 1e-3 / threads if threads <= 11 else 5e-3
    calls = machine.run(crew.Crew(16), 16, 2000)
    assert calls.count(8) > 0.95 * len(calls)


def test_slower_for_another_reason(machine: Machine) -> None:
    """A lower clock rate: fewer threads are no faster, which is not tried again and again."""
    work = crew.Crew(2)
    machine.run(work, 2, 1000)
    machine.seconds = lambda threads: 2e-3 / threads
    assert machine.run(work, 2, 2000).count(1) < 10


def test_an_error_is_raised_and_the_limit_lifted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    work = crew.Crew(2)
    machine.run(work, 2, 3)
    monkeypatch.setattr(machine, "dcgan_error", lambda: b"no memory", raising=False)
    with pytest.raises(library.NativeError, match="no memory"):
        work.run(lambda threads: -2, 2)
    assert machine.limit == 0


def layer(transposed: bool) -> Callable[[], list[Tensor]]:
    """A layer of training, forward and backward, with sums over all pixels."""
    torch.manual_seed(0)
    x = torch.randn(16, 64, 16, 16)
    weight = torch.randn(64, 64, 4, 4) / 30
    vectors = [torch.randn(64) for _ in range(3)]
    op = ops.conv_transpose2d_fused if transposed else ops.conv2d_fused

    def run() -> list[Tensor]:
        given = [t.detach().clone().requires_grad_() for t in (x, weight, *vectors)]
        y, mean, var = op(*given, in_act="relu", stats=True)
        (y.square().sum() + mean.sum() + var.square().sum()).backward()
        return [y, mean, var, *(t.grad for t in given if t.grad is not None)]

    return run


@pytest.mark.parametrize("transposed", [False, True])
def test_fewer_threads_give_the_same_bits(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """How sums are cut is not the crew's, so that a run that is resumed ends as one that was not."""
    run = layer(transposed)
    torch.set_num_threads(4)
    monkeypatch.setattr(crew.Crew, "_took", lambda *_: None)
    outcomes = []
    for count in (4, 3, 2, 1):
        crew.of.cache_clear()
        monkeypatch.setattr(
            crew.Crew, "_change", lambda self, most, times, n=count: setattr(self, "_count", n)
        )
        outcomes.append(run())
    torch.set_num_threads(native.THREADS)
    crew.of.cache_clear()
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))
