"""Drop-in networks: the reference's modules, parameters and checkpoints, run through the fused kernels.

    from dcgan.fast import Generator        # instead of dcgan.models

``Generator`` and ``Discriminator`` subclass the reference networks and override ``forward`` and ``logits``
(and, so that cached weights are never stale, the hooks through which weights change). A convolution, its
BatchNorm and its activation are one op, :mod:`dcgan.kernels.ops`:

* eval: BatchNorm folded into the op's epilogue, from the live parameters and running statistics; on a CPU,
  where nothing is to be differentiated, all layers are one call (:mod:`dcgan.kernels.chain`);
* train: the op returns its raw output with its mean and variance, and BatchNorm and activation are the next
  op's prologue, so that a layer keeps one tensor for the backward. Running statistics and
  ``num_batches_tracked`` are updated as ``nn.BatchNorm2d`` does. For ``batchnorm.SyncBatchNorm2d`` or
  ``nn.SyncBatchNorm`` the op's statistics are merged with other processes'.

A layer the ops do not cover (a changed module, one with hooks) runs as the module it is;
:func:`explain` says, layer by layer, what runs and why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from . import models
from .batchnorm import SYNCHRONISED, BatchNorm, synchronised, track
from .graphs import graphed
from .kernels import chain, ops, weights
from .kernels.reference import accumulator_dtype, activate, normalise

__all__ = ["Discriminator", "Explanation", "Explanations", "Generator", "convert", "explain", "graphed"]

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


# --- from modules to layers ---------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One op's worth of modules; ``conv`` is None for a module that runs as it is (``other``)."""

    names: str
    conv: nn.Conv2d | nn.ConvTranspose2d | None
    norm: BatchNorm | None
    act: str
    slope: float | None
    other: nn.Module | None
    reason: str


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__[hooks] for hooks in _HOOKS)


def _is_activation(module: nn.Module) -> bool:
    if type(module) not in _ACTIVATIONS or _has_hooks(module):
        return False
    return not isinstance(module, nn.LeakyReLU) or module.negative_slope >= 0


def _why_not_fused(module: nn.Module) -> str:
    """'' for a convolution the ops can express."""
    if _has_hooks(module):
        return "the module has hooks"
    if type(module) not in (nn.Conv2d, nn.ConvTranspose2d):
        return f"{type(module).__name__} is not a layer that the ops express"
    assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    if module.bias is not None:
        return "the convolution has a bias"
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        return "the convolution is grouped, dilated or not padded with zeros"
    stride, padding = module.stride, module.padding
    if isinstance(padding, str) or stride[0] != stride[1] or padding[0] != padding[1]:
        return "stride or padding differs between height and width"
    if isinstance(module, nn.ConvTranspose2d) and module.output_padding != (0, 0):
        return "the transposed convolution has an output padding"
    return ""


def _layers(sequence: nn.Sequential) -> Iterator[_Layer]:
    """The sequence cut into convolution [+ BatchNorm] [+ activation], everything else by itself."""
    modules = list(sequence.named_children())
    i = 0
    while i < len(modules):
        first, conv = modules[i]
        i += 1
        reason = _why_not_fused(conv)
        if reason:
            yield _Layer(first, None, None, "none", None, conv, reason)
            continue
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        last, norm, act, slope = first, None, "none", None
        if i < len(modules):
            name, module = modules[i]
            if type(module) in (nn.BatchNorm2d, *SYNCHRONISED) and not _has_hooks(module):
                assert isinstance(module, BatchNorm)
                last, norm = name, module
                i += 1
        if i < len(modules):
            name, module = modules[i]
            if _is_activation(module):
                last, act = name, _ACTIVATIONS[type(module)]
                slope = module.negative_slope if isinstance(module, nn.LeakyReLU) else None
                i += 1
        yield _Layer(first if first == last else f"{first}-{last}", conv, norm, act, slope, None, "")


# --- running them -------------------------------------------------------------------------------------------


@dataclass
class _Pending:
    """What is still to be applied to a raw tensor: act((x - center)·scale + shift)."""

    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"
    slope: float | None = None


_NOTHING = _Pending()


def _affine(norm: BatchNorm, var: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """scale = gamma·rsqrt(var + eps) and shift = beta, in the accumulator's dtype."""
    scale = torch.rsqrt(var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    return scale, None if norm.bias is None else norm.bias.to(dtype)


def _run_layer(layer: _Layer, x: Tensor, pending: _Pending, channels_last: bool) -> tuple[Tensor, _Pending]:
    """The layer's raw or finished output, and what is still to be applied to it."""
    conv, norm = layer.conv, layer.norm
    assert conv is not None
    op: Callable[..., ops.Outputs] = (
        ops.conv_transpose2d_fused if isinstance(conv, nn.ConvTranspose2d) else ops.conv2d_fused
    )
    padding = conv.padding[0]
    assert isinstance(padding, int)
    geometry = {"stride": conv.stride[0], "padding": padding, "channels_last": channels_last}
    prologue = {
        "center": pending.center,
        "scale": pending.scale,
        "shift": pending.shift,
        "in_act": pending.act,
    }
    weight = conv.weight
    batch_statistics = norm is not None and (norm.training or norm.running_mean is None)

    if batch_statistics:
        assert norm is not None
        y, mean, var = op(x, weight, **prologue, stats=True, slope=pending.slope or 0.0, **geometry)
        count = y.numel() // y.shape[1] if y.shape[1] else 0
        if isinstance(norm, SYNCHRONISED) and norm.training and distributed.is_initialized():
            mean, var, count = synchronised(mean, var, count, norm.process_group)
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {y.shape}"
            )
        track(norm, mean, var, count)
        if count == 0:  # the statistics of nothing are NaN, which would reach the gradients
            mean, var = torch.zeros_like(mean), torch.ones_like(var)
        scale, shift = _affine(norm, var, mean.dtype)
        shift = torch.zeros_like(scale) if shift is None else shift
        return y, _Pending(mean, scale, shift, layer.act, layer.slope)

    # Without batch statistics BatchNorm and activation are the epilogue, unless the activation's slope is not
    # the prologue's, since the op has one slope: then it is left to what comes next.
    act = layer.act
    defer = pending.slope is not None and layer.slope is not None and pending.slope != layer.slope
    stage = _stage(layer)
    assert stage is not None
    out_scale, out_shift = chain.folded(stage, accumulator_dtype(x.dtype))
    epilogue: dict[str, Any] = {"out_scale": out_scale, "out_shift": out_shift}
    if act != "none" and not defer:
        epilogue["out_act"] = act
    slope = pending.slope if pending.slope is not None else layer.slope
    y, _, _ = op(x, weight, **prologue, **epilogue, slope=slope or 0.0, **geometry)
    return y, _Pending(act=act, slope=layer.slope) if defer else _NOTHING


def _settle(x: Tensor, pending: _Pending) -> Tensor:
    """The pending affine map and activation, applied: for a module that is not an op, and for the end."""
    y = x
    if pending.scale is not None and pending.center is not None and pending.shift is not None:
        y = normalise(x.to(accumulator_dtype(x.dtype)), pending.center, pending.scale, pending.shift)
    return activate(y, pending.act, pending.slope or 0.0).to(x.dtype)


def _eager_format_is_channels_last(sequence: nn.Sequential, x: Tensor) -> bool:
    """Whether eager's output is channels_last: input or a convolution's weight says so, as in aten."""
    return any(_is_channels_last(t) for t in (x, *_convolution_weights(sequence)))


def _convolution_weights(sequence: nn.Sequential) -> list[nn.Parameter]:
    """Those that are parameters: to read a parametrized one computes it (and steps a spectral norm)."""
    found = [m._parameters.get("weight") for m in sequence if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return [weight for weight in found if weight is not None]


def _is_channels_last(t: Tensor) -> bool:
    """As aten takes it from the strides, which also tell where one channel or a 1×1 map would be both."""
    if t.ndim != 4 or t.shape[1] * t.shape[2] * t.shape[3] == 1:
        return False
    row, column = t.stride(2), t.stride(3)
    return t.stride(1) == 1 and column >= t.shape[1] and row >= t.shape[3] * column


def _stage(layer: _Layer) -> chain.Stage | None:
    """The layer as a stage of a chain, which has no batch statistics and no training."""
    conv, norm = layer.conv, layer.norm
    if conv is None or (norm is not None and (norm.training or norm.running_mean is None)):
        return None
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return chain.Stage(
        isinstance(conv, nn.ConvTranspose2d),
        conv.weight,
        scale=None if norm is None else norm.weight,
        shift=None if norm is None else norm.bias,
        mean=None if norm is None else norm.running_mean,
        var=None if norm is None else norm.running_var,
        eps=0.0 if norm is None else norm.eps,
        act=layer.act,
        slope=layer.slope or 0.0,
        stride=conv.stride[0],
        padding=padding,
    )


# What a module says of itself besides its tensors, and what hangs on it.
_ATTRIBUTES = (
    *("stride", "padding", "dilation", "groups", "padding_mode", "output_padding"),
    *("eps", "momentum", "track_running_stats", "negative_slope", "training"),
)


def _facts(sequence: nn.Sequential) -> list[Any]:
    """All that :func:`_layers` and :func:`_stage` look at, to tell in microseconds whether it has changed.

    It holds no module, which could refer to the network: what is kept by it must not keep the network.
    """
    facts: list[Any] = []
    for name, module in sequence._modules.items():
        about = module.__dict__
        facts.append(name)
        facts.append(type(module))
        facts.extend([about.get(attribute) for attribute in _ATTRIBUTES])
        facts.extend([bool(about[hooks]) for hooks in _HOOKS])
        facts.extend(map(id, about["_parameters"].values()))
        facts.extend(map(id, about["_buffers"].values()))
    return facts


_chains: weakref.WeakKeyDictionary[nn.Sequential, tuple[list[Any], chain.Chain | None]]
_chains = weakref.WeakKeyDictionary()


def stages(sequence: nn.Sequential) -> list[chain.Stage]:
    """The whole sequence as stages of one chain; none where one of its layers cannot be."""
    found = [_stage(layer) for layer in _layers(sequence)]
    return [] if None in found else found  # type: ignore[return-value]


def _chain(sequence: nn.Sequential) -> chain.Chain | None:
    """:func:`stages` as a chain, kept while nothing in the sequence changes but values."""
    facts = _facts(sequence)
    known = _chains.get(sequence)
    if known is None or known[0] != facts:
        whole = stages(sequence)
        known = _chains[sequence] = facts, chain.Chain(whole) if whole else None
    return known[1]


def _differentiated(sequence: nn.Sequential, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in sequence.parameters())
    )


def _forward(sequence: nn.Sequential, x: Tensor) -> Tensor:
    """``sequence(x)`` by the ops; between two ops NHWC, else (output, input of a module) eager's format."""
    if chain.chains(x) and not _differentiated(sequence, x):
        kept = None if torch.compiler.is_compiling() else _chain(sequence)
        whole = kept.stages if kept else stages(sequence) if torch.compiler.is_compiling() else []
        if whole:
            nhwc = whole[-1].c_out > 1 and _eager_format_is_channels_last(sequence, x)
            return kept(x, nhwc) if kept else chain.conv_chain(x, whole, nhwc)
    channels_last = _eager_format_is_channels_last(sequence, x)
    pending = _NOTHING
    layers = list(_layers(sequence))
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        if layer.other is not None:
            x, pending = layer.other(_settle(x, pending)), _NOTHING
        else:
            assert layer.conv is not None
            fused_next = not last and layers[i + 1].other is None
            # A single channel is both formats; eager's activations then give it contiguous strides.
            nhwc = fused_next or (channels_last and layer.conv.out_channels > 1)
            x, pending = _run_layer(layer, x, pending, nhwc)
    return _settle(x, pending)


# --- the networks -------------------------------------------------------------------------------------------


class _Fast(nn.Module):
    """What both drop-ins share: cached weights that follow every change of the parameters."""

    main: nn.Sequential

    def _freeze(self) -> None:
        weights.freeze(self, _convolution_weights(self.main))

    def refresh(self) -> None:
        """Forget everything made of the weights, whichever network has made it.

        Needed in eval mode after ``p.data`` was edited in place, and after a CUDA graph that is not a
        TrainStep's has written to the weights; every other change (an optimizer's step, load_state_dict,
        ``copy_``, ``.to()``) is seen without it.
        """
        weights.thaw(self)
        weights.written(self.parameters())

    def _fast(self, x: Tensor, sequence: nn.Sequential | None = None) -> Tensor:
        sequence = self.main if sequence is None else sequence
        if self.training or torch.compiler.is_compiling():
            return _forward(sequence, x)
        self._freeze()
        with weights.eager():
            return _forward(sequence, x)

    def train(self: _Self, mode: bool = True) -> _Self:
        super().train(mode)
        self.refresh()
        if not mode:
            self._freeze()  # here too, since a compiled forward does not run Python
        return self

    def _apply(self: _Self, fn: Callable[..., Any], recurse: bool = True) -> _Self:
        self.refresh()
        super()._apply(fn, recurse)
        if not self.training:
            self._freeze()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.refresh()
        result = super().load_state_dict(*args, **kwargs)
        if not self.training:
            self._freeze()
        return result


_Self = TypeVar("_Self", bound=_Fast)


class Generator(_Fast, models.Generator):
    """:class:`dcgan.models.Generator` through the fused kernels.

    Same arguments, parameters, checkpoints, results and output strides.
    """

    def forward(self, z: Tensor) -> Tensor:
        return self._fast(self._latent(z))


class Discriminator(_Fast, models.Discriminator):
    """:class:`dcgan.models.Discriminator` through the fused kernels.

    Same arguments, parameters, checkpoints and results.
    """

    def forward(self, image: Tensor) -> Tensor:
        return self._fast(self._image(image)).view(-1, 1).squeeze(1)

    def logits(self, image: Tensor) -> Tensor:
        return self._fast(self._image(image), models.but_sigmoid(self.main)).view(-1, 1).squeeze(1)


Model = TypeVar("Model", models.Generator, models.Discriminator)


def convert(model: models.Generator | models.Discriminator) -> Generator | Discriminator:
    """A fast network around ``model``'s own modules: parameters and buffers are shared, not copied.

    Raises:
        TypeError: ``model`` is not a :class:`dcgan.models.Generator` or :class:`dcgan.models.Discriminator`.
    """
    if isinstance(model, _Fast):
        return model  # type: ignore[return-value]
    if type(model) is models.Generator:
        fast: Generator | Discriminator = Generator.__new__(Generator)
    elif type(model) is models.Discriminator:
        fast = Discriminator.__new__(Discriminator)
    else:
        raise TypeError(
            "model must be a dcgan.models.Generator or dcgan.models.Discriminator, "
            f"got {type(model).__module__}.{type(model).__qualname__}"
        )
    fast.__dict__.update(model.__dict__)
    # Containers of its own: what is later registered on one of the two is not the other's.
    for name, value in model.__dict__.items():
        if name.startswith("_") and hasattr(value, "copy"):
            fast.__dict__[name] = value.copy()
    if not fast.training:
        fast._freeze()  # a compiled forward would not
    return fast


class Explanation(NamedTuple):
    """One layer of :func:`explain`: its modules, the op, the engine, and why not a faster one."""

    modules: str
    op: str
    engine: str
    reason: str


class Explanations(list[Explanation]):
    def __str__(self) -> str:
        rows = [("modules", "op", "engine", "why"), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def explain(model: Generator | Discriminator, x: Tensor) -> Explanations:
    """Which engine runs each layer of ``model(x)``, and why not a faster one. Changes nothing in the model.

    Raises:
        TypeError: ``model`` is not a network of this module.
        ValueError: as ``model(x)``.
    """
    if not isinstance(model, _Fast):
        raise TypeError(f"model must be a network of dcgan.fast, got {type(model).__qualname__}")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), ops.recording() as choices:
        torch.func.functional_call(model, buffers, (x,))
    remaining = iter(choices)
    rows = Explanations()
    for layer in _layers(model.main):
        if layer.other is not None:
            rows.append(Explanation(layer.names, type(layer.other).__name__, "eager", layer.reason))
        else:
            rows.append(Explanation(layer.names, *next(remaining)))
    return rows
