"""Criterion for whether a training variant learns what the reference learns, and the runs it is applied to.

Adversarial training is chaotic. Rounding moves some value across a LeakyReLU's kink, where its gradient
changes by 80%; Adam's first steps turn a gradient near zero into its sign; some tens of steps later, two runs
with the same weights, batches and noise differ as much as runs with different RNG seeds. :func:`compare`
therefore checks two conditions:

* **the start**: over ``START`` steps at ``START_SHARE`` of the learning rate, the relative difference of both
  losses from the reference is at most ``TOLERANCE`` for every seed. With steps this small, rounding errors
  grow little: the reference in channels_last, which sums the same products in another order, reaches 1.3e-3
  (0.5 at the full learning rate).
* **the whole run**: for each quantity, the distance between the variant's mean over the seeds and the
  reference's is at most the largest distance between two seeds of the reference. A quantity is either a
  curve, given by its means over windows of ``WINDOW`` steps, or a statistic of samples from fixed noise,
  given by its values every ``EVERY`` steps. The distance is the root mean square of the difference over all
  windows, or over all snapshots and pixels.

The mean over the seeds is used because, once chaos is complete, the distance between a run and the reference
run of its seed has the same distribution as the distance between two seeds. The largest of three such
distances would exceed the largest of three others in half of all comparisons even if nothing is wrong. The
mean of three runs scatters less by a factor of √3 and stays below the limit, while an error common to all
seeds remains in it. ``Finding.seeds`` keeps the distances per seed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
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
    """Settings shared by all runs of a comparison."""

    steps: int = 300
    features: int = 32
    image_size: int = 64
    batch: int = 32
    lr: float = 1e-3
    """Five times the reference recipe's 2e-4, so that 300 steps suffice to generate digits."""
    real_label: float = 0.9
    device: str = "cpu"

    @property
    def title(self) -> str:
        return f"features {self.features} · image_size {self.image_size} · batch {self.batch}"

    def config(self, seed: int) -> Config:
        """Return the training configuration, with more epochs than the steps need."""
        return Config(epochs=self.steps, lr=self.lr, real_label=self.real_label, seed=seed)

    def images(self) -> Tensor:
        return digits(self.image_size).to(self.device)

    def networks(self, seed: int) -> tuple[Generator, Discriminator]:
        """Return the reference networks with DCGAN's initial weights, the same for every variant."""
        sizes = {"features": self.features, "image_size": self.image_size}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pair = Generator(**sizes), Discriminator(**sizes)
            for network in pair:
                network.apply(weights_init)
        return pair[0].to(self.device), pair[1].to(self.device)


class Run(NamedTuple):
    """The measurements of one run."""

    variant: str
    seed: int
    start: Tensor  # the curves of a separate run with small steps
    curves: Tensor  # [steps, 4], with columns as in dcgan.training.Result
    statistics: dict[str, Tensor]  # of samples from fixed noise, every EVERY steps: [snapshots, …]
    samples: Tensor  # the first SHOWN of the last snapshot
    seconds: float

    def quantities(self) -> dict[str, Tensor]:
        """Return the quantities by which whole runs are compared."""
        windows = torch.stack([window.mean(0) for window in self.curves.split(WINDOW)])
        return dict(zip(Result._fields, windows.T, strict=True)) | self.statistics

    def ends(self) -> dict[str, float]:
        """Return the curves' last window and the last samples' scalar statistics."""
        return {name: float(value[-1]) for name, value in self.quantities().items() if value.ndim == 1}


def statistics(images: Tensor) -> dict[str, Tensor]:
    """Return the statistics of samples [N, …]; diversity is the mean RMS distance between two samples."""
    pixels = images.cpu().double().flatten(1)
    return {
        "mean image": pixels.mean(0),
        "std image": pixels.std(0),
        "mean": pixels.mean(),
        "std": pixels.std(),
        "quantiles": pixels.flatten().quantile(pixels.new_tensor(QUANTILES)),
        "diversity": torch.pdist(pixels).mean() / math.sqrt(pixels.shape[1]),
    }


# --- training variants --------------------------------------------------------------------------------------

VARIANTS = ("reference", "fast", "channels_last")
"""``channels_last`` is the reference with another summation order; it shows the effect of rounding alone."""


def steps(variant: str, seed: int, settings: Settings) -> Iterator[tuple[nn.Module, Result]]:
    """Yield the Generator and the Result of every step.

    Initial weights, batches and noise are determined by the RNG seed and the same for every variant.
    """
    networks: Sequence[Any] = settings.networks(seed)
    if variant == "channels_last":
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
    elif variant == "fast":
        networks = [fast.convert(network) for network in networks]
    (g, d), config = networks, settings.config(seed)
    batches = Batches(settings.images(), settings.batch, seed)
    slow = (step.result for step in train(g, d, batches, config))
    results = fast_train(g, d, batches, config) if variant == "fast" else slow
    for result in itertools.islice(results, settings.steps):
        yield g, result


def fast_train(g: nn.Module, d: nn.Module, batches: Batches, config: Config) -> Iterator[Result]:
    """The loop of :func:`dcgan.training.train` around TrainStep, with the same noise."""
    step = TrainStep(g, d, *optimizers(g, d, config), real_label=config.real_label, loss=config.loss)
    device = batches.images.device
    random = torch.Generator(device).manual_seed(config.seed)
    for real in itertools.chain.from_iterable(itertools.repeat(batches, config.epochs)):
        yield step(real, torch.randn(len(real), config.latent_dim, 1, 1, generator=random, device=device))


def start(variant: str, seed: int, settings: Settings) -> Tensor:
    """Return the curves [START, 4] of a run with small steps."""
    slow = replace(settings, steps=START, lr=settings.lr * START_SHARE)
    return torch.stack([torch.stack(result) for _, result in steps(variant, seed, slow)]).cpu().double()


def learn(variant: str, seed: int, settings: Settings) -> Run:
    """Train one variant from one RNG seed."""
    began = time.perf_counter()
    random = torch.Generator().manual_seed(1 << 30)  # no run has this RNG seed
    noise = torch.randn(SAMPLES, LATENT, 1, 1, generator=random).to(settings.device)
    curves: list[Tensor] = []
    snapshots: list[dict[str, Tensor]] = []
    for generator, result in steps(variant, seed, settings):
        curves.append(torch.stack(result))
        if len(curves) % EVERY == 0 or len(curves) == settings.steps:
            with torch.no_grad():
                samples = generator.eval()(noise).cpu()
            generator.train()
            snapshots.append(statistics(samples))
    return Run(
        variant,
        seed,
        start(variant, seed, settings),
        torch.stack(curves).cpu().double(),
        {name: torch.stack([snapshot[name] for snapshot in snapshots]) for name in snapshots[0]},
        samples[:SHOWN],
        time.perf_counter() - began,
    )


# --- the criterion ------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """The distance of one quantity from the reference, and its limit."""

    quantity: str
    distance: float
    allowed: float
    seeds: tuple[float, ...] = ()  # the distances per seed, which have no influence on the verdict

    @property
    def ok(self) -> bool:
        return self.distance <= self.allowed  # False for NaN


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def compare(references: Sequence[Run], others: Sequence[Run]) -> list[Finding]:
    """Apply the criterion (see the module) to a variant's runs; their seeds and order are the reference's.

    Raises:
        ValueError: the seeds differ, or there are fewer than two.
    """
    seeds, other_seeds = [run.seed for run in references], [run.seed for run in others]
    if seeds != other_seeds or len(set(seeds)) < 2:
        raise ValueError(f"runs must be of the same two seeds or more, got {seeds} and {other_seeds}")
    starts = torch.stack([b.start / a.start - 1 for a, b in zip(references, others, strict=True)]).abs()
    findings = []
    for name in LOSSES:
        distance = starts[..., Result._fields.index(name)].max()
        findings.append(Finding(f"{name}, start", float(distance), TOLERANCE))
    want, got = [run.quantities() for run in references], [run.quantities() for run in others]
    for name in want[0]:
        differences = torch.stack([b[name] - a[name] for a, b in zip(want, got, strict=True)])
        spread = [rms(a[name] - b[name]) for a, b in itertools.combinations(want, 2)]
        by_seed = tuple(map(rms, differences))
        findings.append(Finding(name, rms(differences.mean(0)), max(spread), by_seed))
    return findings
