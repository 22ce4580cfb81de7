"""Run modules that follow one another: fused layers by the ops and chains, everything else as it is.

A :class:`Pipeline` is what a fused network consists of (:mod:`.fusing`). It divides its modules into parts:
the longest possible runs of layers that the kernels cover, each of which is one operator where it can be
(:mod:`.kernels.chain` for inference, :mod:`.kernels.train_chain` for training), and modules that are called.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import layers, training_layers
from .introspection import is_leaf, tracing, why_all_eager
from .kernels import chain, coverage, ops, weight_cache
from .kernels.spec import Stage
from .layers import Layer, NamedModules, is_differentiated, uses_batch_statistics

# --- from layers to parts -----------------------------------------------------------------------------------


@dataclass
class _State:
    """What is prepared for a part at its first call."""

    chain: chain.Chain | None = None
    macs: int | None = None  # of an image


class Part(NamedTuple):
    """Consecutive layers that the kernels run, with the modules called after them; or one module alone."""

    layers: tuple[Layer, ...]
    """One, without a convolution, if it is called."""
    after: tuple[Layer, ...]
    """BatchNorm and activation of the last layer, if no op follows to apply them."""
    has_statistics: bool
    """Whether a BatchNorm uses batch statistics."""
    is_computed: bool
    """Whether PyTorch computes a weight at each call."""
    state: _State

    @staticmethod
    def of(found: Sequence[Layer], after: Sequence[Layer] = ()) -> Part:
        statistics = any(uses_batch_statistics(layer.norm) for layer in found)
        return Part(tuple(found), tuple(after), statistics, any(layer.computed for layer in found), _State())


def _part(found: Sequence[Layer], start: int, height: int, width: int) -> Part:
    """Return the part of a pipeline's layers that begins with a layer, on a map of this size."""
    end, reason = start, ""
    channels: int | None = None
    while end < len(found) and not reason:
        layer = found[end]
        reason = layer.reason
        if layer.conv is not None:
            geometry = layers.geometry(layer.conv, height, width)
            reason = layers.why_not_covered(layer.conv, geometry)
            if channels not in (None, geometry.c_in):
                break  # PyTorch reports it
            height, width = geometry.output
            channels = geometry.c_out
        end += not reason
    if end == start:
        return _one_called(found[start], reason)
    run, last = found[start:end], found[end - 1]
    if not uses_batch_statistics(last.norm):
        return Part.of(run)
    # Applied on its own, a BatchNorm takes as many passes over the map as nn.BatchNorm2d.
    why = "no fused op follows to apply the BatchNorm"
    names = last.names.split(layers.SEPARATOR)
    rest = [Layer(n, (m,), reason=why) for n, m in zip(names[1:], last.modules[1:], strict=True)]
    conv = last._replace(names=names[0], modules=last.modules[:1], norm=None, act="none", slope=None)
    return Part.of([*run[:-1], conv], rest)


def _one_called(layer: Layer, reason: str) -> Part:
    return Part.of([layer._replace(conv=None, norm=None, act="none", reason=layer.reason or reason)])


class Outcome(NamedTuple):
    """How a layer ran: what :func:`explaining` lists."""

    layer: Layer
    choice: ops.Choice | None
    """The op and its engine; None if the modules were called."""
    reason: str
    """Why they were."""
    is_chain: bool


class _Local(threading.local):
    """What a thread's calls are to report."""

    outcomes: list[Outcome] | None = None
    ran = 0
    """Counts the parts that the kernels have run."""


_local = _Local()


@contextlib.contextmanager
def explaining() -> Iterator[list[Outcome]]:
    """Yield a list to which every layer that a pipeline of this thread runs in this context is appended."""
    before, _local.outcomes = _local.outcomes, []
    try:
        yield _local.outcomes
    finally:
        _local.outcomes = before


class Verdicts:
    """Remembers for which inputs no kernel runs in a module, which for those is called as it is.

    To find out costs about 50 µs, which a small network notices. To call the modules is always right, so that
    a verdict may be out of date; every 32nd call finds out again.
    """

    _CALLS, _KEPT = 31, 64

    def __init__(self) -> None:
        self._remaining: dict[Any, int] = {}

    def run(self, x: Tensor, training: bool, plain: Callable[[], Any], fused: Callable[[], Any]) -> Any:
        """Return ``plain()`` where that is known to do for inputs like x, else ``fused()``."""
        if ops.is_recording() or _local.outcomes is not None:
            return fused()
        gradients = torch.is_grad_enabled(), x.requires_grad, training
        settings = ops.autocast_dtype(x), torch.get_num_threads(), ops.engine()
        key = x.shape, x.dtype, x.device, gradients, settings
        remaining = self._remaining.get(key, 0)
        if remaining:
            self._remaining[key] = remaining - 1
            return plain()
        before = _local.ran
        y = fused()
        if _local.ran == before:
            if len(self._remaining) >= self._KEPT:
                self._remaining.clear()
            self._remaining[key] = self._CALLS
        return y


class Pipeline:
    """Modules that are run one after the other, with what is prepared to run them fast.

    Edits of the modules are detected at each call. Feature maps between two ops are NHWC. A part's output,
    and the input of a module that is called, have eager's memory format.

    Args:
        modules: (name, module), in the order of execution.
        freeze: called before weights are packed.
    """

    def __init__(self, modules: NamedModules, freeze: Callable[[], None]) -> None:
        self.modules, self._freeze = list(modules), freeze
        self.is_flat = torch.compiler.is_compiling() or all(is_leaf(module) for _, module in modules)
        """Whether no module contains others."""
        self._fingerprint: list[Any] | None = None
        self._layers: list[Layer] = []
        self._parts: dict[tuple[int, int, int], Part] = {}

    def layers(self) -> list[Layer]:
        """Return the modules as layers."""
        if torch.compiler.is_compiling():
            return layers.group(self.modules)
        fingerprint = layers.fingerprint(self.modules)
        if fingerprint != self._fingerprint:
            self._layers, self._fingerprint = layers.group(self.modules), fingerprint
            self._parts.clear()
        return self._layers

    def constant_weights(self) -> list[Tensor]:
        """Return the weights of the convolutions that the kernels may run, except those that are computed."""
        return layers.constant_weights(self.layers())

    def __call__(self, x: Tensor, groups: int = 1) -> Tensor:
        """Run the modules. With ``groups``, the result is that of a call for each of as many parts of x."""
        why = _why_not_replaced()
        found = self.layers()
        if why:
            return _called(found, x, why)  # type: ignore[no-any-return]
        if groups > 1 and not self.engine_of_groups(x, groups):
            return torch.cat([self(part) for part in x.chunk(groups)])
        i = 0
        while i < len(found):
            if isinstance(x, Tensor) and x.ndim == 4:
                part = self._part(found, i, *x.shape[2:])
            else:
                part = _one_called(found[i], "its input is not 4-D")
            i += len(part.layers)
            x = self._run(part, x, groups)
            x = _called(part.after, x)
        return x

    def _part(self, found: list[Layer], start: int, height: int, width: int) -> Part:
        if torch.compiler.is_compiling():
            return _part(found, start, height, width)
        key = start, height, width
        if key not in self._parts:
            if len(self._parts) >= MAX_PARTS:
                self._parts.clear()
            self._parts[key] = _part(found, start, height, width)
        return self._parts[key]

    def whole(self, x: Tensor) -> Part | None:
        """Return the only part of the pipeline for inputs like x; None if there are several."""
        found = self.layers()
        if not found or x.ndim != 4:
            return None
        part = self._part(found, 0, *x.shape[2:])
        return part if len(part.layers) == len(found) and not part.after else None

    def engine_of_groups(self, x: Tensor, groups: int) -> str:
        """Return the engine with which a call computes the groups in one pass; '' if it takes several."""
        part = self.whole(x)
        if part is None or _why_not_replaced() or _why_called(part, x, infers=False):
            return ""
        if part.is_computed:  # which may have side effects
            return ""
        call = training_layers.call_of(
            part.layers, x, [layers.tensors(layer) for layer in part.layers], groups, False
        )
        return "" if call is None else training_layers.engine_of(call)

    def _run(self, part: Part, x: Tensor, groups: int) -> Tensor:
        if part.layers[0].conv is None:
            return _called(part.layers, x)  # type: ignore[no-any-return]
        infers = _infers(part, x)
        why = _why_called(part, x, infers)
        if why:
            return _called(part.layers, x, why)  # type: ignore[no-any-return]
        run = self._infer if infers else self._train
        if torch.compiler.is_compiling():
            return run(part, x, groups)
        _local.ran += 1
        with weight_cache.called_from_python():
            if _local.outcomes is None:
                return run(part, x, groups)
            with ops.recording() as choices:
                y = run(part, x, groups)
        for layer, choice in zip(part.layers, choices, strict=True):
            ops.record(choice)
            _local.outcomes.append(Outcome(layer, choice, "", infers))
        return y

    def _infer(self, part: Part, x: Tensor, groups: int) -> Tensor:
        """Run the part as one operator for inference; groups do not matter without batch statistics."""
        found = part.state.chain
        if found is None:
            stages: Any = [layers.stage(layer, layers.tensors(layer)) for layer in part.layers]
            if part.is_computed or torch.compiler.is_compiling():
                return chain.conv_chain(x, stages, _infers_channels_last(x, stages))
            found = part.state.chain = chain.Chain(stages)
        return found(x, _infers_channels_last(x, found.stages), self._freeze)

    def _train(self, part: Part, x: Tensor, groups: int) -> Tensor:
        """Run the part for training, as one operator if possible."""
        last = part.layers[-1]
        activation = last.modules[-1]
        if isinstance(activation, nn.LeakyReLU) and not activation.inplace:
            # Its derivative needs its input alone: what follows may write to its result, as in `y += x`.
            without = last._replace(act="none", slope=None, modules=last.modules[:-1])
            y: Tensor = activation(self._train(part._replace(layers=(*part.layers[:-1], without)), x, groups))
            return y
        own = [layers.tensors(layer) for layer in part.layers]
        channels_last = layers.eager_output_is_channels_last(x, [tensors.weight for tensors in own])
        call = training_layers.call_of(part.layers, x, own, groups, channels_last)
        if call is not None:
            return training_layers.run_as_operator(call, part.layers, own)
        self._freeze()
        return training_layers.run_one_by_one(part.layers, own, x, channels_last)


def _infers_channels_last(x: Tensor, stages: Sequence[Stage]) -> bool:
    return stages[-1].c_out > 1 and layers.eager_output_is_channels_last(
        x, [stage.weight for stage in stages]
    )


MAX_PARTS = 64
"""Parts that a pipeline keeps, by the size of the map."""


def _called(found: Sequence[Layer], x: Any, why: str = "") -> Any:
    """Call the layers' modules; ``why`` says why none is replaced."""
    for layer in found:
        if _local.outcomes is not None:
            _local.outcomes.append(Outcome(layer, None, layer.reason or why, False))
        for module in layer.modules:
            x = module(x)
    return x


# --- whether the kernels run a part -------------------------------------------------------------------------


def _why_not_replaced() -> str:
    """Return why every module has to be called: a global hook, or a tracer; '' if none has."""
    why = why_all_eager()
    if why:
        return why
    tracer = tracing()
    return f"{tracer} must record only PyTorch's own operators" if tracer else ""


def _infers(part: Part, x: Tensor) -> bool:
    """Return whether the part may run as a chain for inference.

    On a CPU its weights must last: packed for one call only, they are better packed as in training.
    """
    if part.has_statistics or not chain.runs_as_one_call(x) or (part.is_computed and x.is_cpu):
        return False
    return not is_differentiated(part.layers, x)


def _why_called(part: Part, x: Tensor, infers: bool) -> str:
    """Return why the part's modules are called; '' if ops run them (``infers``: as a chain for inference)."""
    if part.layers[0].conv is None:
        return part.layers[0].reason
    why = _why_not_accepted(part.layers[0], x) or coverage.why_eager(x, training=not infers)
    if why or infers:
        return why
    if part.is_computed:
        if any(layer.norm is not None and not uses_batch_statistics(layer.norm) for layer in part.layers):
            return "its weight is computed at each call, and its BatchNorm is in eval mode"
        return _why_small(part, x, "computing and packing weights")
    return _why_small(part, x, "training") if is_differentiated(part.layers, x) else ""


def _why_not_accepted(layer: Layer, x: Tensor) -> str:
    """Return why PyTorch has to run on x, or to report what is wrong with it."""
    conv = layer.conv
    assert conv is not None
    if x.shape[1] != conv.in_channels:
        return "the input has the wrong number of channels"
    weight = layers.own_tensor(conv, "weight")
    if not isinstance(weight, Tensor):  # a parametrization computes it
        weight = next(conv.parameters(), x)
    if x.device != weight.device or (x.dtype != weight.dtype and ops.autocast_dtype(x) is None):
        return "the input's dtype or device is not the weight's"
    return ""


def _why_small(part: Part, x: Tensor, what: str) -> str:
    """Return why the part is too small for the ops, else ''; ``what`` names the work that has to pay."""

    def macs() -> int:
        height, width = x.shape[2:]
        if part.state.macs is None or torch.compiler.is_compiling():
            part.state.macs = 0
            for layer in part.layers:
                assert layer.conv is not None
                geometry = layers.geometry(layer.conv, height, width)
                part.state.macs += geometry.macs
                height, width = geometry.output
        return int(x.shape[0]) * part.state.macs

    return coverage.why_small(x, macs, len(part.layers), what)
