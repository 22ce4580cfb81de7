"""The native engine's loss and running statistics against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcgan.kernels import cpu, ops, reference
from dcgan.kernels.loss import _reference, _reference_backward, grouped_bce_with_logits
from tests.support.tolerance import relative

TARGETS = ([0.9], [0.0], [0.9, 0.0], [1.0, 0.3, 0.0])


def logits_of(groups: int, scale: float, stride: int) -> Tensor:
    drawn = torch.randn(7 * groups, stride, generator=torch.Generator().manual_seed(groups)) * scale
    return drawn[:, 0]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("stride", [1, 3])
def test_loss(targets: list[float], scale: float, stride: int) -> None:
    logits = logits_of(len(targets), scale, stride)
    found = cpu.loss.bce(logits, targets)
    for got, want in zip(found, _reference(logits.double(), targets), strict=True):
        assert relative(got, want) < 1e-7
    d = torch.randn(2, len(targets))
    expanded = d[0, :1].expand(len(targets))
    for dloss, dprobability in ((d[0], None), (None, d[1]), (d[0], d[1]), (expanded, None)):
        got = cpu.loss.bce_backward(logits, targets, dloss, dprobability)
        wide = [None if t is None else t.double() for t in (dloss, dprobability)]
        assert relative(got, _reference_backward(logits.double(), *wide, targets)) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits(value: float) -> None:
    logits = torch.tensor([0.5, value, 1.0, 2.0])
    found, want = cpu.loss.bce(logits, [0.9, 0.1]), _reference(logits.double(), [0.9, 0.1])
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())


def test_the_operator_uses_it() -> None:
    logits = torch.randn(8, requires_grad=True)
    with ops.recording() as choices:
        loss, _ = grouped_bce_with_logits(logits, [1.0, 0.0])
        loss.sum().backward()
    assert [choice.engine for choice in choices] == ["native", "native"]


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.7, -1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_running_statistics(momentum: float, groups: int) -> None:
    stats = [torch.rand(4, groups, c, generator=torch.Generator().manual_seed(c)) for c in (1, 5, 70)]

    def run(track: object, dtype: torch.dtype) -> list[Tensor]:
        means = [torch.full((s.shape[2],), 0.25, dtype=dtype) for s in stats]
        variances = [torch.ones(s.shape[2], dtype=dtype) for s in stats]
        batches = [torch.tensor(i) for i in range(3)]
        given = [s.to(dtype) for s in stats]
        track(means, variances, batches, given, [momentum] * 3, [2, 30, 500])  # type: ignore[operator]
        return [*means, *variances, *batches]

    found, expected = run(cpu.track, torch.float32), run(reference.track, torch.float64)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=3e-7, atol=0)
