"""Run a sequence of modules through the fused ops: grouping into layers, prologues, chains, fallback."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from . import models
from .batchnorm import SYNC_BATCHNORMS, BatchNorm, merge_statistics, update_running_stats
from .introspection import tracing, why_all_eager, why_eager
from .kernels import chain, coverage, ops, train_chain, weight_cache
from .kernels.reference import accumulator_dtype, activate, normalise
from .kernels.spec import Shaped, TrainCall, TrainStage

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}

NamedModules = Sequence[tuple[str, nn.Module]]


def named_modules(main: nn.Module) -> NamedModules:
    """Return the modules in call order. Unlike in ``named_children()``, repeated modules are repeated."""
    return list(main._modules.items())  # type: ignore[arg-type]


# --- from modules to layers ---------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The modules that one op replaces, or, with ``conv`` None, one that runs eagerly for ``reason``."""

    names: str
    modules: tuple[nn.Module, ...]
    conv: nn.Conv2d | nn.ConvTranspose2d | None
    norm: BatchNorm | None
    act: str
    slope: float | None
    reason: str


def _why_not_fused(module: nn.Module) -> str:
    """Return '' for a convolution that the ops support and the engines have kernels for, else the reason."""
    why = why_eager(module)
    if why:
        return why
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return f"{type(module).__name__} does not follow a convolution that the fused ops support"
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        return "the convolution is grouped, dilated or not padded with zeros"
    stride, padding = module.stride, module.padding
    if isinstance(padding, str) or stride[0] != stride[1] or padding[0] != padding[1]:
        return "stride or padding differs between height and width"
    if isinstance(module, nn.ConvTranspose2d) and module.output_padding != (0, 0):
        return "the transposed convolution has output padding"
    geometry = module.kernel_size, stride[0], padding[0]
    if padding[0] != 0 and geometry != ((4, 4), 2, 1) and ops.engine() == "auto":
        return "no engine has kernels for this kernel size, stride and padding"
    return ""


def _padding(conv: nn.Conv2d | nn.ConvTranspose2d) -> int:
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return padding


def _group(modules: NamedModules) -> Iterator[Layer]:
    """Group the modules into convolution [+ BatchNorm] [+ activation]; any other module is its own layer."""
    after: list[Any] = [*(module for _, module in modules), None]
    i = 0
    while i < len(modules):
        first, conv = modules[i]
        i += 1
        reason = _why_not_fused(conv)
        if reason:
            yield Layer(first, (conv,), None, None, "none", None, reason)
            continue
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        start, norm, act, slope = i - 1, None, "none", None
        module = after[i]
        if isinstance(module, BatchNorm) and not why_eager(module):
            norm = module
            i += 1
            module = after[i]
        if type(module) in _ACTIVATIONS and not why_eager(module):
            leaky = module.negative_slope if isinstance(module, nn.LeakyReLU) else None
            if leaky is None or leaky >= 0:
                act, slope = _ACTIVATIONS[type(module)], leaky
                i += 1
        last = modules[i - 1][0]
        names = first if first == last else f"{first}-{last}"
        yield Layer(names, tuple(m for _, m in modules[start:i]), conv, norm, act, slope, "")


def _uses_batch_statistics(norm: BatchNorm | None) -> bool:
    return norm is not None and (norm.training or norm.running_mean is None)


def group_layers(modules: NamedModules) -> list[Layer]:
    """Group the modules into the layers that run one by one.

    A layer whose BatchNorm uses batch statistics runs eagerly unless the next layer is an op, which applies
    that BatchNorm in its prologue: a standalone normalization with separate statistics makes more passes over
    the feature map than nn.BatchNorm2d.
    """
    layers = list(_group(modules))
    result = []
    for layer, following in zip(layers, [*layers, None][1:], strict=True):
        if _uses_batch_statistics(layer.norm) and (following is None or following.conv is None):
            layer = layer._replace(conv=None, reason="no fused op follows to apply its BatchNorm")
        result.append(layer)
    return result


# --- running the layers -------------------------------------------------------------------------------------


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


def _run_layer(layer: Layer, x: Tensor, prologue: _Prologue, channels_last: bool) -> tuple[Tensor, _Prologue]:
    """Run one op. Return its raw or finished output, and the prologue that is still to be applied to it."""
    conv, norm = layer.conv, layer.norm
    assert conv is not None
    op: Callable[..., ops.Outputs] = (
        ops.conv_transpose2d_fused if isinstance(conv, nn.ConvTranspose2d) else ops.conv2d_fused
    )
    geometry = {"stride": conv.stride[0], "padding": _padding(conv), "channels_last": channels_last}
    inputs = {
        "center": prologue.center,
        "scale": prologue.scale,
        "shift": prologue.shift,
        "in_act": prologue.act,
    }
    weight = conv.weight
    if _uses_batch_statistics(norm):
        assert norm is not None
        y, mean, var = op(x, weight, **inputs, stats=True, slope=prologue.slope or 0.0, **geometry)
        count = y.numel() // y.shape[1] if y.shape[1] else 0
        if isinstance(norm, SYNC_BATCHNORMS) and norm.training and distributed.is_initialized():
            mean, var, count = merge_statistics(mean, var, count, norm.process_group)
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {y.shape}"
            )
        bias = conv.bias
        # BatchNorm cancels the bias, which therefore only shifts the running mean and has a gradient of zero.
        shifted = mean if bias is None else mean.detach() + bias.detach().to(mean.dtype)
        update_running_stats(norm, shifted, var, count)
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
    stage = _stage(layer)
    assert stage is not None
    out_scale, out_shift = chain.fold_epilogue(stage, accumulator_dtype(x.dtype))
    epilogue: dict[str, Any] = {"out_scale": out_scale, "out_shift": out_shift}
    if act != "none" and not defer:
        epilogue["out_act"] = act
    slope = prologue.slope if prologue.slope is not None else layer.slope
    y, _, _ = op(x, weight, **inputs, **epilogue, slope=slope or 0.0, **geometry)
    return y, _Prologue(act=act, slope=layer.slope) if defer else _NO_PROLOGUE


def _materialize(x: Tensor, prologue: _Prologue) -> Tensor:
    """Apply the prologue, before a module that is not an op and after the last layer."""
    y = x
    if prologue.scale is not None and prologue.center is not None and prologue.shift is not None:
        y = normalise(x.to(accumulator_dtype(x.dtype)), prologue.center, prologue.scale, prologue.shift)
    return activate(y, prologue.act, prologue.slope or 0.0).to(x.dtype)


def _eager_output_is_channels_last(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether eager's output is channels_last: as in aten, if the input or any weight is."""
    return any(_is_channels_last(t) for t in (x, *weights))


def _own_tensor(module: nn.Module, name: str) -> Any:
    """Return a parameter, or the plain attribute that has replaced it; None if there is neither.

    This never evaluates a parametrization, which may have side effects: a spectral norm updates its power
    iteration each time it is read.
    """
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def convolution_weights(main: nn.Module) -> list[Tensor]:
    """Return the weights of all convolutions in ``main``, except those that a parametrization computes."""
    convolutions = (m for _, m in named_modules(main) if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))
    found = [_own_tensor(m, "weight") for m in convolutions]
    return [weight for weight in found if isinstance(weight, Tensor)]


def _is_channels_last(t: Tensor) -> bool:
    """Decide from the strides as aten does, also where one channel or a 1×1 map would fit both formats."""
    if t.ndim != 4:
        return False
    _, c, h, w = t.shape
    _, channel, row, column = t.stride()
    return channel == 1 and column >= c and row >= w * column and c * h * w != 1


# --- chains -------------------------------------------------------------------------------------------------


def _stage(layer: Layer) -> chain.Stage | None:
    """Return the layer as a stage of a chain; None if it runs eagerly or uses batch statistics."""
    conv, norm = layer.conv, layer.norm
    if conv is None or _uses_batch_statistics(norm):
        return None
    folded: dict[str, Any] = {}
    if norm is not None:
        folded = {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean}
        folded |= {"var": norm.running_var, "eps": norm.eps}
    return chain.Stage(
        isinstance(conv, nn.ConvTranspose2d),
        conv.weight,
        conv.bias,
        **folded,
        act=layer.act,
        slope=layer.slope or 0.0,
        stride=conv.stride[0],
        padding=_padding(conv),
    )


def stages(modules: NamedModules) -> list[chain.Stage]:
    """Return the modules as the stages of one chain; an empty list if any layer cannot be a stage."""
    found = [_stage(layer) for layer in _group(modules)]
    return [] if None in found else found  # type: ignore[return-value]


# The attributes of each module type, besides its tensors, that _group and _stage read.
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
_NORM = ("eps", "momentum", "track_running_stats", "training")
_ATTRIBUTES: dict[type[nn.Module], Callable[[Any], tuple[Any, ...]]] = {
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), itemgetter(*_CONVOLUTION)),
    **dict.fromkeys((nn.BatchNorm2d, *SYNC_BATCHNORMS), itemgetter(*_NORM)),
    nn.LeakyReLU: itemgetter("negative_slope", "inplace"),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def fingerprint(main: nn.Module) -> list[Any]:
    """Return everything in ``main`` that decides how it runs, except tensors' values and memory."""
    return [why_main_runs_eagerly(main), *_fingerprint(named_modules(main))]


def _fingerprint(modules: NamedModules) -> list[Any]:
    """Return everything that :func:`_group` and :func:`_stage` read, to detect a change in microseconds.

    It holds no module: a module may refer to the network, and the cached fingerprint must not keep it alive.
    """
    fingerprint: list[Any] = [ops.engine()]
    for _, module in modules:
        kind = type(module)
        attributes = _ATTRIBUTES.get(kind)
        if attributes is None:
            fingerprint += (kind, why_eager(module))
            continue
        state = module.__dict__
        fingerprint += (kind, why_eager(module), *attributes(state))
        if kind is nn.LeakyReLU:
            continue
        parameters, buffers = state["_parameters"], state["_buffers"]
        fingerprint += (id(parameters.get("weight")), id(parameters.get("bias")))
        if buffers:
            fingerprint += map(id, buffers.values())
        if "weight" in state or "bias" in state or "running_mean" in state or "running_var" in state:
            fingerprint += map(id, map(state.get, _TENSORS))
    return fingerprint


_chains: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[list[Any], chain.Chain | None]]]
_chains = weakref.WeakKeyDictionary()


def _chain(main: nn.Module, modules: NamedModules, logits: bool) -> chain.Chain | None:
    """Return :func:`stages` as a chain, cached until anything but tensor values changes in the modules."""
    fingerprint = _fingerprint(modules)
    cached = _chains.setdefault(main, {})
    entry = cached.get(logits)
    if entry is None or entry[0] != fingerprint:
        found = stages(modules)
        entry = cached[logits] = fingerprint, chain.Chain(found) if found else None
    return entry[1]


# --- training -----------------------------------------------------------------------------------------------

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


def _train_stage(layer: Layer, is_last: bool) -> TrainStage | None:
    """Return the layer as a stage of a network's operator; None if it needs an op, or a call, of its own."""
    conv, norm = layer.conv, layer.norm
    if conv is None or conv.bias is not None or (layer.act not in train_chain.ACTIVATIONS and not is_last):
        return None
    stage = TrainStage(
        isinstance(conv, nn.ConvTranspose2d),
        conv.weight,
        act=layer.act,
        stride=conv.stride[0],
        padding=_padding(conv),
    )
    if norm is None:
        return stage
    merges = isinstance(norm, SYNC_BATCHNORMS) and norm.training and distributed.is_initialized()
    if merges or not _uses_batch_statistics(norm):
        return None
    return stage._replace(gamma=norm.weight, beta=norm.bias, norm=True, eps=norm.eps)


def _train_call(
    main: nn.Module, layers: Sequence[Layer], x: Tensor, groups: int, channels_last: bool
) -> TrainCall | None:
    """Return the network on x as a call of one operator; None if it has to run layer by layer.

    Autocast has not been applied to x, as the caller may only want to know whether there is one.
    """
    if _separate_layers or ops.under_transform() or _overlaps_communication(main):
        return None
    slopes = {layer.slope for layer in layers if layer.slope is not None}
    if not layers or not x.shape[0] or len(slopes) > 1:
        return None
    stages: list[TrainStage] = []
    for layer in layers:
        stage = _train_stage(layer, layer is layers[-1])
        if stage is None:
            return None
        stages.append(stage)
    dtype = ops.autocast_dtype(x)
    dtypes = (x.dtype,) if dtype is None else (dtype, torch.float32)  # float32 is cast as it is packed
    if any(stage.weight.dtype not in dtypes for stage in stages):
        return None
    slope = slopes.pop() if slopes else 0.0
    nhwc = channels_last and stages[-1].c_out > 1
    call = TrainCall(x, stages, slope, groups, nhwc, _is_differentiated(main, x))
    # While compiling, the choice cannot be traced: the operator makes it when it runs.
    return call if torch.compiler.is_compiling() or _engine_of(call) else None


def _overlaps_communication(main: nn.Module) -> bool:
    """Return whether DistributedDataParallel averages gradients of ``main`` while its backward still runs.

    It averages a bucket as soon as all of its gradients are there. A single node for the network yields all
    gradients at its end, which costs nothing only if they all fit into one bucket anyway.
    """
    if torch.compiler.is_compiling() or not distributed.is_initialized():
        return False
    active = DistributedDataParallel._get_active_ddp_module()
    if active is None or not active.require_backward_grad_sync:
        return False
    size = sum(p.numel() * p.element_size() for p in main.parameters() if p.requires_grad)
    return bool(size > active.bucket_bytes_cap)


def _train(call: TrainCall, norms: Sequence[BatchNorm]) -> Tensor:
    """Run the network's operator, and update the running statistics of its BatchNorms."""
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
    if torch.compiler.is_compiling():
        y, stats = train_chain.train_chain(call)
    else:
        with weight_cache.called_from_python():
            y, stats = train_chain.train_chain(call)
    _track(norms, stats, counts)
    return y


def _track(norms: Sequence[BatchNorm], stats: Sequence[Tensor], counts: Sequence[int]) -> None:
    """Update running statistics: all of a network in one operator, except those that it does not support."""
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


# --- running a network --------------------------------------------------------------------------------------


def why_main_runs_eagerly(main: nn.Module) -> str:
    """Return why ``main`` has to be called as a whole; '' if its modules may be replaced one by one."""
    if type(main) is not nn.Sequential:
        return f"main is a {type(main).__name__}, not an nn.Sequential"
    why = why_eager(main)
    if why:
        return f"main: {why}"
    why = why_all_eager()
    if why:
        return why
    tracer = tracing()
    return f"{tracer} must record only PyTorch's own operators" if tracer else ""


def why_modules_run_eagerly(main: nn.Module, x: Tensor, training: bool) -> str:
    """Return why ``main``'s modules are all called although they may be replaced; '' if the ops run them."""
    modules = named_modules(main)
    return (training and _why_small(modules, x)) or _why_few(group_layers(modules), modules, x)


def run(
    main: nn.Module, x: Tensor, logits: bool, freeze: Callable[[], None] = lambda: None, groups: int = 1
) -> Tensor:
    """Compute ``main(x)`` by the ops; with ``logits``, without its last module.

    Feature maps between two ops are NHWC. The output, and the input of a module that runs eagerly, have
    eager's memory format. ``freeze`` is called before weights are packed. With ``groups``, the result is that
    of one call for each of as many equal parts of x, in order.
    """
    if groups > 1 and not engine_of_groups(main, x, logits, groups):
        return torch.cat([run(main, part, logits, freeze) for part in x.chunk(groups)])
    if why_main_runs_eagerly(main):
        return _call(main, x, logits)
    modules = named_modules(main)[: -1 if logits else None]
    differentiated = _is_differentiated(main, x)
    if chain.runs_as_one_call(x) and not differentiated and not coverage.why_eager(x, training=False):
        compiling = torch.compiler.is_compiling()
        cached = None if compiling else _chain(main, modules, logits)
        network = stages(modules) if compiling else cached.stages if cached else []
        if network:
            weights = [stage.weight for stage in network]
            nhwc = network[-1].c_out > 1 and _eager_output_is_channels_last(x, weights)
            return cached(x, nhwc, freeze) if cached else chain.conv_chain(x, network, nhwc)
    if coverage.why_eager(x, training=True) or (differentiated and _why_small(modules, x)):
        return _call(main, x, logits)
    layers = group_layers(modules)
    if _why_few(layers, modules, x):
        return _call(main, x, logits)
    channels_last = _eager_output_is_channels_last(x, convolution_weights(main))
    call = _train_call(main, layers, x, groups, channels_last)
    if call is not None:
        return _train(call, [layer.norm for layer in layers if layer.norm is not None])
    freeze()
    prologue = _NO_PROLOGUE
    for i, layer in enumerate(layers):
        if layer.conv is None:
            x, prologue = _materialize(x, prologue), _NO_PROLOGUE
            for module in layer.modules:
                x = module(x)
        else:
            feeds_an_op = i + 1 < len(layers) and layers[i + 1].conv is not None
            # One channel fits both formats; eager's activations then return contiguous strides.
            nhwc = feeds_an_op or (channels_last and layer.conv.out_channels > 1)
            x, prologue = _run_layer(layer, x, prologue, nhwc)
    return _materialize(x, prologue)


def engine_of_groups(main: nn.Module, x: Tensor, logits: bool, groups: int) -> str:
    """Return the engine with which :func:`run` computes the groups in one pass; '' if it takes several."""
    if why_main_runs_eagerly(main) or coverage.why_eager(x, training=True):
        return ""
    modules = named_modules(main)[: -1 if logits else None]
    if _is_differentiated(main, x) and _why_small(modules, x):
        return ""
    call = _train_call(main, group_layers(modules), x, groups, channels_last=False)
    return "" if call is None else _engine_of(call)


def _engine_of(call: TrainCall) -> str:
    """Return the engine of all layers of a call to which autocast has not been applied; '' if they differ."""
    x = call.x
    shaped: Any = Shaped(x.shape, ops.autocast_dtype(x) or x.dtype, x.device, x.stride())
    engines = {choice.engine for choice in train_chain.choose(train_chain.specs(call._replace(x=shaped)))}
    return engines.pop() if len(engines) == 1 else ""


def _is_differentiated(main: nn.Module, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or any(p.requires_grad for p in main.parameters()):
        return True
    attributes = (_own_tensor(module, name) for _, module in named_modules(main) for name in _TENSORS[:2])
    return any(isinstance(t, Tensor) and t.requires_grad for t in attributes)


def _macs(modules: NamedModules, x: Tensor) -> list[tuple[nn.Module, int]]:
    """Return each convolution's multiply-adds per image, for square maps that no other module resizes."""
    side = x.shape[-1]
    found: list[tuple[nn.Module, int]] = []
    for _, module in modules:
        kind = type(module)
        if kind not in (nn.Conv2d, nn.ConvTranspose2d):
            continue
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        kernel, stride, padding = module.kernel_size[0], module.stride[0], _padding(module)
        before = side
        if kind is nn.ConvTranspose2d:
            side = (side - 1) * stride - 2 * padding + kernel
        else:
            side = (side + 2 * padding - kernel) // stride + 1
        channels = module.in_channels * module.out_channels // module.groups
        found.append((module, channels * (kernel * min(before, side)) ** 2))
    return found


def _why_small(modules: NamedModules, x: Tensor) -> str:
    """Return why the network is too small to train by the ops, else ''."""
    return coverage.why_small(x, lambda: x.shape[0] * sum(macs for _, macs in _macs(modules, x)))


def _why_few(layers: Sequence[Layer], modules: NamedModules, x: Tensor) -> str:
    """Return why too little runs by the ops to pay for a copy between each op and eager module, else ''."""
    if ops.engine() != "auto":
        return ""
    fused = {id(layer.conv) for layer in layers}
    if len(fused) == len(layers):
        return ""
    macs = _macs(modules, x)
    ours, total = sum(n for m, n in macs if id(m) in fused), sum(n for _, n in macs)
    return (
        "" if 2 * ours >= total else "most of the arithmetic is in layers that the fused ops do not support"
    )


def _call(main: nn.Module, x: Tensor, logits: bool) -> Tensor:
    if logits:
        assert isinstance(main, nn.Sequential)  # checked by logits()
        main = models.without_sigmoid(main)
    return main(x)  # type: ignore[no-any-return]
