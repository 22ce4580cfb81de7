"""BatchNorm without its arithmetic: running statistics, and statistics over several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from .kernels.reference import accumulator_dtype


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the batches of all torch.distributed processes, on GPUs and CPUs.

    ``nn.SyncBatchNorm`` supports only GPUs, and DistributedDataParallel rejects it on CPUs. Without a process
    group, and in eval mode, this class is ``nn.BatchNorm2d``.
    """

    process_group: Any = None

    @staticmethod
    def convert(network: nn.Module) -> nn.Module:
        """Convert every ``nn.BatchNorm2d`` of ``network`` in place; parameters and names are unchanged."""
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d
        return network

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and distributed.is_initialized()):
            return super().forward(input)
        x = input.to(accumulator_dtype(input.dtype))
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean, var, count = merge_statistics(mean, var, x.numel() // x.shape[1], self.process_group)
        update_running_stats(self, mean, var, count)
        y = (x - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)


BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
SYNC_BATCHNORMS = (SyncBatchNorm2d, nn.SyncBatchNorm)


def update_running_stats(norm: BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics as ``nn.BatchNorm2d`` does, from the biased variance of ``count`` values.

    The running variance is unbiased; a momentum of None stands for the cumulative average.
    """
    if not (norm.training and norm.track_running_stats):
        return
    running_mean, running_var = norm.running_mean, norm.running_var
    if running_mean is None or running_var is None:
        return
    with torch.no_grad():
        momentum: Any = norm.momentum
        if momentum is None:
            momentum = 0.0  # as in nn.BatchNorm2d, if there is no count of batches
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = norm.num_batches_tracked.to(running_mean.dtype).reciprocal()
        if count == 0:
            return
        running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        unbiased = var.detach() * (count / (count - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def merge_statistics(mean: Tensor, var: Tensor, count: int, group: Any = None) -> tuple[Tensor, Tensor, int]:
    """Merge each process's mean and variance into those over the values of all processes.

    With n_r values on process r, N = Σ n_r and w_r = n_r / N (Chan, Golub, LeVeque, 1983)::

        mean = Σ w_r·mean_r
        var  = Σ w_r·(var_r + (mean_r - mean)²)

    The backward sums the incoming gradients over the processes first, since every process's loss depends on
    every process's statistics::

        dmean_r = w_r·(Σ dmean + 2·(mean_r - mean)·Σ dvar)
        dvar_r  = w_r·Σ dvar

    Args:
        mean: [C], float32 or float64.
        var: [C], biased.
        count: number of values per channel in this process; may be 0.
        group: the process group; None for all processes. Each of them must call this function, and its
            backward, in the same order.

    Returns:
        The merged mean and (biased) variance, and N.
    """
    merged, variance, total = _Merge.apply(mean, var, count, group)
    return merged, variance, int(total)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, int]:
        own = torch.cat([mean, var, mean.new_full((1,), count)])
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, own, group=group)
        means, variances, counts = torch.stack(parts).split([len(mean), len(var), 1], dim=1)
        total = int(counts.sum())
        present = counts > 0  # the statistics of an empty batch are NaN
        weights = counts / max(1, total)
        merged = (weights * means.where(present, 0)).sum(0)
        offsets = (means - merged).where(present, 0)
        variance = (weights * (variances.where(present, 0) + offsets.square())).sum(0)
        ctx.group, ctx.weight = group, count / max(1, total)
        ctx.offset = mean - merged if count else torch.zeros_like(mean)
        return merged, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:
        sums = torch.stack([dmean, dvar])
        distributed.all_reduce(sums, group=ctx.group)
        dmean, dvar = sums * ctx.weight
        return dmean + 2 * ctx.offset * dvar, dvar, None, None
