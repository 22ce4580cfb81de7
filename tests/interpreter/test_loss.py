"""The loss kernels against float64."""

from __future__ import annotations

import pytest
import torch

from dcgan.kernels import ops
from dcgan.kernels.gpu.bce import backward, forward
from dcgan.kernels.loss import bce_with_logits, grouped_bce_with_logits


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


GROUPS = [((0.9, 0.0), 1), ((0.9, 0.0), 64), ((0.0, 1.0, 0.25), 5), ((1.0, 0.1), 1100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("targets", "count"), GROUPS)
def test_groups_equal_calls_in_order(dtype: torch.dtype, targets: tuple[float, ...], count: int) -> None:
    groups = len(targets)
    memory = (5 * torch.randn(2 * groups * count)).to(dtype)
    logits, alone = memory[::2].requires_grad_(), memory[::2].clone().requires_grad_()
    cotangent = torch.randn(groups, 2).t()
    with ops.use_engine("triton"), ops.recording() as choices:
        together = torch.stack(grouped_bce_with_logits(logits, targets))
        together.backward(cotangent)
        assert [choice.engine for choice in choices] == ["triton", "triton"]
        pairs = zip(alone.chunk(groups), targets, strict=True)
        one_by_one = torch.stack([torch.stack(bce_with_logits(part, t)) for part, t in pairs], 1)
        one_by_one.backward(cotangent)
    assert torch.equal(together, one_by_one)
    assert logits.grad is not None
    assert alone.grad is not None
    assert torch.equal(logits.grad, alone.grad)


@pytest.mark.parametrize(("targets", "count"), GROUPS)
@pytest.mark.parametrize("given", ["loss", "probability", "both", "neither", "expanded"])
def test_each_result_is_written_once(targets: tuple[float, ...], count: int, given: str) -> None:
    """Outputs and gradients of several strides, in memory that is NaN before and, around them, after."""
    groups = len(targets)
    logits = torch.randn(groups * count)
    outputs, dlogits = torch.full((2, groups + 8), torch.nan), torch.full((groups * count + 8,), torch.nan)
    forward(logits, targets, outputs[0, 4:-4], outputs[1, 4:-4])
    assert outputs.isnan().tolist() == [[True] * 4 + [False] * groups + [True] * 4] * 2
    dloss = torch.randn(groups, 3)[:, 1] if given in ("loss", "both") else None
    dprobability = torch.randn(2 * groups)[::2] if given in ("probability", "both") else None
    if given == "expanded":
        dloss = torch.randn(()).expand(groups)
    backward(logits, targets, dloss, dprobability, dlogits[4:-4])
    assert dlogits[:4].isnan().all()
    assert dlogits[-4:].isnan().all()
    wide = logits.double().view(groups, count).requires_grad_()
    t = torch.tensor(targets, dtype=torch.float64)[:, None]
    exact = torch.nn.functional.softplus(wide, threshold=1e3) - t * wide
    value = torch.zeros((), dtype=torch.float64)
    for output, gradient in ((exact, dloss), (wide.sigmoid(), dprobability)):
        if gradient is not None:
            value = value + (output.mean(1) * gradient.double()).sum()
    (expected,) = torch.autograd.grad(value + 0 * wide.sum(), wide)
    torch.testing.assert_close(outputs[0, 4:-4].double(), exact.mean(1), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(dlogits[4:-4].double(), expected.flatten(), rtol=2e-6, atol=1e-7 / count)


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
