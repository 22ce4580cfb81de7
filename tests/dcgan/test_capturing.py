"""A failed CUDA graph capture restores the process's CUDA state; torch.cuda is faked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from dcgan.capturing import capturing
from dcgan.training.captured_step import Cuda

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
