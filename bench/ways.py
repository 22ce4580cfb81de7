"""Who trains: one entry a way, each a function from the reference networks to a step of training.

A build function gets both networks in training mode and float32, on the case's device, and returns a
:class:`Loop`. Rivals are the seed's loop, :func:`dcgan.training.train_step`, around networks that PyTorch
makes as fast as it can, and this project's own step around cuDNN's. In a 16-bit dtype the networks run under
autocast, as mixed precision is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam

from bench.providers import Provider
from bench.train_case import Batch, Training
from dcgan.models import Discriminator, Generator
from dcgan.training import Config, Result, TrainStep, optimizers, train_step


@dataclass(frozen=True)
class Loop:
    """A way of training, built."""

    step: Callable[[Tensor, Tensor], Result]
    """One step of both networks, from real images and noise."""
    adams: tuple[Adam, Adam]
    """G's and D's: what the step moves, and what it keeps in order to."""

    def __call__(self, batch: Batch) -> Result:
        return self.step(*batch)


BuildLoop = Callable[[Generator, Discriminator, Training], Loop]
Change = Callable[[nn.Module], nn.Module]


class Autocast(nn.Module):
    """A network under autocast; probabilities come out in float32, as BCELoss wants them there."""

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device, self.dtype = network, device, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            y: Tensor = self.network(x)
        return y.float() if y.ndim == 1 else y


def adams(generator: nn.Module, discriminator: nn.Module) -> tuple[Adam, Adam]:
    """The seed's optimizers of both networks' parameters."""
    return optimizers(generator, discriminator, Config())


def seeds_loop(
    generator: nn.Module, discriminator: nn.Module, pair: tuple[Adam, Adam], mark: bool = False
) -> Loop:
    """The seed's loop around any two networks; ``mark`` tells compiled CUDA graphs where steps begin."""

    def step(real: Tensor, noise: Tensor) -> Result:
        if mark:
            torch.compiler.cudagraph_mark_step_begin()
        return train_step(generator, discriminator, *pair, real, noise)

    return Loop(step, pair)


def _same(network: nn.Module) -> nn.Module:
    return network


def _nhwc(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def _fast(network: nn.Module) -> nn.Module:
    from dcgan import fast

    return fast.convert(network)  # type: ignore[arg-type]


def _with(change: Change, compiled: bool = False, mode: str | None = None) -> BuildLoop:
    """The seed's loop around networks changed, then compiled."""

    def build(generator: Generator, discriminator: Discriminator, case: Training) -> Loop:
        pair = adams(generator, discriminator)
        g, d = change(generator), change(discriminator)
        if case.autocast is not None:
            g, d = (Autocast(network, case.device, case.autocast) for network in (g, d))
        if compiled:
            g, d = torch.compile(g, mode=mode), torch.compile(d, mode=mode)  # type: ignore[assignment]
        return seeds_loop(g, d, pair, mark=compiled and case.device == "cuda")

    return build


def _train_step(change: Change) -> BuildLoop:
    """This project's own step around networks changed, with the optimizers that go with it.

    Around channels_last networks, on a GPU, it is cuDNN's convolutions in one CUDA graph; the loss is ours.
    """

    def build(generator: Generator, discriminator: Discriminator, case: Training) -> Loop:
        pair = optimizers(generator, discriminator, Config(), fused=True)
        if case.device == "cuda":  # a replay is to read what the check sets
            for group in (group for adam in pair for group in adam.param_groups):
                group["lr"] = torch.tensor(group["lr"], device=case.device)
        step = TrainStep(change(generator), change(discriminator), *pair, autocast=case.autocast)
        return Loop(step, pair)

    return build


_CUDA = ("cuda",)

WAYS: dict[str, Provider[BuildLoop]] = {
    way.name: way
    for way in (
        Provider("eager", _with(_same), searches=True),
        Provider("channels_last", _with(_nhwc), searches=True),
        Provider("compile", _with(_same, compiled=True)),
        Provider("compile-channels_last", _with(_nhwc, compiled=True)),
        Provider("max-autotune", _with(_same, compiled=True, mode="max-autotune"), searches=True),
        Provider(
            "max-autotune-channels_last",
            _with(_nhwc, compiled=True, mode="max-autotune"),
            searches=True,
        ),
        Provider("reduce-overhead", _with(_nhwc, compiled=True, mode="reduce-overhead"), devices=_CUDA),
        Provider("cudnn-graph", _train_step(_nhwc), devices=_CUDA, searches=True),
        Provider("fast", _with(_fast), ours=True),
        Provider("fast-compile", _with(_fast, compiled=True), ours=True),
        Provider("train-step", _train_step(_fast), ours=True),
    )
}

PROFILED = {"fast": ("cpu", "cuda"), "train-step": ("cpu",)}
"""Whose operators run one by one and can be told apart, and where: on a GPU TrainStep is one graph."""
