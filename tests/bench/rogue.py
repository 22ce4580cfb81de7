"""Deliberately faulty providers, for ``--providers rogue:NAME``."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.training import Loop, Training, reference_loop
from dcgan.training import Result

Runner = Callable[[Tensor], Tensor]


def wrong(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Scale the output by 1.03."""
    return lambda x: model(x) * 1.03


def stale(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Return the output of the first call forever."""
    output = model(example)
    return lambda x: output


def raises(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Fail while it is built."""
    raise RuntimeError("no kernel\nand a second line")


def dies(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Exit the process at the first call."""
    return lambda x: os._exit(7)


def dies_later(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Pass the check, then exit the process while being timed."""
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
    """Never finish building."""
    time.sleep(3600)
    raise AssertionError


# --- training variants, for ``bench train --providers rogue:NAME`` ------------------------------------------


def reference(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Run the reference loop, registered as an external variant."""
    return reference_loop(generator, discriminator)


def half_a_gradient(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Compute correct losses, but halve the weight gradient of one layer of G."""
    generator.main[0].weight.register_hook(lambda gradient: gradient / 2)
    return reference(generator, discriminator, case)


def other_labels(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Compute correct gradients, but report a loss_d that is off by 0.1%."""
    loop = reference(generator, discriminator, case)

    def step(real: Tensor, noise: Tensor) -> Result:
        result = loop.step(real, noise)
        return result._replace(loss_d=result.loss_d * 1.001)

    return dataclasses.replace(loop, step=step)


def never_moves(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Compute everything, then restore G's parameters."""
    loop = reference(generator, discriminator, case)

    def step(real: Tensor, noise: Tensor) -> Result:
        before = [p.detach().clone() for p in generator.parameters()]
        result = loop.step(real, noise)
        with torch.no_grad():
            for parameter, value in zip(generator.parameters(), before, strict=True):
                parameter.copy_(value)
        return result

    return dataclasses.replace(loop, step=step)


def forgets_its_optimizers(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Expose optimizers other than those it steps."""
    loop = reference(generator, discriminator, case)
    return dataclasses.replace(loop, adams=reference(generator, discriminator, case).adams)


def remembers(generator: Any, discriminator: Any, case: Training) -> Loop:
    """Train on the first batch forever."""
    loop = reference(generator, discriminator, case)
    first: list[Tensor] = []

    def step(real: Tensor, noise: Tensor) -> Result:
        first[:] = first or [real, noise]
        return loop.step(*first)

    return dataclasses.replace(loop, step=step)
