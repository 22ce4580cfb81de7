"""The launches of a network as the kernels see them: shapes without data on the meta device, or real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcgan import models
from dcgan.kernels import gpu
from dcgan.kernels.call import Backward, Call
from dcgan.kernels.gpu import passes, products, reduce, wgrad
from dcgan.kernels.gpu.launch import Launch, Product, Prologue
from dcgan.kernels.gpu.tiles import Problem, Tile

Network = models.Generator | models.Discriminator
PHASES = ("eval", "forward", "dgrad", "wgrad")


WRITTEN = ("out", "y", "partial", "mean", "var", "dcenter", "dscale", "dshift", "dw")
"""Arguments that launches write."""


class Launches(NamedTuple):
    """What one phase of one layer launches, in order."""

    passes: tuple[Launch, ...]  # prologues of their own
    product: Launch
    reduction: Launch | None  # of the tiles' sums or the chunks

    def __call__(self) -> None:
        for launch in self.every():
            launch()

    def every(self) -> Iterator[Launch]:
        """Each of them, in order."""
        yield from (launch for launch in (*self.passes, self.product, self.reduction) if launch is not None)

    def spoil(self) -> None:
        """Makes NaN of all that they write, sums between two launches included."""
        for launch in self.every():
            for name in WRITTEN:
                if (written := launch.arguments.get(f"{name}_ptr")) is not None:
                    written.fill_(math.nan)


class Layer(NamedTuple):
    """One convolution of a network at a batch in one phase: 'eval', or of training one of the others."""

    name: str
    phase: str
    kernel: str
    operation: Product | wgrad.Gradient
    problem: Problem
    launches: Callable[[Tile, int], Launches]
    """With a tile, for a number of multiprocessors."""
    packed: Tensor | None = None


class Convolution(NamedTuple):
    """A convolution with the shapes it has at a batch."""

    name: str
    transposed: bool
    call: Call
    """In eval, without its epilogue."""
    norm: bool
    act: str
    first: bool


def _fill(t: Tensor) -> Tensor:
    return t if t.is_meta else t.normal_()


def _vector(channels: int, device: torch.device) -> Tensor:
    return _fill(torch.empty(channels, device=device))


def _pass(x: Tensor, prologue: Prologue, slope: float) -> tuple[Tensor, tuple[Launch, ...]]:
    """What the product loads instead of x, and the launch that writes it if there is a prologue."""
    if prologue.kind == "none":
        return x, ()
    out = passes.output(x)
    return out, (passes.launch(x, prologue, slope, out),)


def of_product(name: str, phase: str, product: Product) -> Layer:
    """A forward or adjoint product."""
    kernel = gpu.kernel_for(product)
    packed = kernel.pack(product.weight)
    problem = kernel.problem(product)
    x, y, epilogue = product.x, product.y, product.epilogue

    def launches(tile: Tile, processors: int) -> Launches:
        now: Product = product
        before: tuple[Launch, ...] = ()
        if not tile.fused:
            written, before = _pass(x, product.prologue, product.slope)
            now = product._replace(x=written, prologue=Prologue())
        partial, after = None, None
        if epilogue.sums:
            rows = -(-problem.rows // tile.block_m) * kernel.tiles_a_row(product)
            partial = torch.empty(2, rows, y.shape[1], device=x.device)
            vectors = [torch.empty(y.shape[1], device=x.device) for _ in range(3)]
            if epilogue.kind == "statistics":
                group = kernel.tiles_a_row(product)
                count = y.numel() // y.shape[1] // group
                after = reduce.statistics(partial, vectors[0], vectors[1], count, group, tile.block_m)
            else:
                assert epilogue.scale is not None
                after = reduce.sums(partial, epilogue.scale, *vectors)
        return Launches(before, kernel.launch(now, packed, partial, tile), after)

    return Layer(name, phase, kernel.name, product, problem, launches, packed)


def of_gradient(name: str, gradient: wgrad.Gradient, weight: Tensor) -> Layer:
    """The gradient of a weight."""
    problem = wgrad.problem(gradient)

    def launches(tile: Tile, processors: int) -> Launches:
        now = gradient
        before: tuple[Launch, ...] = ()
        if not tile.fused:
            small, first = _pass(gradient.small, gradient.small_prologue, gradient.slope)
            large, second = _pass(gradient.large, gradient.large_prologue, gradient.slope)
            now = gradient._replace(
                small=small, large=large, small_prologue=Prologue(), large_prologue=Prologue()
            )
            before = first + second
        partial = wgrad.partials(now, tile, processors)
        after = reduce.chunks(partial, torch.empty_like(weight))
        return Launches(before, wgrad.launch(now, partial, tile), after)

    return Layer(name, "wgrad", problem.kernel, gradient, problem, launches)


def outputs(layer: Layer, tile: Tile, processors: int) -> tuple[Tensor, ...]:
    """Runs a layer's launches, what they write being NaN before; gives what :func:`.aten.compute` does."""
    launches = layer.launches(tile, processors)
    launches.spoil()
    launches()
    sums: dict[str, Any] = {} if launches.reduction is None else launches.reduction.arguments
    if not isinstance(layer.operation, Product):
        return (sums["dw_ptr"],)
    names = ("mean_ptr", "var_ptr") if "mean_ptr" in sums else ("dshift_ptr", "dscale_ptr")
    return layer.operation.y, *(sums[name] for name in names if name in sums)


def after_pass(layer: Layer) -> Layer:
    """A weight gradient whose du the adjoint's pass has already written."""
    gradient = layer.operation
    assert isinstance(gradient, wgrad.Gradient)
    (small, first), (large, second) = (
        (passes.output(x), Prologue()) if prologue.other is not None else (x, prologue)
        for x, prologue in (
            (gradient.small, gradient.small_prologue),
            (gradient.large, gradient.large_prologue),
        )
    )
    written = gradient._replace(small=small, large=large, small_prologue=first, large_prologue=second)
    return of_gradient(
        layer.name, written, torch.empty(gradient.shape, dtype=small.dtype, device=small.device)
    )


def convolutions(network: Network, batch: int, dtype: torch.dtype, device: torch.device) -> list[Convolution]:
    """Those of ``network``, NHWC inside, the image at the door and the output NCHW."""
    network = network.to(device, dtype)
    modules = list(network.main)
    found: list[Convolution] = []
    shape: tuple[int, ...] = (
        (network.latent_dim, 1, 1)
        if isinstance(network, models.Generator)
        else (network.channels, network.image_size, network.image_size)
    )
    x = _fill(torch.empty(batch, *shape, dtype=dtype, device=device))
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
        y = _fill(gpu.output(call, transposed))
        name = f"{x.shape[1]}→{y.shape[1]} @{x.shape[2]}→{y.shape[2]}"
        found.append(Convolution(name, transposed, call, norm, act, first=not found))
        x = y
    return found


def layers(network: Network, batch: int, dtype: torch.dtype, device: str = "meta") -> list[Layer]:
    """Every convolution of ``network`` in eval, without its epilogue."""
    found = []
    for conv in convolutions(network, batch, dtype, torch.device(device)):
        y = gpu.output(conv.call, conv.transposed)
        found.append(of_product(conv.name, "eval", products.forward(conv.call, conv.transposed, y)))
    return found


def training(
    network: Network, batch: int, dtype: torch.dtype, device: str = "meta", *, input_gradient: bool = False
) -> list[Layer]:
    """The products of a training step's forward and backward, in their order.

    BatchNorm is the statistics of one and the prologue of the next, as in :mod:`dcgan.fast`;
    ``input_gradient``: of the first layer too (a Discriminator's, in the Generator's phase).
    """
    forwards, backwards = [], []
    pending: dict[str, Any] = {}
    where = torch.device(device)
    for conv in convolutions(network, batch, dtype, where):
        call = conv.call._replace(**pending, stats=conv.norm, out_act="none" if conv.norm else conv.act)
        y = _fill(gpu.output(call, conv.transposed))
        forwards.append(of_product(conv.name, "forward", products.forward(call, conv.transposed, y)))
        mean, dmean, dvar = (_vector(y.shape[1], where) if conv.norm else None for _ in range(3))
        back = Backward(
            _fill(torch.empty_like(y)), dmean, dvar, call.x, call.weight, call.center, call.scale,
            call.shift, call.in_act, None, call.out_act, y, mean, conv.norm, call.slope, call.stride,
            call.padding, (True, True, call.center is not None, False, False),
        )  # fmt: skip
        wanted = []
        if not conv.first or input_gradient:
            dx = torch.empty_like(call.x)
            wanted.append(of_product(conv.name, "dgrad", products.adjoint(back, conv.transposed, dx)))
        gradient = products.weight_gradient(back, conv.transposed)
        wanted.append(of_gradient(conv.name, gradient, call.weight))
        backwards.append(wanted)
        pending = {}
        if conv.norm:
            vectors = {name: _vector(y.shape[1], where) for name in ("center", "scale", "shift")}
            pending = vectors | {"in_act": conv.act}
    return forwards + [layer for wanted in reversed(backwards) for layer in wanted]
