"""From modules to layers: which modules of a sequence one op replaces, and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from .batchnorm import SYNC_BATCHNORMS, BatchNorm
from .introspection import compute_weight, computes_weight, why_eager
from .kernels import ops
from .kernels.cpu.algorithm_selection import Geometry
from .kernels.spec import Stage, TrainStage
from .kernels.train_chain import ACTIVATIONS

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}

NamedModules = Sequence[tuple[str, nn.Module]]


class Layer(NamedTuple):
    """The modules that one op replaces, or, with ``conv`` None, one that runs eagerly for ``reason``."""

    names: str
    modules: tuple[nn.Module, ...]
    conv: nn.Conv2d | nn.ConvTranspose2d | None = None
    norm: BatchNorm | None = None
    act: str = "none"
    slope: float | None = None
    reason: str = ""
    computed: bool = False
    """Whether PyTorch computes a tensor of the layer at each call, as spectral norm does."""


def why_not_fused(module: nn.Module) -> str:
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
        return _NO_KERNELS
    return ""


_NO_KERNELS = "no engine has kernels for this kernel size, stride and padding"


def geometry(conv: nn.Conv2d | nn.ConvTranspose2d, height: int, width: int) -> Geometry:
    """Return the geometry of a convolution that :func:`why_not_fused` accepts, on a map of this size."""
    transposed = isinstance(conv, nn.ConvTranspose2d)
    sizes = conv.in_channels, conv.out_channels, height, width
    return Geometry(transposed, *sizes, conv.kernel_size[0], conv.stride[0], padding_of(conv))


def why_not_covered(conv: nn.Conv2d | nn.ConvTranspose2d, of: Geometry) -> str:
    """Return why no engine has kernels for the convolution on a map of this size; '' if one has."""
    if ops.engine() != "auto" or (conv.kernel_size[0] == conv.kernel_size[1] and (of.dense or of.strided)):
        return ""
    return f"{_NO_KERNELS} on a map of {of.height}×{of.width}"


def padding_of(conv: nn.Conv2d | nn.ConvTranspose2d) -> int:
    """Return the padding of a convolution that :func:`why_not_fused` accepts."""
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return padding


def _is_identity(module: nn.Module) -> bool:
    """Return whether a module returns its input: an nn.Identity, or a dropout in eval mode."""
    kind = type(module)
    if kind not in (nn.Identity, nn.Dropout, nn.Dropout2d) or why_eager(module):
        return False
    return kind is nn.Identity or not module.training


def group(modules: NamedModules) -> list[Layer]:
    """Group modules into convolution [+ BatchNorm] [+ activation]; any other module is its own layer."""
    return list(_layers([(name, module) for name, module in modules if not _is_identity(module)]))


SEPARATOR = " "
"""Separates the names of a layer's modules."""


def _layers(modules: NamedModules) -> Iterator[Layer]:
    after: list[Any] = [*(module for _, module in modules), None]
    i = 0
    while i < len(modules):
        first, conv = modules[i]
        i += 1
        reason = why_not_fused(conv)
        if reason:
            yield Layer(first, (conv,), reason=reason)
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
        names = SEPARATOR.join(name for name, _ in modules[start:i])
        found = tuple(m for _, m in modules[start:i])
        computed = any(map(computes_weight, found))
        yield Layer(names, found, conv, norm, act, slope, computed=computed)


def uses_batch_statistics(norm: BatchNorm | None) -> bool:
    """Return whether a BatchNorm normalizes by the statistics of the batch."""
    return norm is not None and (norm.training or norm.running_mean is None)


# --- a layer's tensors --------------------------------------------------------------------------------------


class Tensors(NamedTuple):
    """The tensors of a layer's convolution at one call."""

    weight: Tensor
    bias: Tensor | None


def tensors(layer: Layer) -> Tensors:
    """Read the tensors of a layer's convolution, once per call: that may compute them, with side effects."""
    assert layer.conv is not None
    if layer.computed:
        for module in layer.modules:
            compute_weight(module)
    return Tensors(layer.conv.weight, layer.conv.bias)


def own_tensor(module: nn.Module, name: str) -> Any:
    """Return a parameter, or the plain attribute that has replaced it; None if there is neither.

    This never evaluates a parametrization.
    """
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def constant_weights(layers: Sequence[Layer]) -> list[Tensor]:
    """Return the weights of the layers' convolutions, except those that are computed."""
    convolutions = [layer.conv for layer in layers if layer.conv is not None and not layer.computed]
    found = [own_tensor(conv, "weight") for conv in convolutions]
    return [weight for weight in found if isinstance(weight, Tensor)]


def stage(layer: Layer, own: Tensors) -> Stage | None:
    """Return the layer as a stage of a chain; None if it uses batch statistics."""
    conv, norm = layer.conv, layer.norm
    if conv is None or uses_batch_statistics(norm):
        return None
    folded: dict[str, Any] = {}
    if norm is not None:
        folded = {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean}
        folded |= {"var": norm.running_var, "eps": norm.eps}
    return Stage(
        isinstance(conv, nn.ConvTranspose2d),
        own.weight,
        own.bias,
        **folded,
        act=layer.act,
        slope=layer.slope or 0.0,
        stride=conv.stride[0],
        padding=padding_of(conv),
    )


def stages(modules: NamedModules) -> list[Stage]:
    """Return the modules as the stages of one chain; an empty list if any layer cannot be a stage."""
    found = [None if layer.conv is None else stage(layer, tensors(layer)) for layer in group(modules)]
    return [] if None in found else found  # type: ignore[return-value]


def train_stage(layer: Layer, own: Tensors, is_last: bool) -> TrainStage | None:
    """Return the layer as a stage of a network's operator in training; None if it has to be an op of its own.

    The bias of a convolution is left out before a BatchNorm, which cancels it.
    """
    conv, norm = layer.conv, layer.norm
    if conv is None or (layer.act not in ACTIVATIONS and not is_last):
        return None
    found = TrainStage(
        isinstance(conv, nn.ConvTranspose2d),
        own.weight,
        beta=own.bias if norm is None else None,
        act=layer.act,
        stride=conv.stride[0],
        padding=padding_of(conv),
    )
    if norm is None:
        return found
    if merges_statistics(norm) or not uses_batch_statistics(norm):
        return None
    return found._replace(gamma=norm.weight, beta=norm.bias, norm=True, eps=norm.eps)


def merges_statistics(norm: BatchNorm) -> bool:
    """Return whether a BatchNorm computes its statistics over several processes."""
    return isinstance(norm, SYNC_BATCHNORMS) and norm.training and distributed.is_initialized()


def is_differentiated(found: Sequence[Layer], x: Tensor) -> bool:
    """Return whether autograd records what the layers compute of x."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    modules = [module for layer in found for module in layer.modules]
    if any(p.requires_grad for module in modules for p in module.parameters()):
        return True
    attributes = (own_tensor(module, name) for module in modules for name in ("weight", "bias"))
    return any(isinstance(t, Tensor) and t.requires_grad for t in attributes)


def eager_output_is_channels_last(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether eager's output is channels_last: as in aten, if the input or any weight is."""
    return any(_is_channels_last(t) for t in (x, *weights))


def _is_channels_last(t: Tensor) -> bool:
    """Decide from the strides as aten does, also where one channel or a 1×1 map would fit both formats."""
    if t.ndim != 4:
        return False
    _, c, h, w = t.shape
    _, channel, row, column = t.stride()
    return channel == 1 and column >= c and row >= w * column and c * h * w != 1


# --- detecting changes --------------------------------------------------------------------------------------

# The attributes of each module type, besides its tensors, that group and stage read.
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
_NORM = ("eps", "momentum", "track_running_stats", "training")
_ATTRIBUTES: dict[type[nn.Module], Callable[[Any], tuple[Any, ...]]] = {
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), itemgetter(*_CONVOLUTION)),
    **dict.fromkeys((nn.BatchNorm2d, *SYNC_BATCHNORMS), itemgetter(*_NORM)),
    nn.LeakyReLU: itemgetter("negative_slope", "inplace"),
    **dict.fromkeys((nn.Dropout, nn.Dropout2d), itemgetter("training", "inplace")),
}
_WITHOUT_TENSORS = nn.LeakyReLU, nn.Dropout, nn.Dropout2d
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def fingerprint(modules: NamedModules) -> list[Any]:
    """Return everything that :func:`group` and :func:`stage` read, to detect a change in microseconds.

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
        if kind in _WITHOUT_TENSORS:
            continue
        parameters, buffers = state["_parameters"], state["_buffers"]
        fingerprint += (id(parameters.get("weight")), id(parameters.get("bias")))
        if buffers:
            fingerprint += map(id, buffers.values())
        if "weight" in state or "bias" in state or "running_mean" in state or "running_var" in state:
            fingerprint += map(id, map(state.get, _TENSORS))
    return fingerprint
