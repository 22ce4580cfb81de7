"""Layers of small integers and quarters, for which kernels round nothing but their results.

A product must then equal the exact result, rounded once to its dtype, bit for bit. This detects even a single
operand corrupted by a race, the compiler or a mask, which a norm over millions of elements would hide.
Prologues and epilogues take part: their vectors are small integers, slopes are a quarter, and tanh and
sigmoid occur only as derivatives, computed from saved outputs of 0, ½ and ±1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcgan.kernels.gpu import aten, executor, kernel_for, up_block
from dcgan.kernels.gpu.launcher import Pointers, Product
from dcgan.kernels.gpu.tiles import Problem, Tile
from dcgan.kernels.gpu.tools.layers import outputs
from dcgan.kernels.spec import Backward, Call, Operand, specify

SLOPE = 0.25
GRAIN = 2**-4  # every exact sum is a multiple of this: a quarter of x̂ times a quarter of du
EXACT = 2**24 * GRAIN  # float32 represents every multiple of GRAIN up to this


class Shape(NamedTuple):
    """A layer with its prologue and epilogue in training."""

    transposed: bool
    c_in: int
    c_out: int
    size: int
    stride: int
    padding: int
    in_act: str
    """The prologue's activation; '' without a prologue."""
    stats: bool
    out_act: str
    batch: int
    """Gives several waves and partial tiles; N·H·W of the output satisfies :func:`divides`."""
    centered: bool = True
    """Whether the prologue has its three vectors in addition to the activation."""


SHAPES = {  # one per kernel, with each of the prologues
    "G1": Shape(True, 100, 512, 1, 1, 0, "", True, "none", 333),
    "G2": Shape(True, 512, 256, 4, 2, 1, "relu", True, "none", 333),
    "G4": Shape(True, 128, 64, 16, 2, 1, "relu", True, "none", 85),
    "G5": Shape(True, 64, 1, 32, 2, 1, "relu", False, "tanh", 83),
    "D1": Shape(False, 1, 64, 64, 2, 1, "", False, "leaky_relu", 83),
    "D2": Shape(False, 64, 128, 32, 2, 1, "", True, "none", 85),
    "D3": Shape(False, 128, 256, 16, 2, 1, "leaky_relu", True, "none", 333),
    "D5": Shape(False, 512, 1, 4, 1, 0, "leaky_relu", False, "sigmoid", 333),
    "G2-act": Shape(True, 512, 256, 4, 2, 1, "relu", True, "none", 333, centered=False),
    "D3-act": Shape(False, 128, 256, 16, 2, 1, "leaky_relu", True, "none", 333, centered=False),
}


def divides(count: int) -> bool:
    """Return whether count times the float32 nearest to 1/count is 1 in float32."""
    one = torch.tensor(1.0)
    return bool(count * (one / count) == one)


def shrunk(shape: Shape, batch: int, factor: int) -> Shape:
    """Shrink a layer: ``batch`` images, smaller maps and, in wide layers, channels divided by ``factor``.

    Of the channels that decide between the kernels up and up_block, more than 64 stay so.
    """
    c_in, c_out = (c if c <= 4 else -(-c // factor) for c in (shape.c_in, shape.c_out))
    if shape.stride == 2 and shape.transposed and shape.c_out > up_block.MAX_CHANNELS:
        c_out = up_block.MAX_CHANNELS + 2
    size = shape.size if shape.size <= 4 else max(8, shape.size // 4)
    return shape._replace(c_in=c_in, c_out=c_out, size=size, batch=batch)


class Case(NamedTuple):
    """A product and its expected results."""

    phase: str
    product: Product
    exact: tuple[Tensor, ...]
    """The expected results, in float64."""

    @property
    def problem(self) -> Problem:
        """The product's GEMM sizes."""
        kernel = kernel_for(self.product.spec)
        assert kernel is not None
        return kernel.problem(self.product.spec)


def cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the products of a layer: eval, and the forward, dgrad and wgrad of training.

    Of a layer after a BatchNorm, the dgrad of a network's training follows, with the epilogue 'gradient'. The
    images have three groups in it and in forward, if their number allows.
    """
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
    yield case("eval", forward(call._replace(stats=False, **after), transposed))

    call = call._replace(**vectors)
    trained = forward(call if shape.stats else call._replace(out_act="leaky_relu"), transposed)
    groups = 3 if shape.batch % 3 == 0 else 1
    grouped: tuple[Tensor, ...] = ()
    if call.center is not None:
        of_groups = (signs, (-1, 1, 2), signs)
        grouped = tuple(drawn(values, groups, c_in) for values in of_groups)
        trained = trained._replace(x=Pointers(x, None, *grouped))
    yield case("forward", trained._replace(spec=trained.spec._replace(groups=groups)))

    # du = dy + a + b·(y - mean) is odd and so never 0: its 16-bit rounding is exact even if 1/count is not.
    # float32 keeps more digits of 1/count, so there a is 0.
    y = trained.y.ptr
    count = y.numel() // c_out
    assert divides(count) or not shape.stats, count
    saved_y = nhwc({"tanh": signs, "sigmoid": (0.5, 0.5, 0.5, 1)}.get(shape.out_act, few), *y.shape)
    mean, dmean, dvar = (None, None, None) if not shape.stats else (
        drawn(signs, c_out),
        drawn((-2, 0, 2) if dtype.itemsize == 2 else (0,), c_out) * count,
        drawn(signs, c_out) * count,
    )  # fmt: skip
    back = Backward(
        nhwc((-3, -1, 1, 3), *y.shape), dmean, dvar, x, weight, call.center, call.scale, call.shift,
        call.in_act, None, shape.out_act, saved_y, mean, shape.stats, SLOPE, shape.stride, shape.padding,
        (True, True, call.center is not None, False, False),
    )  # fmt: skip
    dgrad = executor.dgrad(back, transposed, torch.empty_like(x))
    yield case("dgrad", dgrad)
    yield case("wgrad", executor.wgrad(back, transposed))
    if grouped:
        spec, dy = dgrad.spec, back.dy
        functions = {"x": Operand(spec.x.size, dy.stride()), "y": spec.y._replace(function="gradient")}
        spec = spec._replace(**functions, groups=groups)
        yield case("gradient", Product(spec, Pointers(dy), weight, Pointers(dgrad.y.ptr, x, *grouped)))


def forward(call: Call, transposed: bool) -> Product:
    """Return the product of a forward call."""
    spec = specify(call, transposed)
    y = torch.empty_strided(spec.shape, spec.y.stride, dtype=spec.dtype, device=spec.device)
    return executor.fprop(spec, call, y)


def case(phase: str, product: Product) -> Case:
    """Pair a product with its exact results; float32 represents every partial sum, in any order."""
    exact = aten.exact(product)
    assert largest_sum(product) < EXACT
    first = (exact[0] / GRAIN).round() * GRAIN  # a library may compute float64 through a transform
    assert (first - exact[0]).abs().max() < 1e-3 * GRAIN
    return Case(phase, product, (first, *exact[1:]))


def largest_sum(it: Product) -> float:
    """Return the largest sum of the magnitudes of an accumulator's terms."""
    sides = [(it.spec.x, it.x), (it.spec.y, it.y)][: 2 if it.spec.kind == "wgrad" else 1]
    operands = [aten.apply_prologue(operand, t, it.spec.slope).double().abs() for operand, t in sides]
    wide = aten.cast(it, torch.float64)
    weight = None if wide.weight is None else wide.weight.abs()
    return float(aten.convolve(wide._replace(weight=weight), *operands).max())


def difference(of: Case, tile: Tile, sms: int) -> str:
    """Describe how a tile's results differ from the expected ones; '' if they are equal.

    Means, variances and sums over all pixels are divided, or may exceed what float32 represents exactly: they
    need only be correct within float32's rounding.
    """
    got = outputs(of.product, tile, sms)
    expected = of.exact[0].to(got[0].dtype)
    wrong = got[0] != expected
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        found, wanted = got[0][at].item(), expected[at].item()
        return f"{int(wrong.sum())} of {wrong.numel()} numbers: {found} for {wanted} at {list(at)}"
    sums = of.exact[1:]
    for number, (part, exact) in enumerate(zip(got[1:], sums, strict=True)):
        size = exact.norm()
        if of.phase == "forward" and number == 0:
            size = (exact.square() + sums[1]).sum().sqrt()  # a mean, relative to mean and deviation
        off = ((part.double() - exact).norm() / size).item()
        if not off <= 1e-5:
            return f"sum {number} of its epilogue is off by {off:.1e}"
    return ""
