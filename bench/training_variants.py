"""Registry of training variants: each builds a training step from the reference networks.

A build function gets both networks in training mode and float32, on the case's device, and returns a
:class:`Loop`. The baselines are the reference loop (:func:`dcgan.training.train_step`) around the fastest
networks PyTorch offers, and this project's step around cuDNN's convolutions. In a 16-bit dtype the networks
run under autocast, as is usual in mixed-precision training.
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
    """A training variant, built and ready to run."""

    step: Callable[[Tensor, Tensor], Result]
    """One step of both networks, from real images and noise."""
    adams: tuple[Adam, Adam]
    """The optimizers of G and D, which hold the parameters that the step updates and its Adam state."""

    def __call__(self, batch: Batch) -> Result:
        return self.step(*batch)


BuildLoop = Callable[[Generator, Discriminator, Training], Loop]
Transform = Callable[[nn.Module], nn.Module]


class Autocast(nn.Module):
    """A network under autocast; probabilities are returned in float32, as BCELoss requires."""

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device, self.dtype = network, device, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            y: Tensor = self.network(x)
        return y.float() if y.ndim == 1 else y


def adams(generator: nn.Module, discriminator: nn.Module) -> tuple[Adam, Adam]:
    """Return the reference recipe's optimizers of both networks' parameters."""
    return optimizers(generator, discriminator, Config())


def reference_loop(
    generator: nn.Module, discriminator: nn.Module, pair: tuple[Adam, Adam], mark: bool = False
) -> Loop:
    """Return the reference loop around any two networks.

    ``mark`` marks the beginning of each step for the CUDA graphs of torch.compile.
    """

    def step(real: Tensor, noise: Tensor) -> Result:
        if mark:
            torch.compiler.cudagraph_mark_step_begin()
        return train_step(generator, discriminator, *pair, real, noise)

    return Loop(step, pair)


def _unchanged(network: nn.Module) -> nn.Module:
    return network


def _nhwc(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def _fast(network: nn.Module) -> nn.Module:
    from dcgan import fast

    return fast.convert(network)  # type: ignore[arg-type]


def _with(transform: Transform, compiled: bool = False, mode: str | None = None) -> BuildLoop:
    """Return a build function of the reference loop around transformed and optionally compiled networks."""

    def build(generator: Generator, discriminator: Discriminator, case: Training) -> Loop:
        pair = adams(generator, discriminator)
        g, d = transform(generator), transform(discriminator)
        if case.autocast is not None:
            g, d = (Autocast(network, case.device, case.autocast) for network in (g, d))
        if compiled:
            g, d = torch.compile(g, mode=mode), torch.compile(d, mode=mode)  # type: ignore[assignment]
        return reference_loop(g, d, pair, mark=compiled and case.device == "cuda")

    return build


def _train_step(transform: Transform) -> BuildLoop:
    """Return a build function of this project's TrainStep around transformed networks, with fused optimizers.

    Around channels_last networks on a GPU, it captures cuDNN's convolutions in one CUDA graph; only the loss
    is this project's.
    """

    def build(generator: Generator, discriminator: Discriminator, case: Training) -> Loop:
        pair = optimizers(generator, discriminator, Config(), fused=True)
        if case.device == "cuda":  # as a tensor, so that graph replays see the value the check sets
            for group in (group for adam in pair for group in adam.param_groups):
                group["lr"] = torch.tensor(group["lr"], device=case.device)
        step = TrainStep(transform(generator), transform(discriminator), *pair, autocast=case.autocast)
        return Loop(step, pair)

    return build


_CUDA = ("cuda",)

VARIANTS: dict[str, Provider[BuildLoop]] = {
    variant.name: variant
    for variant in (
        Provider("eager", _with(_unchanged), searches=True),
        Provider("channels_last", _with(_nhwc), searches=True),
        Provider("compile", _with(_unchanged, compiled=True)),
        Provider("compile-channels_last", _with(_nhwc, compiled=True)),
        Provider("max-autotune", _with(_unchanged, compiled=True, mode="max-autotune"), searches=True),
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
"""Variants whose operators run one by one and can be profiled, and on which devices.

On a GPU, TrainStep is one CUDA graph.
"""
