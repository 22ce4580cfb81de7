"""One layer, or a chain of layers, through the native library."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import weights
from ..call import Call, Outputs, Stage
from ..reference import memory_format
from . import library, select
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
    if call.stats:
        return "the inference kernels gather no statistics"
    if call.scale is not None or call.in_act != "none":
        return "the inference kernels have no prologue"
    if weight.shape[2] != weight.shape[3]:
        return "the kernel is not square"
    g = geometry(transposed, weight.shape, x.shape[2], x.shape[3], call.stride, call.padding)
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


def run(call: Call, transposed: bool) -> Outputs:
    """(y, mean, var) of a call that :func:`why_not` has nothing against, mean and var empty."""
    stage = Stage(
        transposed,
        call.weight,
        call.out_scale,
        call.out_shift,
        act=call.out_act,
        slope=call.slope,
        stride=call.stride,
        padding=call.padding,
    )
    y = run_chain(call.x, [stage], call.channels_last)
    return y, torch.empty(0), torch.empty(0)


class _Plan(NamedTuple):
    """What a chain's shapes and batch decide."""

    geometries: tuple[Geometry, ...]
    algorithms: tuple[str, ...]
    layers: bytes  # dcgan_layer[], without its pointers
    out: tuple[int, int, int]  # C, H, W


_Key = tuple[bool, tuple[int, ...], str, float, int, int, bool]


@functools.lru_cache(maxsize=512)
def _plan(keys: tuple[_Key, ...], height: int, width: int, images: int, threads: int, isa: str) -> _Plan:
    geometries, algorithms = [], []
    layers = (library.Layer * len(keys))()
    channels = 0
    for layer, (transposed, shape, act, slope, stride, padding, kept) in zip(layers, keys, strict=True):
        g = geometry(transposed, shape, height, width, stride, padding)
        algorithm = select.algorithm(g, images, threads, isa, kept)
        geometries.append(g)
        algorithms.append(algorithm)
        layer.transposed, layer.algorithm = transposed, library.ALGORITHMS.index(algorithm)
        layer.c_in, layer.c_out, layer.height, layer.width = g.c_in, g.c_out, height, width
        layer.kernel, layer.stride, layer.padding = g.kernel, stride, padding
        layer.act, layer.slope = library.ACTIVATIONS.index(act), slope
        channels, (height, width) = g.c_out, g.output
    return _Plan(tuple(geometries), tuple(algorithms), bytes(layers), (channels, height, width))


def pack(weight: Tensor, g: Geometry, algorithm: str) -> Tensor:
    """The weights as ``algorithm`` reads them, on the instruction set in use: a flat float32 tensor."""
    weight = weight.detach().to(torch.float32)
    layer = library.Layer(g.transposed, library.ALGORITHMS.index(algorithm), *g[1:])
    address = ctypes.addressof(layer)
    packed = torch.empty(library.checked(library.library().dcgan_packed_size(address)))
    strides = library.Strides(*weight.stride())
    library.checked(
        library.library().dcgan_pack(
            address, weight.data_ptr(), ctypes.addressof(strides), packed.data_ptr(), torch.get_num_threads()
        )
    )
    return packed


def _channels_adjacent(t: Tensor) -> bool:
    return t.shape[1] == 1 or t.stride(1) == 1


def _address(vector: Tensor | None, held: list[Tensor]) -> int | None:
    if vector is None:
        return None
    vector = vector.to(torch.float32).contiguous()
    held.append(vector)
    return vector.data_ptr()


def run_chain(x: Tensor, stages: Sequence[Stage], channels_last: bool) -> Tensor:
    """The stages one after the other in one call of the library, for stages that :func:`why_not` allows.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16, any strides.
        channels_last: the result's memory format.
    """
    isa, threads, images = library.isa(), torch.get_num_threads(), x.shape[0]
    keys = tuple(
        (s.transposed, s.weight.shape, s.act, s.slope, s.stride, s.padding, weights.frozen(s.weight))
        for s in stages
    )
    plan = _plan(keys, x.shape[2], x.shape[3], images, threads, isa)
    layers = (library.Layer * len(stages)).from_buffer_copy(plan.layers)
    held = []  # what the layers point to
    for stage, layer, g, algorithm in zip(stages, layers, plan.geometries, plan.algorithms, strict=True):
        key = ("native", isa, algorithm, g.transposed)
        packed = weights.transformed(stage.weight, key, functools.partial(pack, g=g, algorithm=algorithm))
        layer.weights = packed.data_ptr()
        held.append(packed)
        layer.epsilon = stage.eps
        layer.scale, layer.shift = _address(stage.scale, held), _address(stage.shift, held)
        layer.mean, layer.variance = _address(stage.mean, held), _address(stage.var, held)

    dtype = x.dtype
    x = x.detach().to(torch.float32)
    first, last = stages[0], stages[-1]
    if not _channels_adjacent(x) and (first.transposed or plan.algorithms[0] != "narrow"):
        x = x.contiguous(memory_format=torch.channels_last)
    any_strides = last.transposed and plan.algorithms[-1] == "narrow"
    y = torch.empty((images, *plan.out), memory_format=memory_format(channels_last or not any_strides))
    x_view, y_view = library.View.of(x), library.View.of(y)
    library.checked(
        library.library().dcgan_run(
            ctypes.addressof(layers),
            len(stages),
            images,
            ctypes.addressof(x_view),
            ctypes.addressof(y_view),
            threads,
        )
    )
    return y.contiguous(memory_format=memory_format(channels_last)).to(dtype)
