"""A network in training in float32: one call of the library per forward, and one per backward.

csrc/dcgan.h defines what they compute.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import ConvSpec, TrainBackward, TrainCall, TrainGradients, TrainOutputs, dense_strides
from . import adaptive_threads, algorithm_selection, buffers, library
from .algorithm_selection import DGRAD, FPROP, WGRAD
from .inference import geometry_of
from .products import address, fused, nhwc


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What depends only on the specs and the thread count."""

    layers: bytes  # dcgan_train_layer[], epsilon and pointers unset
    planes: bool  # whether y's layout is not NHWC
    threads: int


@functools.lru_cache(maxsize=256)
def _plan(specs: tuple[ConvSpec, ...], threads: int, isa: str) -> _Plan:
    images = specs[0].images // specs[0].groups
    layers = (library.TrainLayer * len(specs))()
    for i, (layer, spec) in enumerate(zip(layers, specs, strict=True)):
        g = geometry_of(spec)
        layer.transposed, layer.c_in, layer.c_out, layer.height, layer.width = g[:5]
        layer.kernel, layer.stride, layer.padding = g[5:]
        layer.fprop, layer.dgrad, layer.wgrad = (
            library.ALGORITHMS.index(
                algorithm_selection.training(g, product, fused(spec), images, threads, isa)
            )
            for product in (FPROP, DGRAD, WGRAD)
        )
        layer.normalized = spec.y.function == "statistics"
        layer.act = library.ACTIVATIONS.index(specs[i + 1].x.act if layer.normalized else spec.y.act)
    y = specs[-1].y
    c, h, w = y.size
    planes = c > 1 and h * w > 1 and y.stride != dense_strides(y.size, channels_last=True)
    return _Plan(bytes(layers), planes, threads)


def train_forward(specs: Sequence[ConvSpec], call: TrainCall) -> TrainOutputs:
    """Return (y, saved, stats, packed) of a network that the engine covers; packed is empty.

    Args:
        specs: of the call's layers (:func:`..train_chain.specs`).
        call: x and the weights are float32, of any strides; gammas and betas have any floating dtype.
    """
    plan = _plan(tuple(specs), torch.get_num_threads(), library.isa())
    layers = (library.TrainLayer * len(specs)).from_buffer_copy(plan.layers)
    x = nhwc(call.x)
    maps: list[Tensor] = []
    all_stats: list[Tensor] = []
    held: list[Tensor] = []  # tensors that the layers point to
    for layer, stage, spec in zip(layers, call.stages, specs, strict=True):
        _set_weight(layer, stage.weight, held)
        maps.append(buffers.empty_map(spec.shape, channels_last=True))
        layer.y = maps[-1].data_ptr()
        layer.gamma, layer.beta = address(stage.gamma, held), address(stage.beta, held)
        if stage.norm:
            all_stats.append(x.new_empty((4, call.groups, stage.c_out)))
            layer.stats, layer.epsilon = all_stats[-1].data_ptr(), stage.eps
    adaptive_threads.for_kind((plan, "forward"), plan.threads).run(
        *(library.library().dcgan_train_forward, ctypes.addressof(layers), len(specs)),
        *(len(x), call.groups, call.slope, x.data_ptr(), plan.threads),
    )
    *saved, y = maps
    stride = specs[-1].y.stride
    if plan.planes:
        y = buffers.empty(y.shape, stride).copy_(y)
    elif y.stride() != stride:  # of dimensions of size 1
        y.as_strided_(y.shape, stride)
    return y, saved if call.keep else [], all_stats, x.new_empty(0)


def train_backward(specs: Sequence[ConvSpec], call: TrainBackward, results: TrainGradients) -> None:
    """Write the gradients that are not empty into ``results``.

    Args:
        specs: of the forward's layers.
        call: dy and y are float32, of any strides.
        results: x's gradient and those of weights are float32, of any strides.
    """
    plan = _plan(tuple(specs), torch.get_num_threads(), library.isa())
    layers = (library.TrainLayer * len(specs)).from_buffer_copy(plan.layers)
    forward = call.forward
    x, dy = nhwc(forward.x), nhwc(call.dy)
    held: list[Tensor] = []
    stats = iter(call.stats)
    outputs = (*call.saved, call.y)
    copies: list[tuple[Tensor, Tensor]] = []  # (result, the tensor that the library writes)
    for layer, stage, y, dweight, dgamma, dbeta in zip(
        layers, forward.stages, outputs, results.weight, results.gamma, results.beta, strict=True
    ):
        _set_weight(layer, stage.weight, held)
        if y is not None:
            held.append(nhwc(y))
            layer.y = held[-1].data_ptr()
        if stage.norm:
            layer.stats, layer.epsilon = address(next(stats), held), stage.eps
        layer.dgamma, layer.dbeta = _result(dgamma, copies), _result(dbeta, copies)
        if dweight.numel():
            layer.dweight, layer.dweight_strides = dweight.data_ptr(), library.Strides(*dweight.stride())
    dx = results.x
    if dx.numel() and not dx.is_contiguous(memory_format=torch.channels_last):
        dx = buffers.empty_map(dx.shape, channels_last=True)
        copies.append((results.x, dx))
    computed = (dx.numel() > 0, *call.need_weight, *call.need_gamma, *call.need_beta)
    adaptive_threads.for_kind((plan, "backward", computed), plan.threads).run(
        *(library.library().dcgan_train_backward, ctypes.addressof(layers), len(specs)),
        *(len(x), forward.groups, forward.slope, x.data_ptr(), dy.data_ptr()),
        *(dx.data_ptr() if dx.numel() else None, plan.threads),
    )
    for result, written in copies:
        result.copy_(written)


def track(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batches: Sequence[Tensor],
    stats: Sequence[Tensor],
    momentum: Sequence[float],
    count: Sequence[int],
) -> None:
    """Update running statistics as :func:`..reference.track` does; vectors are float32 and contiguous."""
    norms = (library.Running * len(stats))()
    rows = zip(norms, running_mean, running_var, batches, stats, momentum, count, strict=True)
    for norm, mean, var, seen, vectors, weight, values in rows:
        norm.mean, norm.variance, norm.batches = mean.data_ptr(), var.data_ptr(), seen.data_ptr()
        norm.stats, norm.channels = vectors.data_ptr(), vectors.shape[2]
        norm.momentum, norm.count = weight, values
    library.checked(library.library().dcgan_track(ctypes.addressof(norms), len(norms), stats[0].shape[1]))


def _set_weight(layer: library.TrainLayer, weight: Tensor, held: list[Tensor]) -> None:
    held.append(weight.resolve_neg())
    layer.weight, layer.weight_strides = held[-1].data_ptr(), library.Strides(*weight.stride())


def _result(vector: Tensor, copies: list[tuple[Tensor, Tensor]]) -> int | None:
    """Return the address at which the library writes a result, or None if it is empty."""
    if not vector.numel():
        return None
    if vector.dtype == torch.float32 and vector.is_contiguous():
        return vector.data_ptr()
    copies.append((vector, torch.empty(vector.shape, dtype=torch.float32, device="cpu")))
    return copies[-1][1].data_ptr()
