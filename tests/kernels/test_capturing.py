"""A failed CUDA graph capture restores the process's CUDA state; replays of a function; CUDA is faked."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dcgan.kernels.capturing import Cuda, Replay, capturing

POOL = (0, 7)


class Stream:
    device = torch.device("cuda", 1)


class Graph:
    def replay(self) -> None: ...


class FakeCuda:
    """A fake torch.cuda; an exception inside a capture leaves the captured stream the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ended: bool) -> None:
        self.calls: list[Any] = []
        self.side, outside = Stream(), Stream()
        self.current = self.outside = outside
        fake = self

        @contextlib.contextmanager
        def graph(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            fake.current = stream
            yield
            fake.current = fake.outside

        class Random:
            def clone_state(self) -> str:
                return "the state before"

            def graphsafe_set_state(self, state: str) -> None:
                fake.calls.append(("random", state))

        def end(index: int, pool: Any) -> None:
            fake.calls.append(("end", index, pool))
            if ended:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

        for name, value in {
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": lambda device: fake.side,
            "graph_pool_handle": lambda: POOL,
            "current_stream": lambda: fake.current,
            "set_stream": lambda stream: setattr(fake, "current", stream),
            "default_generators": {1: Random()},
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)


def test_the_private_functions_exist() -> None:
    """capturing() uses private interfaces of torch, whose absence the fake would hide."""
    assert callable(torch._C._cuda_endAllocateToPool)
    assert all(hasattr(torch.Generator, name) for name in ("clone_state", "graphsafe_set_state"))


@pytest.mark.parametrize("ended", [False, True], ids=["CUDA invalidated it", "the step raised"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_capture_restores_the_state(
    error: type[BaseException], ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current stream, the allocator and the random number generator are restored."""
    fake = FakeCuda(monkeypatch, ended)
    graph, side = (cast(Any, value) for value in (Graph(), fake.side))

    def capture() -> None:
        with capturing(graph, side):
            assert fake.current is fake.side
            raise error("no")

    with pytest.raises(error, match="no"):
        capture()
    assert fake.current is fake.outside
    assert fake.calls == [("end", 1, POOL), ("random", "the state before")]


def test_a_capture_succeeds_after_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, ended=False)
    backend = Cuda(torch.device("cuda", 1))

    def refuse() -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        backend.capture(refuse)
    fake.calls.clear()
    result = torch.zeros(4)
    assert backend.capture(lambda: result)[1] is result
    assert (fake.current, fake.calls) == (fake.outside, [])


# --- replays ------------------------------------------------------------------------------------------------


class SimulatedGraph:
    """A simulated CUDA graph: a replay computes the function of the captured memory, in captured memory."""

    def __init__(self, before_replay: Callable[[], None] = lambda: None) -> None:
        self.captures = self.replays = 0
        self._before_replay = before_replay

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        result = step()
        assert not result.is_inference()
        result.fill_(torch.nan)

        def replay() -> None:
            self._before_replay()
            self.replays += 1
            with torch.no_grad():
                result.copy_(step())

        return replay, result


def function(x: Tensor) -> Tensor:
    """Return a nonlinear function of each row, of another shape and with the memory format of x."""
    return torch.cat([x.tanh(), x.square()], 1)


NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"), [((5, 3, 4, 7), NCHW), ((5, 3, 4, 7), NHWC), ((1, 2, 1, 1), NCHW), ((4, 9), NCHW)]
)
def test_a_replay_equals_the_function(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """For every number of rows, with the function's strides; one row does not depend on earlier calls."""
    x = torch.randn(shape).to(dtype).to(memory_format=layout)
    graph = SimulatedGraph()
    run = Replay(function, torch.full_like(x, torch.nan), graph)
    assert (graph.captures, graph.replays) == (1, 0)
    for rows in (shape[0], *range(shape[0] + 1)):
        given = torch.randn_like(x)[:rows]
        before = given.clone()
        y = run(given)
        assert torch.equal(y, function(given))
        assert torch.equal(given, before)
        assert (y.dtype, y.stride()) == (dtype, function(x)[:rows].clone().stride())
        assert not y.requires_grad
    assert (graph.captures, graph.replays) == (1, shape[0] + 2)


def test_the_example_decides_the_strides() -> None:
    """The captured input has those of the example, whose values do not matter; x may have others."""
    example = torch.full((4, 3, 5, 7), torch.nan).to(memory_format=NHWC)
    seen: list[tuple[int, ...]] = []

    def noting(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return function(x)

    run = Replay(noting, example, SimulatedGraph())
    x = torch.randn(4, 3, 5, 7)
    for given in (x, x.to(memory_format=NHWC), x[:3], x.transpose(2, 3).contiguous().transpose(2, 3)):
        y = run(given)
        assert torch.equal(y, function(given))
        assert y.is_contiguous(memory_format=NHWC)
    assert set(seen) == {example.stride()}


def test_each_result_is_new_memory() -> None:
    """A later call changes neither earlier results nor arguments."""
    run = Replay(function, torch.empty(3, 4), SimulatedGraph())
    xs = [torch.randn(rows, 4) for rows in (3, 1, 3, 2)]
    ys = [run(x) for x in xs]
    assert len({y.data_ptr() for y in ys}) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(y, function(x))
    ys[0].zero_()
    assert torch.equal(run(xs[0]), function(xs[0]))


@pytest.mark.parametrize("made_in", [True, False], ids=["made inside", "made outside"])
def test_a_replay_serves_inside_and_outside_of_inference_mode(made_in: bool) -> None:
    """Wherever it was made, and whether or not gradients are enabled; an x that has a graph is only read."""
    with torch.inference_mode(made_in):
        run = Replay(function, torch.empty(3, 4), SimulatedGraph())
    x = torch.randn(3, 4)
    for inside in (False, True, False):
        with torch.inference_mode(inside):
            assert torch.equal(run(x), function(x))
    with torch.inference_mode():
        inference = torch.randn(2, 4)
    assert torch.equal(run(inference), function(inference))
    with torch.no_grad():
        assert torch.equal(run(x.clone().requires_grad_()), function(x))


def test_threads_take_turns() -> None:
    """A thread's input is neither overwritten before its replay nor its result after it."""
    inside = threading.Lock()

    def enter() -> None:
        assert inside.acquire(blocking=False), "two replays at a time"
        time.sleep(0.001)  # let the other thread run
        inside.release()

    run = Replay(lambda x: 2 * x, torch.empty(4, 5), SimulatedGraph(enter))
    wrong: list[int] = []

    def call(first: int) -> None:
        for i in range(first, first + 40):
            rows = i % 4 + 1
            if not torch.equal(run(torch.full((rows, 5), float(i))), torch.full((rows, 5), 2.0 * i)):
                wrong.append(i)
        done.append(first)

    done: list[int] = []
    threads = [threading.Thread(target=call, args=(first,)) for first in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, sorted(done)) == ([], [0, 1000])


def test_a_failed_call_does_not_block_later_ones() -> None:
    """An x of another shape, or a replay that raises."""
    failing = [RuntimeError("no")]

    def fail() -> None:
        if failing:
            raise failing.pop()

    run = Replay(function, torch.empty(3, 4), SimulatedGraph(fail))
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="no"):
        run(x)
    with pytest.raises(RuntimeError, match="size"):
        run(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="size"):
        run(torch.randn(5, 4))
    assert torch.equal(run(x), function(x))
