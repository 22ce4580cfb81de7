"""A training step as the replay of a CUDA graph: one graph for each size of batch that keeps coming.

A step that changes parameters, statistics and the optimizer's state cannot be tried out and taken back, and
need not be: the first :data:`WARM_UP` steps of a size are taken, eagerly, on the stream that will be
captured. They compile kernels and create the optimizer's state; then the step is captured, which executes
nothing, and replayed. So nothing is to be restored, and a size that comes once, or once an epoch, costs no
graph before its fourth time.

A step can be captured again at any time, after a change of what it depends on. Two things could prevent that.
A gradient is accumulated on the stream on which its parameter was first used in a graph of autograd that is
still alive, and a capture that reaches out to a stream which is not captured fails: so every warm-up and
capture begins with parameters that have no such stream (:func:`use_anew`). And a capture that fails would
leave the process as if it were still under way, if :mod:`dcgan.capturing` did not set it right.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dcgan.capturing import capturing
from dcgan.kernels import weights
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
        """A function that does ``step()`` again, and the tensor in which it leaves its result.

        What cannot be captured raises, and leaves the process as it was.
        """


class Cuda:
    """Graphs on one device, from one memory pool: a graph's results are copied before another replays."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

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
        with capturing(graph, self._stream, self._pool, "thread_local"):
            result = step()
        return graph.replay, result


def use_anew(parameters: Iterable[Tensor]) -> None:
    """Let each parameter's gradient be accumulated on the stream on which it is next used.

    Autograd keeps a parameter's accumulation node, and with it its stream, as long as any graph that uses
    the parameter is alive: somebody's ``parameter.clone()``, a loss that was kept. Such a graph keeps its
    node and remains as good as it was; what comes after it makes a new one. (A hook that was registered on
    the node itself stays with the old one. Hooks of the parameter are called by every node.)
    """
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or not parameter.requires_grad:
            continue
        data = parameter.data
        other = torch.float32 if data.dtype == torch.float64 else torch.float64
        parameter.data = torch.empty(0, dtype=other, device=data.device)  # of another dtype: a node for that
        parameter.data = data


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
    failed: bool = False
    """Its capture did: it runs eagerly until something changes."""


class Graphs:
    """Calls of a step: eager while a size of batch is new or what it depends on changes, then replayed.

    Args:
        step: (real, noise) → Result; all that it does on the device, it does whenever it is called.
        stamp: what a captured step depends on and its replay does not look at, identities of its tensors
            included. Where that has changed, the size is new again.
        tensors: the parameters, whose ``grad`` the step makes, and every tensor that it changes in place: a
            replay raises their versions, by which autograd can tell, and tells :mod:`dcgan.kernels.weights`.
        backend: where it runs.
        insist: a capture that fails is an error; otherwise a warning, and steps go on eagerly.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Result],
        stamp: Callable[[], Hashable],
        tensors: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
        backend: Backend,
        insist: bool = False,
    ) -> None:
        self._step, self._stamp, self._tensors, self._backend = step, stamp, tensors, backend
        self._insist = insist
        self._sizes: OrderedDict[Hashable, _Size] = OrderedDict()
        self.failure = ""
        """Why the last capture failed; '' after one that did not."""

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
            if size.captured is None and size.steps >= WARM_UP and not size.failed:
                size.captured = self._capture(real, noise)
                size.failed = size.captured is None
            if size.captured is None:
                if not size.failed:
                    use_anew(self._tensors()[0])
                result = self._backend.run(lambda: self._step(real, noise))
                size.steps += 1
                size.stamp = self._stamp()  # a first step creates the optimizer's state
                return result
            captured = size.captured
            captured.real.copy_(real)
            captured.noise.copy_(noise)
            captured.replay()
            for parameter, gradient in zip(captured.parameters, captured.gradients, strict=True):
                parameter.grad = gradient
            torch.autograd.graph.increment_version(captured.changed)
            weights.written(captured.changed)
            return Result(*captured.result.clone().unbind())

    def _capture(self, real: Tensor, noise: Tensor) -> _Captured | None:
        """None where it failed and that is no error."""
        parameters, changed = self._tensors()
        use_anew(parameters)
        static_real, static_noise = torch.empty_like(real), torch.empty_like(noise)
        static_real.copy_(real)
        static_noise.copy_(noise)
        for parameter in parameters:  # so that the graph's gradients are in its own memory
            parameter.grad = None
        first: list[Exception] = []

        def step() -> Tensor:
            try:
                return torch.stack(self._step(static_real, static_noise))
            except Exception as error:  # what follows from it says less
                first.append(error)
                raise

        try:
            replay, result = self._backend.capture(step)
        except Exception as error:
            for parameter in parameters:
                parameter.grad = None
            torch.clear_autocast_cache()
            self.failure = f"{(first or [error])[0]}"
            said = f"the training step cannot be captured in a CUDA graph: {self.failure}"
            if self._insist:
                raise RuntimeError(f"{said} (capture=False runs it eagerly)") from error
            warnings.warn(f"{said}. It runs eagerly, which is slower.", RuntimeWarning, stacklevel=4)
            return None
        self.failure = ""
        gradients = [p.grad for p in parameters]
        return _Captured(static_real, static_noise, replay, result, parameters, gradients, changed)
