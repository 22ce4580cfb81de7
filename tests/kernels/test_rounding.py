"""Gradients through BatchNorms in 16 bits: the chain's errors are at most 1.2 times eager's at any size.

The chain rounds du once. Single ops store the gradient of their input, s·g, in 16 bits, and round it again
with the terms of the mean and the variance. :mod:`tests.support.rounding` says what that loses; that these
tests detect it is tested as well.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.rounding import (
    BATCHES,
    BOUND,
    DEVIATION,
    DTYPES,
    FRACTION,
    LOST_FROM,
    NORMS,
    Norm,
    assert_rounded_once,
    draw,
    eager,
    exact,
    measure,
    rounded_du,
)
from tests.support.tolerance import relative

__all__ = ["rounded_du"]  # a fixture
FAST = ("D1", "D3")
"""The layers of the default run, at batch 64: 16,384 and 1,024 pixels."""


def cases() -> list[Any]:
    """Return every layer, batch, dtype and mean."""
    found = []
    for norm in NORMS:
        for batch in BATCHES:
            for dtype in DTYPES:
                for mean in (FRACTION, DEVIATION):
                    fast = norm.name in FAST and batch == 64 and mean == FRACTION
                    fast = fast and (dtype == torch.bfloat16 or norm.name == "D3")
                    name = f"{norm}-{batch}-{str(dtype).removeprefix('torch.')}-{mean}"
                    marks = [] if fast else [pytest.mark.slow]
                    found.append(pytest.param(norm, batch, dtype, mean, id=name, marks=marks))
    return found


@pytest.mark.usefixtures("reference_engine", "rounded_du")
@pytest.mark.parametrize(("norm", "batch", "dtype", "mean"), cases())
def test_errors_are_eagers(norm: Norm, batch: int, dtype: torch.dtype, mean: str) -> None:
    """The chain's. Those of single ops exceed the bound where there are many pixels."""
    pixels = batch * norm.pixels
    errors = measure(norm, batch, dtype, mean, draws=max(1, min(8, 2**19 // pixels)))
    assert_rounded_once(errors)
    if mean == FRACTION and norm.name != "G1" and pixels >= LOST_FROM[dtype]:
        assert errors.single_ratio > BOUND


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs oneDNN's bfloat16 convolutions"
)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm.name in FAST], ids=str)
def test_eager_is_pytorchs(norm: Norm) -> None:
    """What the tests call eager has the errors of PyTorch's modules under autocast."""
    problem = draw(norm, 64, torch.bfloat16, FRACTION)
    network = copy.deepcopy(problem.network)
    signs: list[Tensor] = []
    network[1].register_forward_hook(lambda module, given, output: signs.append(output > 0))
    x = problem.x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    dx, dweight = torch.autograd.grad(y, [x, network[0].weight], problem.dy)

    found, positive = eager(problem)
    pairs = zip((dx, dweight), exact(problem, signs[0]), strict=True)
    actual = [relative(got, want) for got, want in pairs]
    rounded = found.x, found.weight.to(x.dtype)
    emulated = [relative(got, want) for got, want in zip(rounded, exact(problem, positive), strict=True)]
    assert actual == pytest.approx(emulated, rel=0.1)
