"""Inference: one layer, or a chain of layers, through the native library."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import weight_cache
from ..reference import memory_format
from ..spec import Call, ConvSpec, Outputs, Stage
from . import adaptive_threads, algorithm_selection, buffers, library
from .algorithm_selection import Geometry
from .value_guard import Pairs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROLOGUE_ACTIVATIONS = ("none", "relu", "leaky_relu")


def geometry(
    transposed: bool, weight_shape: Sequence[int], height: int, width: int, stride: int, padding: int
) -> Geometry:
    """Return the geometry of a layer with a square kernel."""
    first, second, kernel, _ = weight_shape
    c_in, c_out = (first, second) if transposed else (second, first)
    return Geometry(transposed, c_in, c_out, height, width, kernel, stride, padding)


@functools.lru_cache(maxsize=1024)
def geometry_of(spec: ConvSpec) -> Geometry:
    """Return the :func:`geometry` of a call."""
    return geometry(spec.transposed, spec.weight, *spec.x.size[1:], spec.stride, spec.padding)


def needs_training_kernels(spec: ConvSpec) -> bool:
    """Return whether a call needs statistics or a prologue, which only the training kernels support."""
    return spec.y.function == "statistics" or spec.x.function != "none"


@functools.lru_cache(maxsize=1024)
def _unsupported(spec: ConvSpec, training: bool) -> str | None:
    """Return why no kernel supports a spec, or None if one does."""
    kernels = "training kernels" if training else "kernels"
    if spec.device.type != "cpu":
        return f"x is on the {spec.device.type}"
    if spec.dtype not in (_DTYPES[:1] if training else _DTYPES):
        return f"the {kernels} do not support {str(spec.dtype).removeprefix('torch.')}"
    if spec.x.act not in _PROLOGUE_ACTIVATIONS:
        return f"the {kernels} do not support {spec.x.act} in a prologue"
    if spec.weight[2] != spec.weight[3]:
        return "the kernel is not square"
    g = geometry_of(spec)
    if not g.fits:
        return "the layer is larger than the engine supports"
    if not algorithm_selection.candidates(g):
        return "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    return None


def why_not(spec: ConvSpec, weight: Tensor | None = None, forced: bool = False) -> str | None:
    """Return the reason why the native engine does not cover a call, or its gradients, or None if it does.

    Args:
        spec: the call's.
        weight: None for the gradients. Unless ``forced``, the engine declines a call in inference whose
            weights it would have to pack for that call alone where that takes longer than it saves.
    """
    training = weight is None or needs_training_kernels(spec)
    reason = _unsupported(spec, training)
    if reason is not None:
        return reason
    missing = library.problem()
    if missing is not None:
        return missing.splitlines()[0]
    if not training and not forced and weight is not None and not weight_cache.frozen(weight):
        images, threads, isa = spec.images, torch.get_num_threads(), library.isa()
        if not algorithm_selection.worthwhile(geometry_of(spec), images, threads, isa):
            return "the weights are not frozen, and packing them for one call takes longer than it saves"
    return None


class Plan(NamedTuple):
    """The part of a prepared chain that depends only on its shapes, batch size and thread count."""

    geometries: tuple[Geometry, ...]
    algorithms: tuple[str, ...]
    layers: bytes  # dcgan_layer[], pointers unset
    out: tuple[int, int, int]  # C, H, W


# A layer in a plan's cache key: transposed, the weight's shape, act, slope, eps, stride, padding, and either
# the algorithm or whether its weights are frozen, on which the choice of an algorithm depends.
_Key = tuple[bool, tuple[int, ...], str, float, float, int, int, "str | bool"]


def plan(
    shape: Sequence[int], stages: Sequence[Stage], threads: int, algorithms: Sequence[str] | None = None
) -> Plan:
    """Plan a chain for x of ``shape`` [N, C, H, W]; choose the algorithms unless they are given."""
    how: Sequence[str | bool] = algorithms or [weight_cache.frozen(s.weight) for s in stages]
    keys = tuple(
        (s.transposed, s.weight.shape, s.act, s.slope, s.eps, s.stride, s.padding, choice)
        for s, choice in zip(stages, how, strict=True)
    )
    return _plan(keys, shape[2], shape[3], shape[0], threads, library.isa())


@functools.lru_cache(maxsize=512)
def _plan(keys: tuple[_Key, ...], height: int, width: int, images: int, threads: int, isa: str) -> Plan:
    geometries, algorithms = [], []
    layers = (library.Layer * len(keys))()
    channels = 0
    for layer, (transposed, shape, act, slope, eps, stride, padding, how) in zip(layers, keys, strict=True):
        g = geometry(transposed, shape, height, width, stride, padding)
        algorithm = (
            how if isinstance(how, str) else algorithm_selection.algorithm(g, images, threads, isa, how)
        )
        geometries.append(g)
        algorithms.append(algorithm)
        layer.transposed, layer.algorithm = transposed, library.ALGORITHMS.index(algorithm)
        layer.c_in, layer.c_out, layer.height, layer.width = g.c_in, g.c_out, height, width
        layer.kernel, layer.stride, layer.padding = g.kernel, stride, padding
        layer.act, layer.slope, layer.epsilon = library.ACTIVATIONS.index(act), slope, eps
        channels, (height, width) = g.c_out, g.output
    return Plan(tuple(geometries), tuple(algorithms), bytes(layers), (channels, height, width))


def pack(weight: Tensor, g: Geometry, algorithm: str) -> Tensor:
    """Pack weights for ``algorithm`` and the current instruction set, into a flat float32 tensor."""
    weight = weight.detach().to(torch.float32).resolve_neg()
    layer = library.Layer(g.transposed, library.ALGORITHMS.index(algorithm), *g[1:])
    address = ctypes.addressof(layer)
    size = library.checked(library.library().dcgan_packed_size(address))
    packed = torch.empty(size, dtype=torch.float32, device="cpu")
    strides = library.Strides(*weight.stride())
    library.checked(
        library.library().dcgan_pack(
            address, weight.data_ptr(), ctypes.addressof(strides), packed.data_ptr(), torch.get_num_threads()
        )
    )
    return packed


def _channels_adjacent(t: Tensor) -> bool:
    return t.shape[1] == 1 or t.stride(1) == 1


def _fingerprint(vector: Tensor) -> Any:
    return vector.data_ptr(), vector.dtype, vector.shape, vector.stride()


class Prepared:
    """A chain ready to run on batches of one shape: its plan, packed weights and all pointers."""

    def __init__(
        self,
        shape: Sequence[int],
        stages: Sequence[Stage],
        threads: int,
        algorithms: Sequence[str] | None = None,
    ) -> None:
        """Prepare a chain that the engine covers (:func:`why_not`); arguments as for :func:`plan`."""
        self._isa, self._threads, self._images = library.isa(), threads, shape[0]
        planned = plan(shape, stages, threads, algorithms)
        self._adaptive_threads = adaptive_threads.for_kind((planned, self._images), threads)
        self._layers = (library.Layer * len(stages)).from_buffer_copy(planned.layers)
        self.packed: list[Tensor] = []  # until take() hands them over to the cache and the caller
        self._packed: list[tuple[Tensor, Any, weakref.ref[Tensor]]] = []
        self._vectors: list[tuple[Tensor, Any]] = []
        self._held: list[Any] = []
        self._samples: Pairs | None = None  # of the tensors that current() has found, kept alive by the cache
        for stage, layer, g, algorithm in zip(
            stages, self._layers, planned.geometries, planned.algorithms, strict=True
        ):
            key = ("native", self._isa, algorithm, g.transposed)
            make = functools.partial(pack, g=g, algorithm=algorithm)
            packed = weight_cache.get_or_make(stage.weight, key, make)
            self.packed.append(packed)
            self._packed.append((stage.weight, key, weakref.ref(packed)))
            layer.weights = packed.data_ptr()
            layer.bias = self._address(stage.bias)
            layer.scale, layer.shift = self._address(stage.scale), self._address(stage.shift)
            layer.mean, layer.variance = self._address(stage.mean), self._address(stage.var)
        self._any_input = planned.algorithms[0] == "narrow" and not stages[0].transposed
        self._shape = (self._images, *planned.out)
        # Output formats, indexed by channels_last. The library writes NHWC, but NCHW as well from the narrow
        # algorithm and where both coincide: with one channel or one pixel.
        planes = planned.algorithms[-1] == "narrow" and stages[-1].transposed
        planes = planes or planned.out[0] == 1 or planned.out[1] * planned.out[2] == 1
        self._format = (memory_format(not planes), torch.channels_last)

    def _address(self, vector: Tensor | None) -> int | None:
        if vector is None:
            return None
        ready = vector.detach().to(torch.float32).contiguous().resolve_neg()
        in_place = ready.data_ptr() == vector.data_ptr()
        self._vectors.append((vector, _fingerprint(vector) if in_place else None))
        self._held.append(ready.untyped_storage())
        return ready.data_ptr()

    def take(self) -> list[Tensor]:
        """Hand over the packed weights for the caller to hold during a call; then the cache may free them."""
        packed, self.packed = self.packed, []
        return packed

    def current(self) -> list[Tensor] | None:
        """Return the packed weights after :meth:`take`, or None if the chain must be prepared again.

        Vectors are read whenever the chain runs, so their values need no check.
        """
        if self._isa != library.isa():
            return None
        held, before = [], []
        for weight, key, reference in self._packed:
            packed = reference()
            copy = None if packed is None else weight_cache.cached_from(weight, key, packed)
            if packed is None or copy is None:
                return None
            held.append(packed)
            before.append(copy)
        if self._samples is None:
            self._samples = Pairs([(w, b) for (w, _, _), b in zip(self._packed, before, strict=True)])
        if self._samples.differ():
            # An edit usually covers all weights: discard all, so that the chain does not mix old and new.
            weight_cache.discard([weight for weight, _, _ in self._packed])
            return None
        if all(_fingerprint(vector) == fingerprint for vector, fingerprint in self._vectors):
            return held
        return None

    def __call__(self, x: Tensor, channels_last: bool, pooled: bool = False) -> Tensor:
        """Run the chain on x [N, C, H, W], any strides. ``pooled``: allocate y from :mod:`.buffers`."""
        dtype = x.dtype
        if dtype != torch.float32:
            x = x.to(torch.float32)
        if not (self._any_input or _channels_adjacent(x)):
            x = x.contiguous(memory_format=torch.channels_last)
        if pooled:
            y = buffers.empty_map(self._shape, self._format[channels_last] == torch.channels_last)
        else:
            y = torch.empty(
                self._shape, dtype=torch.float32, device="cpu", memory_format=self._format[channels_last]
            )
        x_view, y_view = library.View.of(x), library.View.of(y)
        self._adaptive_threads.run(
            *(library.library().dcgan_run, ctypes.addressof(self._layers), len(self._layers)),
            *(self._images, ctypes.addressof(x_view), ctypes.addressof(y_view), self._threads),
        )
        if self._format[channels_last] != memory_format(channels_last):
            y = y.contiguous()
        return y if dtype == torch.float32 else y.to(dtype)


def run(spec: ConvSpec, call: Call) -> Outputs:
    """Return (y, mean, var) of a call that the engine covers (:func:`why_not`); mean and var are empty."""
    stage = Stage(
        spec.transposed,
        call.weight,
        scale=call.out_scale,
        shift=call.out_shift,
        act=call.out_act,
        slope=call.slope,
        stride=call.stride,
        padding=call.padding,
    )
    y = Prepared(call.x.shape, [stage], torch.get_num_threads())(
        call.x, call.channels_last, pooled=not weight_cache.frozen(call.weight)
    )
    empty = y.new_empty(0, dtype=torch.float32)
    return y, empty, empty.clone()
