"""Whether another way of training learns what the reference learns: runs on real digits, and the criterion.

Adversarial training is chaotic. Rounding takes some value to the other side of a LeakyReLU's kink, where its
gradient changes by 80%; Adam's first steps take a gradient near zero by its sign; some tens of steps later
two runs of the same weights, batches and noise are as far apart as runs of different seeds. So
:func:`compare` asks two things:

* **the start**: over ``START`` steps of ``START_SHARE`` of the step size, both losses are within
  ``TOLERANCE`` of the reference's, relatively, in every seed. Steps this small leave rounding little to grow
  by: the reference in channels_last, other sums of the same products, comes to 1.3e-3 (in steps of full size
  to 0.5).
* **the whole run**: of each quantity, the seeds' mean in one way and in the other are no farther apart than
  two seeds of the reference are at most. A quantity is a curve, as its means over windows of ``WINDOW``
  steps, or a statistic of samples from fixed noise, as its values every ``EVERY`` steps. Apart is the root
  mean square of the difference over all windows, or moments and pixels.

Why the seeds' mean: where chaos is complete, a run's distance from the reference of its seed is distributed
as the distance of two seeds is, so that the largest of three exceeds the largest of three in every second
comparison, with nothing wrong. A mean of three scatters by a factor √3 less and stays within, and what is
wrong in every seed remains in it. ``Finding.seeds`` keeps the distances seed by seed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcgan import fast
from dcgan.data import Batches, digits
from dcgan.models import Discriminator, Generator, weights_init
from dcgan.training import Config, Result, TrainStep, optimizers, train

START = 20
START_SHARE = 0.02
TOLERANCE = 1e-2
WINDOW = 25
EVERY = 50
SAMPLES = 256
LATENT = 100
SHOWN = 12
LOSSES = ("loss_d", "loss_g")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Settings:
    """What the runs of a comparison share."""

    steps: int = 300
    features: int = 32
    image_size: int = 64
    batch: int = 32
    lr: float = 1e-3
    """Five times the seed's, so that 300 steps make digits."""
    real_label: float = 0.9
    device: str = "cpu"

    @property
    def title(self) -> str:
        return f"features {self.features} · image_size {self.image_size} · batch {self.batch}"

    def config(self, seed: int) -> Config:
        """The training loop's; more epochs than there are steps for."""
        return Config(epochs=self.steps, lr=self.lr, real_label=self.real_label, seed=seed)

    def images(self) -> Tensor:
        return digits(self.image_size).to(self.device)

    def networks(self, seed: int) -> tuple[Generator, Discriminator]:
        """The reference networks with DCGAN's initial weights; the same for every way."""
        sizes = {"features": self.features, "image_size": self.image_size}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pair = Generator(**sizes), Discriminator(**sizes)
            for network in pair:
                network.apply(weights_init)
        return pair[0].to(self.device), pair[1].to(self.device)


@dataclass(frozen=True)
class Run:
    """What one run measured."""

    way: str
    seed: int
    start: Tensor
    """The curves of another run, see :func:`start`."""
    curves: Tensor
    """[steps, 4], columns as in :class:`dcgan.training.Result`."""
    statistics: dict[str, Tensor]
    """:func:`statistics` of samples from fixed noise, every ``EVERY`` steps: [moments, …]."""
    samples: Tensor
    """The first ``SHOWN`` of the last moment's."""
    seconds: float

    def quantities(self) -> dict[str, Tensor]:
        """What whole runs are compared by."""
        windows = torch.stack([window.mean(0) for window in self.curves.split(WINDOW)])
        return dict(zip(Result._fields, windows.T, strict=True)) | self.statistics


def statistics(images: Tensor) -> dict[str, Tensor]:
    """What samples [N, …] are compared by; diversity is the mean distance (RMS of pixels) of two of them."""
    pixels = images.cpu().double().flatten(1)
    return {
        "mean image": pixels.mean(0),
        "std image": pixels.std(0),
        "mean": pixels.mean(),
        "std": pixels.std(),
        "quantiles": pixels.flatten().quantile(pixels.new_tensor(QUANTILES)),
        "diversity": torch.pdist(pixels).mean() / math.sqrt(pixels.shape[1]),
    }


# --- ways to train ------------------------------------------------------------------------------------------


def seeds_loop(
    generator: nn.Module, discriminator: nn.Module, batches: Batches, config: Config
) -> Iterator[Result]:
    for step in train(generator, discriminator, batches, config):
        yield step.result


def train_steps(
    generator: nn.Module, discriminator: nn.Module, batches: Batches, config: Config
) -> Iterator[Result]:
    """The same loop around :class:`dcgan.training.TrainStep`, with the same noise."""
    pair = optimizers(generator, discriminator, config)
    step = TrainStep(generator, discriminator, *pair, real_label=config.real_label, loss=config.loss)
    device = batches.images.device
    random = torch.Generator(device).manual_seed(config.seed)
    for real in itertools.chain.from_iterable(itertools.repeat(batches, config.epochs)):
        yield step(real, torch.randn(len(real), config.latent_dim, 1, 1, generator=random, device=device))


class Way(NamedTuple):
    """A way of training: what becomes of the reference networks, and the loop."""

    network: Callable[[Any], nn.Module]
    loop: Callable[[nn.Module, nn.Module, Batches, Config], Iterator[Result]]


WAYS = {
    "reference": Way(lambda network: network, seeds_loop),
    "channels_last": Way(lambda network: network.to(memory_format=torch.channels_last), seeds_loop),
    "fast": Way(fast.convert, train_steps),
}
"""``channels_last`` is the reference in other sums: how far rounding alone takes it."""


def fixed_noise() -> Tensor:
    """What all samples are made from; of no run's seed."""
    return torch.randn(SAMPLES, LATENT, 1, 1, generator=torch.Generator().manual_seed(1 << 30))


def steps(way: str, seed: int, settings: Settings) -> Iterator[tuple[nn.Module, Result]]:
    """The Generator and the Result, step by step; weights, batches and noise are the seed's in every way."""
    change, loop = WAYS[way]
    generator, discriminator = map(change, settings.networks(seed))
    batches = Batches(settings.images(), settings.batch, seed)
    for result in itertools.islice(
        loop(generator, discriminator, batches, settings.config(seed)), settings.steps
    ):
        yield generator, result


def start(way: str, seed: int, settings: Settings) -> Tensor:
    """Curves [START, 4] of a run with small steps."""
    slow = replace(settings, steps=START, lr=settings.lr * START_SHARE)
    return torch.stack([torch.stack(result) for _, result in steps(way, seed, slow)]).cpu().double()


def learn(way: str, seed: int, settings: Settings) -> Run:
    """Trains in one way."""
    began = time.perf_counter()
    noise = fixed_noise().to(settings.device)
    curves: list[Tensor] = []
    moments: list[dict[str, Tensor]] = []
    for generator, result in steps(way, seed, settings):
        curves.append(torch.stack(result))
        if len(curves) % EVERY == 0 or len(curves) == settings.steps:
            with torch.no_grad():
                samples = generator.eval()(noise).cpu()
            generator.train()
            moments.append(statistics(samples))
    return Run(
        way,
        seed,
        start(way, seed, settings),
        torch.stack(curves).cpu().double(),
        {name: torch.stack([moment[name] for moment in moments]) for name in moments[0]},
        samples[:SHOWN],
        time.perf_counter() - began,
    )


# --- the criterion ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One quantity: how far apart the ways are, and may be."""

    quantity: str
    distance: float
    allowed: float
    seeds: tuple[float, ...] = ()
    """For the whole run: the distances seed by seed, which are not judged."""

    @property
    def ok(self) -> bool:
        return self.distance <= self.allowed  # NaN is not


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def compare(references: Sequence[Run], others: Sequence[Run]) -> list[Finding]:
    """The criterion (see the module), of a way's runs from the same seeds as the reference's, in their order.

    Raises:
        ValueError: seeds that differ, or fewer than two.
    """
    seeds, theirs = [run.seed for run in references], [run.seed for run in others]
    if seeds != theirs or len(set(seeds)) < 2:
        raise ValueError(f"runs must be of the same two seeds or more, got {seeds} and {theirs}")
    findings = []
    for name in LOSSES:
        column = Result._fields.index(name)
        off = [
            (b.start / a.start - 1)[:, column].abs().max() for a, b in zip(references, others, strict=True)
        ]
        findings.append(Finding(f"{name}, start", float(torch.stack(off).max()), TOLERANCE))
    want, got = [run.quantities() for run in references], [run.quantities() for run in others]
    for name in want[0]:
        differences = torch.stack([b[name] - a[name] for a, b in zip(want, got, strict=True)])
        spread = [rms(a[name] - b[name]) for a, b in itertools.combinations(want, 2)]
        by_seed = tuple(map(rms, differences))
        findings.append(Finding(name, rms(differences.mean(0)), max(spread), by_seed))
    return findings
