"""Providers that misbehave, for ``--providers rogue:NAME``."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.train_case import Training
from bench.ways import Loop, adams, seeds_loop
from dcgan.training import Result

Runner = Callable[[Tensor], Tensor]


def wrong(model: nn.Module, example: Tensor, threads: int) -> Runner:
    return lambda x: model(x) * 1.03


def stale(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Right once: gives its first answer for ever."""
    answer = model(example)
    return lambda x: answer


def raises(model: nn.Module, example: Tensor, threads: int) -> Runner:
    raise RuntimeError("no kernel\nand a second line")


def dies(model: nn.Module, example: Tensor, threads: int) -> Runner:
    return lambda x: os._exit(7)


def dies_later(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Passes the check, then dies while it is timed."""
    calls = 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            os._exit(7)
        output: Tensor = model(x)
        return output

    return run


def hangs(model: nn.Module, example: Tensor, threads: int) -> Runner:
    time.sleep(3600)
    raise AssertionError


# --- ways of training, for ``bench train --providers rogue:NAME`` -------------------------------------------


def seeds(generator: Any, discriminator: Any, case: Training) -> Loop:
    """The seed's loop, from outside."""
    return seeds_loop(generator, discriminator, adams(generator, discriminator))


def half_a_gradient(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Right losses; one layer of G learns half as fast."""
    generator.main[0].weight.register_hook(lambda gradient: gradient / 2)
    return seeds(generator, discriminator, case)


def other_labels(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Gradients of the smoothed labels, a loss that is reported for others."""
    loop = seeds(generator, discriminator, case)

    def step(real: Tensor, noise: Tensor) -> Result:
        result = loop.step(real, noise)
        return result._replace(loss_d=result.loss_d * 1.001)

    return dataclasses.replace(loop, step=step)


def never_moves(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Computes everything and puts G's parameters back."""
    loop = seeds(generator, discriminator, case)

    def step(real: Tensor, noise: Tensor) -> Result:
        before = [p.detach().clone() for p in generator.parameters()]
        result = loop.step(real, noise)
        with torch.no_grad():
            for parameter, value in zip(generator.parameters(), before, strict=True):
                parameter.copy_(value)
        return result

    return dataclasses.replace(loop, step=step)


def forgets_its_optimizers(generator: Any, discriminator: Any, case: Training) -> Loop:
    loop = seeds(generator, discriminator, case)
    return dataclasses.replace(loop, adams=adams(generator, discriminator))


def remembers(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Right once: trains on the first batch for ever."""
    loop = seeds(generator, discriminator, case)
    first: list[Tensor] = []

    def step(real: Tensor, noise: Tensor) -> Result:
        first[:] = first or [real, noise]
        return loop.step(*first)

    return dataclasses.replace(loop, step=step)
