"""On a real GPU: the loss of several groups, against float64 and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.loss import bce_with_logits, grouped_bce_with_logits

pytestmark = pytest.mark.gpu

TARGETS = (0.9, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 64, 1500])
@pytest.mark.parametrize("given", ["loss", "both"])
def test_groups(dtype: torch.dtype, count: int, given: str) -> None:
    """Gradients of the outputs, from the sums of losses alone and from weighted sums of both outputs."""
    logits = (5 * torch.randn(2 * count, device="cuda")).to(dtype).requires_grad_()
    alone = logits.detach().clone().requires_grad_()
    wide = logits.detach().double().requires_grad_()

    def backward(outputs: Tensor) -> None:
        weights = torch.arange(1.0, 5.0, device="cuda").view(2, 2).t()
        (outputs[0].sum() if given == "loss" else (outputs * weights).sum()).backward()

    with ops.use_engine("triton"):
        outputs = torch.stack(grouped_bce_with_logits(logits, TARGETS))
        backward(outputs)
        parts = zip(alone.chunk(2), TARGETS, strict=True)
        one_by_one = torch.stack([torch.stack(bce_with_logits(part, t)) for part, t in parts], 1)
        backward(one_by_one)
    exact = torch.stack(grouped_bce_with_logits(wide, TARGETS))
    backward(exact)
    assert torch.equal(outputs, one_by_one)
    assert logits.grad is not None
    assert alone.grad is not None
    assert wide.grad is not None
    assert torch.equal(logits.grad, alone.grad)
    torch.testing.assert_close(outputs.double(), exact, rtol=2e-6, atol=1e-7)
    error = (logits.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error <= 2e-6 + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_captured(dtype: torch.dtype) -> None:
    """On both engines: float64 runs on the reference."""
    logits = torch.randn(128, device="cuda", dtype=dtype, requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        loss = grouped_bce_with_logits(logits, TARGETS)[0]
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return loss.detach(), gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compile and plan
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert all(map(torch.equal, captured, step()))
