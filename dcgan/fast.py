"""Drop-in networks: the reference's modules, parameters and checkpoints, run through the fused kernels.

    from dcgan.fast import Generator        # instead of dcgan.models

``Generator`` and ``Discriminator`` subclass the reference networks and override ``forward`` and ``logits``
(and, so that prepacked weights are never stale, the hooks through which weights change). A convolution, its
BatchNorm and its activation are one op, :mod:`dcgan.kernels.ops`:

* eval: BatchNorm folded into the op's epilogue, from the live parameters and running statistics; on a CPU,
  where nothing is to be differentiated, all layers are one call (:mod:`dcgan.kernels.chain`);
* train: the op returns its raw output with its mean and variance, and BatchNorm and activation are the next
  op's prologue, so that a layer keeps one tensor for the backward. Running statistics and
  ``num_batches_tracked`` are updated as ``nn.BatchNorm2d`` does. For ``batchnorm.SyncBatchNorm2d`` or
  ``nn.SyncBatchNorm`` the op's statistics are merged with other processes'.

**What is replaced.** The call of a module, where its type is exactly a known one, nothing but
``nn.Module``'s own ``__call__`` and the class's own ``forward`` would run, and no hook of any kind is set on
it or on ``main`` (:mod:`.introspection`). Any other module is called, between ops. ``main`` as a whole is
called where it is no plain ``nn.Sequential`` itself, under ``torch.jit.trace`` and ``torch.export``, and
where no engine has kernels for the input's device and dtype (:mod:`dcgan.kernels.coverage`). :func:`explain`
says, layer by layer, what runs and why.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from . import models
from .batchnorm import SYNCHRONISED, BatchNorm, synchronised, track
from .graphs import graphed
from .introspection import tracing, why_all_called, why_called
from .kernels import chain, coverage, flops, ops, weights
from .kernels.reference import accumulator_dtype, activate, normalise

__all__ = ["Discriminator", "Explanation", "Explanations", "Generator", "convert", "explain", "graphed"]

flops.register()

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}

_Named = Sequence[tuple[str, nn.Module]]


def _named(main: nn.Module) -> _Named:
    """Its modules as they are called: one that is there twice, twice, unlike in ``named_children()``."""
    return list(main._modules.items())  # type: ignore[arg-type]


# --- from modules to layers ---------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One op's worth of modules; ``conv`` is None for a module that is called as it is, for a ``reason``."""

    names: str
    modules: tuple[nn.Module, ...]
    conv: nn.Conv2d | nn.ConvTranspose2d | None
    norm: BatchNorm | None
    act: str
    slope: float | None
    reason: str


def _why_not_fused(module: nn.Module) -> str:
    """'' for a convolution that the ops express and the engines have kernels for."""
    why = why_called(module)
    if why:
        return why
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return f"{type(module).__name__} does not follow a convolution that the ops express"
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        return "the convolution is grouped, dilated or not padded with zeros"
    stride, padding = module.stride, module.padding
    if isinstance(padding, str) or stride[0] != stride[1] or padding[0] != padding[1]:
        return "stride or padding differs between height and width"
    if isinstance(module, nn.ConvTranspose2d) and module.output_padding != (0, 0):
        return "the transposed convolution has an output padding"
    geometry = module.kernel_size, stride[0], padding[0]
    if padding[0] != 0 and geometry != ((4, 4), 2, 1) and ops.engine() == "auto":
        return "no engine has kernels for its kernel size, stride and padding"
    return ""


def _layers(modules: _Named) -> Iterator[_Layer]:
    """The modules cut into convolution [+ BatchNorm] [+ activation], everything else by itself."""
    i = 0
    while i < len(modules):
        first, conv = modules[i]
        i += 1
        reason = _why_not_fused(conv)
        if reason:
            yield _Layer(first, (conv,), None, None, "none", None, reason)
            continue
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        start, norm, act, slope = i - 1, None, "none", None
        if i < len(modules):
            module = modules[i][1]
            if isinstance(module, BatchNorm) and not why_called(module):
                norm = module
                i += 1
        if i < len(modules):
            module = modules[i][1]
            if type(module) in _ACTIVATIONS and not why_called(module):
                leaky = module.negative_slope if isinstance(module, nn.LeakyReLU) else None
                if leaky is None or leaky >= 0:
                    act, slope = _ACTIVATIONS[type(module)], leaky
                    i += 1
        last = modules[i - 1][0]
        names = first if first == last else f"{first}-{last}"
        yield _Layer(names, tuple(m for _, m in modules[start:i]), conv, norm, act, slope, "")


def _batch_statistics(norm: BatchNorm | None) -> bool:
    return norm is not None and (norm.training or norm.running_mean is None)


def _settled(layers: list[_Layer]) -> list[_Layer]:
    """The layers as they run one by one: where the next one cannot apply a BatchNorm, its module is called.

    To apply it between two ops, statistics apart, takes more passes over the map than nn.BatchNorm2d.
    """
    settled = []
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if _batch_statistics(layer.norm) and (after is None or after.conv is None):
            layer = layer._replace(conv=None, reason="what takes its BatchNorm's output is no op")
        settled.append(layer)
    return settled


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
    if _batch_statistics(norm):
        assert norm is not None
        y, mean, var = op(x, weight, **prologue, stats=True, slope=pending.slope or 0.0, **geometry)
        count = y.numel() // y.shape[1] if y.shape[1] else 0
        if isinstance(norm, SYNCHRONISED) and norm.training and distributed.is_initialized():
            mean, var, count = synchronised(mean, var, count, norm.process_group)
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {y.shape}"
            )
        bias = conv.bias
        # It cancels in what BatchNorm normalises, and so has a gradient of zero.
        track(norm, mean if bias is None else mean.detach() + bias.detach().to(mean.dtype), var, count)
        if count == 0:  # the statistics of nothing are NaN, which would reach the gradients
            mean, var = torch.zeros_like(mean), torch.ones_like(var)
        scale, shift = _affine(norm, var, mean.dtype)
        shift = torch.zeros_like(scale) if shift is None else shift
        if bias is not None and bias.requires_grad:
            shift = shift + 0 * bias.to(shift.dtype)
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


def _eager_format_is_channels_last(main: nn.Module, x: Tensor) -> bool:
    """Whether eager's output is channels_last: input or a convolution's weight says so, as in aten."""
    return any(_is_channels_last(t) for t in (x, *_convolution_weights(main)))


def _own(module: nn.Module, name: str) -> Any:
    """A parameter of the module's, or a plain attribute that has taken its place; None where it has neither.

    Not what a parametrization would compute (and step, as a spectral norm's does).
    """
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def _convolution_weights(main: nn.Module) -> list[Tensor]:
    found = [_own(m, "weight") for _, m in _named(main) if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return [weight for weight in found if isinstance(weight, Tensor)]


def _is_channels_last(t: Tensor) -> bool:
    """As aten takes it from the strides, which also tell where one channel or a 1×1 map would be both."""
    if t.ndim != 4 or t.shape[1] * t.shape[2] * t.shape[3] == 1:
        return False
    row, column = t.stride(2), t.stride(3)
    return t.stride(1) == 1 and column >= t.shape[1] and row >= t.shape[3] * column


def _stage(layer: _Layer) -> chain.Stage | None:
    """The layer as a stage of a chain, which has no batch statistics and no training."""
    conv, norm = layer.conv, layer.norm
    if conv is None or _batch_statistics(norm):
        return None
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return chain.Stage(
        isinstance(conv, nn.ConvTranspose2d),
        conv.weight,
        bias=conv.bias,
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


# What a module of a type says of itself, besides its tensors.
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
_NORM = ("eps", "momentum", "track_running_stats", "training")
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), _CONVOLUTION),
    **dict.fromkeys((nn.BatchNorm2d, *SYNCHRONISED), _NORM),
    nn.LeakyReLU: ("negative_slope",),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _facts(modules: _Named) -> list[Any]:
    """All that :func:`_layers` and :func:`_stage` look at, to tell in microseconds whether it has changed.

    It holds no module, which could refer to the network: what is kept by it must not keep the network.
    """
    facts: list[Any] = [ops.engine()]
    for _, module in modules:
        kind = type(module)
        facts.append(kind)
        facts.append(why_called(module))
        attributes = _ATTRIBUTES.get(kind)
        if attributes is not None:
            about = module.__dict__
            facts += map(about.get, attributes)
            for tensors in (about["_parameters"], about["_buffers"], about):
                facts += map(id, map(tensors.get, _TENSORS))
    return facts


_chains: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[list[Any], chain.Chain | None]]]
_chains = weakref.WeakKeyDictionary()


def stages(modules: _Named) -> list[chain.Stage]:
    """All of the modules, by name, as stages of one chain; none where one of the layers cannot be."""
    found = [_stage(layer) for layer in _layers(modules)]
    return [] if None in found else found  # type: ignore[return-value]


def _chain(main: nn.Module, modules: _Named, cut: bool) -> chain.Chain | None:
    """:func:`stages` as a chain, kept while nothing in the modules changes but values."""
    facts = _facts(modules)
    kept = _chains.setdefault(main, {})
    known = kept.get(cut)
    if known is None or known[0] != facts:
        whole = stages(modules)
        known = kept[cut] = facts, chain.Chain(whole) if whole else None
    return known[1]


# --- running a network --------------------------------------------------------------------------------------


def _why_main_is_called(main: nn.Module) -> str:
    """Why ``main`` has to be called as the module it is; '' where its modules may be looked at one by one."""
    if type(main) is not nn.Sequential:
        return f"main is a {type(main).__name__}, not an nn.Sequential"
    why = why_called(main)
    if why:
        return f"main: {why}"
    why = why_all_called()
    if why:
        return why
    recording = tracing()
    return f"{recording} records PyTorch's own operators" if recording else ""


def _differentiated(main: nn.Module, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or any(p.requires_grad for p in main.parameters()):
        return True
    attributes = (_own(module, name) for _, module in _named(main) for name in _TENSORS[:2])
    return any(isinstance(t, Tensor) and t.requires_grad for t in attributes)


def _forward(main: nn.Module, x: Tensor, cut: bool, freeze: Callable[[], None] = lambda: None) -> Tensor:
    """``main(x)`` by the ops, or with ``cut`` what its last module is given.

    Between two ops maps are NHWC; the output, and the input of a module that is called, have eager's format.
    ``freeze`` is called before weights are packed.
    """
    if _why_main_is_called(main):
        return _called(main, x, cut)
    modules = _named(main)[: -1 if cut else None]
    differentiated = _differentiated(main, x)
    if chain.chains(x) and not differentiated and not coverage.why_plain(x, training=False):
        compiling = torch.compiler.is_compiling()
        kept = None if compiling else _chain(main, modules, cut)
        whole = stages(modules) if compiling else kept.stages if kept else []
        if whole:
            nhwc = whole[-1].c_out > 1 and any(_is_channels_last(t) for t in (x, *(s.weight for s in whole)))
            return kept(x, nhwc, freeze) if kept else chain.conv_chain(x, whole, nhwc)
    if coverage.why_plain(x, training=True) or (differentiated and _why_small(modules, x)):
        return _called(main, x, cut)
    layers = _settled(list(_layers(modules)))
    if _why_few(layers, modules, x):
        return _called(main, x, cut)
    freeze()
    channels_last = _eager_format_is_channels_last(main, x)
    pending = _NOTHING
    for i, layer in enumerate(layers):
        if layer.conv is None:
            x, pending = _settle(x, pending), _NOTHING
            for module in layer.modules:
                x = module(x)
        else:
            fused_next = i + 1 < len(layers) and layers[i + 1].conv is not None
            # A single channel is both formats; eager's activations then give it contiguous strides.
            nhwc = fused_next or (channels_last and layer.conv.out_channels > 1)
            x, pending = _run_layer(layer, x, pending, nhwc)
    return _settle(x, pending)


def _macs(modules: _Named, x: Tensor) -> list[tuple[nn.Module, int]]:
    """Each convolution's multiply-adds an image, of square maps whose size nothing else changes."""
    side = x.shape[-1]
    found: list[tuple[nn.Module, int]] = []
    for _, module in modules:
        kind = type(module)
        if kind not in (nn.Conv2d, nn.ConvTranspose2d):
            continue
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        kernel, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
        assert isinstance(padding, int)
        before = side
        if kind is nn.ConvTranspose2d:
            side = (side - 1) * stride - 2 * padding + kernel
        else:
            side = (side + 2 * padding - kernel) // stride + 1
        channels = module.in_channels * module.out_channels // module.groups
        found.append((module, channels * (kernel * min(before, side)) ** 2))
    return found


def _why_small(modules: _Named, x: Tensor) -> str:
    """Why training does not pay by the ops, and ``main`` is called."""
    return coverage.why_small(x, lambda: x.shape[0] * sum(macs for _, macs in _macs(modules, x)))


def _why_few(layers: Sequence[_Layer], modules: _Named, x: Tensor) -> str:
    """Why the layers that are ops do not pay, and ``main`` is called: from op to module a map is copied."""
    if ops.engine() != "auto":
        return ""
    fused = {id(layer.conv) for layer in layers}
    if len(fused) == len(layers):
        return ""
    macs = _macs(modules, x)
    ours, all_of_them = sum(n for m, n in macs if id(m) in fused), sum(n for _, n in macs)
    return "" if 2 * ours >= all_of_them else "most of the arithmetic is in layers that no op expresses"


def _called(main: nn.Module, x: Tensor, cut: bool) -> Tensor:
    if cut:
        assert isinstance(main, nn.Sequential)  # checked by logits()
        main = models.but_sigmoid(main)
    return main(x)  # type: ignore[no-any-return]


# --- the networks -------------------------------------------------------------------------------------------


class _Fast(nn.Module):
    """What both drop-ins share: prepacked weights that follow every change of the parameters."""

    main: nn.Sequential  # unless a user has put something else in its place

    def _freeze(self) -> None:
        weights.freeze(self, _convolution_weights(self.main))

    def refresh(self) -> None:
        """Forget everything made of the weights, whichever network has made it.

        On a CPU nothing needs it but an edit in place, behind the tensor's version counter (``p.data``, a
        NumPy view, another process), of so few elements that samples of the weights miss it;
        :mod:`dcgan.kernels.weights` states the probability. On a GPU in eval mode, any edit of ``p.data`` in
        place needs it, and a CUDA graph that is not a TrainStep's and has written to the weights.
        """
        weights.thaw(self)
        weights.written(self.parameters())

    def _fast(self, x: Tensor, cut: bool = False) -> Tensor:
        if self.training or torch.compiler.is_compiling() or tracing():
            return _forward(self.main, x, cut)
        with weights.eager():
            return _forward(self.main, x, cut, self._freeze)

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
        image = self._image(image)
        models.check_sigmoid(self.main)
        return self._fast(image, cut=True).view(-1, 1).squeeze(1)


Model = TypeVar("Model", models.Generator, models.Discriminator)


def convert(model: models.Generator | models.Discriminator) -> Generator | Discriminator:
    """A fast network around ``model``'s own modules: parameters and buffers are shared, not copied.

    What ``model.compile()`` has set is not taken over, which a warning says: it would run the plain network.

    Raises:
        TypeError: ``model`` is not a :class:`dcgan.models.Generator` or :class:`dcgan.models.Discriminator`,
            or has a ``forward`` of its own; says what to do instead.
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
            f"got {type(model).__module__}.{type(model).__qualname__}; {_instead(model)}"
        )
    for method in ("forward", "logits"):
        if method in model.__dict__:
            raise TypeError(
                f"model.{method} has been replaced on this instance, which a fast network would not run; "
                "convert the network first, then replace it there"
            )
    fast.__dict__.update(model.__dict__)
    if fast.__dict__.pop("_compiled_call_impl", None) is not None:
        warnings.warn(
            "model is compiled, but the fast network around it is not: call its compile() for that",
            stacklevel=2,
        )
    # Containers of its own: what is later registered on one of the two is not the other's.
    for name, value in model.__dict__.items():
        if name.startswith("_") and hasattr(value, "copy"):
            fast.__dict__[name] = value.copy()
    if not fast.training:
        fast._freeze()  # a compiled forward would not
    return fast


def _instead(model: Any) -> str:
    """What a caller of :func:`convert` can do with another network."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, models.Generator | models.Discriminator):
        return "convert what it has compiled, model._orig_mod, and compile the fast network"
    if isinstance(model, models.Generator | models.Discriminator):
        base = "Generator" if isinstance(model, models.Generator) else "Discriminator"
        return f"a subclass can derive from dcgan.fast.{base} instead"
    if isinstance(model, nn.Module):
        state = model.state_dict()
        for kind in (Generator, Discriminator):
            try:
                fits = kind(**kind.sizes_of(state)).state_dict()
            except ValueError:
                continue
            if {k: v.shape for k, v in fits.items()} == {k: v.shape for k, v in state.items()}:
                sizes = ", ".join(f"{name}={size}" for name, size in kind.sizes_of(state).items())
                return (
                    "its weights fit, so if it computes the same function: "
                    f"fast.{kind.__name__}({sizes}).load_state_dict(model.state_dict())"
                )
    return "other networks have no drop-in"


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


def explain(model: models.Generator | models.Discriminator, x: Tensor) -> Explanations:
    """Which engine runs each layer of ``model(x)``, and why not a faster one. Changes nothing in the model.

    In training mode x is taken as one that the network is trained with, in eval mode as one under
    ``torch.no_grad()``. Of a reference network it says that PyTorch runs every module.

    Raises:
        TypeError: ``model`` is no network of this module or of :mod:`dcgan.models`.
        ValueError: as ``model(x)``.
    """
    model = getattr(model, "_orig_mod", model)  # within torch.compile's wrapper
    if not isinstance(model, models.Generator | models.Discriminator):
        raise TypeError(
            f"model must be a Generator or Discriminator of dcgan.fast, got {type(model).__qualname__}"
        )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.set_grad_enabled(model.training), ops.recording() as choices:
        torch.func.functional_call(model, buffers, (x,))
    if not isinstance(model, _Fast):
        return _all_called(model.main, "a reference network; dcgan.fast.convert(model) makes a fast one")
    why = _why_main_is_called(model.main)
    if why:
        return _all_called(model.main, why)
    modules = _named(model.main)
    layers = _settled(list(_layers(modules)))
    if not choices:
        first = x[:, :, None, None] if x.ndim == 2 else x
        why = coverage.why_plain(x, model.training) or coverage.why_plain(x, training=True)
        why = why or (model.training and _why_small(modules, first)) or _why_few(layers, modules, first)
        return _all_called(model.main, why)
    remaining = iter(choices)
    rows = Explanations()
    for layer in layers:
        if layer.conv is None:
            kinds = "-".join(type(module).__name__ for module in layer.modules)
            rows.append(Explanation(layer.names, kinds, "eager", layer.reason))
        else:
            rows.append(Explanation(layer.names, *next(remaining)))
    return rows


def _all_called(main: nn.Module, why: str) -> Explanations:
    inner = _named(main) if isinstance(main, nn.Sequential) else [("main", main)]
    return Explanations(Explanation(name, type(module).__name__, "eager", why) for name, module in inner)
