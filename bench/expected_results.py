"""Gradients and losses of training steps, read from the optimizers' state, and their float64 reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam

from bench.cases import relative_error
from bench.train_case import KINK_TOLERANCE, MIN_TOLERANCE, TIMES_EAGER, Batch, Training
from bench.training_variants import VARIANTS, Loop, adams, reference_loop
from dcgan.training import Config, Result

LR = Config().lr
UPDATE_TOLERANCE = 1e-3  # relative: float32 rounds a weight near 1 by 3e-4 of an update of 2e-4


class StepResult(NamedTuple):
    """The losses and gradients of one step."""

    figures: list[float]
    """Losses and mean probabilities, in the order of :class:`dcgan.training.Result`."""
    gradients: list[Tensor]
    """Gradients of G and D as their optimizers saw them: one vector per network, float64, on the CPU."""

    def errors(self, expected: StepResult) -> tuple[float, float, str]:
        """Return the largest relative errors of a gradient and of a figure, and describe the latter."""
        gradient = max(map(relative_error, self.gradients, expected.gradients))
        pairs = list(zip(Result._fields, self.figures, expected.figures, strict=True))
        relative = [abs(a - e) / abs(e) if math.isfinite(a) else math.inf for _, a, e in pairs]
        figure = max(relative)
        name, a, e = pairs[relative.index(figure)]
        return gradient, figure, f"{name} is {a:.6g}, expected {e:.6g}"


def step_results(loop: Loop, batches: Sequence[Batch]) -> list[StepResult]:
    """Run a step on each batch, all with the same parameters, which are left unchanged.

    With a learning rate of 0, Adam leaves the parameters unchanged but updates its running mean of gradients,
    from whose change each gradient is computed. D's ``.grad`` cannot be used: after a step it holds the
    gradient of G's phase, which no optimizer reads.
    """
    set_lr(loop, 0.0)
    decays = [adam.param_groups[0]["betas"][0] for adam in loop.adams]
    means = [state(adam, "exp_avg") for adam in loop.adams]
    results = []
    for batch in batches:
        figures = [float(figure) for figure in loop(batch)]
        before, means = means, [state(adam, "exp_avg") for adam in loop.adams]
        gradients = [
            (new - decay * old) / (1 - decay) for new, old, decay in zip(means, before, decays, strict=True)
        ]
        results.append(StepResult(figures, gradients))
    set_lr(loop, LR)
    return results


def update_error(loop: Loop, batch: Batch) -> float:
    """Take a step and return the relative error of the parameter update given Adam's state after it."""
    before = [flat(parameters(adam)) for adam in loop.adams]
    loop(batch)
    errors = []
    for adam, old in zip(loop.adams, before, strict=True):
        (decay, square_decay), eps = adam.param_groups[0]["betas"], adam.param_groups[0]["eps"]
        steps = max((float(kept["step"]) for kept in adam.state.values() if "step" in kept), default=0.0)
        if not steps:
            return math.inf
        mean = state(adam, "exp_avg") / (1 - decay**steps)
        square = state(adam, "exp_avg_sq") / (1 - square_decay**steps)
        errors.append(relative_error(flat(parameters(adam)) - old, -LR * mean / (square.sqrt() + eps)))
    return max(errors)


def set_lr(loop: Loop, lr: float) -> None:
    """Set the learning rate of both optimizers, in place where it is a tensor that a CUDA graph reads."""
    for group in (group for adam in loop.adams for group in adam.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def parameters(adam: Adam) -> list[Tensor]:
    return [p for group in adam.param_groups for p in group["params"]]


def state(adam: Adam, name: str) -> Tensor:
    """Return one entry of Adam's state for all parameters as one vector; zeros before the first step."""
    return flat([adam.state.get(p, {}).get(name, torch.zeros_like(p)) for p in parameters(adam)])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all values in one float64 vector on the CPU."""
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


@dataclass(frozen=True)
class Materials:
    """A case's batches and reference results, computed once and used to check every variant."""

    batches: list[list[Tensor]]
    figures: list[list[float]]
    gradients: list[list[Tensor]]
    tolerance: float
    """Allowed relative error of a network's gradient."""
    figure_tolerance: float
    """Allowed relative error of a loss or mean probability."""

    @property
    def step_results(self) -> list[StepResult]:
        return [StepResult(*pair) for pair in zip(self.figures, self.gradients, strict=True)]

    @staticmethod
    def of(case: Training) -> Materials:
        """Run the reference loop on the case's device, in float64 and (for the tolerances) in its dtype."""
        generator, discriminator = case.networks()
        batches = [Batch(*(t.to(case.device) for t in batch)) for batch in case.batches()]
        g, d = (copy.deepcopy(network).to(case.device).double() for network in (generator, discriminator))
        expected = step_results(
            reference_loop(g, d, adams(g, d)), [Batch(*(t.double() for t in b)) for b in batches]
        )
        loop = VARIANTS["eager"].build(generator.to(case.device), discriminator.to(case.device), case)
        errors = [a.errors(e) for a, e in zip(step_results(loop, batches), expected, strict=True)]
        return Materials(
            [[t.cpu() for t in batch] for batch in batches],
            [result.figures for result in expected],
            [result.gradients for result in expected],
            max(KINK_TOLERANCE, TIMES_EAGER * max(gradient for gradient, _, _ in errors)),
            max(MIN_TOLERANCE, TIMES_EAGER * max(figure for _, figure, _ in errors)),
        )

    def save(self, path: Path) -> None:
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, path)

    @staticmethod
    def load(path: Path) -> Materials:
        return Materials(**torch.load(path, map_location="cpu", weights_only=True))
