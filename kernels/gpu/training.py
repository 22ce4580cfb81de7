"""A network in training on the Triton engine: its products, and the small kernels between them.

Forward: one launch packs all weights. A layer is its product, whose epilogue leaves partial statistics, and
``batchnorm.forward``, which merges them. The next product applies the BatchNorm as its prologue, fused or in
a standalone kernel. Without a BatchNorm, the epilogue adds the bias and applies the activation.

Backward, from the last layer to the first: dgrad, whose epilogue computes g and its partial sums;
``batchnorm.backward``, which merges these; ``batchnorm.apply``, one sweep that computes the du of the layer
before and this layer's x̂; and wgrad, which reads that x̂ and this layer's du. No product of the backward has a
prologue. Gradients of weights are written in the weight's dtype. A bias's is PyTorch's sum of du.

:func:`forward_specs`, :func:`dgrad_spec` and :func:`wgrad_spec` describe the products from shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import weight_cache
from ..spec import (
    ConvSpec,
    Operand,
    TrainBackward,
    TrainCall,
    TrainGradients,
    TrainOutputs,
    TrainStage,
    dense_strides,
)
from . import batchnorm, packing, prologue_kernel, reduce
from .executor import device_guard
from .launcher import Pointers, Product, kernel_for, precision, run

# --- from a network to products -----------------------------------------------------------------------------


def forward_specs(specs: Sequence[ConvSpec]) -> list[ConvSpec]:
    """Return the forward products of a network, given :func:`..train_chain.specs`."""
    return [spec._replace(precision=precision(spec.dtype)) for spec in specs]


def dgrad_spec(spec: ConvSpec, before: TrainStage | None, du: Operand, strides: tuple[int, ...]) -> ConvSpec:
    """Return the product that computes the gradient of a layer's input.

    Args:
        spec: the layer's forward product.
        before: the layer before, whose activation the epilogue differentiates; None for the first layer.
        du: the gradient of the layer's output.
        strides: of the result, and of the layer's input.
    """
    size = spec.x.size
    if before is None or (before.act == "none" and not before.norm):
        y = Operand(size, strides, "affine")
    elif before.norm:
        y = Operand(size, strides, "gradient", before.act, True, True, strides)
    else:
        y = Operand(size, strides, "adjoint", before.act, other_stride=strides)
    kind, transposed = "dgrad", not spec.transposed
    return spec._replace(kind=kind, transposed=transposed, x=du, y=y, precision=precision(spec.dtype))


def wgrad_spec(spec: ConvSpec, x: Operand, du: Operand) -> ConvSpec:
    """Return the product that computes the gradient of a layer's weight, from x̂ and du."""
    return spec._replace(kind="wgrad", x=x, y=du, groups=1, precision=precision(spec.dtype))


def _plain(t: Tensor) -> Operand:
    _, c, h, w = t.shape
    return Operand((c, h, w), t.stride())


Weights = list[tuple[packing.Layout, TrainStage]]


def _layout(spec: ConvSpec) -> packing.Layout:
    kernel = kernel_for(spec)
    assert kernel is not None
    assert kernel.layout is not None
    return kernel.layout


def _forward_weights(specs: Sequence[ConvSpec], stages: Sequence[TrainStage]) -> Weights:
    """Return the weights of a network's forward products, in the layouts that these read."""
    return [(_layout(spec), stage) for spec, stage in zip(specs, stages, strict=True)]


def _backward_weights(specs: Sequence[ConvSpec], stages: Sequence[TrainStage]) -> Weights:
    """Return the weights of a network's dgrads."""
    found = []
    for i, (spec, stage) in enumerate(zip(specs, stages, strict=True)):
        du = Operand(spec.y.size, dense_strides(spec.y.size, True))
        strides = dense_strides(spec.x.size, True)
        found.append((_layout(dgrad_spec(spec, stages[i - 1] if i else None, du, strides)), stage))
    return found


def _shapes(weights: Weights) -> list[packing.Packed]:
    return [(stage.weight.shape, layout) for layout, stage in weights]


def packed_size(specs: Sequence[ConvSpec], stages: Sequence[TrainStage]) -> int:
    """Return the number of elements of the packed weights that a network's backward needs."""
    return packing.offsets(_shapes(_backward_weights(specs, stages)))[1]


def _pack(specs: Sequence[ConvSpec], call: TrainCall) -> tuple[Tensor, Tensor]:
    """Return buffers with the packed weights of the forward and of the backward, made in one launch.

    They are made once where weights are constant. The forward's are freed with it.
    """
    stages, x = call.stages, call.x
    sides = [_forward_weights(specs, stages), _backward_weights(specs, stages) if call.keep else []]

    def make() -> tuple[Tensor, ...]:
        buffers = tuple([x.new_empty(packing.offsets(_shapes(weights))[1]) for weights in sides])
        jobs = [[(stage.weight, layout) for layout, stage in weights] for weights in sides]
        packing.pack_into(buffers, jobs)
        return buffers

    sources = tuple([(s.weight.data_ptr(), s.weight.stride(), s.weight.dtype) for s in stages])
    layouts = tuple([layout for weights in sides for layout, _ in weights])
    weights = [stage.weight for stage in stages]
    forward, backward = weight_cache.make_once(weights, (sources, layouts, x.dtype), make)
    return forward, backward


def _output(y: Tensor, stage: TrainStage, groups: int) -> Pointers:
    """Return a layer's output with its bias, which is that of every group."""
    if stage.norm or stage.beta is None:
        return Pointers(y)
    return Pointers(y, shift=stage.beta.to(torch.float32).expand(groups, -1).contiguous())


def _normalized(y: Tensor, stats: Tensor | None) -> Pointers:
    """Return what a layer stores, with the vectors of its BatchNorm."""
    return Pointers(y) if stats is None else Pointers(y, None, stats[0], stats[2], stats[3])


# --- forward ------------------------------------------------------------------------------------------------


def forward(specs: Sequence[ConvSpec], call: TrainCall) -> TrainOutputs:
    """Return (y, saved, stats, packed) of a network whose layers :func:`.launcher.why_not` accepts."""
    x = call.x
    maps: list[Tensor] = []
    all_stats: list[Tensor] = []
    stats: Tensor | None = None
    with device_guard(x):
        buffer, for_backward = _pack(specs, call)
        packed = packing.views(buffer, _shapes(_forward_weights(specs, call.stages)))
        for spec, stage, weight in zip(forward_specs(specs), call.stages, packed, strict=True):
            y = torch.empty_strided(spec.shape, spec.y.stride, dtype=spec.dtype, device=spec.device)
            output = _output(y, stage, call.groups)
            product = Product(spec, _normalized(x, stats), stage.weight, output)
            partial = run(product, weight).partial
            stats = None
            if stage.norm:
                assert partial is not None
                stats = x.new_empty((4, call.groups, stage.c_out), dtype=torch.float32)
                batchnorm.forward(partial, stage.gamma, stage.beta, stage.eps, stats)
                all_stats.append(stats)
            x = y
            if call.keep:
                maps.append(y)
    return x, maps[:-1], all_stats, for_backward


# --- backward -----------------------------------------------------------------------------------------------


def backward(specs: Sequence[ConvSpec], call: TrainBackward, results: TrainGradients) -> None:
    """Write the gradients of x, gammas and betas into ``results`` if not empty, and add those of weights.

    A weight's gradient is allocated when it is computed. Each map is removed from ``call.saved`` after its
    last use.
    """
    with device_guard(call.forward.x):
        it = _Backward(specs, call, results)
        du: Tensor | None = _last_du(specs[-1], call)
        for i in reversed(range(1, len(specs))):
            if du is None:
                return
            it.bias(i, du)
            du = it.after_activation(i, du) if it.stats[i - 1] is None else it.after_batchnorm(i, du)
        if du is not None:
            it.bias(0, du)
            it.first_layer(du)


class _Backward:
    """The backward of one call, layer by layer.

    Each layer is a function, so that its maps are freed before the next one allocates. It takes the layer's
    du and returns that of the layer before, or None if nothing below needs it.
    """

    def __init__(self, specs: Sequence[ConvSpec], call: TrainBackward, results: TrainGradients) -> None:
        self.specs, self.call, self.results = specs, call, results
        self.forward, self.stages = call.forward, call.forward.stages
        each = iter(call.stats)
        self.stats = [next(each) if stage.norm else None for stage in self.stages]
        weights = _backward_weights(specs, self.stages)
        if call.packed.numel():
            self.packed = packing.views(call.packed, _shapes(weights))
        else:  # another engine has run the forward
            jobs = [(stage.weight, layout) for layout, stage in weights]
            self.packed = packing.pack(jobs, self.forward.x.dtype)
        columns = zip(call.need_weight, call.need_gamma, call.need_beta, strict=True)
        needed = [any(of_layer) for of_layer in columns]
        self.below = [call.need_x or any(needed[:i]) for i in range(len(specs))]
        """Whether the gradient of a layer's input is needed."""

    def bias(self, i: int, du: Tensor) -> None:
        """Compute the gradient of layer i's bias, if it has one that is needed."""
        if self.call.need_beta[i] and not self.stages[i].norm:
            dtype = self.results.beta[i].dtype
            self.results.beta[i] = du.sum((0, 2, 3), dtype=torch.float32).to(dtype)

    def first_layer(self, du: Tensor) -> None:
        if self.call.need_weight[0]:
            self._wgrad(0, self.forward.x, du)
        if self.call.need_x:
            self._dgrad(0, du, Pointers(self.results.x))

    def after_activation(self, i: int, du: Tensor) -> Tensor | None:
        """Run layer i, whose input is what the layer before stores."""
        x_hat = self.call.saved.pop()
        if self.call.need_weight[i]:  # first, as its split-K partials are freed before dgrad allocates
            self._wgrad(i, x_hat, du)
        if not self.below[i]:
            return None
        dx = torch.empty_like(x_hat)
        self._dgrad(i, du, Pointers(dx, x_hat))
        return dx

    def after_batchnorm(self, i: int, du: Tensor) -> Tensor | None:
        """Run layer i, whose input is the BatchNorm and activation of what the layer before stores."""
        stats, before, y = self.stats[i - 1], self.stages[i - 1], self.call.saved.pop()
        assert stats is not None
        g = coefficients = x_hat = None
        if self.below[i]:
            g, coefficients = torch.empty_like(y), torch.empty_like(stats[:2])
            sums = self._dgrad(i, du, Pointers(g, y, stats[0], stats[2], stats[3]))
            assert sums is not None
            dgamma, dbeta = _present(self.results.gamma[i - 1]), _present(self.results.beta[i - 1])
            pixels = y.numel() // y.shape[1] // self.forward.groups
            batchnorm.backward(sums, stats, coefficients, dgamma, dbeta, pixels, before.eps)
            del sums
        if not (self.call.need_weight[i - 1] or self.below[i - 1]):
            g = None
        if self.call.need_weight[i]:
            x_hat = torch.empty_like(y)
        if g is not None or x_hat is not None:
            batchnorm.apply(g, y, stats, coefficients, x_hat, before.act, self.forward.slope)
        del y
        if x_hat is not None:
            self._wgrad(i, x_hat, du)
        return g  # which apply has turned into du

    def _dgrad(self, i: int, du: Tensor, y: Pointers) -> Tensor | None:
        """Run the dgrad of layer i into y.ptr; returns the partial sums of its epilogue."""
        before = self.stages[i - 1] if i else None
        spec = dgrad_spec(self.specs[i], before, _plain(du), y.ptr.stride())
        if spec.y.other_stride is None:
            y = Pointers(y.ptr)
        return run(Product(spec, Pointers(du), self.stages[i].weight, y), self.packed[i]).partial

    def _wgrad(self, i: int, x: Tensor, du: Tensor) -> None:
        """Compute the gradient of layer i's weight, in the weight's dtype and strides."""
        product = wgrad_spec(self.specs[i], _plain(x), _plain(du))
        partial = run(Product(product, Pointers(x), None, Pointers(du))).partial
        assert partial is not None
        self.results.weight[i] = torch.empty_like(self.stages[i].weight)
        reduce.split_k(partial, self.results.weight[i])


def _present(gradient: Tensor) -> Tensor | None:
    return gradient if gradient.numel() else None


def _last_du(spec: ConvSpec, call: TrainBackward) -> Tensor:
    """Return the gradient of the last convolution, before its activation."""
    act = call.forward.stages[-1].act
    if call.y is None or act == "none":
        return call.dy
    _, c, h, w = call.dy.shape
    operand = Operand((c, h, w), call.dy.stride(), "gradient", act, other_stride=call.y.stride())
    return prologue_kernel.materialize(spec, operand, Pointers(call.dy, call.y))[1]


# --- running statistics -------------------------------------------------------------------------------------


def track(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    batches: Sequence[Tensor],
    stats: Sequence[Tensor],
    momentum: Sequence[float],
    count: Sequence[int],
) -> None:
    """Update the running statistics of every layer in one launch, as :func:`..reference.track` does."""
    with device_guard(stats[0]):
        batchnorm.track(running_mean, running_var, batches, stats, momentum, count)
