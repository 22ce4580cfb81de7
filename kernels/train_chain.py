"""A network in training as one operator: its forward, its backward, and its running statistics.

    dcgan::train_chain(x, weight, gamma, beta, norm, eps, act, stride, padding, transposed,
                       slope, groups, channels_last, keep) -> y, saved, stats, packed

        x̂_0 = x
        y_i = conv(x̂_i, W_i)                        raw; mean[c] and var[c] over N, H, W
        s_i = gamma·rsqrt(var + eps)
        x̂_{i+1} = act((y_i - mean)·s_i + beta)      a BatchNorm with batch statistics, and an activation
                  act(y_i + beta)                   in a layer without one, which stores this result
        y = x̂_n                                     the last layer has no BatchNorm

In a layer without a BatchNorm beta is the convolution's bias, and there is no gamma.

The backward needs one tensor a layer (``saved``), the vectors of each BatchNorm (``stats``: mean, var, s and
beta), and the packed weights.

    dcgan::train_chain_backward(dy, y, saved, stats, packed, needs, x, …) -> dx, dweight, dgamma, dbeta

        dx̂_i = adjoint(du_i, W_i);  dW_i = wgrad(x̂_i, du_i);  g_i = dx̂_{i+1}·act'
        dbeta = Σ g;  dgamma = Σ g·(y - mean)·rsqrt(var + eps)
        du_i = s_i·(g - dbeta/M - (y - mean)·rsqrt(var + eps)·dgamma/M),   M = N·H·W
               g in a layer without a BatchNorm, where dbeta = Σ du_i

In 16 bits g is stored unscaled, and du is computed from it in float32 and rounded once. If s·g were stored,
the terms of the mean and the variance would be added to a value that is already on the dtype's lattice: an
addend below half a unit vanishes, in every element alike, so that nothing averages out.

    dcgan::track_(running_mean, running_var, batches, stats, momentum, count)

updates the running statistics of all layers. It is an operator of its own because autograd does not support
operators that mutate their arguments.

``groups=k`` computes statistics, and running statistics, per k-th of the batch, as k calls in order would.
Weights may be float32 beside 16-bit x: they are cast as they are packed, and their gradients are float32.
:func:`.reference.train_forward` and :func:`.reference.train_backward` define the semantics.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd, nn

from . import cpu, ops, reference
from .ops import LIBRARY, NAMES, Choice
from .reference import accumulator_dtype
from .spec import (
    Call,
    ConvSpec,
    Operand,
    Shaped,
    TrainBackward,
    TrainCall,
    TrainGradients,
    TrainOutputs,
    TrainStage,
)

ACTIVATIONS = ("none", "relu", "leaky_relu")
"""Activations of all layers but the last: the sign of the result gives the derivative."""


class _Columns(NamedTuple):
    """The operator's arguments after x, in the order of the schema."""

    weight: Sequence[Tensor]
    gamma: Sequence[Tensor | None]
    beta: Sequence[Tensor | None]
    norm: Sequence[bool]
    eps: Sequence[float]
    act: Sequence[str]
    stride: Sequence[int]
    padding: Sequence[int]
    transposed: Sequence[bool]
    slope: float = 0.2
    groups: int = 1
    channels_last: bool = True
    keep: bool = True

    @classmethod
    def of(cls, call: TrainCall) -> _Columns:
        if not call.stages:
            raise ValueError("stages must hold at least one layer, got none")
        columns = (list(column) for column in zip(*call.stages, strict=True))
        transposed, weight, gamma, beta, norm, eps, act, stride, padding = columns
        return cls(weight, gamma, beta, norm, eps, act, stride, padding, transposed, *call[2:])

    def call(self, x: Tensor) -> TrainCall:
        stages = [TrainStage(*row) for row in zip(self.transposed, *self[:8], strict=True)]
        return TrainCall(x, stages, *self[9:])


# --- checks -------------------------------------------------------------------------------------------------

MAX_SPECS = 256  # kept for repeated calls
_specs: dict[Hashable, list[ConvSpec]] = {}


def specs(call: TrainCall) -> list[ConvSpec]:
    """Check a call and return the spec of each layer's forward product. x may be a :class:`.spec.Shaped`.

    Raises:
        ValueError, TypeError: names the argument at fault.
    """
    if torch.compiler.is_compiling():  # the compiled program would be guarded by the cache's contents
        return _make_specs(call)
    x = call.x
    layers = tuple(
        [
            (s.transposed, s.weight.shape, s.weight.dtype, s.weight.device, s.beta is None, *s[4:])
            for s in call.stages
        ]
    )
    key = (x.shape, x.dtype, x.device, x.stride(), layers, *call[2:5])
    try:
        found = _specs.get(key)
    except TypeError:  # symbolic sizes are not hashable
        return _make_specs(call)
    if found is None:
        if len(_specs) >= MAX_SPECS:
            _specs.clear()
        found = _specs[key] = _make_specs(call)
    return found


def _make_specs(call: TrainCall) -> list[ConvSpec]:
    x, stages, slope, groups, channels_last, _ = call
    if not stages:
        raise ValueError("stages must hold at least one layer, got none")
    if stages[-1].norm:
        raise ValueError("norm must be False in the last layer, as no layer follows that would apply it")
    found: list[ConvSpec] = []
    shaped: Any = Shaped(x.shape, x.dtype, x.device, x.stride())
    for i, stage in enumerate(stages):
        weight, last = stage.weight, i + 1 == len(stages)
        allowed = reference.ACTIVATIONS if last else ACTIVATIONS
        if stage.act not in allowed:
            where = "the last layer" if last else "every layer but the last"
            raise ValueError(f"act must be one of {allowed} in {where}, got {stage.act!r} in layer {i}")
        single = Call(
            shaped,
            Shaped(weight.shape, x.dtype, weight.device, ()),  # type: ignore[arg-type]
            out_act="none" if stage.norm else stage.act,
            stats=stage.norm,
            slope=slope,
            stride=stage.stride,
            padding=stage.padding,
            channels_last=channels_last or not last,
        )
        try:
            spec = ops.check(single, stage.transposed)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, in layer {i}") from None
        if weight.dtype not in (x.dtype, accumulator_dtype(x.dtype)):
            raise TypeError(
                f"weight must be {x.dtype} or {accumulator_dtype(x.dtype)} for x of {x.dtype}, "
                f"got {weight.dtype} in layer {i}"
            )
        if groups < 1 or x.shape[0] % groups:
            raise ValueError(f"groups must divide the {x.shape[0]} images of x, got {groups}")
        biased = stage.beta is not None and not stage.norm
        spec = spec._replace(y=spec.y._replace(shifted=biased), groups=groups)
        if i and stages[i - 1].norm:
            prologue = Operand(spec.x.size, spec.x.stride, "affine", stages[i - 1].act, True, True)
            spec = spec._replace(x=prologue)
        found.append(spec)
        shaped = Shaped(spec.shape, spec.dtype, spec.device, spec.y.stride)
    return found


def _check_vectors(call: TrainCall) -> None:
    for i, stage in enumerate(call.stages):
        for name in ("gamma", "beta"):
            vector: Tensor | None = getattr(stage, name)
            if vector is None:
                continue
            if name == "gamma" and not stage.norm:
                raise ValueError(f"gamma must be None in a layer without a BatchNorm, got one in layer {i}")
            if vector.ndim != 1 or vector.shape[0] != stage.c_out:
                raise ValueError(
                    f"{name} must be [{stage.c_out}], one value per channel, got {list(vector.shape)} "
                    f"in layer {i}"
                )
            if not vector.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {vector.dtype} in layer {i}")
            if vector.device != call.x.device:
                raise ValueError(
                    f"{name} must be on x's device {call.x.device}, got {vector.device} in layer {i}"
                )


# --- engines ------------------------------------------------------------------------------------------------


def choose(found: Sequence[ConvSpec], suffix: str = "") -> list[Choice]:
    """Return the engine that covers each layer."""
    return [
        ops.choose_engine(
            NAMES[spec.transposed] + suffix,
            spec.device,
            triton=lambda gpu, spec=spec: gpu.why_not(spec),  # type: ignore[misc]
            native=lambda spec=spec: cpu.why_not(spec),  # type: ignore[misc]
        )
        for spec in found
    ]


def engine_of(choices: Iterable[Choice]) -> str:
    """Return the engine that runs a chain: that of its layers if they have the same, else the reference."""
    engines = {choice.engine for choice in choices}
    return engines.pop() if len(engines) == 1 else "reference"


def _chosen(found: Sequence[ConvSpec], suffix: str = "") -> str:
    choices = choose(found, suffix)
    engine = engine_of(choices)
    for choice in choices:
        if choice.engine != engine:
            why = next(c.reason for c in choices if c.engine == engine)
            choice = Choice(choice.op, engine, f"the reference runs another layer ({why})")
        ops.record(choice)
    return engine


def call_of(x: Tensor, *columns: Any, **options: Any) -> TrainCall:
    """Return the call from the operator's arguments."""
    return _Columns(*columns, **options).call(x)


def _run(x: Tensor, *columns: Any) -> TrainOutputs:
    call = call_of(x, *columns)
    found = specs(call)
    _check_vectors(call)
    engine = _chosen(found)
    if not x.shape[0]:
        return reference.empty_outputs(found, call)
    if engine == "triton":
        from . import gpu

        return gpu.train_forward(found, call)
    if engine == "native":
        return cpu.train_forward(found, call)
    return reference.train_forward(found, call)


def backward_call(dy: Tensor, y: Tensor | None, *rest: Any) -> TrainBackward:
    """Return the call from the backward operator's arguments."""
    saved, stats, packed, needs, x, *columns = rest
    forward = call_of(x, *columns)
    n = len(forward.stages)
    given = zip(needs[1:], (*columns[0], *columns[1], *columns[2]), strict=True)
    present = [need and tensor is not None for need, tensor in given]
    weight, gamma, beta = (present[i * n : (i + 1) * n] for i in range(3))
    return TrainBackward(dy, y, saved, stats, packed, needs[0], weight, gamma, beta, forward)


def _run_backward(*arguments: Any) -> TrainGradients:
    """Run the backward; what it is given as ``saved`` is emptied."""
    call = backward_call(*arguments)
    found = specs(call.forward)
    engine = _chosen(found, "_backward")
    # The Triton engine allocates the gradients of weights one by one.
    triton = engine == "triton" and call.dy.numel()
    results = empty_gradients(call._replace(need_weight=[False] * len(found)) if triton else call)
    if not call.dy.numel():
        for gradient in (results.x, *results.weight, *results.gamma, *results.beta):
            gradient.zero_()
    elif triton:
        from . import gpu

        gpu.train_backward(found, call, results)
    elif engine == "native":
        cpu.train_backward(found, call, results)
    else:
        reference.train_backward(found, call, results)
    return results


def empty_gradients(call: TrainBackward) -> TrainGradients:
    """Allocate gradients of the right shape, dtype and strides; [0] where not needed or absent."""
    x, stages = call.forward.x, call.forward.stages

    def empty(wanted: Sequence[bool], tensors: Iterable[Tensor | None]) -> list[Tensor]:
        return [
            x.new_empty(0) if t is None or not want else torch.empty_like(t)
            for want, t in zip(wanted, tensors, strict=True)
        ]

    return TrainGradients(
        reference.empty_gradient(x) if call.need_x else x.new_empty(0),
        empty(call.need_weight, (stage.weight for stage in stages)),
        empty(call.need_gamma, (stage.gamma for stage in stages)),
        empty(call.need_beta, (stage.beta for stage in stages)),
    )


# --- the operators ------------------------------------------------------------------------------------------

_COLUMNS = (
    "Tensor[] weight, Tensor?[] gamma, Tensor?[] beta, bool[] norm, float[] eps, str[] act, int[] stride, "
    "int[] padding, bool[] transposed, float slope=0.2, int groups=1, bool channels_last=True, bool keep=True"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(f"train_chain(Tensor x, {_COLUMNS}) -> (Tensor, Tensor[], Tensor[], Tensor)", tags=_TAGS)
LIBRARY.define(
    "train_chain_backward(Tensor dy, Tensor? y, Tensor[] saved, Tensor[] stats, Tensor packed, bool[] needs, "
    f"Tensor x, {_COLUMNS}) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    tags=_TAGS,
)
LIBRARY.define(
    "track_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] batches, Tensor[] stats, "
    "float[] momentum, SymInt[] count) -> ()",
    tags=_TAGS,
)


def _fake(x: Tensor, *columns: Any) -> TrainOutputs:
    call = call_of(x, *columns)
    found = _make_specs(call)
    _check_vectors(call)
    packed = 0
    if x.shape[0] and (x.device.type == "cuda" or ops.engine() == "triton"):
        concrete = _with_integer_sizes(call)
        concrete_specs = _make_specs(concrete)
        if engine_of(choose(concrete_specs)) == "triton":
            from . import gpu

            packed = gpu.packed_size(concrete_specs, concrete.stages)
    return reference.empty_outputs(found, call, packed)


def _with_integer_sizes(call: TrainCall) -> TrainCall:
    """Replace symbolic sizes, by which kernels cannot be looked up, for questions that no batch size changes.

    The batch becomes the smallest, so that its size stays symbolic in the graph. All others become constants.
    """

    def shaped(t: Tensor, *batch: int) -> Any:
        size = (*batch, *map(int, t.shape[len(batch) :]))
        return Shaped(size, t.dtype, t.device, tuple(map(int, t.stride())))

    stages = [stage._replace(weight=shaped(stage.weight)) for stage in call.stages]
    return call._replace(x=shaped(call.x, call.groups), stages=stages)


def _fake_backward(*arguments: Any) -> tuple[Any, ...]:
    return tuple(empty_gradients(backward_call(*arguments)))


def _autograd(x: Tensor, *columns: Any) -> TrainOutputs:
    if ops.under_transform():
        raise RuntimeError(
            "dcgan::train_chain has no rules for torch.func's transforms and forward-mode AD; "
            "the function train_chain supports them"
        )
    given = _Columns(*columns)
    tensors = (x, *given.weight, *given.gamma, *given.beta)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, *rest, packed = _Chain.apply(given._replace(keep=True), *tensors)
        maps = len(rest) - sum(given.norm)
        return y, rest[:maps], rest[maps:], packed
    return _below_autograd(x, given)


def _below_autograd(x: Tensor, given: _Columns) -> TrainOutputs:
    if _may_bypass_dispatcher(x, given):
        return _run(x, *given)
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(x, *given)  # type: ignore[no-any-return]


def _may_bypass_dispatcher(x: Tensor, given: _Columns) -> bool:
    """Return whether nothing observes or intercepts operators, so that an engine may be called directly.

    That saves time, and in the backward memory: the dispatcher holds all maps until the operator returns.
    A parameter of a tensor subclass intercepts them too, and may own no memory.
    """
    if torch.compiler.is_compiling():
        return False
    parameters = (*given.weight, *given.gamma, *given.beta)
    if any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in parameters):
        return False
    with torch.no_grad():
        return ops.can_bypass_dispatcher(x)


class _Chain(autograd.Function):
    """The chain's node: of the outputs only y is differentiable."""

    @staticmethod
    def forward(ctx: Any, given: _Columns, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        y, saved, stats, packed = _below_autograd(x, given)
        keep_y = y if given.act[-1] != "none" else None
        ctx.save_for_backward(x, *tensors, *saved, *stats, packed, keep_y)
        ctx.given, ctx.present = given[3:], [i for i, t in enumerate((x, *tensors)) if t is not None]
        ctx.mark_non_differentiable(*saved, *stats, packed)
        ctx.set_materialize_grads(False)
        return y, *saved, *stats, packed

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        inputs = len(ctx.needs_input_grad) - 1
        if dy is None:
            return (None,) * (1 + inputs)
        needs = _needed(ctx)
        n = inputs // 3
        tensors = ctx.saved_tensors
        x, *parameters = tensors[:inputs]
        given = _Columns(parameters[:n], parameters[n : 2 * n], parameters[2 * n :], *ctx.given)
        if torch.is_grad_enabled() or ops.under_transform() or _is_batched(dy):
            return None, *_differentiable_backward(dy, needs, x, given)
        *saved, packed, y = tensors[inputs:]
        saved, stats = saved[: n - 1], saved[n - 1 :]
        del tensors
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: the backward frees maps as it goes
        run = _run_backward if _may_bypass_dispatcher(dy, given) else _BACKWARD_OP
        dx, *rest = run(dy, y, saved, stats, packed, needs, x, *given)
        computed = (dx, *(t for column in rest for t in column))
        return None, *(t if need else None for t, need in zip(computed, needs, strict=True))


def _needed(ctx: Any) -> list[bool]:
    """Return, per tensor, whether this backward must compute its gradient; as :func:`.ops._needed`."""
    needed = list(ctx.needs_input_grad[1:])
    for i, (node, _) in zip(ctx.present, ctx.next_functions, strict=True):
        needed[i] = needed[i] and node is not None and ops._executes(node)
    return needed


_BATCHED = torch._C._parse_dispatch_key("Batched")


def _is_batched(dy: Tensor) -> bool:
    """Return whether dy comes from ``torch.autograd.grad(..., is_grads_batched=True)``.

    Its vmap is not one of torch.func's, and has no fallback for an operator that takes lists of tensors.
    """
    return torch._C._dispatch_keys(dy).has(_BATCHED)  # type: ignore[arg-type]


def _differentiable_backward(
    dy: Tensor, needs: Sequence[bool], x: Tensor, given: _Columns
) -> list[Tensor | None]:
    """Return the gradients as differentiable functions, by running the layers again as single ops.

    They are for ``create_graph=True``, and for a vmap over dy.
    """
    tensors = (x, *given.weight, *given.gamma, *given.beta)
    n = len(given.weight)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # Aliases, so that a tensor that is given twice has a gradient for each.
        aliases: list[Tensor | None] = [None if t is None else t.view_as(t) for t in tensors]
        own, *rest = aliases
        assert own is not None
        parameters: list[Any] = rest
        columns = _Columns(parameters[:n], parameters[n : 2 * n], parameters[2 * n :], *given[3:])
        y = one_by_one(columns.call(own))[0]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _cast(x: Tensor, given: _Columns) -> tuple[Tensor, _Columns]:
    """Apply autocast's rule: x is cast, but no float32 weight, as those are cast when they are packed."""
    if x.dtype == torch.float64:
        return x, given
    x = x.to(torch.get_autocast_dtype(x.device.type))
    weights = [w if w.dtype == torch.float32 else w.to(x.dtype) for w in given.weight]
    return x, given._replace(weight=weights)


def _autocast(key: torch._C.DispatchKey) -> Any:
    """Return the autocast kernel."""
    without = torch._C.DispatchKeySet(key)

    def autocast(x: Tensor, *columns: Any) -> TrainOutputs:
        with torch._C._ExcludeDispatchKeyGuard(without):
            x, given = _cast(x, _Columns(*columns))
            return _OP(x, *given)  # type: ignore[no-any-return]

    return autocast


_TRACK_COLUMNS = ("running_mean", "running_var", "batches", "momentum", "count")


def _track(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batches: Sequence[Tensor],
    stats: Sequence[Tensor],
    momentum: Sequence[float],
    count: Sequence[int],
) -> None:
    columns = (running_mean, running_var, batches, momentum, count)
    for name, column in zip(_TRACK_COLUMNS, columns, strict=True):
        if len(column) != len(stats):
            raise ValueError(f"{name} must have one entry per BatchNorm, {len(stats)}, got {len(column)}")
    if 1 in count:
        raise ValueError(f"count must be at least 2 values per channel and group, got {list(count)}")
    if not stats:
        return
    device, dtype = stats[0].device, stats[0].dtype
    tensors = (*running_mean, *running_var, *stats)
    plain = all(t.dtype == torch.float32 and t.is_contiguous() and not t.is_neg() for t in tensors)
    choice = ops.choose_engine(
        "track_",
        device,
        triton=lambda gpu: gpu.why_not_here(device, dtype),
        native=cpu.problem if plain else None,
    )
    if choice.engine == "triton" and all(count):
        from . import gpu

        gpu.track(running_mean, running_var, batches, stats, momentum, count)
    elif choice.engine == "native" and all(count):
        cpu.track(running_mean, running_var, batches, stats, momentum, count)
    else:
        reference.track(running_mean, running_var, batches, stats, momentum, count)


LIBRARY.impl("train_chain", _run, "CompositeExplicitAutograd")
LIBRARY.impl("train_chain", _autograd, "Autograd")
LIBRARY.impl("train_chain_backward", lambda *a: tuple(_run_backward(*a)), "CompositeExplicitAutograd")
LIBRARY.impl("track_", _track, "CompositeExplicitAutograd")
torch.library.register_fake("dcgan::train_chain", _fake, lib=LIBRARY)
torch.library.register_fake("dcgan::train_chain_backward", _fake_backward, lib=LIBRARY)
torch.library.register_fake("dcgan::track_", lambda *arguments: None, lib=LIBRARY)
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("train_chain", _autocast(getattr(torch._C.DispatchKey, _key)), _key)
_OP = torch.ops.dcgan.train_chain.default
_BACKWARD_OP = torch.ops.dcgan.train_chain_backward.default


# --- public -------------------------------------------------------------------------------------------------


def train_chain(call: TrainCall) -> tuple[Tensor, list[Tensor]]:
    """Run a network in training; differentiable in x, the weights, gammas and betas.

    The module's docstring has the mathematics. In a layer without a BatchNorm beta is the bias.

    Args:
        call: x [N, C, H, W] of float16, bfloat16, float32 or float64, any strides; its layers, of which the
            last has no BatchNorm; the negative slope of all leaky ReLUs; the number of groups, which divides
            N; y's memory format, channels_last or contiguous; and whether to keep what a backward needs.

    Returns:
        y, of x's dtype, and for each BatchNorm [4, groups, C] in the accumulator's dtype: mean, biased
        variance, scale gamma·rsqrt(var + eps), and shift beta.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is allowed.
    """
    x, given = call.x, _Columns.of(call)
    if not ops.under_transform():
        run = _autograd if _may_bypass_dispatcher(x, given) else _OP
        y, _, stats, _ = run(x, *given)
        return y, stats
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, given = _cast(x, given)
    call = given.call(x)
    specs(call)
    _check_vectors(call)
    with torch.autocast(device, enabled=False):
        return one_by_one(call)


def one_by_one(call: TrainCall) -> tuple[Tensor, list[Tensor]]:
    """Compute :func:`train_chain` by single ops, which support second derivatives and transforms.

    The arguments are not checked, and autocast is disabled.
    """
    x, stages, slope, groups, channels_last, _ = call
    if groups > 1:
        parts = [one_by_one(call._replace(x=part, groups=1)) for part in x.chunk(groups)]
        each = zip(*(stats for _, stats in parts), strict=True)
        return torch.cat([y for y, _ in parts]), [torch.cat(one, 1) for one in each]
    found: list[Tensor] = []
    acc = accumulator_dtype(x.dtype)
    prologue: dict[str, Any] = {}
    for i, stage in enumerate(stages):
        beta = None if stage.beta is None else stage.beta.to(acc)
        op = ops.conv_transpose2d_fused if stage.transposed else ops.conv2d_fused
        x, mean, var = op(
            x,
            stage.weight.to(x.dtype),
            **prologue,
            out_shift=None if stage.norm else beta,
            out_act="none" if stage.norm else stage.act,
            stats=stage.norm,
            slope=slope,
            stride=stage.stride,
            padding=stage.padding,
            channels_last=channels_last or i + 1 < len(stages),
        )
        prologue = {}
        if stage.norm:
            scale = torch.rsqrt(var + stage.eps)
            if stage.gamma is not None:
                scale = scale * stage.gamma.to(acc)
            shift = torch.zeros_like(scale) if beta is None else beta
            found.append(torch.stack([mean, var, scale, shift])[:, None])
            prologue = {"center": mean, "scale": scale, "shift": shift, "in_act": stage.act}
    return x, found


def track_(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batches: Sequence[Tensor],
    stats: Sequence[Tensor],
    momentum: Sequence[float | None],
    count: Sequence[int],
) -> None:
    """Update the running statistics of BatchNorms as ``nn.BatchNorm2d`` does, one group after the other.

    Args:
        running_mean, running_var: [C] each, updated in place.
        batches: the numbers of batches tracked, int64 [] each, updated in place.
        stats: [4, groups, C] each, as :func:`train_chain` returns them.
        momentum: None for the cumulative average.
        count: the number of values per channel and group, which is not 1. After an empty batch (0), only
            ``batches`` changes.

    Raises:
        ValueError: ``count`` is 1, or the sequences differ in length.
    """
    weights = [-1.0 if m is None else float(m) for m in momentum]
    with torch.no_grad():
        torch.ops.dcgan.track_.default(running_mean, running_var, batches, stats, weights, count)
