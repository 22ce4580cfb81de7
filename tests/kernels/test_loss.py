"""The loss, of one group and of several: nn.BCELoss in float64, operator checks, and invalid input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcgan.kernels import ops
from dcgan.kernels.loss import bce_with_logits, grouped_bce_with_logits


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("targets", [(0.9, 0.0), (0.0, 0.25, 1.0)], ids=str)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_groups_equal_calls_in_order(dtype: torch.dtype, targets: tuple[float, ...], count: int) -> None:
    """Including a gradient of each output, of any stride."""
    groups = len(targets)
    memory = (3 * torch.randn(2 * groups * count)).to(dtype)
    logits, alone = memory[::2].requires_grad_(), memory[::2].clone().requires_grad_()
    together = torch.stack(grouped_bce_with_logits(logits, targets))
    each = [
        torch.stack(bce_with_logits(part, t)) for part, t in zip(alone.chunk(groups), targets, strict=True)
    ]
    one_by_one = torch.stack(each, 1)
    assert together.shape == (2, groups)
    torch.testing.assert_close(together, one_by_one)
    cotangent = torch.randn(groups, 2, dtype=together.dtype).t()
    together.backward(cotangent)
    one_by_one.backward(cotangent)
    assert logits.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(logits.grad, alone.grad)


@pytest.mark.parametrize("output", [0, 1], ids=["loss", "probability"])
def test_an_output_that_nothing_uses_has_no_gradient(output: int) -> None:
    """Nor does one whose gradient is one number, expanded: both reach the backward as they are."""
    given: list[tuple[Tensor | None, ...]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is torch.ops.dcgan.bce_with_logits_backward.default:
                given.append(args[1:3])
            return func(*args, **(kwargs or {}))

    logits = torch.randn(6, requires_grad=True)
    with Recorder():
        grouped_bce_with_logits(logits, (0.9, 0.0))[output].sum().backward()
    ((used, unused),) = (pair if output == 0 else pair[::-1] for pair in given)
    assert unused is None
    assert used is not None
    assert (used.shape, used.stride()) == ((2,), (0,))


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
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: grouped_bce_with_logits(x, (0.9, 0.0)), logits)
    assert torch.autograd.gradgradcheck(lambda x: grouped_bce_with_logits(x, (0.9, 0.0)), logits)


def test_opcheck() -> None:
    logits = torch.randn(6)
    strided = torch.randn(12, requires_grad=True)[::2]
    for x in (logits, logits.clone().requires_grad_(), strided):
        for targets in ([0.9], [0.9, 0.0]):
            torch.library.opcheck(torch.ops.dcgan.bce_with_logits.default, (x, targets))
    gradient = torch.randn(2)
    for given in ((gradient, gradient), (gradient, None), (None, gradient), (gradient[:1].expand(2), None)):
        arguments = (logits, *given, [0.9, 0.0])
        torch.library.opcheck(torch.ops.dcgan.bce_with_logits_backward.default, arguments)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: bce_with_logits(x, 0.9)[0],
        lambda x: grouped_bce_with_logits(x, (0.9, 0.0))[0].sum(),
        lambda x: sum(t.sum() for t in grouped_bce_with_logits(x, (0.9, 0.0))),
    ],
    ids=["one target", "the losses of groups", "both outputs of groups"],
)
def test_compiled(step: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(8, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True)(logits)
    (a,) = torch.autograd.grad(compiled, logits)
    (b,) = torch.autograd.grad(step(logits), logits)
    torch.testing.assert_close(a, b)


def test_transforms_and_no_logits() -> None:
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.grad(lambda v: bce_with_logits(v, 0.9)[0])(x), (x.sigmoid() - 0.9) / 5
    )
    jacobian = torch.func.jacrev(lambda v: grouped_bce_with_logits(v, (0.9, 0.0))[0])(torch.cat([x, x]))
    p = x.sigmoid() / 5
    expected = torch.stack([torch.cat([p - 0.9 / 5, 0 * p]), torch.cat([0 * p, p])])
    torch.testing.assert_close(jacobian, expected)
    assert bce_with_logits(torch.empty(0), 0.9)[0].isnan()
    assert [t.isnan().tolist() for t in grouped_bce_with_logits(torch.empty(0), (0.9, 0.0))] == [
        [True] * 2
    ] * 2


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
    with pytest.raises(ValueError, match=r"targets must each be from 0 to 1, got \[0\.9, nan\]"):
        grouped_bce_with_logits(torch.zeros(2), [0.9, float("nan")])
    with pytest.raises(ValueError, match=r"targets must hold one number per group .*, got none"):
        grouped_bce_with_logits(torch.zeros(2), [])
    with pytest.raises(ValueError, match=r"logits must divide into 2 equal groups, .*, got \[3\]"):
        grouped_bce_with_logits(torch.zeros(3), [0.9, 0.0])
    with ops.use_engine("triton"), pytest.raises(RuntimeError, match=r"bce_with_logits: x is on the cpu"):
        bce_with_logits(torch.zeros(2), 0.9)
