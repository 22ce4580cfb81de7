"""Layers whose numbers are integers, or quarters, so small that kernels have nothing to round but results.

A product's result is then to be equal to the exact one, bit for bit, after one rounding to its dtype. Even a
single operand that a race, the compiler or a mask has spoilt shows, where a norm over millions of elements
would hide it. Prologues and epilogues take part: their vectors are small integers, slopes a quarter, and tanh
and sigmoid occur as derivatives alone, told from outputs of 0, ½ and ±1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.layers import Layer, of_gradient, of_product, outputs
from dcgan.kernels import gpu
from dcgan.kernels.call import Backward, Call
from dcgan.kernels.gpu import aten, products, tiles
from dcgan.kernels.gpu.launch import Product

SLOPE = 0.25
GRAIN = 2**-4  # what every exact sum is a multiple of: a quarter of x̂ times a quarter of du
EXACT = 2**24 * GRAIN  # float32 holds every multiple of GRAIN up to there


class Shape(NamedTuple):
    """A layer, and what is around it in training."""

    transposed: bool
    c_in: int
    c_out: int
    size: int
    stride: int
    padding: int
    in_act: str
    """Of the prologue; '' without one."""
    stats: bool
    out_act: str
    batch: int
    """Of several waves of programs, that fills no tile and has an exact :func:`count`."""
    centered: bool = True
    """Whether the prologue has its three vectors besides the activation."""


SHAPES = {  # one a kernel, with each of the prologues
    "G1": Shape(True, 100, 512, 1, 1, 0, "", True, "none", 333),
    "G2": Shape(True, 512, 256, 4, 2, 1, "relu", True, "none", 333),
    "G5": Shape(True, 64, 1, 32, 2, 1, "relu", False, "tanh", 83),
    "D1": Shape(False, 1, 64, 64, 2, 1, "", False, "leaky_relu", 83),
    "D2": Shape(False, 64, 128, 32, 2, 1, "", True, "none", 85),
    "D3": Shape(False, 128, 256, 16, 2, 1, "leaky_relu", True, "none", 333),
    "D5": Shape(False, 512, 1, 4, 1, 0, "leaky_relu", False, "sigmoid", 333),
    "G2-act": Shape(True, 512, 256, 4, 2, 1, "relu", True, "none", 333, centered=False),
    "D3-act": Shape(False, 128, 256, 16, 2, 1, "leaky_relu", True, "none", 333, centered=False),
}


def divides(count: int) -> bool:
    """Whether count times the float32 nearest to 1/count is 1 in float32."""
    one = torch.tensor(1.0)
    return bool(count * (one / count) == one)


def shrunk(shape: Shape, batch: int, factor: int) -> Shape:
    """With so many images, smaller ones, and of wide layers a ``factor`` fewer channels."""
    c_in, c_out = (c if c <= 4 else -(-c // factor) for c in (shape.c_in, shape.c_out))
    size = shape.size if shape.size <= 4 else max(8, shape.size // 4)
    return shape._replace(c_in=c_in, c_out=c_out, size=size, batch=batch)


class Case(NamedTuple):
    """A launch, and what it is to give."""

    layer: Layer
    exact: tuple[Tensor, ...]
    """In float64."""


def cases(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The launches of a layer: eval, and of training the forward, dgrad and wgrad."""
    generator = torch.Generator().manual_seed(0)

    def drawn(values: Sequence[float], *size: int, of: torch.dtype = torch.float32) -> Tensor:
        at = torch.randint(len(values), size, generator=generator)
        return torch.tensor(values)[at].to(device, of)

    def nhwc(values: Sequence[float], *size: int) -> Tensor:
        return drawn(values, *size, of=dtype).contiguous(memory_format=torch.channels_last)

    transposed, c_in, c_out, size = shape[:4]
    few, signs = (-2, -1, 0, 1, 2), (-1, 0, 1)
    x = nhwc(few, shape.batch, c_in, size, size)
    weight = drawn(few, *((c_in, c_out) if transposed else (c_out, c_in)), 4, 4, of=dtype)
    vectors: dict[str, Any] = {"in_act": shape.in_act or "none"}
    if shape.in_act and shape.centered:
        center, scale, shift = drawn(signs, c_in), drawn((-1, 1, 2), c_in), drawn(signs, c_in)
        vectors |= {"center": center, "scale": scale, "shift": shift}
    call = Call(x, weight, stats=shape.stats, slope=SLOPE, stride=shape.stride, padding=shape.padding)

    act = "relu" if transposed else "leaky_relu"
    after = {"out_scale": drawn((-1, 1, 2), c_out), "out_shift": drawn(signs, c_out), "out_act": act}
    y = gpu.output(call, transposed)
    yield case(of_product(name, "eval", products.forward(call._replace(stats=False, **after), transposed, y)))

    call = call._replace(**vectors)
    forward = call if shape.stats else call._replace(out_act="leaky_relu")
    yield case(of_product(name, "forward", products.forward(forward, transposed, torch.empty_like(y))))

    # What du is made of, dy + a + b·(y - mean), is odd and so never 0: 1/count need not be exact for 16 bits
    # to be. float32 keeps more of it, and has no a.
    count = y.numel() // c_out
    assert divides(count) or not shape.stats, count
    kept = nhwc({"tanh": signs, "sigmoid": (0.5, 0.5, 0.5, 1)}.get(shape.out_act, few), *y.shape)
    mean, dmean, dvar = (None, None, None) if not shape.stats else (
        drawn(signs, c_out),
        drawn((-2, 0, 2) if dtype.itemsize == 2 else (0,), c_out) * count,
        drawn(signs, c_out) * count,
    )  # fmt: skip
    back = Backward(
        nhwc((-3, -1, 1, 3), *y.shape), dmean, dvar, x, weight, call.center, call.scale, call.shift,
        call.in_act, None, shape.out_act, kept, mean, shape.stats, SLOPE, shape.stride, shape.padding,
        (True, True, call.center is not None, False, False),
    )  # fmt: skip
    yield case(of_product(name, "dgrad", products.adjoint(back, transposed, torch.empty_like(x))))
    # In float32, where a sum over all pixels neither overflows nor is rounded.
    yield case(of_gradient(name, products.weight_gradient(back, transposed), weight.float()))


def case(layer: Layer) -> Case:
    """A layer with its exact results; whatever the order of its sums, float32 holds each of them."""
    exact = aten.exact(layer.operation)
    assert largest_sum(layer.operation) < EXACT
    first = (exact[0] / GRAIN).round() * GRAIN  # a library's float64 may come by way of a transform
    assert (first - exact[0]).abs().max() < 1e-3 * GRAIN
    return Case(layer, (first, *exact[1:]))


def largest_sum(it: Any) -> float:
    """The largest sum of the magnitudes of an accumulator's terms."""
    if isinstance(it, Product):
        x = aten.prepared(it.x, it.prologue, it.slope).double().abs()
        return float(aten.convolution(x, it._replace(weight=it.weight.double().abs(), y=it.y.double())).max())
    small = aten.prepared(it.small, it.small_prologue, it.slope).double().abs()
    large = aten.prepared(it.large, it.large_prologue, it.slope).double().abs()
    return float(aten.convolution_weight(small, large, it).max())


def difference(of: Case, tile: tiles.Tile, processors: int) -> str:
    """What is not as it should be of a tile's results; '' if they are equal.

    Means, variances and sums over all pixels are divided, or may exceed what float32 holds: they are to be
    right within float32's rounding.
    """
    got = outputs(of.layer, tile, processors)
    expected = of.exact[0].to(got[0].dtype)
    wrong = got[0] != expected
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        found, right = got[0][at].item(), expected[at].item()
        return f"{int(wrong.sum())} of {wrong.numel()} numbers: {found} for {right} at {list(at)}"
    sums = of.exact[1:]
    for number, (part, exact) in enumerate(zip(got[1:], sums, strict=True)):
        size = exact.norm()
        if of.layer.phase == "forward" and number == 0:
            size = (exact.square() + sums[1]).sum().sqrt()  # a mean beside its deviation
        off = ((part.double() - exact).norm() / size).item()
        if not off <= 1e-5:
            return f"sum {number} of its epilogue is off by {off:.1e}"
    return ""
