"""How 16-bit gradients through a BatchNorm are rounded: the data, every way to compute them, their errors.

The network is a layer with a BatchNorm of the reference networks, and the layer after it: convolution,
BatchNorm, activation, convolution. Geometry and numbers of pixels are those of training; channels are few.
The gradient of the first convolution's output, du, has three terms, g and those of the mean and the variance:

    du = s·(g - Σ g/M - (y - mean)·rsqrt(var + eps)·dgamma/M)

It is seen through what is computed from it, the gradients of the input and of the weight. The gradient of the
weight, a sum over M pixels, grows with √M where du has random signs, but with M where du has the same error
in all pixels, as it has where Σ g/M is lost, if the inputs have a mean, as activations have.

Each result is compared with float64, in which only the signs that the activation sees are given: those of the
result's own forward. As y is rounded, a few differ from the exact ones, in eager as well, and each that does
changes the gradients by more than all roundings of the backward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dcgan import models
from dcgan.kernels import reference
from dcgan.kernels.spec import Backward, TrainCall
from dcgan.kernels.train_chain import one_by_one
from tests.support.train_chains import ACTS, BACKWARD_OP, OP, Eager, Layer, arguments, build, stages

DTYPES = (torch.bfloat16, torch.float16)
BATCHES = (64, 1024)
CHANNELS = (4, 8, 4)
"""Of the input, of the BatchNorm and of the output."""
BOUND = 1.2
"""Of the error of a result relative to eager's."""
LOST_FROM = {torch.bfloat16: 16_384, torch.float16: 65_536}
"""The number of pixels from which rounding twice exceeds BOUND with :data:`FRACTION`, in every layer but G1.

It grows with 1/eps: of random gradients of M pixels, the terms of the mean and of the variance are of order
g/√M. Where they exceed the spacing of 16-bit numbers near g, the second rounding rounds different pixels
differently, and its errors average out. In bfloat16 the bound is first exceeded at 4,096 pixels, by little.
G1's input is noise of mean zero, one pixel an image, so that its weight gradient adds up N terms a tap.
"""
FRACTION, DEVIATION = "a fraction of a unit", "a standard deviation"
"""Of dy's means: eps, so that the term of the mean is less than a unit in the last place of g, or 1."""


class Norm(NamedTuple):
    """A BatchNorm of a reference network, of 64×64 images, with the layers around it."""

    name: str
    size: int
    """Height and width of the first convolution's input."""
    pixels: int
    """Pixels of an image at the BatchNorm."""
    layers: tuple[Layer, Layer]

    def __str__(self) -> str:
        return self.name


def _layer(convolution: Any, channels: int, act: str) -> Layer:
    transposed = isinstance(convolution, nn.ConvTranspose2d)
    stride, padding = convolution.stride[0], convolution.padding[0]
    return Layer(transposed, channels, convolution.kernel_size, stride, padding, act != "none", act=act)


def _norms(kind: str, network: Any, x: Tensor) -> Iterator[Norm]:
    """Yield the BatchNorms of a reference network, numbered from its input, given an input on meta."""
    modules, before, number = list(network.main), x, 0
    for i, module in enumerate(modules):
        y = module(x)
        if isinstance(module, nn.BatchNorm2d):
            number += 1
            first = _layer(modules[i - 1], CHANNELS[1], ACTS[type(modules[i + 1])])
            second = _layer(modules[i + 2], CHANNELS[2], "none")
            yield Norm(f"{kind}{number}", before.shape[2], y.shape[2] * y.shape[3], (first, second))
        before, x = x, y


with torch.device("meta"):
    NORMS = (
        *_norms("G", models.Generator(), torch.empty(1, 100, 1, 1)),
        *_norms("D", models.Discriminator(), torch.empty(1, 1, 64, 64)),
    )
"""4×4 to 32×32 pixels an image in the Generator, 16×16 to 4×4 in the Discriminator."""


class Problem(NamedTuple):
    """A network, its input and the gradient of its output; everything that products read is 16-bit."""

    network: Eager
    """convolution, BatchNorm, activation, convolution: of float32, with weights that are 16-bit numbers."""
    x: Tensor
    dy: Tensor

    @property
    def call(self) -> TrainCall:
        """The call of the training chain, with float32 weights and their float32 gradients."""
        return TrainCall(self.x, stages(self.network), models.LEAKY_SLOPE)


def draw(norm: Norm, batch: int, dtype: torch.dtype, mean: str) -> Problem:
    """Draw a problem. The input is an activation, or noise in the Generator's first layer.

    dy is scaled such that no weight gradient overflows float16, as a scaler of the loss would.
    """
    network = build(CHANNELS[0], norm.layers, models.LEAKY_SLOPE)
    means = (torch.finfo(dtype).eps if mean == FRACTION else 1.0) * torch.randn(CHANNELS[2], 1, 1)
    with torch.no_grad():
        for convolution in (network[0], network[3]):
            convolution.weight.copy_(convolution.weight.to(dtype))  # type: ignore[operator, arg-type]
        x = torch.randn(batch, CHANNELS[0], norm.size, norm.size)
        if norm.size > 1:
            x = network[2](x)
        dy = (torch.randn(batch, *network(x[:1]).shape[1:]) + means) / 32
    x, dy = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return Problem(network, x, dy)


class Gradients(NamedTuple):
    """The gradients of the input and of the first weight that are computed from du."""

    x: Tensor
    weight: Tensor

    def squares(self, other: Gradients) -> list[float]:
        """Return the squared norms of the differences."""
        pairs = zip(self, other, strict=True)
        return [float((a.double() - b.double()).square().sum()) for a, b in pairs]


class _Signed(torch.autograd.Function):
    """ReLU or leaky ReLU of a tensor with these signs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(positive)
        ctx.slope = slope
        return torch.where(positive, x, slope * x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (positive,) = ctx.saved_tensors
        return torch.where(positive, dy, ctx.slope * dy), None, None


def exact(problem: Problem, positive: Tensor) -> Gradients:
    """Return the gradients in float64, given the signs that the activation sees."""
    first, norm, act, second = copy.deepcopy(problem.network).double()
    x = problem.x.double().requires_grad_()
    hidden = _Signed.apply(norm(first(x)), positive, getattr(act, "negative_slope", 0.0))
    found = torch.autograd.grad(second(hidden), [x, first.weight], problem.dy.double())
    return Gradients(*found)


class _Rounded(torch.autograd.Function):
    """An edge between two modules: its value and its gradient are stored in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy.to(ctx.dtype).to(dy.dtype), None


def eager(problem: Problem) -> tuple[Gradients, Tensor]:
    """Return the gradients as PyTorch's modules under autocast compute them, and the activation's signs.

    The modules run in float32, the BatchNorm in float64, with every edge between them rounded to 16 bits, in
    both directions. That is autocast on a GPU: products of 16-bit operands with float32 accumulation, a
    BatchNorm of a 16-bit map with float32 statistics. CPUs compute the same in bfloat16, which
    ``test_eager_is_pytorchs`` checks, but accumulate some sums in float16. The float64 BatchNorm is free of
    the errors of its sums over a million pixels, which differ between PyTorch's kernels, and only tightens
    the bound. The weight's gradient, which autocast rounds to 16 bits, is not rounded here.
    """
    (first, norm, act, second), dtype = copy.deepcopy(problem.network), problem.x.dtype
    x = problem.x.float().requires_grad_()
    y = _Rounded.apply(first(x), dtype)
    normalised = _Rounded.apply(norm.double()(y.double()).float(), dtype)
    positive = normalised.detach() > 0
    hidden = _Rounded.apply(act(normalised), dtype)
    dx, dweight = torch.autograd.grad(second(hidden), [x, first.weight], problem.dy.float())
    return Gradients(dx.to(dtype), dweight), positive


def chain(problem: Problem) -> tuple[Gradients, Tensor]:
    """Return the gradients by the training chain on the current engine, and the activation's signs."""
    call = problem.call
    needs = [True, True, *[False] * 5]  # x, and the weight, gamma and beta of each layer
    with torch.no_grad():
        _, saved, stats, packed = OP(*arguments(call))
        positive = reference._layer_input(call, 1, saved[0], stats[0], call.slope) > 0
        dx, dweight, *_ = BACKWARD_OP(problem.dy, None, saved, stats, packed, needs, *arguments(call))
    return Gradients(dx, dweight[0]), positive


def single_ops(problem: Problem) -> Gradients:
    """Return the gradients by single ops on the current engine, whose weight gradients are 16-bit.

    They store s·g in 16 bits, and add the other terms to that.
    """
    x = problem.x.clone(memory_format=torch.preserve_format).requires_grad_()
    first, second = problem.call.stages
    second = second._replace(weight=second.weight.detach())
    y, _ = one_by_one(problem.call._replace(x=x, stages=[first, second]))
    return Gradients(*torch.autograd.grad(y, [x, first.weight], problem.dy))


@pytest.fixture
def rounded_du(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference round the du of a single op to 16 bits, as an engine's product rounds its operands.

    Unrounded, du has one rounding as well, that of s·g, and the reference is as good as eager.
    """
    original = reference.backward

    def backward(call: Backward, transposed: bool) -> reference.OptionalGradients:
        if call.stats:
            assert call.y is not None
            assert call.mean is not None
            assert call.dmean is not None
            assert call.dvar is not None
            mean, dmean, dvar = (v[:, None, None] for v in (call.mean, call.dmean, call.dvar))
            count = call.y.numel() // call.y.shape[1]
            du = call.dy.float() + dmean / count + dvar * 2 / count * (call.y.float() - mean)
            call = call._replace(dy=du.to(call.dy.dtype), dmean=None, dvar=None)
        return original(call, transposed)

    monkeypatch.setattr(reference, "backward", backward)


class Errors(NamedTuple):
    """Errors ‖result - exact‖/‖exact‖ of the gradients of x and the weight, over several draws."""

    eager: list[float]
    eager_rounded: list[float]
    """With the weight's gradient rounded to 16 bits."""
    chain: list[float]
    single: list[float]

    @property
    def ratios(self) -> list[float]:
        """The chain's errors relative to eager's."""
        return [a / b for a, b in zip(self.chain, self.eager, strict=True)]

    @property
    def single_ratio(self) -> float:
        """The error of the single ops' weight gradient relative to that of eager's, both 16-bit."""
        return self.single[1] / self.eager_rounded[1]


def measure(norm: Norm, batch: int, dtype: torch.dtype, mean: str, draws: int) -> Errors:
    """Return the errors of every way to compute the gradients, over ``draws`` problems."""
    columns = [[0.0, 0.0] for _ in range(5)]
    for _ in range(draws):
        problem = draw(norm, batch, dtype, mean)
        of_eager, eager_signs = eager(problem)
        of_chain, signs = chain(problem)
        of_single = single_ops(problem)
        want = exact(problem, eager_signs)
        own = want if torch.equal(signs, eager_signs) else exact(problem, signs)
        rounded = of_eager._replace(weight=of_eager.weight.to(dtype))
        zero = Gradients(*(torch.zeros_like(t) for t in want))
        pairs = [(of_eager, want), (rounded, want), (of_chain, own), (of_single, own), (want, zero)]
        for column, (got, expected) in zip(columns, pairs, strict=True):
            for i, square in enumerate(got.squares(expected)):
                column[i] += square
    *errors, size = columns
    return Errors(*([(e / s) ** 0.5 for e, s in zip(error, size, strict=True)] for error in errors))


def assert_rounded_once(errors: Errors) -> None:
    """Check that the chain's errors are at most BOUND times eager's."""
    for name, found, of_eager in zip(("x", "the weight"), errors.chain, errors.eager, strict=True):
        assert found <= BOUND * of_eager, (
            f"gradient of {name}: error {found:.2e}, eager's {of_eager:.2e}, ratio {found / of_eager:.2f}"
        )
