"""Binary cross-entropy on logits with the Sigmoid fused in, and its gradient; see :mod:`..loss`.

The logits are k groups of N. Group i has the target t_i, and its own outputs.

Forward (one program per group): loss = mean of softplus(l) - t·l, and the mean of sigmoid(l), summed in a
fixed order. Backward (BLOCK logits of one group per program), p = sigmoid(l):
dl = (dloss·(p - t) + dprobability·p·(1 - p)) / N.

Both read logits [k·N] of any stride and use float32 arithmetic. Targets are arguments, not compile-time
constants, so that a label that changes from step to step does not compile anything.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device_functions import activate
from .launcher import Launch, run_planned
from .tiles import next_power_of_two

_BLOCK = 1024


@triton.jit
def _target_of(group, targets):
    """Return targets[group] from a tuple of scalars, which cannot be indexed by a run-time value."""
    target = targets[0]
    for i in tl.static_range(1, len(targets)):
        target = tl.where(group == i, targets[i], target)
    return target


@triton.jit
def _bce_kernel(
    logits_ptr,
    loss_ptr,
    probability_ptr,
    N,  # logits per group
    targets,  # a number per group
    per_count,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    target = _target_of(group, targets)
    logits_ptr += tl.cast(group, tl.int64) * N * STRIDE
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
    tl.store(loss_ptr + group, tl.sum(losses, axis=0) * per_count)
    tl.store(probability_ptr + group, tl.sum(probabilities, axis=0) * per_count)


@triton.jit
def _bce_backward_kernel(
    logits_ptr,
    dloss_ptr,
    dprobability_ptr,
    dlogits_ptr,
    N,  # logits per group
    targets,  # a number per group
    per_count,
    STRIDE: tl.constexpr,
    DLOSS_STRIDE: tl.constexpr,  # None if dloss is absent
    DPROBABILITY_STRIDE: tl.constexpr,  # None if dprobability is absent
    BLOCK: tl.constexpr,
):
    blocks = (N + BLOCK - 1) // BLOCK  # per group
    group = tl.program_id(0) // blocks
    target = _target_of(group, targets)
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    n = tl.cast(group, tl.int64) * N + inside
    x = tl.load(logits_ptr + n * STRIDE, mask=inside < N, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(x))
    small = e / (1.0 + e)  # min(p, 1 - p): p - t is computed from it, because p - 1 would cancel
    dx = tl.zeros((BLOCK,), dtype=tl.float32)
    if DLOSS_STRIDE is not None:
        difference = tl.where(x < 0.0, small - target, (1.0 - target) - small)
        dx += tl.load(dloss_ptr + group * DLOSS_STRIDE) * difference
    if DPROBABILITY_STRIDE is not None:
        dx += tl.load(dprobability_ptr + group * DPROBABILITY_STRIDE) * small * (1.0 - small)
    tl.store(dlogits_ptr + n, (dx * per_count).to(dlogits_ptr.dtype.element_ty), mask=inside < N)


def _sizes(logits: Tensor, targets: Sequence[float]) -> tuple[dict[str, Any], int]:
    """Return the scalars of a launch, and the number of logits that a program loads at once."""
    count = logits.shape[0] // len(targets)
    scalars = {"N": count, "targets": tuple(map(float, targets)), "per_count": 1.0 / count}
    return scalars, min(_BLOCK, max(16, next_power_of_two(count)))


def _key(name: str, logits: Tensor, targets: Sequence[float]) -> tuple[Hashable, ...]:
    return name, logits.shape, logits.stride(), logits.dtype, logits.device, tuple(targets)


def _stride(t: Tensor | None) -> int | None:
    return None if t is None else t.stride(0)


def forward_launch(logits: Tensor, targets: Sequence[float], loss: Tensor, probability: Tensor) -> Launch:
    """Return the launch of loss [k] and probability [k] from logits [k·N]."""
    scalars, block = _sizes(logits, targets)
    tensors: dict[str, Any] = {"logits_ptr": logits, "loss_ptr": loss, "probability_ptr": probability}
    constants = {"STRIDE": logits.stride(0), "BLOCK": block}
    return Launch(_bce_kernel, len(targets), tensors, scalars, constants)


def forward(logits: Tensor, targets: Sequence[float], loss: Tensor, probability: Tensor) -> None:
    """Write loss [k] and probability [k] from logits [k·N]."""
    make = functools.partial(forward_launch, logits, targets, loss, probability)
    run_planned(_key("bce", logits, targets), (logits, loss, probability), make)


def backward_launch(
    logits: Tensor,
    targets: Sequence[float],
    dloss: Tensor | None,
    dprobability: Tensor | None,
    dlogits: Tensor,
) -> Launch:
    """Return the launch of dlogits [k·N] from logits [k·N] and the gradients [k] of the outputs, if any."""
    scalars, block = _sizes(logits, targets)
    names = ("logits_ptr", "dloss_ptr", "dprobability_ptr", "dlogits_ptr")
    tensors: dict[str, Any] = dict(zip(names, _pointers(logits, dloss, dprobability, dlogits), strict=True))
    strides = {"DLOSS_STRIDE": _stride(dloss), "DPROBABILITY_STRIDE": _stride(dprobability)}
    constants = {"STRIDE": logits.stride(0), **strides, "BLOCK": block}
    programs = len(targets) * -(-scalars["N"] // block)
    return Launch(_bce_backward_kernel, programs, tensors, scalars, constants)


def backward(
    logits: Tensor,
    targets: Sequence[float],
    dloss: Tensor | None,
    dprobability: Tensor | None,
    dlogits: Tensor,
) -> None:
    """Write dlogits [k·N] from logits [k·N] and the gradients [k] of the outputs, if any, of any stride."""
    key = (*_key("dbce", logits, targets), _stride(dloss), _stride(dprobability))
    make = functools.partial(backward_launch, logits, targets, dloss, dprobability, dlogits)
    run_planned(key, _pointers(logits, dloss, dprobability, dlogits), make)


def _pointers(
    logits: Tensor, dloss: Tensor | None, dprobability: Tensor | None, dlogits: Tensor
) -> tuple[Tensor, ...]:
    """Return the tensors of the backward, with the logits in place of absent ones, which it never reads."""
    present = (logits if t is None else t for t in (dloss, dprobability))
    return (logits, *present, dlogits)
