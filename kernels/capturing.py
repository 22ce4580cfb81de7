"""CUDA graphs: capture that restores the process's CUDA state if it fails, and replays of a function."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Returned = TypeVar("Returned")

_failed: list[torch.cuda.CUDAGraph] = []
"""The graphs of failed captures, kept alive because torch's allocators may still refer to them."""


@contextlib.contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None, error_mode: str = "global"
) -> Iterator[None]:
    """Capture into ``graph`` as :class:`torch.cuda.graph` does, but clean up if the capture fails.

    When CUDA invalidates a capture, ``torch.cuda.graph.__exit__`` raises before it has cleaned up: the
    captured stream stays the current one, allocations still go to the graph's memory pool, and the random
    number generator refuses to draw outside of a capture.

    Args:
        graph: a new graph.
        stream: the stream to capture, on the current device.
        pool: the memory pool, if shared with other graphs; a new one by default.
        error_mode: ``capture_error_mode`` of :class:`torch.cuda.graph`.
    """
    outside = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    index = stream.device.index
    random = torch.cuda.default_generators[index]
    before = random.clone_state()
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode=error_mode):
            yield
    except BaseException:
        torch.cuda.set_stream(outside)
        with contextlib.suppress(RuntimeError):  # torch has already ended it if the captured code raised
            torch._C._cuda_endAllocateToPool(index, pool)
        random.graphsafe_set_state(before)
        _failed.append(graph)
        raise


class Cuda:
    """CUDA graphs on one device, in one memory pool: results must be copied before another graph replays."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def device_context(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which steps run, are captured and are replayed."""
        return torch.cuda.device(self._device)

    def run(self, step: Callable[[], Returned]) -> Returned:
        """Run ``step()`` eagerly, on the stream that will be captured."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = step()
        current.wait_stream(self._stream)
        return result

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture ``step()``; return a function that replays it, and the tensor that receives its result.

        If the step cannot be captured, raise, and restore the state of the process.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may do CUDA work meanwhile, such as pinning memory for the next batch.
        with capturing(graph, self._stream, self._pool, "thread_local"):
            result = step()
        return graph.replay, result


class Replay:
    """A function of one tensor, captured: a call is a copy in, the graph and a copy out.

    Calls from several threads take turns; they must be on one stream at a time.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, backend: Any) -> None:
        """Capture ``function(x)``, whose launches must be compiled already.

        Args:
            function: returns a tensor with as many rows as x.
            x: an example, dense in memory, with the shape and dtype of every later argument. ``function`` is
                captured for its strides.
            backend: a :class:`Cuda`, or in tests a simulated one.
        """
        with torch.inference_mode(False), torch.no_grad():  # both tensors are written outside of it too
            self._input = torch.empty_like(x)
            self._replay, self._output = backend.capture(lambda: function(self._input))
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``function(x)`` in newly allocated memory; x may have fewer rows than the example."""
        rows = x.shape[0]
        with self._lock:
            self._input[:rows].copy_(x)
            self._replay()
            y: Tensor = self._output[:rows].clone()
            return y
