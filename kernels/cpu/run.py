"""One layer, or a chain of layers, through the native library."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import weights
from ..call import Call, Outputs, Stage
from ..reference import memory_format
from . import buffers, crew, library, select
from .samples import Pairs
from .select import Geometry

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def geometry(
    transposed: bool, weight_shape: Sequence[int], height: int, width: int, stride: int, padding: int
) -> Geometry:
    """Of a layer with a square kernel."""
    first, second, kernel, _ = weight_shape
    c_in, c_out = (first, second) if transposed else (second, first)
    return Geometry(transposed, c_in, c_out, height, width, kernel, stride, padding)


def why_not(call: Call, transposed: bool, forced: bool = False) -> str | None:
    """Why the native engine does not cover the call, or None if it does.

    Unless ``forced``, it leaves alone a call whose weights it would transform for that call only, where that
    takes longer than what it saves.
    """
    x, weight = call.x, call.weight
    if x.device.type != "cpu":
        return f"x is on the {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"the kernels have no {str(x.dtype).removeprefix('torch.')}"
    if weight.shape[2] != weight.shape[3]:
        return "the kernel is not square"
    g = geometry(transposed, weight.shape, x.shape[2], x.shape[3], call.stride, call.padding)
    if not g.fits:
        return "the layer is larger than the engine takes"
    if not select.candidates(g):
        return "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    missing = library.problem()
    if missing is not None:
        return missing.splitlines()[0]
    if not forced and not weights.frozen(weight):
        images, threads, isa = x.shape[0], torch.get_num_threads(), library.isa()
        if not select.worthwhile(g, images, threads, isa):
            return "the weights are not kept, and transforming them for one call takes longer than it saves"
    return None


class Plan(NamedTuple):
    """What a chain's shapes and batch decide."""

    geometries: tuple[Geometry, ...]
    algorithms: tuple[str, ...]
    layers: bytes  # dcgan_layer[], without its pointers
    out: tuple[int, int, int]  # C, H, W


# What a plan takes of a layer: transposed, the weight's shape, act, slope, eps, stride, padding; and the
# algorithm, or whether its weights are kept, by which one is chosen.
_Key = tuple[bool, tuple[int, ...], str, float, float, int, int, "str | bool"]


def plan(
    shape: Sequence[int], stages: Sequence[Stage], threads: int, algorithms: Sequence[str] | None = None
) -> Plan:
    """For x of ``shape`` [N, C, H, W]. Without ``algorithms``, those that :mod:`.select` chooses."""
    how: Sequence[str | bool] = algorithms or [weights.frozen(s.weight) for s in stages]
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
        algorithm = how if isinstance(how, str) else select.algorithm(g, images, threads, isa, how)
        geometries.append(g)
        algorithms.append(algorithm)
        layer.transposed, layer.algorithm = transposed, library.ALGORITHMS.index(algorithm)
        layer.c_in, layer.c_out, layer.height, layer.width = g.c_in, g.c_out, height, width
        layer.kernel, layer.stride, layer.padding = g.kernel, stride, padding
        layer.act, layer.slope, layer.epsilon = library.ACTIVATIONS.index(act), slope, eps
        channels, (height, width) = g.c_out, g.output
    return Plan(tuple(geometries), tuple(algorithms), bytes(layers), (channels, height, width))


def pack(weight: Tensor, g: Geometry, algorithm: str) -> Tensor:
    """The weights as ``algorithm`` reads them, on the instruction set in use: a flat float32 tensor."""
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


def _place(vector: Tensor) -> Any:
    return vector.data_ptr(), vector.dtype, vector.shape, vector.stride()


class Prepared:
    """A chain for batches of one shape, ready to run: plan, packed weights, and pointers to everything."""

    def __init__(
        self,
        shape: Sequence[int],
        stages: Sequence[Stage],
        threads: int,
        algorithms: Sequence[str] | None = None,
    ) -> None:
        """As :func:`plan`; stages that :func:`why_not` has nothing against."""
        self._isa, self._threads, self._images = library.isa(), threads, shape[0]
        planned = plan(shape, stages, threads, algorithms)
        self._crew = crew.of((planned, self._images), threads)
        self._layers = (library.Layer * len(stages)).from_buffer_copy(planned.layers)
        self.packed: list[Tensor] = []  # by take() handed over to their cache and the caller
        self._packed: list[tuple[Tensor, Any, weakref.ref[Tensor]]] = []
        self._vectors: list[tuple[Tensor, Any]] = []
        self._held: list[Any] = []
        self._samples: Pairs | None = None  # of what current() has found, which keeps it alive
        for stage, layer, g, algorithm in zip(
            stages, self._layers, planned.geometries, planned.algorithms, strict=True
        ):
            key = ("native", self._isa, algorithm, g.transposed)
            make = functools.partial(pack, g=g, algorithm=algorithm)
            packed = weights.transformed(stage.weight, key, make)
            self.packed.append(packed)
            self._packed.append((stage.weight, key, weakref.ref(packed)))
            layer.weights = packed.data_ptr()
            layer.bias = self._address(stage.bias)
            layer.scale, layer.shift = self._address(stage.scale), self._address(stage.shift)
            layer.mean, layer.variance = self._address(stage.mean), self._address(stage.var)
        self._any_input = planned.algorithms[0] == "narrow" and not stages[0].transposed
        self._shape = (self._images, *planned.out)
        # By whether channels_last is wanted: the library writes pixels, but planes too where both are one.
        planes = planned.algorithms[-1] == "narrow" and stages[-1].transposed
        planes = planes or planned.out[0] == 1 or planned.out[1] * planned.out[2] == 1
        self._format = (memory_format(not planes), torch.channels_last)

    def _address(self, vector: Tensor | None) -> int | None:
        if vector is None:
            return None
        ready = vector.detach().to(torch.float32).contiguous().resolve_neg()
        in_place = ready.data_ptr() == vector.data_ptr()
        self._vectors.append((vector, _place(vector) if in_place else None))
        self._held.append(ready.untyped_storage())
        return ready.data_ptr()

    def take(self) -> list[Tensor]:
        """The packed weights, to be held during a call: not by this any more, so that they can be freed."""
        packed, self.packed = self.packed, []
        return packed

    def current(self) -> list[Tensor] | None:
        """The packed weights after :meth:`take`, if this still is what a new one would be: else None.

        Vectors are read when the chain runs, so that their values are always those of now.
        """
        if self._isa != library.isa():
            return None
        held, before = [], []
        for weight, key, reference in self._packed:
            packed = reference()
            copy = None if packed is None else weights.current(weight, key, packed)
            if packed is None or copy is None:
                return None
            held.append(packed)
            before.append(copy)
        if self._samples is None:
            self._samples = Pairs([(w, b) for (w, _, _), b in zip(self._packed, before, strict=True)])
        if self._samples.differ():
            # Whoever edits one weight edits all: none of them is to be of another time than the rest.
            weights.renew([weight for weight, _, _ in self._packed])
            return None
        if all(_place(vector) == place for vector, place in self._vectors):
            return held
        return None

    def __call__(self, x: Tensor, channels_last: bool, pooled: bool = False) -> Tensor:
        """The chain's result in x's dtype; x [N, C, H, W] of any strides. ``pooled``: of :mod:`.buffers`."""
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
        self._crew.run(
            *(library.library().dcgan_run, ctypes.addressof(self._layers), len(self._layers)),
            *(self._images, ctypes.addressof(x_view), ctypes.addressof(y_view), self._threads),
        )
        if self._format[channels_last] != memory_format(channels_last):
            y = y.contiguous()
        return y if dtype == torch.float32 else y.to(dtype)


def run(call: Call, transposed: bool) -> Outputs:
    """(y, mean, var) of a call that :func:`why_not` has nothing against, mean and var empty."""
    stage = Stage(
        transposed,
        call.weight,
        scale=call.out_scale,
        shift=call.out_shift,
        act=call.out_act,
        slope=call.slope,
        stride=call.stride,
        padding=call.padding,
    )
    y = Prepared(call.x.shape, [stage], torch.get_num_threads())(
        call.x, call.channels_last, pooled=not weights.frozen(call.weight)
    )
    nothing = y.new_empty(0, dtype=torch.float32)
    return y, nothing, nothing.clone()
