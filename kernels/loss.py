"""Binary cross-entropy on logits, with the Sigmoid fused in, as an operator.

    dcgan::bce_with_logits(logits, target) -> loss, probability

        loss = mean_n(softplus(l_n) - t·l_n) = -mean_n(t·log p_n + (1-t)·log(1-p_n)),   p = sigmoid(l)
        probability = mean_n p_n                   logged as D(x) and D(G(z)) in GAN training
        dl_n = (dloss·(p_n - t) + dprobability·p_n·(1-p_n)) / N

The forward and the backward are one kernel each. They are accurate where Sigmoid followed by BCELoss is not:
in float32 p rounds to 1 for l > 17, and BCELoss then clamps log(1-p) at -100 and its gradient vanishes.
Elsewhere both agree up to rounding. The target is one number, as in adversarial training: 0, 1, or a smoothed
label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from . import ops
from .reference import accumulator_dtype


def _reference(logits: Tensor, target: float) -> tuple[Tensor, Tensor]:
    x = logits.to(accumulator_dtype(logits.dtype))
    labels = torch.full_like(x, target)
    return binary_cross_entropy_with_logits(x, labels), x.sigmoid().mean()


def _reference_backward(logits: Tensor, dloss: Tensor, dprobability: Tensor, target: float) -> Tensor:
    p = logits.to(accumulator_dtype(logits.dtype)).sigmoid()
    dx = dloss * (p - target) + dprobability * p * (1 - p)
    return (dx / logits.shape[0]).to(logits.dtype)


def _use_triton(logits: Tensor) -> bool:
    """Return whether the Triton kernels run; raise EngineError if they are forced but cannot."""
    choice = ops.choose_engine(
        "bce_with_logits", logits.device, triton=lambda gpu: gpu.why_not_here(logits.device, logits.dtype)
    )
    ops.record(choice)
    return choice.engine == "triton" and logits.numel() > 0


def _run(logits: Tensor, target: float) -> tuple[Tensor, Tensor]:
    _check(logits)
    if _use_triton(logits):
        from . import gpu

        return gpu.bce(logits, target)
    return _reference(logits, target)


def _run_backward(logits: Tensor, dloss: Tensor, dprobability: Tensor, target: float) -> Tensor:
    if _use_triton(logits):
        from . import gpu

        return gpu.bce_backward(logits, target, dloss, dprobability)
    return _reference_backward(logits, dloss, dprobability, target)


def _check(logits: Tensor) -> None:
    if logits.ndim != 1:
        raise ValueError(f"logits must be [N], got {list(logits.shape)}")
    if logits.dtype not in ops.DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")


def _fake(logits: Tensor, target: float) -> tuple[Tensor, Tensor]:
    _check(logits)
    loss = logits.new_empty((), dtype=accumulator_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.target = inputs[1]


def _backward(ctx: Any, dloss: Tensor, dprobability: Tensor) -> tuple[Tensor, None]:
    (logits,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # double backward differentiates the reference
        return _reference_backward(logits, dloss, dprobability, ctx.target), None
    return _BACKWARD(logits, dloss, dprobability, ctx.target), None


_TAGS = (torch.Tag.pt2_compliant_tag,)
ops.LIBRARY.define("bce_with_logits(Tensor logits, float target) -> (Tensor, Tensor)", tags=_TAGS)
ops.LIBRARY.define(
    "bce_with_logits_backward(Tensor logits, Tensor dloss, Tensor dprobability, float target) -> Tensor",
    tags=_TAGS,
)
ops.LIBRARY.impl("bce_with_logits", _run, "CompositeExplicitAutograd")
ops.LIBRARY.impl("bce_with_logits_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dcgan::bce_with_logits", _fake, lib=ops.LIBRARY)
torch.library.register_fake(
    "dcgan::bce_with_logits_backward",
    lambda logits, dloss, dprobability, target: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    ),
    lib=ops.LIBRARY,
)
torch.library.register_autograd("dcgan::bce_with_logits", _backward, setup_context=_save, lib=ops.LIBRARY)
_FORWARD = torch.ops.dcgan.bce_with_logits.default
_BACKWARD = torch.ops.dcgan.bce_with_logits_backward.default


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
    if ops.under_transform():
        _check(logits)
        return _reference(logits, target)
    loss, probability = _FORWARD(logits, float(target))
    return loss, probability
