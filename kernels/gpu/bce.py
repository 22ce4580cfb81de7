"""Binary cross-entropy on logits with the Sigmoid fused in, and its gradient; see :mod:`..loss`.

Forward (one program): loss = mean of softplus(l) - t·l, and the mean of sigmoid(l), summed in a fixed order.
Backward (BLOCK logits per program), p = sigmoid(l): dl = (dloss·(p - t) + dprobability·p·(1 - p)) / N.

Both read logits [N] of any stride and use float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device_functions import activate
from .launcher import Launch, run_planned
from .tiles import next_power_of_two

_BLOCK = 1024


@triton.jit
def _bce_kernel(
    logits_ptr,
    loss_ptr,
    probability_ptr,
    N,
    target,
    per_count,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    losses = tl.zeros((BLOCK,), dtype=tl.float32)
    probabilities = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + n.to(tl.int64) * STRIDE, mask=n < N, other=0.0).to(tl.float32)
        # softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|) ≤ 1; a series where 1 + e would lose e's digits.
        e = tl.exp(-tl.abs(x))
        log_term = tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * (0.33333334 - e * 0.25))), tl.log(1.0 + e))
        loss = (tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - target * x) + log_term
        losses += tl.where(n < N, loss, 0.0)
        probabilities += tl.where(n < N, activate(x, 0.0, "sigmoid"), 0.0)
    tl.store(loss_ptr, tl.sum(losses, axis=0) * per_count)
    tl.store(probability_ptr, tl.sum(probabilities, axis=0) * per_count)


@triton.jit
def _bce_backward_kernel(
    logits_ptr,
    dloss_ptr,
    dprobability_ptr,
    dlogits_ptr,
    N,
    target,
    per_count,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + n * STRIDE, mask=n < N, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(x))
    small = e / (1.0 + e)  # min(p, 1 - p): p - t is computed from it, because p - 1 would cancel
    difference = tl.where(x < 0.0, small - target, (1.0 - target) - small)
    dx = tl.load(dloss_ptr) * difference + tl.load(dprobability_ptr) * small * (1.0 - small)
    tl.store(dlogits_ptr + n, (dx * per_count).to(dlogits_ptr.dtype.element_ty), mask=n < N)


def _scalars_and_constants(logits: Tensor, target: float) -> tuple[dict[str, int | float], dict[str, Any]]:
    count = logits.shape[0]
    block = min(_BLOCK, max(16, next_power_of_two(count)))
    scalars = {"N": count, "target": float(target), "per_count": 1.0 / count}
    return scalars, {"STRIDE": logits.stride(0), "BLOCK": block}


def _key(name: str, logits: Tensor, target: float) -> tuple[Hashable, ...]:
    return name, logits.shape, logits.stride(), logits.dtype, logits.device, target


def forward(logits: Tensor, target: float, loss: Tensor, probability: Tensor) -> None:
    """Write loss [] and probability [] from logits [N]."""
    tensors = (logits, loss, probability)

    def make() -> Launch:
        named: dict[str, Any] = {"logits_ptr": logits, "loss_ptr": loss, "probability_ptr": probability}
        return Launch(_bce_kernel, 1, named, *_scalars_and_constants(logits, target))

    run_planned(_key("bce", logits, target), tensors, make)


def backward(logits: Tensor, target: float, dloss: Tensor, dprobability: Tensor, dlogits: Tensor) -> None:
    """Write dlogits [N] from logits [N] and the gradients of both outputs."""
    tensors = (logits, dloss, dprobability, dlogits)

    def make() -> Launch:
        names = ("logits_ptr", "dloss_ptr", "dprobability_ptr", "dlogits_ptr")
        named: dict[str, Any] = dict(zip(names, tensors, strict=True))
        count = -(-logits.shape[0] // _BLOCK)
        return Launch(_bce_backward_kernel, count, named, *_scalars_and_constants(logits, target))

    run_planned(_key("dbce", logits, target), tensors, make)
