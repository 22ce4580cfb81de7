"""The exponential moving average of the Generator's weights, with a decay that is warmed up."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

WARM_UP = 9.0
"""In update n the newest weights have the weight 9/(10 + n), until that falls below 1 - decay."""


class MovingAverage:
    """Updates a copy of the generator towards it: ``e ← e + w·(p - e)`` for each parameter, after each step.

    In update n = 1, 2, … the weight is::

        w = 1 - min(decay, (1 + n)/(10 + n)) = max(1 - decay, 9/(10 + n))

    With a constant weight the average would still hold a share decayⁿ of the initial weights, 41% after 900
    steps at 0.999. With this one it holds less than (6/n)⁹. It is roughly the average over the last tenth of
    the steps so far, until it becomes that over the last 1/(1 - decay) steps (from step 8,990 on at 0.999).

    Floating-point buffers, that is BatchNorm's running statistics, are averaged too, and others copied.
    Copying all of them gave images of about the same Fréchet distance over 1,000 steps.

    n is counted in a tensor on the networks' device, so that a captured CUDA graph counts it too.

    Args:
        average: a copy of the generator; it may have a wider dtype, as 16 bits cannot represent such small
            increments.
        generator: the network that is averaged.
        decay: the decay in the limit, in [0, 1).
        updates: number of updates that ``average`` has had already, to continue with.

    Sources: Yazıcı et al., *The Unusual Effectiveness of Averaging in GAN Training*, 2019; the warm-up is
    that of TensorFlow's ``ExponentialMovingAverage``, and an instance of the power-function averages of
    Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, 2024 (γ = 8).
    """

    def __init__(self, average: nn.Module, generator: nn.Module, decay: float, updates: int = 0) -> None:
        self._average, self._generator, self._smallest = average, generator, 1 - decay
        first = next(average.parameters())
        dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
        self.updates = torch.full((), float(updates), dtype=dtype, device=first.device)
        """The number of updates so far, changed in place."""

    @torch.no_grad()
    def update(self) -> None:
        """Update the average once; waits for nothing on the device."""
        self.updates += 1
        weight = (WARM_UP / (self.updates + 10)).clamp_(min=self._smallest)
        averages, values = [], []
        for old, new in zip(_tensors(self._average), _tensors(self._generator), strict=True):
            if old.is_floating_point():
                averages.append(old)
                values.append(new.to(old.dtype))
            else:
                old.copy_(new)
        differences = torch._foreach_sub(values, averages)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(averages, differences)


def check(ema: nn.Module, generator: nn.Module, device: torch.device) -> None:
    """Check that ``ema`` is a copy of the generator on the device, or an AveragedModel with such a copy.

    Raises:
        TypeError, ValueError: it is not; the message names the first tensor that differs.
    """
    if not isinstance(ema, nn.Module):
        raise TypeError(f"ema must be a torch.nn.Module, got {type(ema).__qualname__}")
    copied = ema.module if isinstance(ema, AveragedModel) else ema
    # Compared in order, as they are averaged: a wrapper around one of the two may change its names.
    for own, other in itertools.zip_longest(_named(generator).items(), _named(copied).items()):
        sides = [None if of is None else (of[1].shape, of[1].is_floating_point()) for of in (other, own)]
        if sides[0] != sides[1]:
            name = (own or other)[0]
            found, wanted = ("none" if side is None else str(list(side[0])) for side in sides)
            raise ValueError(
                f"ema must be a copy of the generator, but {name} is {found} instead of {wanted}"
            )
    addresses = {value.data_ptr() for value in _tensors(generator) if value.numel()}
    for name, value in _named(copied).items():
        if value.data_ptr() in addresses:
            raise ValueError(f"ema must be a copy of the generator, but shares {name} with it")
        if value.device != device:
            raise ValueError(f"ema must be on the networks' device {device}, but {name} is on {value.device}")


def _named(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(_named(network).values())
