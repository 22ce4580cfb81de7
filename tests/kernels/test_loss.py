"""bce_with_logits: comparison with nn.BCELoss in float64, operator checks, and invalid input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcgan.kernels import ops
from dcgan.kernels.loss import bce_with_logits


@pytest.mark.parametrize("target", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 64, 1000])
def test_against_sigmoid_and_bceloss(target: float, count: int) -> None:
    logits = torch.randn(count, dtype=torch.float64, requires_grad=True)
    loss, probability = bce_with_logits(logits, target)
    (dlogits,) = torch.autograd.grad(loss, logits)
    p = logits.sigmoid()
    expected = nn.BCELoss()(p, torch.full_like(p, target))
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(probability, p.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(dlogits, wanted, rtol=1e-10, atol=1e-14)


def test_accurate_where_the_probability_saturates() -> None:
    """σ(40) rounds to 1 in float32, where BCELoss clamps and its gradient vanishes."""
    logits = torch.tensor([40.0, -40.0], requires_grad=True)
    loss, _ = bce_with_logits(logits, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(20.0)
    assert logits.grad is not None
    assert logits.grad[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(9).to(dtype).requires_grad_()
    loss, probability = bce_with_logits(logits, 0.9)
    assert loss.dtype == probability.dtype == torch.float32
    assert loss.shape == probability.shape == ()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_gradients() -> None:
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bce_with_logits(x, 0.9), logits)
    assert torch.autograd.gradgradcheck(lambda x: bce_with_logits(x, 0.9), logits)


def test_opcheck() -> None:
    logits = torch.randn(7)
    strided = torch.randn(14, requires_grad=True)[::2]
    for x in (logits, logits.clone().requires_grad_(), strided):
        torch.library.opcheck(torch.ops.dcgan.bce_with_logits.default, (x, 0.9))
    scalar = torch.tensor(0.5)
    torch.library.opcheck(torch.ops.dcgan.bce_with_logits_backward.default, (logits, scalar, scalar, 0.9))


def test_compiled() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return bce_with_logits(x, 0.9)[0]

    logits = torch.randn(7, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True)(logits)
    (a,) = torch.autograd.grad(compiled, logits)
    (b,) = torch.autograd.grad(step(logits), logits)
    torch.testing.assert_close(a, b)


def test_transforms_and_no_logits() -> None:
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.grad(lambda v: bce_with_logits(v, 0.9)[0])(x), (x.sigmoid() - 0.9) / 5
    )
    assert bce_with_logits(torch.empty(0), 0.9)[0].isnan()


def test_nan_is_not_hidden() -> None:
    logits = torch.tensor([0.0, float("nan")], requires_grad=True)
    loss, probability = bce_with_logits(logits, 0.9)
    loss.backward()
    assert loss.isnan()
    assert probability.isnan()
    assert logits.grad is not None
    assert logits.grad.isnan().tolist() == [False, True]


def test_invalid_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[N\], got \[2, 1\]"):
        bce_with_logits(torch.zeros(2, 1), 0.9)
    with pytest.raises(TypeError, match=r"logits must be float16, .*int64"):
        bce_with_logits(torch.zeros(2, dtype=torch.int64), 0.9)
    with pytest.raises(ValueError, match=r"target must be from 0 to 1, got 1\.5"):
        bce_with_logits(torch.zeros(2), 1.5)
    with ops.use_engine("triton"), pytest.raises(RuntimeError, match=r"bce_with_logits: x is on the cpu"):
        bce_with_logits(torch.zeros(2), 0.9)
