"""A training step as the replay of a CUDA graph: one graph for each size of batch that keeps coming.

A step that changes parameters, statistics and the optimizer's state cannot be tried out and taken back, and
need not be: the first :data:`WARM_UP` steps of a size are taken, eagerly, on the stream that will be
captured. They compile kernels and create the optimizer's state; then the step is captured, which executes
nothing, and replayed. So nothing is to be restored, and a size that comes once, or once an epoch, costs no
graph before its fourth time.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dcgan.training.step import Result

WARM_UP = 3  # what PyTorch's own examples take
SIZES = 4  # of batches, whose graphs are kept: an epoch's, its short last one's, and two to spare


class Backend(Protocol):
    """Where steps run. :class:`Cuda` is the real one; tests have another."""

    def here(self) -> contextlib.AbstractContextManager[object]:
        """What calls, captures and replays are made in."""

    def run(self, step: Callable[[], Result]) -> Result:
        """``step()``, as a warm-up."""

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that does ``step()`` again, and the tensor in which it leaves its result."""


class Cuda:
    """Graphs on one device, from one memory pool: a graph's results are copied before another replays."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def here(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self._device)

    def run(self, step: Callable[[], Result]) -> Result:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = step()
        current.wait_stream(self._stream)
        return result

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile, pinning memory for the next batch, is not our step.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = step()
        self._pool = self._pool or graph.pool()
        return graph.replay, result


@dataclass
class _Captured:
    real: Tensor
    noise: Tensor
    """Where a replay reads its batch."""
    replay: Callable[[], None]
    result: Tensor
    """[4], a Result's values, where a replay leaves them."""
    parameters: Sequence[Tensor]
    gradients: list[Tensor | None]
    """Of the parameters, likewise: other graphs, and eager steps, have theirs elsewhere."""
    changed: Sequence[Tensor]


@dataclass
class _Size:
    stamp: Hashable
    steps: int = 0
    captured: _Captured | None = None


class Graphs:
    """Calls of a step: eager while a size of batch is new or what it depends on changes, then replayed.

    Args:
        step: (real, noise) → Result; all that it does on the device, it does whenever it is called.
        stamp: what a captured step depends on and its replay does not look at, identities of its tensors
            included. Where that has changed, the size is new again.
        tensors: the parameters, whose ``grad`` the step makes, and every tensor that it changes in place: a
            replay raises their versions, by which others (autograd, caches of packed weights) can tell.
        backend: where it runs.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Result],
        stamp: Callable[[], Hashable],
        tensors: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
        backend: Backend,
    ) -> None:
        self._step, self._stamp, self._tensors, self._backend = step, stamp, tensors, backend
        self._sizes: OrderedDict[Hashable, _Size] = OrderedDict()

    def __call__(self, real: Tensor, noise: Tensor) -> Result:
        """One step on one batch."""
        key, stamp = (real.shape, noise.shape), self._stamp()
        size = self._sizes.pop(key, None)
        if size is None or size.stamp != stamp:
            size = _Size(stamp)
        self._sizes[key] = size  # the one used last is the last
        while len(self._sizes) > SIZES:
            self._sizes.popitem(last=False)

        with self._backend.here():
            if size.captured is None and size.steps < WARM_UP:
                result = self._backend.run(lambda: self._step(real, noise))
                size.steps += 1
                size.stamp = self._stamp()  # a first step creates the optimizer's state
                return result
            if size.captured is None:
                size.captured = self._capture(real, noise)
            captured = size.captured
            captured.real.copy_(real)
            captured.noise.copy_(noise)
            captured.replay()
            for parameter, gradient in zip(captured.parameters, captured.gradients, strict=True):
                parameter.grad = gradient
            torch.autograd.graph.increment_version(captured.changed)
            return Result(*captured.result.clone().unbind())

    def _capture(self, real: Tensor, noise: Tensor) -> _Captured:
        parameters, changed = self._tensors()
        static_real, static_noise = torch.empty_like(real), torch.empty_like(noise)
        static_real.copy_(real)
        static_noise.copy_(noise)
        for parameter in parameters:  # so that the graph's gradients are in its own memory
            parameter.grad = None
        try:
            replay, result = self._backend.capture(lambda: torch.stack(self._step(static_real, static_noise)))
        except Exception as error:
            for parameter in parameters:
                parameter.grad = None
            raise RuntimeError(
                "the training step cannot be captured in a CUDA graph (capture=False runs it eagerly): "
                f"{error}"
            ) from error
        gradients = [p.grad for p in parameters]
        return _Captured(static_real, static_noise, replay, result, parameters, gradients, changed)
