"""GAN theory's optimal discriminator, checked numerically on one-dimensional densities.

    python examples/theory.py --p normal:-1,0.5 --q laplace:1,0.7 --sweep

For densities p (real) and q (generated) and a discriminator D: ℝ → (0, 1),

    V(D) = E_p[log D(x)] + E_q[log(1 − D(x))]
    D*(x) = p(x) / (p(x) + q(x))                     maximises V, point by point
    V(D*) = 2·JSD(p‖q) − 2·log 2
    JSD(p‖q) = ½ KL(p‖m) + ½ KL(q‖m),  m = (p + q)/2

The script trains D on samples of p and q and compares it with D*. It exits with 1 if V(D*) is not
2·JSD − 2·log 2, or if V(D) exceeds V(D*). Integrals are computed in float64 and on logits: D = σ(l), with
l = log p − log q for D*, so that neither log D nor log(1 − D) loses digits where D is near 0 or 1.

Sources: Goodfellow et al., *Generative Adversarial Nets*, NeurIPS 2014, section 4; for vanishing gradients,
Arjovsky and Bottou, *Towards Principled Methods for Training GANs*, ICLR 2017.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.integrate import tanhsinh
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Laplace, MixtureSameFamily, Normal, Uniform
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcgan.errors import RunError

SPECS = {
    "normal": "normal:MEAN,STD",
    "uniform": "uniform:LOW,HIGH",
    "laplace": "laplace:MEAN,SCALE",
    "mixture": "mixture:WEIGHT,MEAN,STD/WEIGHT,MEAN,STD/…",
}
KINDS = "; ".join(SPECS.values())
LARGEST, SMALLEST = 1e3, 1e-3  # limits of the parameters; float64 has many more digits than the checks need
IDENTITY = 1e-6  # allowed between V(D*) and 2·JSD − 2·log 2: both have errors of 1e-9, wrong formulas of 1e-3
POINTS = 16  # of the Gauss-Legendre rule, on each interval between two breaks
BATCH = 1024  # samples of each density per step
MEASUREMENTS = 100  # of V(D) during training


# --- densities ----------------------------------------------------------------------------------------------


class Density(NamedTuple):
    """A probability density on the line, in float64.

    Less than 1e-15 of the mass lies beyond the outermost breaks; between two breaks the density is smooth and
    varies moderately.
    """

    spec: str
    distribution: Distribution
    breaks: Tensor

    def log(self, x: Tensor) -> Tensor:
        """Return the log density at x; −∞ where the density is 0."""
        return self.distribution.log_prob(x)


def parse(spec: str) -> Density:
    """Parse a density such as ``normal:-1,0.5``; a mixture's weights are normalized by their sum."""
    family, _, rest = spec.partition(":")
    if family not in SPECS:
        raise ArgumentTypeError(f"a density must be one of {KINDS}; got {spec!r}")
    names = SPECS[family].partition(":")[2].split("/")[0].split(",")
    parts = rest.split("/") if family == "mixture" else [rest]
    try:
        rows = [dict(zip(names, map(float, part.split(",")), strict=True)) for part in parts]
    except ValueError:
        needed = f"must be {SPECS[family]} with numeric values"
        raise ArgumentTypeError(f"a density of family {family} {needed}, got {spec!r}") from None
    for name, value in (item for row in rows for item in row.items()):
        least = SMALLEST if name in ("WEIGHT", "STD", "SCALE") else -LARGEST
        if not least <= value <= LARGEST:  # a NaN is out of range too
            raise ArgumentTypeError(
                f"{name} must be from {least:g} to {LARGEST:g}, got {value:g} in {spec!r}"
            )
    columns = [torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names]
    if family == "uniform":
        (low,), (high,) = columns
        if round(float(high - low), 9) < SMALLEST:
            raise ArgumentTypeError(f"HIGH must exceed LOW by at least {SMALLEST}, got {spec!r}")
        outside = {"validate_args": False}  # the log density is −∞ there
        return Density(spec, Uniform(low, high, **outside), low + (high - low) * torch.arange(9) / 8)
    if family == "laplace":
        (mean,), (scale,) = columns
        return Density(spec, Laplace(mean, scale), mean + scale * torch.arange(-40, 41))
    weights, means, stds = columns if family == "mixture" else (torch.ones_like(columns[0]), *columns)
    breaks = means[:, None] + stds[:, None] * torch.arange(-24, 25) / 2
    mixture = MixtureSameFamily(Categorical(weights), Normal(means, stds))
    return Density(spec, mixture, breaks.flatten())


class Pair:
    """A density p of real data and a density q of generated data, with the quantities that compare them.

    ``x`` and ``weight`` are the points and weights of a quadrature: ∫f is Σ weight·f(x).
    """

    def __init__(self, p: Density, q: Density) -> None:
        self.p, self.q = p, q
        breaks = np.sort(torch.cat([p.breaks, q.breaks]).numpy())
        self.breaks = breaks[np.diff(breaks, prepend=-math.inf) > 1e-11]  # others differ only by rounding
        nodes, weights = np.polynomial.legendre.leggauss(POINTS)
        middle, half = (self.breaks[1:] + self.breaks[:-1]) / 2, np.diff(self.breaks) / 2
        self.x = torch.from_numpy((middle[:, None] + half[:, None] * nodes).ravel())
        self.weight = torch.from_numpy((half[:, None] * weights).ravel())
        self.density_p, self.density_q = p.log(self.x).exp(), q.log(self.x).exp()

    def optimal_logit(self, x: Tensor) -> Tensor:
        """Return D*'s logit log p − log q: ±∞ where one density is 0, 0 (arbitrarily) where both are."""
        return (self.p.log(x) - self.q.log(x)).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)

    def mean_under(self, density: Tensor, values: Tensor) -> float:
        """Return ∫ density·values, both given at the points x, with 0·∞ = 0."""
        return float((self.weight * torch.where(density > 0, density * values, 0.0)).sum())

    def value(self, logit: Tensor) -> float:
        """Return V(D) = ∫ p log σ(l) + q log σ(−l) for the logits l of D at the points x."""
        logit = logit.double()
        real = self.mean_under(self.density_p, F.logsigmoid(logit))
        return real + self.mean_under(self.density_q, F.logsigmoid(-logit))

    def optimal_value(self) -> float:
        """Return V(D*), by Gauss-Legendre quadrature."""
        return self.value(self.optimal_logit(self.x))

    def jsd(self) -> float:
        """Return JSD(p‖q), in [0, log 2], by tanh-sinh quadrature of its two KL terms."""

        def integrand(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            logs = [density.log(torch.from_numpy(x)) for density in (self.p, self.q)]
            log_m = torch.logaddexp(*logs) - math.log(2)
            kl = [torch.where(log > -math.inf, log.exp() * (log - log_m), 0.0) for log in logs]
            return ((kl[0] + kl[1]) / 2).numpy()

        result = tanhsinh(integrand, self.breaks[:-1], self.breaks[1:], atol=1e-12, maxlevel=7)
        error = float(result.error.sum())
        if not error <= IDENTITY / 10:
            raise RunError(
                f"the quadrature of JSD({self.p.spec} ‖ {self.q.spec}) is accurate only to {error:.0e}; "
                f"{IDENTITY / 10:.0e} is required"
            )
        return float(result.integral.sum())

    def generator_gradients(self) -> tuple[float, float]:
        """Return |∂/∂θ| of G's two losses at θ = 0, where G adds θ to samples of q and D = D* is held fixed.

            minimax         E_q[log(1 − D*(x + θ))]      →  −E_q[D*(x) l'(x)]
            non-saturating  −E_q[log D*(x + θ)]          →  −E_q[(1 − D*(x)) l'(x)]

        with l = log p − log q, for densities that are positive everywhere. Where D* is certain, it is 0 on
        q's samples: the first gradient vanishes, the second does not.
        """
        x = self.x.clone().requires_grad_()
        logit = self.optimal_logit(x)
        (slope,) = torch.autograd.grad(logit.sum(), x)
        minimax = self.mean_under(self.density_q, torch.sigmoid(logit.detach()) * slope)
        non_saturating = self.mean_under(self.density_q, torch.sigmoid(-logit.detach()) * slope)
        return abs(minimax), abs(non_saturating)


def sweep(distances: int = 41) -> dict[str, Any]:
    """Compute JSD, V(D*) and G's gradients for normal densities of std 1 with means 0 to 10 apart.

    With D = D*, the minimax gradient is the gradient of 2·JSD, which saturates at 2·log 2.
    """
    offsets = np.linspace(0, 10, distances).tolist()
    pairs = [Pair(parse("normal:0,1"), parse(f"normal:{offset!r},1")) for offset in offsets]
    minimax, non_saturating = zip(*(pair.generator_gradients() for pair in pairs), strict=True)
    return {
        "std": 1.0,
        "distances": offsets,
        "jsd": [pair.jsd() for pair in pairs],
        "value": [pair.optimal_value() for pair in pairs],
        "minimax": minimax,
        "non_saturating": non_saturating,
    }


# --- the trained discriminator ------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """An MLP with two hidden layers that maps the standardized x to a logit."""

    def __init__(self, center: float, scale: float, width: int = 64) -> None:
        super().__init__()
        self.center, self.scale = center, scale
        layers = (nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map float64 [N] to float32 logits [N]."""
        standardized = (x - self.center) / self.scale
        return self.main(standardized.float().unsqueeze(1)).squeeze(1)  # type: ignore[no-any-return]


def train(pair: Pair, steps: int, seed: int) -> tuple[Discriminator, dict[str, Any]]:
    """Train D by cross-entropy on fresh samples of p and q; return it and the numbers for theory.json.

    ``error_max`` is the largest |D − D*| where (p + q)/2 is at least 1% of its maximum; elsewhere there are
    hardly any samples to learn D from. Raises RunError if V(D*) is not 2·JSD − 2·log 2, or if V(D) exceeds
    V(D*) or is not finite.
    """
    optimal, jsd = pair.optimal_value(), pair.jsd()
    bound = 2 * jsd - 2 * math.log(2)
    if not abs(optimal - bound) <= IDENTITY:
        raise RunError(
            f"V(D*) = {optimal:.9f} is not 2·JSD − 2·log 2 = {bound:.9f}: they differ by "
            f"{abs(optimal - bound):.1e}, {IDENTITY:.0e} is allowed"
        )
    p, q = pair.p.distribution, pair.q.distribution
    scale = torch.sqrt((p.variance + q.variance) / 2 + (p.mean - q.mean) ** 2 / 4)
    measured: dict[int, float] = {}

    def measure(step: int) -> None:
        with torch.no_grad():
            value = measured[step] = pair.value(discriminator(pair.x))
        if not value <= optimal + IDENTITY:  # a NaN is a failure too
            raise RunError(f"V(D) = {value:.9f} after {step} steps exceeds V(D*) = {optimal:.9f}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(float(p.mean + q.mean) / 2, float(scale))
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        targets = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)])
        for step in range(steps):
            if step % max(1, steps // MEASUREMENTS) == 0:
                measure(step)
            logits = discriminator(torch.cat([p.sample((BATCH,)), q.sample((BATCH,))]))
            loss = F.binary_cross_entropy_with_logits(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        measure(steps)

    with torch.no_grad():
        error = (discriminator(pair.x).double().sigmoid() - pair.optimal_logit(pair.x).sigmoid()).abs()
    middle = (pair.density_p + pair.density_q) / 2
    return discriminator, {
        "p": pair.p.spec,
        "q": pair.q.spec,
        "steps": list(measured),
        "values": list(measured.values()),
        "value": measured[steps],
        "optimal_value": optimal,
        "jsd": jsd,
        "bound": bound,
        "error_p": pair.mean_under(pair.density_p, error),
        "error_q": pair.mean_under(pair.density_q, error),
        "error_max": float(error[middle >= middle.max() / 100].max()),
        "seed": seed,
    }


# --- pictures and the command -------------------------------------------------------------------------------


def picture(pair: Pair, discriminator: Discriminator, found: dict[str, Any]) -> Figure:
    """Plot the densities, D and D*, and V(D) during training with its bound."""
    middle = (pair.density_p + pair.density_q) / 2
    visible = pair.x[middle >= middle.max() / 1000]
    line = torch.linspace(float(visible.min()), float(visible.max()), 1000, dtype=torch.float64)
    with torch.no_grad():
        trained = torch.sigmoid(discriminator(line))
    figure = Figure(figsize=(8, 9), layout="constrained")
    densities, functions, values = figure.subplots(3)
    for shown, name in ((pair.p, "p, real"), (pair.q, "q, generated")):
        height = shown.log(line).exp()
        densities.plot(line, height, label=f"{name}: {shown.spec}")
        densities.fill_between(line, height, alpha=0.2)
    densities.set(xlabel="x", ylabel="density")
    functions.plot(line, torch.sigmoid(pair.optimal_logit(line)), "k", label="D* = p/(p + q)")
    functions.plot(line, trained, "C3--", label=f"D, trained for {found['steps'][-1]} steps")
    functions.set(xlabel="x", ylabel="D(x)", ylim=(-0.05, 1.05))
    values.plot(found["steps"], found["values"], "C3", label="V(D)")
    values.axhline(found["bound"], color="k", linestyle=":", label="V(D*) = 2·JSD − 2·log 2")
    values.set(xlabel="step", ylabel="V", xscale="symlog", xlim=(0, found["steps"][-1]))
    for axes in (densities, functions, values):
        axes.legend()
    return figure


def sweep_picture(swept: dict[str, Any]) -> Figure:
    """Plot JSD and V(D*), and below them G's gradients, over the distance of the means."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    levels, gradients = figure.subplots(2, sharex=True)
    distances = swept["distances"]
    levels.plot(distances, swept["jsd"], label="JSD(p‖q)")
    levels.plot(distances, swept["value"], label="V(D*)")
    levels.axhline(math.log(2), color="k", linestyle=":", label="log 2")
    gradients.semilogy(distances[1:], swept["minimax"][1:], label="minimax, log(1 − D*)")
    gradients.semilogy(distances[1:], swept["non_saturating"][1:], label="non-saturating, −log D*")
    gradients.set(xlabel="distance between the means (std 1)", ylabel="|gradient| of G's loss")
    for axes in (levels, gradients):
        axes.legend()
    return figure


class Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:  # in one line, without the usage
        self.exit(2, f"Error: {message}\n")


def integer(least: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return parsed


def run(args: Namespace) -> None:
    pair = Pair(args.p, args.q)
    print(f"Training D on p = {args.p.spec} and q = {args.q.spec}, {args.steps} steps")
    discriminator, found = train(pair, args.steps, args.seed)
    jsd, bound, optimal, value = (found[name] for name in ("jsd", "bound", "optimal_value", "value"))
    for name, number in (
        ("JSD(p‖q)", f"{jsd:.9f}"),
        ("2·JSD − 2·log 2", f"{bound:.9f}"),
        ("V(D*)", f"{optimal:.9f}"),
        ("|V(D*) − (2·JSD − 2·log 2)|", f"{abs(optimal - bound):.1e}"),
        ("V(D) after training", f"{value:.9f}"),
        ("V(D*) − V(D)", f"{optimal - value:.1e}"),
        ("mean |D − D*| under p", f"{found['error_p']:.4f}"),
        ("mean |D − D*| under q", f"{found['error_q']:.4f}"),
        ("max |D − D*| where there is data", f"{found['error_max']:.4f}"),
    ):
        print(f"  {name:<36} {number:>13}")
    pictures = {"theory.png": picture(pair, discriminator, found)}
    if args.sweep:
        swept = found["sweep"] = sweep()
        pictures["sweep.png"] = sweep_picture(swept)
        print("Two normal densities of std 1 at increasing distance; |gradient| of G's loss where D = D*:")
        print(f"  {'distance':>8} {'JSD':>9} {'log 2 − JSD':>12} {'minimax':>9} {'non-saturating':>15}")
        columns = (swept[name][::5] for name in ("distances", "jsd", "minimax", "non_saturating"))
        for far, jsd, minimax, other in zip(*columns, strict=True):
            print(f"  {far:>8.2f} {jsd:>9.6f} {math.log(2) - jsd:>12.1e} {minimax:>9.1e} {other:>15.3f}")
    try:
        for name, figure in pictures.items():
            figure.savefig(args.out / name, dpi=120)
        (args.out / "theory.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}") from error
    print(f"Saved {', '.join(pictures)} and theory.json in {args.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. The exit status is 1 if a check fails, 2 if an option is not allowed."""
    parser = Parser(description="Train a discriminator on samples of two densities and compare it with D*.")
    add = parser.add_argument
    mixture = "mixture:0.6,1,0.7/0.4,-1.5,0.4"
    add("--p", type=parse, metavar="DENSITY", default="normal:-1,0.5", help=f"real data, one of {KINDS}")
    add("--q", type=parse, metavar="DENSITY", default=mixture, help="generated data, in the same syntax")
    add("--steps", type=integer(1), metavar="N", default=1000, help="training steps of the discriminator")
    add("--seed", type=integer(0), metavar="N", default=0, help="RNG seed for initial weights and samples")
    add("--out", type=Path, metavar="FOLDER", default="runs/theory", help="output folder; created if needed")
    add("--sweep", action="store_true", help="also plot JSD, V and G's gradients for normals at a distance")
    args = parser.parse_args(arguments)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {str(args.out)!r}: {error.strerror}")
    try:
        run(args)
    except RunError as error:
        parser.exit(1, f"Error: {error}\n")


if __name__ == "__main__":
    main()
