"""Build the kernel launches of every layer of a network, on the meta device or with real tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcgan import models
from dcgan.kernels import gpu
from dcgan.kernels.call import Backward, Call
from dcgan.kernels.gpu import lowering, prologue_kernel, reduce, wgrad
from dcgan.kernels.gpu.launch import Launch, Product, Prologue
from dcgan.kernels.gpu.tiles import Problem, Tile

Network = models.Generator | models.Discriminator
PHASES = ("eval", "forward", "dgrad", "wgrad")

OUTPUT_ARGUMENTS = ("out", "y", "partial", "mean", "var", "dcenter", "dscale", "dshift", "dw")
"""Kernel arguments that launches write, without their ``_ptr`` suffix."""


class Launches(NamedTuple):
    """The launches of one phase of one layer, in order."""

    prologues: tuple[Launch, ...]  # standalone prologue kernels
    product: Launch
    reduction: Launch | None  # of per-tile partial sums or split-K partials

    def __call__(self) -> None:
        for launch in self.ordered():
            launch()

    def ordered(self) -> Iterator[Launch]:
        """Yield all launches in order."""
        yield from (
            launch for launch in (*self.prologues, self.product, self.reduction) if launch is not None
        )

    def poison(self) -> None:
        """Fill everything that the launches write with NaN, including intermediate partial sums."""
        for launch in self.ordered():
            for name in OUTPUT_ARGUMENTS:
                if (output := launch.arguments.get(f"{name}_ptr")) is not None:
                    output.fill_(math.nan)


class Layer(NamedTuple):
    """One convolution of a network at one batch size in one of PHASES."""

    name: str
    phase: str
    kernel: str
    operation: Product | wgrad.Gradient
    problem: Problem
    launches: Callable[[Tile, int], Launches]
    """Builds the launches for a tile and a number of SMs."""
    packed: Tensor | None = None
    """The packed weight of a product."""


class Convolution(NamedTuple):
    """A convolution with its shapes at one batch size."""

    name: str
    transposed: bool
    call: Call
    """The call in eval mode, without its epilogue."""
    norm: bool
    act: str
    """Name of the activation that follows."""
    first: bool
    """Whether it is the first of its network."""


def _randomize(t: Tensor) -> Tensor:
    return t if t.is_meta else t.normal_()


def _vector(channels: int, device: torch.device) -> Tensor:
    return _randomize(torch.empty(channels, device=device))


def _standalone_prologue(x: Tensor, prologue: Prologue, slope: float) -> tuple[Tensor, tuple[Launch, ...]]:
    """Return the operand that replaces x, and the launch that materializes it if there is a prologue."""
    if prologue.kind == "none":
        return x, ()
    out = prologue_kernel.output(x)
    return out, (prologue_kernel.launch(x, prologue, slope, out),)


def product_layer(name: str, phase: str, product: Product) -> Layer:
    """Build the layer of a forward or adjoint (dgrad) product."""
    kernel = gpu.kernel_for(product)
    packed = kernel.pack(product.weight)
    problem = kernel.problem(product)
    x, y, epilogue = product.x, product.y, product.epilogue

    def launches(tile: Tile, sms: int) -> Launches:
        inner: Product = product
        before: tuple[Launch, ...] = ()
        if not tile.fused:
            materialized, before = _standalone_prologue(x, product.prologue, product.slope)
            inner = product._replace(x=materialized, prologue=Prologue())
        partial, after = None, None
        if epilogue.sums:
            rows = -(-problem.rows // tile.block_m) * kernel.partial_rows_per_row_tile(product)
            partial = torch.empty(2, rows, y.shape[1], device=x.device)
            vectors = [torch.empty(y.shape[1], device=x.device) for _ in range(3)]
            if epilogue.kind == "statistics":
                group = kernel.partial_rows_per_row_tile(product)
                count = y.numel() // y.shape[1] // group
                after = reduce.statistics(partial, vectors[0], vectors[1], count, group, tile.block_m)
            else:
                assert epilogue.scale is not None
                after = reduce.sums(partial, epilogue.scale, *vectors)
        return Launches(before, kernel.launch(inner, packed, partial, tile), after)

    return Layer(name, phase, kernel.name, product, problem, launches, packed)


def gradient_layer(name: str, gradient: wgrad.Gradient, weight: Tensor) -> Layer:
    """Build the layer of a weight gradient (wgrad)."""
    problem = wgrad.problem(gradient)

    def launches(tile: Tile, sms: int) -> Launches:
        inner = gradient
        before: tuple[Launch, ...] = ()
        if not tile.fused:
            small, first = _standalone_prologue(gradient.small, gradient.small_prologue, gradient.slope)
            large, second = _standalone_prologue(gradient.large, gradient.large_prologue, gradient.slope)
            inner = gradient._replace(
                small=small, large=large, small_prologue=Prologue(), large_prologue=Prologue()
            )
            before = first + second
        partial = wgrad.partials(inner, tile, sms)
        after = reduce.split_k(partial, torch.empty_like(weight))
        return Launches(before, wgrad.launch(inner, partial, tile), after)

    return Layer(name, "wgrad", problem.kernel, gradient, problem, launches)


def outputs(layer: Layer, tile: Tile, sms: int) -> tuple[Tensor, ...]:
    """Poison a layer's outputs, run its launches and return the same tensors as :func:`.aten.compute`."""
    launches = layer.launches(tile, sms)
    launches.poison()
    launches()
    sums: dict[str, Any] = {} if launches.reduction is None else launches.reduction.arguments
    if not isinstance(layer.operation, Product):
        return (sums["dw_ptr"],)
    names = ("mean_ptr", "var_ptr") if "mean_ptr" in sums else ("dshift_ptr", "dscale_ptr")
    return layer.operation.y, *(sums[name] for name in names if name in sums)


def with_materialized_du(layer: Layer) -> Layer:
    """Return the weight gradient that reads the du which dgrad's standalone prologue has materialized."""
    gradient = layer.operation
    assert isinstance(gradient, wgrad.Gradient)
    (small, first), (large, second) = (
        (prologue_kernel.output(x), Prologue()) if prologue.other is not None else (x, prologue)
        for x, prologue in (
            (gradient.small, gradient.small_prologue),
            (gradient.large, gradient.large_prologue),
        )
    )
    after = gradient._replace(small=small, large=large, small_prologue=first, large_prologue=second)
    return gradient_layer(
        layer.name, after, torch.empty(gradient.shape, dtype=small.dtype, device=small.device)
    )


def convolutions(network: Network, batch: int, dtype: torch.dtype, device: torch.device) -> list[Convolution]:
    """Return the convolutions of ``network``: NHWC between layers, NCHW for input image and output."""
    network = network.to(device, dtype)
    modules = list(network.main)
    found: list[Convolution] = []
    shape: tuple[int, ...] = (
        (network.latent_dim, 1, 1)
        if isinstance(network, models.Generator)
        else (network.channels, network.image_size, network.image_size)
    )
    x = _randomize(torch.empty(batch, *shape, dtype=dtype, device=device))
    for i, conv in enumerate(modules):
        if not isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            continue
        norm = isinstance(modules[i + 1], nn.BatchNorm2d)
        act = type(modules[i + 1 + norm]).__name__.lower().replace("leakyrelu", "leaky_relu")
        transposed = isinstance(conv, nn.ConvTranspose2d)
        padding = conv.padding[0]
        assert isinstance(padding, int)
        last = i + 2 + norm == len(modules)
        weight = conv.weight.detach()
        call = Call(x, weight, stride=conv.stride[0], padding=padding, channels_last=not last)
        y = _randomize(gpu.output(call, transposed))
        name = f"{x.shape[1]}→{y.shape[1]} @{x.shape[2]}→{y.shape[2]}"
        found.append(Convolution(name, transposed, call, norm, act, first=not found))
        x = y
    return found


def layers(network: Network, batch: int, dtype: torch.dtype, device: str = "meta") -> list[Layer]:
    """Return every convolution of ``network`` in eval mode, without its epilogue."""
    found = []
    for conv in convolutions(network, batch, dtype, torch.device(device)):
        y = gpu.output(conv.call, conv.transposed)
        found.append(product_layer(conv.name, "eval", lowering.forward(conv.call, conv.transposed, y)))
    return found


def training(
    network: Network, batch: int, dtype: torch.dtype, device: str = "meta", *, input_gradient: bool = False
) -> list[Layer]:
    """Return the products of a training step's forward and backward, in execution order.

    As in :mod:`dcgan.fast`, a BatchNorm is split into the statistics epilogue of one layer and the prologue
    of the next. ``input_gradient`` adds the dgrad of the first layer, which the Discriminator needs in the
    Generator's update.
    """
    forwards, backwards = [], []
    pending: dict[str, Any] = {}
    where = torch.device(device)
    for conv in convolutions(network, batch, dtype, where):
        call = conv.call._replace(**pending, stats=conv.norm, out_act="none" if conv.norm else conv.act)
        y = _randomize(gpu.output(call, conv.transposed))
        forwards.append(product_layer(conv.name, "forward", lowering.forward(call, conv.transposed, y)))
        mean, dmean, dvar = (_vector(y.shape[1], where) if conv.norm else None for _ in range(3))
        back = Backward(
            _randomize(torch.empty_like(y)), dmean, dvar, call.x, call.weight, call.center, call.scale,
            call.shift, call.in_act, None, call.out_act, y, mean, conv.norm, call.slope, call.stride,
            call.padding, (True, True, call.center is not None, False, False),
        )  # fmt: skip
        wanted = []
        if not conv.first or input_gradient:
            dx = torch.empty_like(call.x)
            wanted.append(product_layer(conv.name, "dgrad", lowering.adjoint(back, conv.transposed, dx)))
        gradient = lowering.weight_gradient(back, conv.transposed)
        wanted.append(gradient_layer(conv.name, gradient, call.weight))
        backwards.append(wanted)
        pending = {}
        if conv.norm:
            vectors = {name: _vector(y.shape[1], where) for name in ("center", "scale", "shift")}
            pending = vectors | {"in_act": conv.act}
    return forwards + [layer for wanted in reversed(backwards) for layer in wanted]
