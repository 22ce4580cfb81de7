"""The semantics of the two fused convolutions, forward and backward, in plain aten.

Forward, where ``conv`` is a convolution (``transposed=False``) or a transposed convolution:

    x̂ = in_act((x - center[c])·scale[c] + shift[c])          prologue; without these vectors, x̂ = in_act(x)
    u = conv(x̂, weight)                                      the zero padding pads x̂, not x
    stats:      y = u;  mean[c], var[c] = mean and biased variance of u over N, H, W
    otherwise:  y = out_act(u·out_scale[c] + out_shift[c])   epilogue; mean and var are empty

Arithmetic is in float32 (float64 for float64 tensors): the convolution's operands are rounded to x's dtype,
statistics and epilogue use the unrounded accumulator, and the result is rounded once.

Backward, given dy, dmean, dvar (M = N·H·W of y):

    stats:      du = dy + dmean[c]/M + 2·dvar[c]/M·(y - mean[c])
    otherwise:  e = dy·out_act'(y);  du = e·out_scale[c];  dout_scale[c] = Σ e·u;  dout_shift[c] = Σ e
    dx̂, dweight = adjoint_conv(du, weight), wgrad(x̂, du)
    g = dx̂·in_act'(x̂);  dx = g·scale
    dscale[c] = Σ g·(x - center);  dshift[c] = Σ g;  dcenter = -scale·dshift

The sums are centered because Σ g·x - center·Σ g suffers cancellation where mean/std is large. Every step of
the backward is differentiable aten, from which the ops get their second derivatives.

In 16 bits dx is rounded, and the engines round the du that is computed from it in the layer before, so that
terms of less than half a unit of dx vanish in all pixels alike. Simulated in bfloat16 over 4,096, 65,536 and
1,048,576 pixels, a weight's gradient errs by 0.6%, 4% and 29%; by 0.3%, 0.5% and 3% where du is rounded once,
as in :mod:`.train_chain`; and by 0.35% at any size if the second rounding were stochastic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .spec import (
    Backward,
    Call,
    ConvSpec,
    Outputs,
    TrainBackward,
    TrainCall,
    TrainGradients,
    TrainOutputs,
    dense_strides,
)

aten = torch.ops.aten

ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh", "sigmoid")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, statistics and per-channel vectors: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory format that an op's ``channels_last`` argument selects."""
    return torch.channels_last if channels_last else torch.contiguous_format


def activate_(x: Tensor, name: str, slope: float) -> Tensor:
    """Compute ``act(x)`` in place."""
    if name == "none":
        return x
    if name == "relu":
        return x.relu_()
    if name == "leaky_relu":
        return aten.leaky_relu_(x, slope)  # type: ignore[no-any-return]
    return x.tanh_() if name == "tanh" else x.sigmoid_()


def activate(x: Tensor, name: str, slope: float) -> Tensor:
    """Compute ``act(x)``, differentiably."""
    if name == "none":
        return x
    if name == "relu":
        return x.relu()
    if name == "leaky_relu":
        return aten.leaky_relu(x, slope)  # type: ignore[no-any-return]
    return x.tanh() if name == "tanh" else x.sigmoid()


def activation_backward(dy: Tensor, y: Tensor, name: str, slope: float) -> Tensor:
    """Compute ``dy·act'`` from the saved output y alone: every activation here is monotone (slope ≥ 0)."""
    if name == "none":
        return dy
    if name == "relu":
        return aten.threshold_backward(dy, y, 0)  # type: ignore[no-any-return]
    if name == "leaky_relu":
        return aten.leaky_relu_backward(dy, y, slope, True)  # type: ignore[no-any-return]
    if name == "tanh":
        return aten.tanh_backward(dy, y)  # type: ignore[no-any-return]
    return aten.sigmoid_backward(dy, y)  # type: ignore[no-any-return]


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def normalise(x: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute ``(x - center[c])·scale[c] + shift[c]``, differentiably."""
    return torch.addcmul(_per_channel(shift), x - _per_channel(center), _per_channel(scale))


def _channel_sums(t: Tensor) -> Tensor:
    return t.sum(dim=(0, 2, 3))


def _convolve(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    return aten.convolution(  # type: ignore[no-any-return]
        x, weight, None, [stride, stride], [padding, padding], [1, 1], transposed, [0, 0], 1
    )


def _canonical(y: Tensor, channels_last: bool) -> Tensor:
    """Give y the strides of a newly allocated tensor of that format, including its size-1 dimensions.

    In place: of a view, autograd would refuse in-place operations.
    """
    _, c, h, w = y.shape
    strides = dense_strides((c, h, w), channels_last)
    y = y.contiguous(memory_format=memory_format(channels_last))
    return y if y.stride() == strides else y.as_strided_(y.shape, strides)


def forward(call: Call, transposed: bool, functional: bool = False) -> Outputs:
    """Return (y, mean, var) as defined in the module's docstring; :mod:`.ops` has checked the arguments.

    ``functional`` avoids in-place operations and explicit strides, for autograd and torch.func.
    """
    x, slope = call.x, call.slope
    acc = accumulator_dtype(x.dtype)
    act = activate if functional else activate_
    if call.channels_last and not functional:
        x = x.contiguous(memory_format=torch.channels_last)
    x_hat = x
    if call.center is not None and call.scale is not None and call.shift is not None:
        x_hat = normalise(x.to(acc), call.center, call.scale, call.shift)
        x_hat = act(x_hat, call.in_act, slope).to(x.dtype)
    elif call.in_act != "none":
        x_hat = activate(x, call.in_act, slope)
    y = _convolve(x_hat.to(acc), call.weight.to(acc), call.stride, call.padding, transposed)
    if call.stats:
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    else:
        mean, var = y.new_empty(0), y.new_empty(0)
        out_scale, out_shift = call.out_scale, call.out_shift
        target = None if functional else y
        if out_scale is not None and out_shift is not None:  # one pass over y, not two
            y = torch.addcmul(_per_channel(out_shift), y, _per_channel(out_scale), out=target)
        elif out_scale is not None:
            y = torch.mul(y, _per_channel(out_scale), out=target)
        elif out_shift is not None:
            y = torch.add(y, _per_channel(out_shift), out=target)
        y = act(y, call.out_act, slope)
    y = y.to(x.dtype)
    return y if functional else _canonical(y, call.channels_last), mean, var


def gradient_is_channels_last(x: Tensor) -> bool:
    """Return whether x's gradient is channels_last: x is channels_last and not contiguous as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def empty_gradient(x: Tensor) -> Tensor:
    """Allocate a gradient of x, with canonical strides."""
    nhwc = gradient_is_channels_last(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(nhwc))


OptionalGradients = tuple[
    Tensor | None,  # x
    Tensor | None,  # weight
    Tensor | None,  # center
    Tensor | None,  # scale
    Tensor | None,  # shift
    Tensor | None,  # out_scale
    Tensor | None,  # out_shift
]


def backward(call: Backward, transposed: bool) -> OptionalGradients:
    """Return the gradients that ``call.needs`` selects; they are differentiable themselves."""
    x, weight, center, scale, shift = call.x, call.weight, call.center, call.scale, call.shift
    y, mean, out_scale, slope, stride, padding = (
        *(call.y, call.mean, call.out_scale),
        *(call.slope, call.stride, call.padding),
    )
    need_x, need_weight, need_prologue, need_out_scale, need_out_shift = call.needs
    acc = accumulator_dtype(x.dtype)
    x_acc = x.to(acc)
    x_pre = x_acc if scale is None else normalise(x_acc, center, scale, shift)  # type: ignore[arg-type]
    x_act = activate(x_pre, call.in_act, slope)
    x_hat, w = x_act.to(x.dtype).to(acc), weight.to(acc)

    dout_scale = dout_shift = None
    du = call.dy.to(acc)
    if call.stats:
        assert y is not None
        assert mean is not None
        count = y.numel() // y.shape[1]
        if call.dmean is not None:
            du = du + _per_channel(call.dmean / count)
        if call.dvar is not None:
            du = du + _per_channel(call.dvar * 2 / count) * (y.to(acc) - _per_channel(mean))
    else:
        if y is not None:
            du = activation_backward(du, y.to(acc), call.out_act, slope)
        if need_out_shift:
            dout_shift = _channel_sums(du)
        if need_out_scale:
            dout_scale = _channel_sums(du * _convolve(x_hat, w, stride, padding, transposed))
        if out_scale is not None:
            du = du * _per_channel(out_scale)

    dx = dweight = dcenter = dscale = dshift = None
    need_x_hat = need_x or need_prologue
    if need_x_hat or need_weight:
        dx_hat, dweight, _ = aten.convolution_backward(
            du,
            x_hat,
            w,
            None,
            [stride, stride],
            [padding, padding],
            [1, 1],
            transposed,
            [0, 0],
            1,
            [need_x_hat, need_weight, False],
        )
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        if need_x_hat:
            dx = activation_backward(dx_hat, x_act, call.in_act, slope)
            if scale is not None:
                if need_prologue:
                    dshift = _channel_sums(dx)
                    dscale = _channel_sums(dx * (x_acc - _per_channel(center)))  # type: ignore[arg-type]
                    dcenter = -scale * dshift
                dx = dx * _per_channel(scale)
            dx = dx.to(x.dtype) if need_x else None
    return dx, dweight, dcenter, dscale, dshift, dout_scale, dout_shift


# --- a network in training (:mod:`.train_chain`) ------------------------------------------------------------


def _per_image(vector: Tensor, images: int) -> Tensor:
    """Return vectors [groups, C] as [N, C, 1, 1], each group's beside its images."""
    return vector.repeat_interleave(images // vector.shape[0], 0)[:, :, None, None]


def _group_sums(t: Tensor, groups: int) -> Tensor:
    """Return the sums [groups, C] over the pixels of each group's images."""
    return t.unflatten(0, (groups, -1)).sum((1, 3, 4))  # type: ignore[no-any-return]


def _normalised(y: Tensor, stats: Tensor) -> Tensor:
    """Return (y - mean)·scale + shift in the accumulator's dtype."""
    mean, _, scale, shift = (_per_image(v, y.shape[0]) for v in stats)
    return torch.addcmul(shift, y.to(stats.dtype) - mean, scale)


def _layer_input(call: TrainCall, i: int, before: Tensor, stats: Tensor | None, slope: float) -> Tensor:
    """Return x̂ of layer i from what the layer before stores, rounded to its dtype."""
    if stats is None:
        return before
    return activate_(_normalised(before, stats), call.stages[i - 1].act, slope).to(before.dtype)


def empty_outputs(specs: Sequence[ConvSpec], call: TrainCall, packed: int = 0) -> TrainOutputs:
    """Allocate the outputs of a network's forward; statistics are NaN, as for an empty batch."""
    x, acc = call.x, accumulator_dtype(call.x.dtype)
    maps = [torch.empty_strided(s.shape, s.y.stride, dtype=s.dtype, device=s.device) for s in specs]
    stats = [
        torch.full((4, call.groups, stage.c_out), float("nan"), dtype=acc, device=x.device)
        for stage in call.stages
        if stage.norm
    ]
    return maps[-1], maps[:-1] if call.keep else [], stats, x.new_empty(packed if call.keep else 0)


def train_forward(specs: Sequence[ConvSpec], call: TrainCall) -> TrainOutputs:
    """Return (y, saved, stats, packed) of a network in training; packed is empty.

    The beta of a layer without a BatchNorm is its convolution's bias.
    """
    x, acc = call.x, accumulator_dtype(call.x.dtype)
    saved: list[Tensor] = []
    all_stats: list[Tensor] = []
    stats: Tensor | None = None
    for i, (stage, spec) in enumerate(zip(call.stages, specs, strict=True)):
        x_hat = _layer_input(call, i, x, stats, call.slope)
        weight = stage.weight.to(x.dtype).to(acc)
        y = _convolve(x_hat.to(acc), weight, stage.stride, stage.padding, stage.transposed)
        stats = None
        if stage.norm:
            var, mean = torch.var_mean(y.unflatten(0, (call.groups, -1)), dim=(1, 3, 4), correction=0)
            scale = torch.rsqrt(var + stage.eps)
            if stage.gamma is not None:
                scale = scale * stage.gamma.to(acc)
            shift = torch.zeros_like(scale) if stage.beta is None else stage.beta.to(acc).expand_as(scale)
            stats = torch.stack([mean, var, scale, shift])
            all_stats.append(stats)
        else:
            if stage.beta is not None:
                y.add_(_per_channel(stage.beta.to(acc)))
            y = activate_(y, stage.act, call.slope)
        x = _canonical(y.to(x.dtype), spec.y.stride[1] == 1 and spec.y.stride[3] == spec.y.size[0])
        saved.append(x)
    return x, saved[:-1] if call.keep else [], all_stats, x.new_empty(0)


def train_backward(specs: Sequence[ConvSpec], call: TrainBackward, results: TrainGradients) -> None:
    """Write the gradients that are not empty into ``results``; removes each map from ``call.saved``.

    A bias's gradient is the sum of du as it is rounded.
    """
    forward = call.forward
    stages, slope, groups, dtype = forward.stages, forward.slope, forward.groups, forward.x.dtype
    acc = accumulator_dtype(dtype)
    found = iter(call.stats)
    stats = [next(found) if stage.norm else None for stage in stages]
    du = call.dy.to(acc)
    if call.y is not None:
        du = activation_backward(du, call.y.to(acc), stages[-1].act, slope)
    for i in reversed(range(len(stages))):
        stage, images = stages[i], len(du)
        stored = call.saved.pop() if i else forward.x
        du = du.to(dtype).to(acc)
        if call.need_beta[i] and not stage.norm:
            results.beta[i].copy_(_channel_sums(du))
        x_hat = _layer_input(forward, i, stored, stats[i - 1] if i else None, slope).to(acc)
        below = i > 0 or call.need_x
        dx_hat, dweight, _ = aten.convolution_backward(
            du, x_hat, stage.weight.to(dtype).to(acc), None, [stage.stride] * 2, [stage.padding] * 2, [1, 1],
            stage.transposed, [0, 0], 1, [below, call.need_weight[i], False],
        )  # fmt: skip
        if call.need_weight[i]:
            results.weight[i].copy_(dweight)
        if i == 0:
            break
        g = activation_backward(dx_hat, x_hat, stages[i - 1].act, slope)
        of = stats[i - 1]
        if of is None:
            du = g
            continue
        g = g.to(dtype).to(acc)  # as it is stored: the sums over du then vanish
        mean, var, scale, _ = of
        y = stored.to(acc) - _per_image(mean, images)
        inverse = torch.rsqrt(var + stages[i - 1].eps)
        dbeta, dgamma = _group_sums(g, groups), _group_sums(g * y, groups) * inverse
        if call.need_gamma[i - 1]:
            results.gamma[i - 1].copy_(dgamma.sum(0))
        if call.need_beta[i - 1]:
            results.beta[i - 1].copy_(dbeta.sum(0))
        count = y[:, 0].numel() // groups
        g = g - _per_image(dbeta / count, images)
        du = _per_image(scale, images) * (g - y * _per_image(inverse * dgamma / count, images))
    if call.need_x:
        results.x.copy_(dx_hat)


def track(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batches: Sequence[Tensor],
    stats: Sequence[Tensor],
    momentum: Sequence[float],
    count: Sequence[int],
) -> None:
    """Update running statistics in place, one group after the other; a negative momentum is cumulative.

    Each update is computed in the wider dtype of the running statistics and ``stats``, and rounded once.
    """
    for mean, var, n, vectors, weight, values in zip(
        running_mean, running_var, batches, stats, momentum, count, strict=True
    ):
        for group in range(vectors.shape[1]):
            n.add_(1)
            if not values:
                continue
            unbiased = vectors[1, group] * (values / (values - 1))
            for running, new in ((mean, vectors[0, group]), (var, unbiased)):
                acc = torch.promote_types(running.dtype, new.dtype)
                w: Any = weight if weight >= 0 else n.to(acc).reciprocal()
                running.copy_(running.to(acc).lerp(new.to(acc), w))
