"""The loss kernels against float64."""

from __future__ import annotations

import pytest
import torch

from dcgan.kernels import ops
from dcgan.kernels.loss import bce_with_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 5, 64, 2500])
@pytest.mark.parametrize("target", [0.0, 0.9, 1.0])
def test_loss_and_gradient(dtype: torch.dtype, count: int, target: float) -> None:
    memory = (5 * torch.randn(2 * count)).to(dtype)
    logits = memory[::2].requires_grad_()
    with ops.use_engine("triton"), ops.recording() as choices:
        loss, probability = bce_with_logits(logits, target)
        (2 * loss + 3 * probability).backward()
    assert [choice.engine for choice in choices] == ["triton", "triton"]
    wide = logits.detach().double().requires_grad_()
    exact, exact_probability = bce_with_logits(wide, target)
    (2 * exact + 3 * exact_probability).backward()
    # The loss sums float32 numbers of one sign; the gradient is also rounded once to the dtype.
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(probability.double(), exact_probability, rtol=2e-6, atol=0)
    assert logits.grad is not None
    assert wide.grad is not None
    error = (logits.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error <= 2e-6 + torch.finfo(dtype).eps / 2


def test_large_logits() -> None:
    """softplus(-x) ≈ exp(-x) keeps its relative accuracy for large x, and does not overflow for large -x."""
    for value in (3.0, 8.0, 30.0, 80.0, -80.0):
        with ops.use_engine("triton"):
            loss = bce_with_logits(torch.tensor([value]), 1.0)[0]
        exact = torch.nn.functional.softplus(-torch.tensor(value, dtype=torch.float64))
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_nan_propagates() -> None:
    with ops.use_engine("triton"):
        loss, probability = bce_with_logits(torch.tensor([0.0, float("nan")]), 0.9)
    assert loss.isnan()
    assert probability.isnan()
