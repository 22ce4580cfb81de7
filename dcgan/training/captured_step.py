"""Training steps as CUDA graph replays, with one graph per recurring batch shape.

A training step changes parameters, statistics and optimizer state, so warm-up steps cannot be discarded, and
need not be: the first :data:`WARM_UP` steps of a batch shape are ordinary training steps, run eagerly on the
stream that will be captured. They compile kernels and create the optimizer's state. Then the step is
captured, which executes nothing, and replayed. Nothing has to be restored, and a shape that occurs once, or
once per epoch, costs no graph until its fourth occurrence.

A step can be captured again at any time, after the state it depends on has changed. Two things could prevent
that. Autograd accumulates a gradient on the stream on which its parameter was first used in a graph that is
still alive, and a capture that depends on a stream outside of it fails; so every warm-up step and capture
starts with parameters that have no such stream (:func:`reset_accumulation_streams`). And a failed capture
would leave the process in capture mode; :mod:`dcgan.kernels.capturing` restores it.
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

from dcgan.kernels import weight_cache
from dcgan.training.reference_step import Result

WARM_UP = 3  # as in PyTorch's own examples
MAX_SHAPES = 4  # batch shapes whose graphs are kept: the regular one, the short last one, and two spare


class Backend(Protocol):
    """Runs and captures steps: :class:`dcgan.kernels.capturing.Cuda`, or in tests a simulated one."""

    def device_context(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which steps run, are captured and are replayed."""

    def run(self, step: Callable[[], Result]) -> Result:
        """Run ``step()`` eagerly, as a warm-up step."""

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture ``step()``; return a function that replays it, and the tensor that receives its result.

        If the step cannot be captured, raise, and restore the state of the process.
        """


def reset_accumulation_streams(parameters: Iterable[Tensor]) -> None:
    """Make autograd accumulate each parameter's gradient on the stream on which it is used next.

    Autograd keeps a parameter's accumulation node, and with it its stream, as long as any graph that uses
    the parameter is alive, for example through a ``parameter.clone()`` or a loss that was kept. Such a graph
    keeps its node and stays valid; later uses of the parameter create a new node. (A hook registered on the
    node itself stays with the old node. Hooks of the parameter are called by every node.)
    """
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or not parameter.requires_grad:
            continue
        data = parameter.data
        other_dtype = torch.float32 if data.dtype == torch.float64 else torch.float64
        parameter.data = torch.empty(0, dtype=other_dtype, device=data.device)  # a new dtype drops the node
        parameter.data = data


@dataclass
class _Captured:
    real: Tensor
    noise: Tensor
    """Static inputs, from which a replay reads its batch."""
    replay: Callable[[], None]
    result: Tensor
    """[4], a Result's values, written by each replay."""
    parameters: Sequence[Tensor]
    gradients: list[Tensor | None]
    """The parameters' gradients, written by each replay; other graphs and eager steps have separate ones."""
    changed: Sequence[Tensor]


@dataclass
class _ShapeState:
    fingerprint: Hashable
    steps: int = 0
    captured: _Captured | None = None
    failed: bool = False
    """Whether its capture failed; it then runs eagerly until the fingerprint changes."""


class Graphs:
    """Runs a step eagerly for :data:`WARM_UP` calls per batch shape, then captures and replays it.

    Args:
        step: (real, noise) → Result. It must do the same device work on every call.
        fingerprint: returns the state that a captured step bakes in, including the identities of its tensors.
            When it changes, the batch shape starts over with warm-up.
        tensors: returns the parameters, whose ``grad`` the step sets, and all tensors that it changes in
            place. A replay increments their autograd versions and invalidates them in
            :mod:`dcgan.kernels.weight_cache`.
        backend: runs and captures the step.
        raise_on_failure: raise an error if a capture fails; otherwise warn and continue eagerly.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Result],
        fingerprint: Callable[[], Hashable],
        tensors: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
        backend: Backend,
        raise_on_failure: bool = False,
    ) -> None:
        self._step, self._fingerprint, self._tensors, self._backend = step, fingerprint, tensors, backend
        self._insist = raise_on_failure
        self._sizes: OrderedDict[Hashable, _ShapeState] = OrderedDict()
        self.failure = ""
        """Why the last capture failed; '' if it succeeded."""

    def __call__(self, real: Tensor, noise: Tensor) -> Result:
        """Run one step on one batch, by replay if its shape has been captured."""
        key, fingerprint = (real.shape, noise.shape), self._fingerprint()
        state = self._sizes.pop(key, None)
        if state is None or state.fingerprint != fingerprint:
            state = _ShapeState(fingerprint)
        self._sizes[key] = state  # most recently used last
        while len(self._sizes) > MAX_SHAPES:
            self._sizes.popitem(last=False)

        with self._backend.device_context():
            if state.captured is None and state.steps >= WARM_UP and not state.failed:
                state.captured = self._capture(real, noise)
                state.failed = state.captured is None
            if state.captured is None:
                if not state.failed:
                    reset_accumulation_streams(self._tensors()[0])
                result = self._backend.run(lambda: self._step(real, noise))
                state.steps += 1
                state.fingerprint = self._fingerprint()  # the first step creates the optimizer's state
                return result
            captured = state.captured
            captured.real.copy_(real)
            captured.noise.copy_(noise)
            captured.replay()
            for parameter, gradient in zip(captured.parameters, captured.gradients, strict=True):
                parameter.grad = gradient
            torch.autograd.graph.increment_version(captured.changed)
            weight_cache.invalidate(captured.changed)
            return Result(*captured.result.clone().unbind())

    def _capture(self, real: Tensor, noise: Tensor) -> _Captured | None:
        """Capture the step; return None if that fails and failure is not an error."""
        parameters, changed = self._tensors()
        reset_accumulation_streams(parameters)
        static_real, static_noise = torch.empty_like(real), torch.empty_like(noise)
        static_real.copy_(real)
        static_noise.copy_(noise)
        for parameter in parameters:  # so that gradients are allocated in the graph's pool
            parameter.grad = None
        errors: list[Exception] = []

        def step() -> Tensor:
            try:
                return torch.stack(self._step(static_real, static_noise))
            except Exception as error:  # the first error explains more than the ones it causes
                errors.append(error)
                raise

        try:
            replay, result = self._backend.capture(step)
        except Exception as error:
            for parameter in parameters:
                parameter.grad = None
            torch.clear_autocast_cache()
            self.failure = f"{(errors or [error])[0]}"
            message = f"the training step cannot be captured in a CUDA graph: {self.failure}"
            if self._insist:
                raise RuntimeError(f"{message} (capture=False runs it eagerly)") from error
            warnings.warn(f"{message}. It runs eagerly, which is slower.", RuntimeWarning, stacklevel=4)
            return None
        self.failure = ""
        gradients = [p.grad for p in parameters]
        return _Captured(static_real, static_noise, replay, result, parameters, gradients, changed)
