"""What a training step computes, read off its optimizers, and what it should have: float64's."""

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
from bench.train_case import FLOOR, ONE_KINK, TIMES_EAGER, Batch, Training
from bench.ways import WAYS, Loop, adams, seeds_loop
from dcgan.training import Config, Result

LR = Config().lr
MOVED = 1e-3  # of a step's length: float32 rounds a weight near 1 to 3e-4 of a step of 2e-4


class Answer(NamedTuple):
    """What one step computed."""

    figures: list[float]
    """Losses and mean probabilities, in the order of Result."""
    gradients: list[Tensor]
    """G's and D's, as their optimizers saw them: all of a network in one vector, float64, on the CPU."""

    def errors(self, expected: Answer) -> tuple[float, float, str]:
        """Relative errors: of the gradient of the worse network, of the worst figure, and what that is."""
        gradient = max(map(relative_error, self.gradients, expected.gradients))
        pairs = list(zip(Result._fields, self.figures, expected.figures, strict=True))
        apart = [
            abs(mine - right) / abs(right) if math.isfinite(mine) else math.inf for _, mine, right in pairs
        ]
        figure = max(apart)
        name, mine, right = pairs[apart.index(figure)]
        return gradient, figure, f"{name} {mine:.6g}, not {right:.6g}"


def answers(loop: Loop, batches: Sequence[Batch]) -> list[Answer]:
    """A step on each batch, all from the same parameters, which stay as they are.

    At a step size of 0 Adam leaves parameters alone but keeps its mean of gradients, from whose change each
    gradient is told. In D's ``.grad`` there would be what G's phase leaves there, and nothing reads.
    """
    set_lr(loop, 0.0)
    decays = [adam.param_groups[0]["betas"][0] for adam in loop.adams]
    means = [state(adam, "exp_avg") for adam in loop.adams]
    found = []
    for batch in batches:
        figures = [float(figure) for figure in loop(batch)]
        before, means = means, [state(adam, "exp_avg") for adam in loop.adams]
        gradients = [
            (new - decay * old) / (1 - decay) for new, old, decay in zip(means, before, decays, strict=True)
        ]
        found.append(Answer(figures, gradients))
    set_lr(loop, LR)
    return found


def moved(loop: Loop, batch: Batch) -> float:
    """Takes a step; the relative error of how the parameters moved, given what Adam's state is after it."""
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
    """Sets the step size of both optimizers: in place where it is a tensor, for what is captured."""
    for group in (group for adam in loop.adams for group in adam.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def parameters(adam: Adam) -> list[Tensor]:
    return [p for group in adam.param_groups for p in group["params"]]


def state(adam: Adam, name: str) -> Tensor:
    """A part of the state of all parameters; 0 where there is none, before the first step."""
    return flat([adam.state.get(p, {}).get(name, torch.zeros_like(p)) for p in parameters(adam)])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All values in one vector, float64, on the CPU."""
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


@dataclass(frozen=True)
class Materials:
    """A case's batches and right answers, computed once and handed to every way."""

    batches: list[list[Tensor]]
    figures: list[list[float]]
    gradients: list[list[Tensor]]
    tolerance: float
    """Of a network's gradient."""
    figure_tolerance: float
    """Of a loss or mean probability."""

    @property
    def answers(self) -> list[Answer]:
        return [Answer(*answer) for answer in zip(self.figures, self.gradients, strict=True)]

    @staticmethod
    def of(case: Training) -> Materials:
        """By the seed's loop on the case's device: in float64, and for the tolerances in the case's dtype."""
        generator, discriminator = case.networks()
        batches = [Batch(*(t.to(case.device) for t in batch)) for batch in case.batches()]
        g, d = (copy.deepcopy(network).to(case.device).double() for network in (generator, discriminator))
        expected = answers(seeds_loop(g, d, adams(g, d)), [Batch(*(t.double() for t in b)) for b in batches])
        loop = WAYS["eager"].build(generator.to(case.device), discriminator.to(case.device), case)
        errors = [mine.errors(right) for mine, right in zip(answers(loop, batches), expected, strict=True)]
        return Materials(
            [[t.cpu() for t in batch] for batch in batches],
            [answer.figures for answer in expected],
            [answer.gradients for answer in expected],
            max(ONE_KINK, TIMES_EAGER * max(gradient for gradient, _, _ in errors)),
            max(FLOOR, TIMES_EAGER * max(figure for _, figure, _ in errors)),
        )

    def save(self, path: Path) -> None:
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, path)

    @staticmethod
    def load(path: Path) -> Materials:
        return Materials(**torch.load(path, map_location="cpu", weights_only=True))
