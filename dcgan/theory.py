"""GAN theory's optimal discriminator, checked numerically on one-dimensional densities.

For densities p (real) and q (generated) and a discriminator D: ℝ → (0, 1),

    V(D) = E_p[log D(x)] + E_q[log(1 − D(x))]
    D*(x) = p(x) / (p(x) + q(x))                     maximises V, point by point
    V(D*) = 2·JSD(p‖q) − 2·log 2
    JSD(p‖q) = ½ KL(p‖m) + ½ KL(q‖m),  m = (p + q)/2

All computations are in float64 and on logits: D = σ(l), with l = log p − log q for D*, so that neither log D
nor log(1 − D) loses digits where D is near 0 or 1.

Sources: Goodfellow et al., *Generative Adversarial Nets*, NeurIPS 2014, section 4; for vanishing gradients,
Arjovsky and Bottou, *Towards Principled Methods for Training GANs*, ICLR 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.integrate import tanhsinh
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Laplace, MixtureSameFamily, Normal, Uniform
from torch.nn import functional as F

from dcgan.errors import InputError, RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST, SMALLEST = 1e3, 1e-3
"""Limits of locations and scales, within which float64 has many more digits than the checks need."""

SPECS = {
    "normal": "normal:MEAN,STD",
    "uniform": "uniform:LOW,HIGH",
    "laplace": "laplace:MEAN,SCALE",
    "mixture": "mixture:WEIGHT,MEAN,STD/WEIGHT,MEAN,STD/…",
}

IDENTITY = 1e-6
"""Maximum difference between V(D*) and 2·JSD − 2·log 2, each computed by a different quadrature.

Both are accurate to 1e-9 or better; a wrong formula is off by 1e-3 or more.
"""

MIN_GAP = 1e-11
"""Breaks closer than this differ only by rounding and are merged."""

POINTS = 16
"""Number of Gauss-Legendre points on each interval between two breaks."""

BATCH = 1024
LR = 1e-2
MEASUREMENTS = 100
"""How many times V(D) is measured during training."""


@dataclass(frozen=True)
class Density:
    """A probability density on the line, in float64.

    Args:
        spec: the description that it was parsed from.
        distribution: provides ``log_prob`` and ``sample``.
        breaks: sorted points. Less than 1e-15 of the mass lies beyond the outermost ones, and between two
            adjacent ones the density is smooth and varies moderately.
        positive: whether the density is positive everywhere.
    """

    spec: str
    distribution: Distribution
    breaks: tuple[float, ...]
    positive: bool

    def log(self, x: Tensor) -> Tensor:
        """Return the log density in x's shape; −∞ where the density is 0."""
        result: Tensor = self.distribution.log_prob(x)
        return result

    def sample(self, n: int) -> Tensor:
        """Draw samples [n] from PyTorch's global random number generator."""
        return self.distribution.sample((n,))

    @property
    def mean(self) -> float:
        return float(self.distribution.mean)

    @property
    def std(self) -> float:
        return float(self.distribution.stddev)


def parse(spec: str) -> Density:
    """Parse a density in one of the formats of ``SPECS``, for example ``normal:-1,0.5``.

    A mixture's weights are normalized by their sum. Means and bounds are from −1000 to 1000; standard
    deviations, scales, weights and widths are at least 0.001, and all but widths at most 1000.

    Raises:
        InputError: the family is unknown, the number of values is wrong, or a value is out of range.
    """
    family, _, rest = spec.partition(":")
    if family not in SPECS:
        raise InputError(f"a density must be one of {'; '.join(SPECS.values())}; got {spec!r}")
    parts = rest.split("/") if family == "mixture" else [rest]
    values = [_numbers(part, 3 if family == "mixture" else 2, spec, family) for part in parts]
    if family == "mixture":
        weights, means, stds = zip(*values, strict=True)
        for weight in weights:
            _check(SMALLEST <= weight <= LARGEST, "WEIGHT", weight, SMALLEST, spec)
        return _mixture(spec, weights, means, stds)
    first, second = values[0]
    if family == "normal":
        return _mixture(spec, (1.0,), (first,), (second,))
    _check(abs(first) <= LARGEST, "LOW" if family == "uniform" else "MEAN", first, -LARGEST, spec)
    if family == "laplace":
        _check(SMALLEST <= second <= LARGEST, "SCALE", second, SMALLEST, spec)
        laplace = Laplace(_float64(first), _float64(second))
        return Density(spec, laplace, tuple(first + second * k for k in range(-40, 41)), True)
    _check(abs(second) <= LARGEST, "HIGH", second, -LARGEST, spec)
    if round(second - first, 9) < SMALLEST:
        raise InputError(f"HIGH must exceed LOW by at least {SMALLEST}, got {spec!r}")
    uniform = Uniform(_float64(first), _float64(second), validate_args=False)  # log_prob is -inf outside
    return Density(spec, uniform, tuple(np.linspace(first, second, 9).tolist()), False)


def _mixture(
    spec: str, weights: tuple[float, ...], means: tuple[float, ...], stds: tuple[float, ...]
) -> Density:
    for mean, std in zip(means, stds, strict=True):
        _check(abs(mean) <= LARGEST, "MEAN", mean, -LARGEST, spec)
        _check(SMALLEST <= std <= LARGEST, "STD", std, SMALLEST, spec)
    breaks = {m + s * k / 2 for m, s in zip(means, stds, strict=True) for k in range(-24, 25)}
    mixture = MixtureSameFamily(Categorical(_float64(weights)), Normal(_float64(means), _float64(stds)))
    return Density(spec, mixture, tuple(sorted(breaks)), True)


def _float64(value: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _numbers(text: str, count: int, spec: str, family: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        raise InputError(
            f"a density of family {family} must be {SPECS[family]} with numeric values, got {spec!r}"
        )
    return values


def _check(holds: bool, what: str, value: float, minimum: float, spec: str) -> None:
    if not holds:
        raise InputError(f"{what} must be from {minimum:g} to {LARGEST:g}, got {value:g} in {spec!r}")


@dataclass(frozen=True)
class Pair:
    """A density p of real data and a density q of generated data, with the quantities that compare them."""

    p: Density
    q: Density

    @cached_property
    def breaks(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The sorted breaks of both densities; breaks that differ only by rounding are merged."""
        both = np.sort(np.array(self.p.breaks + self.q.breaks))
        return both[np.diff(both, prepend=-math.inf) > MIN_GAP]

    @cached_property
    def x(self) -> Tensor:
        """The Gauss-Legendre quadrature points, sorted, [points]."""
        return self._rule[0]

    @cached_property
    def weight(self) -> Tensor:
        """The weights of the points x: ∫f is Σ weight·f(x)."""
        return self._rule[1]

    @cached_property
    def _rule(self) -> tuple[Tensor, Tensor]:
        nodes, weights = np.polynomial.legendre.leggauss(POINTS)
        middle, half = (self.breaks[1:] + self.breaks[:-1]) / 2, np.diff(self.breaks) / 2
        points, scaled = middle[:, None] + half[:, None] * nodes, half[:, None] * weights
        return torch.from_numpy(points.ravel()), torch.from_numpy(scaled.ravel())

    @cached_property
    def density_p(self) -> Tensor:
        """p at the points x."""
        return self.p.log(self.x).exp()

    @cached_property
    def density_q(self) -> Tensor:
        """q at the points x."""
        return self.q.log(self.x).exp()

    def optimal_logit(self, x: Tensor) -> Tensor:
        """Return D*'s logit log p − log q: ±∞ where one density is 0, 0 (arbitrarily) where both are."""
        return (self.p.log(x) - self.q.log(x)).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)

    def value(self, logit: Tensor) -> float:
        """Return V(D) = ∫ p log σ(l) + q log σ(−l) for the logits l of D at the points x."""
        logit = logit.double()
        # Where a density is 0, it contributes nothing to the expectation, even if log σ is −∞ there.
        real = torch.where(self.density_p > 0, self.density_p * F.logsigmoid(logit), 0.0)
        generated = torch.where(self.density_q > 0, self.density_q * F.logsigmoid(-logit), 0.0)
        return float((self.weight * (real + generated)).sum())

    def optimal_value(self) -> float:
        """Return V(D*), by Gauss-Legendre quadrature."""
        return self.value(self.optimal_logit(self.x))

    def jsd(self) -> float:
        """Return JSD(p‖q), in [0, log 2], from its two KL terms by tanh-sinh quadrature.

        Raises:
            RunError: the quadrature is not accurate enough to check the identity.
        """

        def kl_to_midpoint(a: Density, b: Density) -> float:
            def integrand(x: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
                log_a, log_b = (density.log(torch.from_numpy(x)) for density in (a, b))
                log_m = torch.logaddexp(log_a, log_b) - math.log(2)
                return torch.where(log_a > -math.inf, log_a.exp() * (log_a - log_m), 0.0).numpy()

            result = tanhsinh(integrand, self.breaks[:-1], self.breaks[1:], atol=1e-12, maxlevel=7)
            error = float(result.error.sum())
            if not error <= IDENTITY / 10:
                raise RunError(
                    f"the quadrature of JSD({self.p.spec} ‖ {self.q.spec}) is accurate only to {error:.0e}; "
                    f"{IDENTITY / 10:.0e} is required"
                )
            return float(result.integral.sum())

        return (kl_to_midpoint(self.p, self.q) + kl_to_midpoint(self.q, self.p)) / 2

    def bound(self) -> float:
        """Return 2·JSD − 2·log 2, which equals V(D*)."""
        return 2 * self.jsd() - 2 * math.log(2)

    def mean_under(self, density: Tensor, values: Tensor) -> float:
        """Return ∫ density·values, both given at the points x."""
        return float((self.weight * density * values).sum())

    def generator_gradients(self) -> tuple[float, float]:
        """Return |∂/∂θ| of G's two losses at θ = 0, where G adds θ to samples of q and D = D* is held fixed.

            minimax         E_q[log(1 − D*(x + θ))]      →  −E_q[D*(x) l'(x)]
            non-saturating  −E_q[log D*(x + θ)]          →  −E_q[(1 − D*(x)) l'(x)]

        with l = log p − log q. Where D* is certain, it is 0 on q's samples: the first gradient vanishes, the
        second does not.

        Raises:
            InputError: a density is 0 somewhere, where l is infinite.
        """
        for density in (self.p, self.q):
            if not density.positive:
                raise InputError(
                    f"gradients need densities that are positive everywhere; {density.spec!r} is not"
                )
        x = self.x.clone().requires_grad_()
        logit = self.optimal_logit(x)
        (slope,) = torch.autograd.grad(logit.sum(), x)
        logit = logit.detach()
        minimax = self.mean_under(self.density_q, torch.sigmoid(logit) * slope)
        non_saturating = self.mean_under(self.density_q, torch.sigmoid(-logit) * slope)
        return abs(minimax), abs(non_saturating)


class Discriminator(nn.Module):
    """An MLP with two hidden layers that maps the standardized x to a logit."""

    def __init__(self, center: float, scale: float, width: int = 64) -> None:
        super().__init__()
        self.center, self.scale = center, scale
        self.main = nn.Sequential(
            nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map float64 [N] to float32 logits [N]."""
        standardized = (x - self.center) / self.scale
        result: Tensor = self.main(standardized.float().unsqueeze(1)).squeeze(1)
        return result


@dataclass(frozen=True)
class Result:
    """A trained D compared with D*, by quadrature in float64.

    Args:
        pair: the densities.
        discriminator: the trained D.
        steps, values: the steps after which V(D) was measured, and its values.
        value: V(D) after training.
        optimal_value: V(D*).
        jsd, bound: JSD(p‖q) and 2·JSD − 2·log 2, by a different quadrature.
        error_p, error_q: the means of |D − D*| under p and under q.
        error_max: the largest |D − D*| where (p + q)/2 is at least 1% of its maximum; elsewhere there are
            hardly any samples to learn D from.
    """

    pair: Pair
    discriminator: Discriminator
    steps: tuple[int, ...]
    values: tuple[float, ...]
    value: float
    optimal_value: float
    jsd: float
    bound: float
    error_p: float
    error_q: float
    error_max: float

    def numbers(self) -> dict[str, Any]:
        """Return the specs and all numbers, for a JSON file."""
        own = {name: value for name, value in vars(self).items() if name not in ("pair", "discriminator")}
        return {"p": self.pair.p.spec, "q": self.pair.q.spec, **own}


def train(
    pair: Pair, steps: int = 1000, seed: int = 0, say: Callable[[int], None] = lambda _: None
) -> Result:
    """Train D by cross-entropy on fresh samples of p and q, and compare it with D*.

    The optimizer is Adam with cosine decay of the learning rate to 0, and 1,024 samples of each density per
    step. The state of PyTorch's global random number generator is preserved.

    Args:
        pair: the densities.
        steps: number of optimizer steps, at least 1.
        seed: RNG seed for the initial weights and the samples.
        say: called with the step after each measurement of V(D).

    Raises:
        InputError: ``steps`` is below 1.
        RunError: V(D*) is not 2·JSD − 2·log 2, V(D) exceeds V(D*), or V(D) is not finite.
    """
    if steps < 1:
        raise InputError(f"steps must be an integer of at least 1, got {steps!r}")
    optimal, jsd, bound = pair.optimal_value(), pair.jsd(), pair.bound()
    if not abs(optimal - bound) <= IDENTITY:
        raise RunError(
            f"V(D*) = {optimal:.9f} is not 2·JSD − 2·log 2 = {bound:.9f}: they differ by "
            f"{abs(optimal - bound):.1e}, {IDENTITY:.0e} is allowed"
        )
    center = (pair.p.mean + pair.q.mean) / 2
    scale = math.sqrt((pair.p.std**2 + pair.q.std**2) / 2 + (pair.p.mean - pair.q.mean) ** 2 / 4)
    measured: list[int] = []
    values: list[float] = []

    def measure(step: int) -> None:
        with torch.no_grad():
            value = pair.value(discriminator(pair.x))
        measured.append(step)
        values.append(value)
        say(step)
        if not value <= optimal + IDENTITY:  # a NaN is a failure too
            raise RunError(f"V(D) = {value:.9f} after {step} steps exceeds V(D*) = {optimal:.9f}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(center, scale)
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        targets = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)])
        for step in range(steps):
            if step % max(1, steps // MEASUREMENTS) == 0:
                measure(step)
            logits = discriminator(torch.cat([pair.p.sample(BATCH), pair.q.sample(BATCH)]))
            loss = F.binary_cross_entropy_with_logits(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        measure(steps)

    with torch.no_grad():
        trained = torch.sigmoid(discriminator(pair.x).double())
    error = (trained - torch.sigmoid(pair.optimal_logit(pair.x))).abs()
    middle = (pair.density_p + pair.density_q) / 2
    return Result(
        pair=pair,
        discriminator=discriminator,
        steps=tuple(measured),
        values=tuple(values),
        value=values[-1],
        optimal_value=optimal,
        jsd=jsd,
        bound=bound,
        error_p=pair.mean_under(pair.density_p, error),
        error_q=pair.mean_under(pair.density_q, error),
        error_max=float(error[middle >= middle.max() / 100].max()),
    )


@dataclass(frozen=True)
class Sweep:
    """Two normal densities of equal standard deviation at increasing distance.

    Args:
        std: the standard deviation of both.
        distances: the distances of their means.
        jsd, value: JSD(p‖q) and V(D*) at each distance.
        minimax, non_saturating: the magnitudes of G's gradients, see :meth:`Pair.generator_gradients`.
    """

    std: float
    distances: tuple[float, ...]
    jsd: tuple[float, ...]
    value: tuple[float, ...]
    minimax: tuple[float, ...]
    non_saturating: tuple[float, ...]


def sweep(std: float = 1.0, distances: int = 41, furthest: float = 10.0) -> Sweep:
    """Compute JSD, V(D*) and G's gradients for normal densities with means 0 to ``furthest``·std apart.

    With D = D*, the minimax gradient is the gradient of 2·JSD, which saturates at 2·log 2.
    """
    offsets = np.linspace(0, furthest * std, distances).tolist()
    pairs = [Pair(parse(f"normal:0,{std!r}"), parse(f"normal:{distance!r},{std!r}")) for distance in offsets]
    minimax, non_saturating = zip(*(pair.generator_gradients() for pair in pairs), strict=True)
    return Sweep(
        std=std,
        distances=tuple(offsets),
        jsd=tuple(pair.jsd() for pair in pairs),
        value=tuple(pair.optimal_value() for pair in pairs),
        minimax=minimax,
        non_saturating=non_saturating,
    )


def picture(result: Result) -> Figure:
    """Plot the densities, D and D*, and V(D) during training with its bound."""
    from matplotlib.figure import Figure

    pair, x = result.pair, result.pair.x
    middle = (pair.density_p + pair.density_q) / 2
    visible = x[middle >= middle.max() / 1000]
    line = torch.linspace(float(visible.min()), float(visible.max()), 1000, dtype=torch.float64)
    with torch.no_grad():
        trained = torch.sigmoid(result.discriminator(line))
    figure = Figure(figsize=(8, 9), layout="constrained")
    densities, functions, values = figure.subplots(3)
    for density, name in ((pair.p, "p, real"), (pair.q, "q, generated")):
        height = density.log(line).exp()
        densities.plot(line, height, label=f"{name}: {density.spec}")
        densities.fill_between(line, height, alpha=0.2)
    densities.set(xlabel="x", ylabel="density")
    functions.plot(line, torch.sigmoid(pair.optimal_logit(line)), "k", label="D* = p/(p + q)")
    functions.plot(line, trained, "C3--", label=f"D, trained for {result.steps[-1]} steps")
    functions.set(xlabel="x", ylabel="D(x)", ylim=(-0.05, 1.05))
    values.plot(result.steps, result.values, "C3", label="V(D)")
    values.axhline(result.bound, color="k", linestyle=":", label="V(D*) = 2·JSD − 2·log 2")
    values.set(xlabel="step", ylabel="V", xscale="symlog", xlim=(0, result.steps[-1]))
    for axes in (densities, functions, values):
        axes.legend()
    return figure


def sweep_picture(result: Sweep) -> Figure:
    """Plot JSD and V(D*), and below them G's gradients, over the distance of the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    levels, gradients = figure.subplots(2, sharex=True)
    levels.plot(result.distances, result.jsd, label="JSD(p‖q)")
    levels.plot(result.distances, result.value, label="V(D*)")
    levels.axhline(math.log(2), color="k", linestyle=":", label="log 2")
    gradients.semilogy(result.distances[1:], result.minimax[1:], label="minimax, log(1 − D*)")
    gradients.semilogy(result.distances[1:], result.non_saturating[1:], label="non-saturating, −log D*")
    gradients.set(xlabel=f"distance between the means (std {result.std:g})", ylabel="|gradient| of G's loss")
    for axes in (levels, gradients):
        axes.legend()
    return figure
