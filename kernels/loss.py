"""Binary cross-entropy on logits, with the Sigmoid fused in, as an operator.

    dcgan::bce_with_logits(logits, targets) -> loss, probability

        loss_i = mean_n(softplus(l_n) - t_i·l_n) = -mean_n(t_i·log p_n + (1-t_i)·log(1-p_n)),   p = sigmoid(l)
        probability_i = mean_n p_n                 logged as D(x) and D(G(z)) in GAN training
        dl_n = (dloss_i·(p_n - t_i) + dprobability_i·p_n·(1-p_n)) / M

for the n of group i: the logits are k groups of M, in order, and targets has a number t_i for each.

The forward and the backward are one kernel each, whatever the number of groups. They are accurate where
Sigmoid followed by BCELoss is not: in float32 p rounds to 1 for l > 17, and BCELoss then clamps log(1-p) at
-100 and its gradient vanishes. Elsewhere both agree up to rounding. A target is one number per group, as in
adversarial training: 0, 1, or a smoothed label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, autograd
from torch.nn.functional import logsigmoid

from . import cpu, ops
from .ops import LIBRARY
from .reference import accumulator_dtype


def _grouped(logits: Tensor, values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the logits as [k, M] and one value per group as [k, 1], in the accumulator's dtype."""
    k = len(values)
    x = logits.reshape(k, logits.shape[0] // k).to(accumulator_dtype(logits.dtype))
    # Filled on the device, because a CUDA graph cannot capture a copy from the host.
    return x, torch.cat([x.new_full((1, 1), value) for value in values])


def _reference(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    x, complement = _grouped(logits, [1 - t for t in targets])
    return (complement * x - logsigmoid(x)).mean(1), x.sigmoid().mean(1)


def _reference_backward(
    logits: Tensor, dloss: Tensor | None, dprobability: Tensor | None, targets: Sequence[float]
) -> Tensor:
    x, target = _grouped(logits, targets)
    p = x.sigmoid()
    dx = torch.zeros_like(p) if dloss is None else dloss.unsqueeze(1) * (p - target)
    if dprobability is not None:
        dx = dx + dprobability.unsqueeze(1) * p * (1 - p)
    return (dx / x.shape[1]).reshape(-1).to(logits.dtype)


def _engine(logits: Tensor) -> str:
    """Return the engine that runs; raise EngineError if a forced one cannot."""
    choice = ops.choose_engine(
        "bce_with_logits",
        logits.device,
        triton=lambda gpu: gpu.why_not_here(logits.device, logits.dtype),
        native=cpu.problem if logits.dtype == torch.float32 and not logits.is_neg() else None,
    )
    ops.record(choice)
    return choice.engine if logits.numel() else "reference"


def _run(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    _check(logits, targets)
    engine = _engine(logits)
    if engine == "triton":
        from . import gpu

        return gpu.bce(logits, targets)
    if engine == "native":
        return cpu.loss.bce(logits, targets)
    return _reference(logits, targets)


def _run_backward(
    logits: Tensor, dloss: Tensor | None, dprobability: Tensor | None, targets: Sequence[float]
) -> Tensor:
    engine = _engine(logits)
    if engine == "triton":
        from . import gpu

        return gpu.bce_backward(logits, targets, dloss, dprobability)
    if engine == "native":
        return cpu.loss.bce_backward(logits, targets, dloss, dprobability)
    return _reference_backward(logits, dloss, dprobability, targets)


def _check(logits: Tensor, targets: Sequence[float]) -> None:
    if logits.ndim != 1:
        raise ValueError(f"logits must be [N], got {list(logits.shape)}")
    if logits.dtype not in ops.DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if not targets:
        raise ValueError("targets must hold one number per group of logits, got none")
    if logits.shape[0] % len(targets):
        raise ValueError(
            f"logits must divide into {len(targets)} equal groups, one per target, got {list(logits.shape)}"
        )


def _fake(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    _check(logits, targets)
    loss = logits.new_empty(len(targets), dtype=accumulator_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


def _autograd(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and logits.requires_grad:
        return _BCE.apply(logits, targets)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(logits, targets)  # type: ignore[no-any-return]


class _BCE(autograd.Function):
    """The operator's node; the gradient of an output that nothing uses is None rather than zeros."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits)
        ctx.targets = targets
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            return _OP(logits, targets)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dprobability: Tensor | None) -> tuple[Tensor | None, None]:
        if dloss is None and dprobability is None:
            return None, None
        (logits,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward differentiates the reference
            return _reference_backward(logits, dloss, dprobability, ctx.targets), None
        return _BACKWARD_OP(logits, dloss, dprobability, ctx.targets), None


_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("bce_with_logits(Tensor logits, float[] targets) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    "bce_with_logits_backward(Tensor logits, Tensor? dloss, Tensor? dprobability, float[] targets) -> Tensor",
    tags=_TAGS,
)
LIBRARY.impl("bce_with_logits", _run, "CompositeExplicitAutograd")
LIBRARY.impl("bce_with_logits", _autograd, "Autograd")
LIBRARY.impl("bce_with_logits_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dcgan::bce_with_logits", _fake, lib=LIBRARY)
torch.library.register_fake(
    "dcgan::bce_with_logits_backward",
    lambda logits, dloss, dprobability, targets: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    ),
    lib=LIBRARY,
)
_OP = torch.ops.dcgan.bce_with_logits.default
_BACKWARD_OP = torch.ops.dcgan.bce_with_logits_backward.default


def bce_with_logits(logits: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Return (loss, mean probability) of logits for one target; the module's docstring has the formulas.

    Args:
        logits: [N] of float16, bfloat16, float32 or float64, any stride.
        target: t, from 0 to 1.

    Returns:
        Two scalar tensors, float32 (float64 for float64); NaN if there are no logits, as torch.mean gives.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is allowed.

    Source: Goodfellow et al., *Generative Adversarial Networks*, 2014; the losses of ``nn.BCELoss``.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target must be from 0 to 1, got {target}")
    loss, probability = _compute(logits, (float(target),))
    return loss.squeeze(0), probability.squeeze(0)


def grouped_bce_with_logits(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (loss, mean probability) of each of k groups of logits, which have a target each.

    Equal to k calls of :func:`bce_with_logits` on ``logits.chunk(k)``, in one kernel.

    Args:
        logits: [N] of float16, bfloat16, float32 or float64, any stride; k divides N.
        targets: t_i, one per group, each from 0 to 1.

    Returns:
        Two tensors [k], float32 (float64 for float64); NaN if there are no logits.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is allowed.
    """
    if not all(0 <= target <= 1 for target in targets):
        raise ValueError(f"targets must each be from 0 to 1, got {list(targets)}")
    return _compute(logits, [float(target) for target in targets])


def _compute(logits: Tensor, targets: Sequence[float]) -> tuple[Tensor, Tensor]:
    if ops.under_transform():
        _check(logits, targets)
        return _reference(logits, targets)
    loss, probability = _OP(logits, targets)
    return loss, probability
