"""A network in eval on the Triton engine: one small kernel, then one product per layer.

A layer's product has its BatchNorm, bias and activation as its epilogue, and reads a packed weight. Both
depend on the network's tensors alone; :mod:`.prepare`, one launch in front of the products, keeps them up to
date. From sm_90 on the products are dependent launches (:func:`.device_functions.wait_for_previous`).

The first call of a kind chooses tiles and compiles; later ones pass addresses to compiled launches. Small
batches that recur are captured in a CUDA graph.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capturing import Cuda, Replay
from ..cpu import value_guard
from ..spec import ConvSpec, Stage
from . import packing
from .executor import device_guard
from .launcher import Pointers, Product, kernel_for, plan_of, precision, run, starts_early
from .prepare import Weights, epilogue_of, may_be_checked

MAX_WEIGHTS = 8
"""Sets of packed weights kept for a network: one per stream, dtype and choice of kernels."""
MAX_PREPARED = 32
"""Kinds of calls of a network whose launches are kept: one per shape, strides, dtype and stream."""
CAPTURED_CALL = 16
"""The call of a kind that is captured in a CUDA graph, and from which on it is replayed."""
MAX_IMAGES_CAPTURED = 128
"""Beyond, the device takes longer than the host's launches, with which it overlaps."""
MAX_GRAPHS = 4
"""Of a network."""
MAX_GRAPH_BYTES = 128 << 20


# --- products -----------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A product's launch without the addresses of x and y; 0 stands for a pointer that is not read."""

    run: Callable[..., Any]
    weight: int
    scale: int
    shift: int
    rest: tuple[Any, ...]


def product_specs(specs: Sequence[ConvSpec], stages: Sequence[Stage]) -> list[ConvSpec]:
    """Return the products of a network, given :func:`..chain.specs`."""
    found = []
    for spec, stage in zip(specs, stages, strict=True):
        scaled, shifted = epilogue_of(stage)
        y = spec.y._replace(scaled=scaled, shifted=shifted)
        early = starts_early(spec.device)
        found.append(spec._replace(y=y, precision=precision(spec.dtype), dependent=early))
    return found


def layouts_of(specs: Sequence[ConvSpec]) -> tuple[packing.Layout, ...]:
    """Return the layouts in which products read their weights."""
    kernels = [kernel_for(spec) for spec in specs]
    return tuple([kernel.layout for kernel in kernels if kernel is not None and kernel.layout is not None])


class Prepared:
    """A network ready to run on inputs of one shape, strides, dtype and alignment, on one stream.

    Maps between two layers lie in a workspace, in which each overwrites the last but one.
    """

    def __init__(self, specs: Sequence[ConvSpec], weights: Weights) -> None:
        """Take :func:`product_specs`."""
        self._specs, self.weights = list(specs), weights
        sizes = [spec.images * math.prod(spec.y.size) for spec in specs[:-1]]
        odd = -(-max(sizes[::2], default=0) // packing.ALIGNMENT) * packing.ALIGNMENT
        self._starts = [odd * (i % 2) for i in range(len(sizes))]
        self._size = odd + max(sizes[1::2], default=0)
        self._steps: list[_Step] = []
        self.calls = 0
        self.graph: Replay | None = None

    @property
    def bytes(self) -> int:
        """The size of the output and the maps between layers, which a graph keeps."""
        last = self._specs[-1]
        return (self._size + last.images * math.prod(last.y.size)) * last.dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        last = self._specs[-1]
        with device_guard(x):
            y = torch.empty_strided(last.shape, last.y.stride, dtype=last.dtype, device=last.device)
            workspace = torch.empty(self._size, dtype=last.dtype, device=last.device)
            stream = _stream(x)
            self.weights.prepare(stream)
            if self._steps:
                self._repeat(x.data_ptr(), y.data_ptr(), workspace.data_ptr(), stream)
            else:
                self._run(x, y, workspace)
        return y

    def _repeat(self, x: int, y: int, workspace: int, stream: int) -> None:
        """Launch all products on a stream; the other arguments are addresses."""
        item = self._specs[0].dtype.itemsize
        outputs = [*[workspace + start * item for start in self._starts], y]
        for (launch, weight, scale, shift, rest), out in zip(self._steps, outputs, strict=True):
            inputs, outs = Pointers(x, out, out, out, out), Pointers(out, out, out, scale, shift)
            launch(inputs, weight, outs, out, *rest, stream=stream)
            x = out

    def _run(self, x: Tensor, y: Tensor, workspace: Tensor) -> None:
        """Run all products, choosing their tiles, and keep their launches for the next call."""
        weights, steps = self.weights, []
        maps = [
            workspace.as_strided(spec.shape, spec.y.stride, workspace.storage_offset() + start)
            for spec, start in zip(self._specs, self._starts, strict=False)
        ]
        each = zip(self._specs, weights.packed, weights.scales, weights.shifts, [*maps, y], strict=True)
        for spec, packed, scale, shift, out in each:
            product = Product(spec, Pointers(x), None, Pointers(out, None, None, scale, shift))
            run(product, packed)
            plan = plan_of(product, packed)
            if plan is not None:  # as it is in Triton's interpreter
                assert plan.run is not None
                steps.append(_Step(plan.run, packed.data_ptr(), _address(scale), _address(shift), plan.rest))
            x = out
        self._steps = steps


def _address(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.data_ptr()


# --- networks -----------------------------------------------------------------------------------------------

_capture_failed = False


def captures(x: Tensor) -> bool:
    """Return whether recurring calls on x are captured in a CUDA graph, unless their number is too large.

    ``DCGAN_GRAPHS=0`` turns this off, and so does a capture that fails, for the rest of the process.
    """
    wanted = x.is_cuda and not _capture_failed and os.environ.get("DCGAN_GRAPHS") != "0"
    return wanted and x.shape[0] <= MAX_IMAGES_CAPTURED


def _captured(prepared: Prepared, x: Tensor) -> Replay | None:
    """Return a call captured in a CUDA graph; if that fails, warn once and return None."""
    global _capture_failed
    try:
        with device_guard(x):
            return Replay(prepared, x, Cuda(x.device))
    except Exception as error:  # whatever CUDA, the allocator or Triton may raise: the launches still work
        _capture_failed = True
        warnings.warn(
            "a recurring call could not be captured in a CUDA graph, so that its kernels are launched one by "
            f"one, as they are with DCGAN_GRAPHS=0: {error}",
            stacklevel=2,
        )
        return None


class Network:
    """A chain prepared for repeated calls."""

    def __init__(self, stages: Sequence[Stage], of_a_graph: bool = False) -> None:
        """Prepare nothing yet.

        Args:
            stages: the chain's.
            of_a_graph: whether a CUDA graph has this network for itself: its owner calls :meth:`follow`
                before each replay. Otherwise calls do that, and recurring ones are captured.
        """
        self._stages, self._of_a_graph = stages, of_a_graph
        self._weights: dict[Hashable, Weights] = {}
        self._prepared: dict[Hashable, Prepared] = {}

    def run(
        self, key: Hashable, x: Tensor, specs: Callable[[], Sequence[ConvSpec]], freeze: Callable[[], None]
    ) -> Tensor:
        """Run a call.

        Args:
            key: identifies the call but for x's memory and stream.
            x: the input, in the dtype of the products.
            specs: returns :func:`..chain.specs` of the call.
            freeze: declares the weights constant (:func:`..weight_cache.freeze`), if their owner does so.
        """
        prepared = self._prepare(key, x, specs, freeze)
        if not self._of_a_graph:
            # Those of this call alone: what others read must change on their own streams.
            if not prepared.weights.follow(freeze):
                self.clear()
                prepared = self._prepare(key, x, specs, freeze)
            if prepared.graph is None:
                self._count(prepared, x)
        return prepared(x) if prepared.graph is None else prepared.graph(x)

    def _count(self, prepared: Prepared, x: Tensor) -> None:
        """Count a call, and capture it if it recurs often enough."""
        prepared.calls += 1
        if prepared.calls != CAPTURED_CALL or not captures(x) or not prepared.weights.checked:
            return
        if not value_guard.dense(x):  # a copy of it would have other strides
            return
        graphs = sum(one.graph is not None for one in self._prepared.values())
        if graphs < MAX_GRAPHS and prepared.bytes <= MAX_GRAPH_BYTES:
            prepared.graph = _captured(prepared, x)

    def _prepare(
        self, key: Hashable, x: Tensor, specs: Callable[[], Sequence[ConvSpec]], freeze: Callable[[], None]
    ) -> Prepared:
        stream = _stream(x)
        key = key, x.data_ptr() % 16, stream
        found = self._prepared.get(key)
        if found is not None and not found.weights.moved() and self._as_checked_as_possible(found.weights):
            return found
        if found is not None or len(self._prepared) >= MAX_PREPARED:
            self.clear()
        products = product_specs(specs(), self._stages)
        prepared = self._prepared[key] = Prepared(products, self._weights_for(products, stream, freeze))
        return prepared

    def clear(self) -> None:
        """Forget everything."""
        self._prepared.clear()
        self._weights.clear()

    def follow(self, freeze: Callable[[], None]) -> bool:
        """Call :meth:`Weights.follow` of all packed weights; if any returns False, clear and return False."""
        followed = all(weights.follow(freeze) for weights in self._weights.values())
        if not followed:
            self.clear()
        return followed

    def moved(self) -> bool:
        """Return :meth:`Weights.moved` of any packed weights."""
        return any(weights.moved() for weights in self._weights.values())

    def _as_checked_as_possible(self, weights: Weights) -> bool:
        return weights.checked or not may_be_checked([stage.weight for stage in self._stages])

    def _weights_for(self, products: Sequence[ConvSpec], stream: int, freeze: Callable[[], None]) -> Weights:
        first, layouts = products[0], layouts_of(products)
        key = first.dtype, layouts, stream
        found = self._weights.get(key)
        if found is None or found.moved():
            freeze()
            if found is not None or len(self._weights) >= MAX_WEIGHTS:
                self.clear()
            checked = may_be_checked([stage.weight for stage in self._stages])
            found = Weights(self._stages, layouts, first.dtype, checked, first.dependent)
            self._weights[key] = found
        return found


def _stream(x: Tensor) -> int:
    if not x.is_cuda:
        return 0
    return int(torch._C._cuda_getCurrentRawStream(x.device.index))


def run_once(x: Tensor, specs: Sequence[ConvSpec], stages: Sequence[Stage]) -> Tensor:
    """Run a network whose weights are packed for this call alone, as in a compiled program or a capture.

    Everything is allocated in the call: a graph under capture packs at every replay, and owns all memory.
    """
    products = product_specs(specs, stages)
    with device_guard(x):
        weights = Weights(stages, layouts_of(products), x.dtype, False, products[0].dependent)
    return Prepared(products, weights)(x)
