"""Run consecutive layers for training: as one operator, or each as an op of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from . import layers
from .batchnorm import BatchNorm, merge_statistics, update_running_stats
from .kernels import chain, ops, train_chain
from .kernels.reference import accumulator_dtype, activate
from .kernels.spec import Shaped, TrainCall, TrainStage
from .layers import Layer, Tensors, is_differentiated, uses_batch_statistics

# --- one op a layer -------------------------------------------------------------------------------------


@dataclass
class _Prologue:
    """The map that is still to be applied to a raw tensor: act((x - center)·scale + shift)."""

    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"
    slope: float | None = None


_NO_PROLOGUE = _Prologue()


def _affine(norm: BatchNorm, var: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return scale = gamma·rsqrt(var + eps) and shift = beta, in the accumulator's dtype."""
    scale = torch.rsqrt(var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    return scale, None if norm.bias is None else norm.bias.to(dtype)


def run_one_by_one(found: Sequence[Layer], own: Sequence[Tensors], x: Tensor, channels_last: bool) -> Tensor:
    """Run each layer as an op of its own; a BatchNorm with batch statistics is applied by the next one."""
    prologue = _NO_PROLOGUE
    for i, (layer, tensors) in enumerate(zip(found, own, strict=True)):
        assert layer.conv is not None
        # One channel fits both formats; eager's activations then return contiguous strides.
        nhwc = i + 1 < len(found) or (channels_last and layer.conv.out_channels > 1)
        x, prologue = _run_layer(layer, tensors, x, prologue, nhwc)
    return activate(x, prologue.act, prologue.slope or 0.0)


def _run_layer(
    layer: Layer, own: Tensors, x: Tensor, prologue: _Prologue, channels_last: bool
) -> tuple[Tensor, _Prologue]:
    """Run one op. Return its raw or finished output, and the prologue that is still to be applied to it."""
    conv, norm = layer.conv, layer.norm
    assert conv is not None
    op: Callable[..., ops.Outputs] = (
        ops.conv_transpose2d_fused if isinstance(conv, nn.ConvTranspose2d) else ops.conv2d_fused
    )
    geometry = {
        "stride": conv.stride[0],
        "padding": layers.padding_of(conv),
        "channels_last": channels_last,
    }
    inputs = {
        "center": prologue.center,
        "scale": prologue.scale,
        "shift": prologue.shift,
        "in_act": prologue.act,
    }
    weight, bias = own
    if uses_batch_statistics(norm):
        assert norm is not None
        y, mean, var = op(x, weight, **inputs, stats=True, slope=prologue.slope or 0.0, **geometry)
        count = y.numel() // y.shape[1] if y.shape[1] else 0
        if layers.merges_statistics(norm):
            mean, var, count = merge_statistics(mean, var, count, norm.process_group)
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {y.shape}"
            )
        update_running_stats(norm, _with_bias(mean, bias), var, count)
        if count == 0:  # the statistics of an empty batch are NaN, which would reach the gradients
            mean, var = torch.zeros_like(mean), torch.ones_like(var)
        scale, shift = _affine(norm, var, mean.dtype)
        shift = torch.zeros_like(scale) if shift is None else shift
        if bias is not None and bias.requires_grad:
            shift = shift + 0 * bias.to(shift.dtype)
        return y, _Prologue(mean, scale, shift, layer.act, layer.slope)

    # Without batch statistics, BatchNorm and activation are the epilogue. Since an op has a single slope, an
    # activation whose slope differs from the prologue's is deferred to the next layer.
    act = layer.act
    defer = prologue.slope is not None and layer.slope is not None and prologue.slope != layer.slope
    stage = layers.stage(layer, own)
    assert stage is not None
    out_scale, out_shift = chain.fold_epilogue(stage, accumulator_dtype(x.dtype))
    epilogue: dict[str, Any] = {"out_scale": out_scale, "out_shift": out_shift}
    if act != "none" and not defer:
        epilogue["out_act"] = act
    slope = prologue.slope if prologue.slope is not None else layer.slope
    y, _, _ = op(x, weight, **inputs, **epilogue, slope=slope or 0.0, **geometry)
    return y, _Prologue(act=act, slope=layer.slope) if defer else _NO_PROLOGUE


def _with_bias(mean: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mean of a convolution with its bias, given that without it: BatchNorm cancels the bias,
    which therefore only shifts the running mean and has a gradient of zero.
    """
    return mean if bias is None else mean.detach() + bias.detach().to(mean.dtype)


# --- one operator -------------------------------------------------------------------------------------------

_separate_layers = False


@contextlib.contextmanager
def layer_by_layer() -> Iterator[None]:
    """Train every network in this context layer by layer, as one operator a layer, for profilers and tests.

    The results are the same up to rounding.
    """
    global _separate_layers
    before, _separate_layers = _separate_layers, True
    try:
        yield
    finally:
        _separate_layers = before


def call_of(
    found: Sequence[Layer], x: Tensor, own: Sequence[Tensors], groups: int, channels_last: bool
) -> TrainCall | None:
    """Return the layers on x as a call of one operator; None if they have to run one by one.

    Autocast has not been applied to x, as the caller may only want to know whether there is one.
    """
    if _separate_layers or ops.under_transform() or _overlaps_communication(found):
        return None
    slopes = {layer.slope for layer in found if layer.slope is not None}
    if not x.shape[0] or len(slopes) > 1:
        return None
    stages: list[TrainStage] = []
    for layer, tensors in zip(found, own, strict=True):
        stage = layers.train_stage(layer, tensors, len(stages) + 1 == len(found))
        if stage is None:
            return None
        stages.append(stage)
    dtype = ops.autocast_dtype(x)
    dtypes = (x.dtype,) if dtype is None else (dtype, torch.float32)  # float32 is cast as it is packed
    if any(stage.weight.dtype not in dtypes for stage in stages):
        return None
    slope = slopes.pop() if slopes else 0.0
    nhwc = channels_last and stages[-1].c_out > 1
    call = TrainCall(x, stages, slope, groups, nhwc, is_differentiated(found, x))
    # While compiling, the choice cannot be traced: the operator makes it when it runs.
    return call if torch.compiler.is_compiling() or engine_of(call) else None


def _overlaps_communication(found: Sequence[Layer]) -> bool:
    """Return whether DistributedDataParallel averages gradients of layers while their backward still runs.

    It averages a bucket as soon as all of its gradients are there. A single node for all layers yields all
    gradients at its end, which costs nothing only if they all fit into one bucket anyway.
    """
    if torch.compiler.is_compiling() or not distributed.is_initialized():
        return False
    active = DistributedDataParallel._get_active_ddp_module()
    if active is None or not active.require_backward_grad_sync:
        return False
    parameters = (p for layer in found for module in layer.modules for p in module.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return bool(size > active.bucket_bytes_cap)


def run_as_operator(call: TrainCall, found: Sequence[Layer], own: Sequence[Tensors]) -> Tensor:
    """Run the operator of the layers, and update the running statistics of its BatchNorms."""
    dtype = ops.autocast_dtype(call.x)
    if dtype is not None:
        call = call._replace(x=call.x.to(dtype))
    counts = []
    for spec, stage in zip(train_chain.specs(call), call.stages, strict=True):
        if not stage.norm:
            continue
        size = torch.Size((spec.images // call.groups, *spec.y.size))
        count = size[0] * size[2] * size[3]
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        counts.append(count)
    y, stats = train_chain.train_chain(call)
    norms = [layer.norm for layer in found if layer.norm is not None]
    biases = [tensors.bias for layer, tensors in zip(found, own, strict=True) if layer.norm is not None]
    cancelled = [bias for bias in biases if bias is not None]
    if cancelled:
        stats = [_with_biased_mean(vectors, bias) for vectors, bias in zip(stats, biases, strict=True)]
        y = _Cancelled.apply(y, *cancelled)
    _track(norms, stats, counts)
    return y


def _with_biased_mean(stats: Tensor, bias: Tensor | None) -> Tensor:
    """Return a BatchNorm's vectors [4, groups, C] with the mean of :func:`_with_bias`."""
    return stats if bias is None else torch.cat([_with_bias(stats[:1], bias), stats[1:]])


class _Cancelled(torch.autograd.Function):
    """Return y, with gradients of zero for biases that BatchNorms cancel, which optimizers expect."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *biases: Tensor) -> Tensor:
        ctx.save_for_backward(*biases)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # their second derivatives are zero as well
            dy = dy + sum((0 * bias).sum() for bias in ctx.saved_tensors)
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return dy, *(torch.zeros_like(bias) if need else None for bias, need in needed)


def _track(norms: Sequence[BatchNorm], stats: Sequence[Tensor], counts: Sequence[int]) -> None:
    """Update running statistics: all of a part in one operator, except those that it does not support."""
    rows: list[tuple[Any, ...]] = []
    others = []
    for norm, vectors, count in zip(norms, stats, counts, strict=True):
        if _is_trackable(norm, norms):
            buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
            rows.append((*buffers, vectors, norm.momentum, count))
        else:
            others.append((norm, vectors, count))
    if rows:
        train_chain.track_(*zip(*rows, strict=True))
    for group in range(others[0][1].shape[1] if others else 0):  # in the order of a call for each group
        for norm, vectors, count in others:
            update_running_stats(norm, vectors[0, group], vectors[1, group], count)


def _is_trackable(norm: BatchNorm, norms: Sequence[BatchNorm]) -> bool:
    """Return whether :func:`.train_chain.track_` supports a BatchNorm, of those of one network.

    It does not if another one has the same buffers: they might be updated at the same time.
    """
    buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
    momentum = norm.momentum
    return (
        norm.training
        and norm.track_running_stats
        and all(t is not None and t.is_contiguous() for t in buffers)
        and (momentum is None or momentum >= 0)
        and sum(other.running_mean is norm.running_mean for other in norms) == 1
    )


def engine_of(call: TrainCall) -> str:
    """Return the engine of all layers of a call to which autocast has not been applied; '' if they differ."""
    x = call.x
    shaped: Any = Shaped(x.shape, ops.autocast_dtype(x) or x.dtype, x.device, x.stride())
    engines = {choice.engine for choice in train_chain.choose(train_chain.specs(call._replace(x=shaped)))}
    return engines.pop() if len(engines) == 1 else ""
