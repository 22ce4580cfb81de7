"""Scores of one set of features against another, and a cheap score for the checkpoints of a training run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcgan.errors import InputError, RunError, check_integers
from dcgan.evaluation.features import pixels, to_8_bits
from dcgan.evaluation.real import MIN_IMAGES

SUBSETS = 100
SUBSET_SIZE = 1000

NEIGHBOURS = 5
"""k of :func:`radii`."""
ROWS = 1000
"""Number of points whose distances to all others are in memory at a time."""


@dataclass(frozen=True)
class Scores:
    """How close a set of images is to a set of real ones in feature space.

    All of them depend on the number of images, so compare only figures for the same numbers. Lower is better
    for the first three, higher for the others.

    Args:
        frechet: the Fréchet distance between Gaussians with the moments of the sets. It is biased upwards for
            few images.
        kernel, kernel_std: the squared maximum mean discrepancy with the kernel (xᵀy/F + 1)³, unbiased, hence
            possibly slightly negative: mean and standard deviation over ``SUBSETS`` random subsets.
        precision, recall, density, coverage: see :func:`overlap`.
        subset_size: number of images per subset.
        images: number of images in the two sets, the real ones first.
    """

    frechet: float
    kernel: float
    kernel_std: float
    precision: float
    recall: float
    density: float
    coverage: float
    subset_size: int
    images: tuple[int, int]


def compare(first: Tensor, second: Tensor, seed: int = 0, first_radii: Tensor | None = None) -> Scores:
    """Compute all scores of ``second`` against ``first``, the distances in float64.

    The kernel distance is computed by torchmetrics. Nothing is exchanged with other processes.

    Args:
        first, second: features of real and other images, [N, F] and [M, F], on the CPU.
        seed: RNG seed of the subsets; PyTorch's global RNG state is unchanged.
        first_radii: the result of ``radii(first)`` if it is already known.

    Raises:
        InputError: a set has fewer than 10 images, the features differ in shape, or one is not finite.

    Source: Heusel et al. 2017; Bińkowski et al., *Demystifying MMD GANs*, ICLR 2018; for the others see
    :func:`overlap`.
    """
    smallest = min(len(first), len(second))
    if smallest < MIN_IMAGES:
        raise InputError(f"each set must have features of at least {MIN_IMAGES} images, got {smallest}")
    if first.shape[1:] != second.shape[1:]:
        raise InputError(
            "both sets must have the same number of features, got shapes "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    from torchmetrics.image.kid import KernelInceptionDistance

    distance = frechet(*_moments(first), *_moments(second))
    subset_size = min(SUBSET_SIZE, smallest // 2)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # The warning is about the metric's memory use.
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
        torch.manual_seed(seed)
        kid = KernelInceptionDistance(
            nn.Identity(),
            subsets=SUBSETS,
            subset_size=subset_size,
            sync_on_compute=False,  # under torchrun only the first process scores
        )
        kid.update(first.double(), real=True)
        kid.update(second.double(), real=False)
        mean, std = map(float, kid.compute())
    overlaps = overlap(first, second, first_radii)
    return Scores(distance, mean, std, *overlaps, subset_size, (len(first), len(second)))


def overlap(
    real: Tensor, generated: Tensor, real_radii: Tensor | None = None
) -> tuple[float, float, float, float]:
    """Return precision, recall, density and coverage of generated images x̂ⱼ against real images xᵢ.

    With r(x) the distance from x to the k-th nearest other image of its own set, k = ``NEIGHBOURS``::

        precision = 1/M    Σⱼ [‖xᵢ − x̂ⱼ‖ < r(xᵢ) for an i]     generated images near real ones
        recall    = 1/N    Σᵢ [‖xᵢ − x̂ⱼ‖ < r(x̂ⱼ) for a j]      real images near generated ones
        density   = 1/(kM) Σⱼ Σᵢ [‖xᵢ − x̂ⱼ‖ < r(xᵢ)]           how many of the real ones those are near to
        coverage  = 1/N    Σᵢ [‖xᵢ − x̂ⱼ‖ < r(xᵢ) for a j]      real images with a generated one nearby

    Each lies in [0, 1], except that the density may exceed 1.

    Args:
        real, generated: features [N, F] and [M, F], N and M greater than k; distances between them are
            computed in float32.
        real_radii: the result of ``radii(real)`` if it is already known.

    Source: Kynkäänniemi et al., *Improved Precision and Recall Metric for Assessing Generative Models*,
    NeurIPS 2019; Naeem et al., *Reliable Fidelity and Diversity Metrics for Generative Models*, ICML 2020.
    """
    real_radii = radii(real) if real_radii is None else real_radii
    generated_radii = radii(generated)
    near = torch.zeros(len(generated), dtype=torch.int64)
    recalled = covered = 0
    distances = _distances(real, generated)
    for block, radius in zip(distances, real_radii.split(ROWS), strict=True):
        inside = block < radius[:, None]
        near += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((block < generated_radii).any(1).sum())
    n, m = len(real), len(generated)
    return int((near > 0).sum()) / m, recalled / n, int(near.sum()) / (NEIGHBOURS * m), covered / n


def radii(points: Tensor) -> Tensor:
    """Return the distance of each point [N, F] to its ``NEIGHBOURS``-th nearest other, float32 [N]."""
    nearest = NEIGHBOURS + 1  # a point is its own nearest neighbour
    return torch.cat(
        [block.topk(nearest, largest=False).values[:, -1] for block in _distances(points, points)]
    )


def _distances(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Yield the Euclidean distances of ``ROWS`` of the first points at a time to all of the second, float32.

    They come from a matrix product, ‖x‖² + ‖y‖² − 2xᵀy. Without the mean, less of it cancels.
    """
    centre = first.mean(0)
    first, second = (first - centre).float(), (second - centre).float()
    for rows in first.split(ROWS):
        yield torch.cdist(rows, second, compute_mode="use_mm_for_euclid_dist")


def frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians; FID for Inception's features.

        ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)

    Σ₁Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and positive semi-definite, so that
    tr (Σ₁Σ₂)^½ is the sum of their square roots. Eigenvalues that rounding makes negative are clamped to
    zero, and so is the result.

    Args:
        mean1, mean2: [F].
        cov1, cov2: [F, F], symmetric, positive semi-definite.

    Raises:
        InputError: the shapes do not match, or a value is not finite.

    Source: Dowson and Landau, *The Fréchet Distance between Multivariate Normal Distributions*, 1982; Heusel
    et al. 2017.
    """
    moments = [t.double() for t in (mean1, cov1, mean2, cov2)]
    width = mean1.numel()
    if [list(t.shape) for t in moments] != [[width], [width, width]] * 2:
        shapes = ", ".join(str(list(t.shape)) for t in moments)
        raise InputError(f"means and covariances must be [F] and [F, F], got {shapes}")
    if not all(t.isfinite().all() for t in moments):
        raise InputError("means and covariances must be finite")
    m1, c1, m2, c2 = moments
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ c2 @ root)
    squared = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return max(float(squared), 0.0)


class PixelScore:
    """The Fréchet distance between generated and real images in 8×8 pixel features: cheap but coarse.

    It ranks the generators of one training run. It is not FID: it reflects brightness and layout, not detail.

    Args:
        real: uint8 [N, C, H, W].
        samples: maximum number of real images used; they are evenly spaced.

    Raises:
        InputError: fewer than 2 images, images of another dtype or shape, or ``samples`` below 2.
    """

    def __init__(self, real: Tensor, samples: int = 10_000) -> None:
        check_integers(2, samples=samples)
        if real.dtype != torch.uint8 or real.ndim != 4 or len(real) < 2:
            raise InputError(
                f"real must be at least 2 images, uint8 [N, C, H, W], got {real.dtype} {list(real.shape)}"
            )
        n = min(samples, len(real))
        chosen = torch.arange(n) * len(real) // n
        self._channels = real.shape[1]
        self._mean, self._cov = _moments(torch.cat([pixels(real[some]) for some in chosen.split(1000)]))

    @torch.no_grad()
    def __call__(self, images: Iterable[Tensor]) -> float:
        """Return the distance between ``images`` and the real images; infinite if one of them contains a NaN.

        Args:
            images: batches [n, C, H, W], float in [-1, 1] or uint8, of any size and on any device.

        Raises:
            InputError: fewer than 2 images, or a different number of channels from the real images.
        """
        try:
            found = [pixels(to_8_bits(batch)).cpu() for batch in images]
        except RunError:
            return math.inf
        features = torch.cat(found) if found else torch.empty(0, 0)
        width = len(self._mean)
        if len(features) < 2 or features.shape[1] != width:
            raise InputError(
                f"images must be at least 2 images of {self._channels} channels, got {len(features)} "
                f"of {features.shape[1] * self._channels // width}"
            )
        return frechet(self._mean, self._cov, *_moments(features))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float64 mean [F] and unbiased covariance [F, F] of features [N, F]."""
    features = features.double()
    return features.mean(0), features.T.cov()
