"""Gradients through BatchNorms in 16 bits, by the Triton kernels, with the numbers of pixels of training.

The kernels between two products, from the partial sums of a product's tiles to du and x̂, and whole chains;
:mod:`tests.support.rounding` describes the data and the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dcgan import models
from dcgan.kernels import ops
from dcgan.kernels.gpu import batchnorm, cost_model, launcher, prologue_kernel, tuning
from dcgan.kernels.gpu.launcher import Pointers
from dcgan.kernels.gpu.tiles import Problem, Tile
from dcgan.kernels.spec import Call, Operand, specify
from tests.support.rounding import (
    BATCHES,
    BOUND,
    DTYPES,
    FRACTION,
    LOST_FROM,
    NORMS,
    Norm,
    assert_rounded_once,
    measure,
)
from tests.support.tolerance import relative

COLUMNS = 16
TILE_ROWS = 128
EPS = 1e-5


class Layer(NamedTuple):
    """A BatchNorm's input y and g, the gradient of its output, in float32 [M, C]; gamma and beta [C]."""

    y: Tensor
    g: Tensor
    gamma: Tensor
    beta: Tensor


def draw(pixels: int, dtype: torch.dtype) -> Layer:
    """Draw a layer whose term of the mean is less than a unit in the last place of g."""
    c = 32 if pixels <= 2**16 else 8
    y = torch.randn(c) + (0.5 + torch.rand(c)) * torch.randn(pixels, c)
    g = torch.randn(pixels, c) + torch.finfo(dtype).eps * torch.randn(c)
    return Layer(y, g, 1 + 0.3 * torch.randn(c), 0.3 * torch.randn(c))


def as_map(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of pixels [M, C] as a channels_last map [1, C, M/32, 32] of the dtype; a copy."""
    return t.to(dtype, copy=True).view(1, -1, 32, t.shape[1]).permute(0, 3, 1, 2)


def as_rows(t: Tensor) -> Tensor:
    """Return a map as rows of pixels, in float64."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]).double()


def du_of(y: Tensor, g: Tensor, gamma: Tensor) -> Tensor:
    """Return du in float64 from y and g, by definition."""
    y, g = y.double(), g.double()
    var, mean = torch.var_mean(y, 0, correction=0)
    root = (var + EPS).rsqrt()
    normalised = (y - mean) * root
    return gamma.double() * root * (g - g.mean(0) - normalised * (g * normalised).mean(0))


def tiles_of(t: Tensor) -> Tensor:
    """Return rows of pixels as [tiles, TILE_ROWS, C], in float64."""
    return t.double().view(-1, TILE_ROWS, t.shape[1])


def forward(layer: Layer) -> Tensor:
    """Return stats from the partial statistics that a product's epilogue leaves of the unrounded y."""
    tiles = tiles_of(layer.y)
    means = tiles.mean(1)
    squares, counts = (tiles - means[:, None]).square().sum(1), torch.full_like(means, TILE_ROWS)
    partial = torch.stack([means, squares, counts]).float()
    stats = torch.full((4, 1, layer.y.shape[1]), float("nan"))
    batchnorm.forward(partial, layer.gamma, layer.beta, EPS, stats)
    return stats


def backward(layer: Layer, stats: Tensor, y: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return du, x̂, dgamma and dbeta from the partial sums that a product's epilogue leaves of g."""
    of_tiles = tiles_of(layer.g)
    centred = tiles_of(as_rows(y) - stats[0])
    sums = torch.stack([of_tiles.sum(1), (of_tiles * centred).sum(1)]).float()
    coefficients = torch.full_like(stats[:2], float("nan"))
    dgamma, dbeta = torch.full_like(stats[:2, 0], float("nan"))
    batchnorm.backward(sums, stats, coefficients, dgamma, dbeta, len(layer.g), EPS)
    du, x = as_map(layer.g, y.dtype), torch.full_like(y, float("nan"))
    batchnorm.apply(du, y, stats, coefficients, x, act, models.LEAKY_SLOPE)
    return du, x, dgamma, dbeta


def du_of_single_ops(layer: Layer, stats: Tensor, y: Tensor, dgamma: Tensor, dbeta: Tensor) -> Tensor:
    """Return du as single ops compute it: s·g in 16 bits, to which a product's prologue adds the rest."""
    mean, var, scale, _ = stats[:, 0]
    dx = as_map(layer.g * scale, y.dtype)
    spec = specify(Call(dx, dx.new_zeros(1, dx.shape[1], 4, 4)), False)
    operand = Operand(tuple(dx.shape[1:]), dx.stride(), "statistics", "none", True, True, y.stride())
    vectors = mean, -0.5 * layer.gamma * dgamma / (var + EPS), -scale * dbeta  # mean, dvar, dmean
    return prologue_kernel.materialize(spec, operand, Pointers(dx, y, *vectors))[1]


def counts() -> list[Any]:
    """Return the numbers of pixels of all layers and batches; the slow ones are above 16,384."""
    fast = {n for n in (64 * norm.pixels for norm in NORMS) if n <= 16_384}
    every = sorted({batch * norm.pixels for norm in NORMS for batch in BATCHES})
    return [pytest.param(n, marks=[] if n in fast else [pytest.mark.slow]) for n in every]


@pytest.mark.parametrize("pixels", counts())
def test_statistics(pixels: int) -> None:
    """The sum of up to 8,192 tiles' partial statistics is accurate to float32."""
    layer = draw(pixels, torch.bfloat16)
    mean, var, scale, shift = forward(layer)[:, 0]
    want_var, want_mean = torch.var_mean(layer.y.double(), 0, correction=0)
    assert ((mean - want_mean).abs() <= 1e-6 * (want_var.sqrt() + want_mean.abs())).all()
    assert relative(var, want_var) <= 1e-6
    assert relative(scale, layer.gamma * (want_var + EPS).rsqrt()) <= 1e-6
    assert torch.equal(shift, layer.beta)


@pytest.mark.parametrize(("dtype", "act"), [(torch.bfloat16, "relu"), (torch.float16, "leaky_relu")], ids=str)
@pytest.mark.parametrize("pixels", counts())
def test_gradients(pixels: int, dtype: torch.dtype, act: str) -> None:
    """du, and what a weight gradient makes of it, sums of its products with inputs that have a mean; x̂."""
    layer = draw(pixels, dtype)
    y, stats = as_map(layer.y, dtype), forward(layer)
    du, x_hat, dgamma, dbeta = backward(layer, stats, y, act)
    exact = du_of(layer.y, layer.g, layer.gamma)
    eager = du_of(as_rows(y), layer.g.to(dtype), layer.gamma).to(dtype).double()
    x = (0.25 + torch.randn(pixels, COLUMNS)).to(dtype).double()

    def errors(found: Tensor) -> list[float]:
        return [relative(found, exact), relative(x.T @ found, x.T @ exact)]

    for name, error, of_eager in zip(("du", "x.T @ du"), errors(as_rows(du)), errors(eager), strict=True):
        assert error <= BOUND * of_eager, f"{name}: error {error:.2e}, eager's {of_eager:.2e}"
    if pixels >= LOST_FROM[dtype]:
        single = du_of_single_ops(layer, stats, y, dgamma, dbeta)
        assert errors(as_rows(single))[1] > BOUND * errors(eager)[1]

    normalised = (as_rows(y) - stats[0]) * stats[2] + stats[3]
    slope = models.LEAKY_SLOPE if act == "leaky_relu" else 0.0
    want = torch.where(normalised > 0, normalised, slope * normalised)
    assert ((as_rows(x_hat) - want).abs() <= 0.505 * torch.finfo(dtype).eps * want.abs() + 1e-6).all()
    sums = layer.g.double().sum(0), (layer.g.double() * (as_rows(y) - stats[0])).sum(0)
    for found, want in ((dbeta, sums[0]), (dgamma, sums[1] * (stats[1, 0] + EPS).rsqrt())):
        assert ((found - want).abs() <= 5e-6 * (pixels**0.5 + want.abs())).all()


@pytest.fixture
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program compute 1,024 rows: the interpreter's time is that of its programs and K steps."""

    def choose(problem: Problem, *_: Any) -> Tile:
        tile = tuning.estimate(problem, cost_model.SM_COUNT)
        if problem.kernel == "dense_narrow":  # a program computes one row
            return tile
        along = "block_k" if problem.kernel.startswith("wgrad") else "block_m"
        return replace(tile, **{along: 1024})

    monkeypatch.setattr(launcher, "_plans", {})  # plans record which prologues are standalone
    monkeypatch.setattr(tuning, "choose", choose)


@pytest.fixture
def triton_engine() -> Iterator[None]:
    with ops.use_engine("triton"):
        yield


def chains() -> list[Any]:
    """Return every layer and dtype."""
    fast = [("G3", torch.bfloat16), ("D1", torch.float16)]
    found = []
    for norm in NORMS:
        for dtype in DTYPES:
            marks = [] if (norm.name, dtype) in fast else [pytest.mark.slow]
            found.append(pytest.param(norm, dtype, id=f"{norm}-{dtype}", marks=marks))
    return found


@pytest.mark.usefixtures("triton_engine", "tall_tiles")
@pytest.mark.parametrize(("norm", "dtype"), chains())
def test_chains(norm: Norm, dtype: torch.dtype) -> None:
    """At batch 64, errors are eager's; those of single ops exceed the bound where there are many pixels."""
    pixels = 64 * norm.pixels
    errors = measure(norm, 64, dtype, FRACTION, draws=max(1, min(4, 2**14 // pixels)))
    assert_rounded_once(errors)
    if norm.name != "G1" and pixels >= LOST_FROM[dtype]:
        assert errors.single_ratio > BOUND
