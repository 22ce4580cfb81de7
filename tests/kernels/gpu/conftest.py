"""Fixtures for the tests of recorded launches."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from dcgan.kernels import gpu, ops
from dcgan.kernels.gpu import inference, launcher, up_block
from dcgan.kernels.gpu.launcher import Launch
from tests.support.recorded_launches import (
    Made,
    Recorder,
    SimulatedCuda,
    active,
    captures_as_on_cuda,
    hooks,
    launch_without_compilation,
    launched,
)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the Triton engine cover CPU tensors, and record its launches; small maps run as up_block, too."""
    for module in (launcher, gpu):
        monkeypatch.setattr(module, "why_not_here", lambda device, dtype: None)
    monkeypatch.setattr(up_block, "MIN_BLOCKS", 0)
    monkeypatch.setattr(inference, "_capture_failed", False)
    monkeypatch.delenv("DCGAN_GRAPHS", raising=False)
    launched.clear()
    hooks.clear()
    with active(Recorder()), ops.use_engine("triton"):
        yield


@pytest.fixture
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record launches in place of their compilation."""
    monkeypatch.setattr(Launch, "__call__", launch_without_compilation)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Return what a test prepares."""
    found = Made([], [])
    for kind, references in ((inference.Prepared, found.prepared), (inference.Weights, found.weights)):

        def init(self: Any, *args: Any, original: Any = kind.__init__, references: Any = references) -> None:
            references.append(weakref.ref(self))
            original(self, *args)

        monkeypatch.setattr(kind, "__init__", init)
    return found


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> type[SimulatedCuda]:
    """Capture on the CPU, as on a GPU."""

    class Backend(SimulatedCuda):
        pass

    Backend.log, Backend.failure = [], ""

    monkeypatch.setattr(Launch, "__call__", launch_without_compilation)
    monkeypatch.setattr(inference, "Cuda", Backend)
    monkeypatch.setattr(inference, "captures", captures_as_on_cuda)
    return Backend


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture the second call of each kind."""
    monkeypatch.setattr(inference, "CAPTURED_CALL", 2)


@pytest.fixture
def expired(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives, at each call of Weights.expire, the number of launches before it."""
    found: list[int] = []
    original = inference.Weights.expire

    def expire(self: inference.Weights) -> None:
        found.append(len(launched))
        original(self)

    monkeypatch.setattr(inference.Weights, "expire", expire)
    return found
