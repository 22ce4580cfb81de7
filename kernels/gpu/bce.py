"""Binary cross-entropy on logits with the Sigmoid fused in, and its gradient; see :mod:`..loss`.

Forward (one program): loss = mean of softplus(l) - t·l, and the mean of sigmoid(l), summed in a fixed order.
Backward (BLOCK logits per program), p = sigmoid(l): dl = (dloss·(p - t) + dprobability·p·(1 - p)) / N.

Both read logits [N] of any stride and use float32 arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_functions import activate
from .launch import Launch
from .tiles import Tile, next_power_of_two

_TILE = Tile(1, 1, 1, 4, 1)
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


def _common_arguments(logits: Tensor, target: float) -> tuple[dict[str, object], dict[str, object]]:
    count = logits.shape[0]
    arguments = {"logits_ptr": logits, "N": count, "target": float(target), "per_count": 1.0 / count}
    block = min(_BLOCK, max(16, next_power_of_two(count)))
    return arguments, {"STRIDE": logits.stride(0), "BLOCK": block}


def forward(logits: Tensor, target: float, loss: Tensor, probability: Tensor) -> Launch:
    """Return the forward launch: loss [] and probability [] from logits [N]."""
    arguments, constants = _common_arguments(logits, target)
    arguments |= {"loss_ptr": loss, "probability_ptr": probability}
    return Launch(_bce_kernel, 1, arguments, constants, _TILE)


def backward(logits: Tensor, target: float, dloss: Tensor, dprobability: Tensor, dlogits: Tensor) -> Launch:
    """Return the backward launch: dlogits [N] from logits [N] and the gradients of both outputs."""
    arguments, constants = _common_arguments(logits, target)
    arguments |= {"dloss_ptr": dloss, "dprobability_ptr": dprobability, "dlogits_ptr": dlogits}
    programs = -(-logits.shape[0] // _BLOCK)
    return Launch(_bce_backward_kernel, programs, arguments, constants, _TILE)
