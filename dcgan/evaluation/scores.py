"""Distances between two sets of features, and the cheap one of them that training is scored by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcgan.errors import InputError, RunError
from dcgan.evaluation.features import eight_bits, pixels
from dcgan.evaluation.real import MINIMUM

SUBSETS = 100
SUBSET_SIZE = 1000


@dataclass(frozen=True)
class Scores:
    """How far two sets of images are apart by their features; lower is nearer.

    Args:
        frechet: the Fréchet distance of the Gaussians with the sets' moments. Biased upwards by few images,
            so compare figures of equally many.
        kernel, kernel_std: the squared maximum mean discrepancy with the kernel (xᵀy/F + 1)³, unbiased, so it
            may be slightly negative: mean and standard deviation over ``SUBSETS`` random subsets.
        subset_size: images in each subset.
        images: in either set.
    """

    frechet: float
    kernel: float
    kernel_std: float
    subset_size: int
    images: tuple[int, int]


class _Given(nn.Module):
    """torchmetrics' feature extractor for features that are there already: they serve several scores."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def compare(first: Tensor, second: Tensor, seed: int = 0) -> Scores:
    """Fréchet and kernel distance of two sets of features, by torchmetrics, in float64.

    Args:
        first, second: [N, F] and [M, F], on the CPU.
        seed: of the subsets; PyTorch's global generator is as it was.

    Raises:
        InputError: fewer than 10 images in a set, or sets of different features.

    Source: Heusel et al. 2017; Bińkowski et al., *Demystifying MMD GANs*, ICLR 2018.
    """
    smallest = min(len(first), len(second))
    if smallest < MINIMUM:
        raise InputError(f"a set of images to compare must have at least {MINIMUM}, got {smallest}")
    if first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"features must be of one kind, got shapes {list(first.shape)} and {list(second.shape)}"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    given = _Given(first.shape[1])
    subset_size = min(SUBSET_SIZE, smallest // 2)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings(
            "ignore", message="Metric `Kernel Inception Distance`"
        )  # that it takes memory
        torch.manual_seed(seed)
        fid = FrechetInceptionDistance(feature=given)
        kid = KernelInceptionDistance(feature=given, subsets=SUBSETS, subset_size=subset_size)
        for metric in (fid.set_dtype(torch.float64), kid.set_dtype(torch.float64)):
            metric.update(first.double(), real=True)
            metric.update(second.double(), real=False)
        mean, std = kid.compute()
        return Scores(
            frechet=float(fid.compute()),
            kernel=float(mean),
            kernel_std=float(std),
            subset_size=subset_size,
            images=(len(first), len(second)),
        )


def frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The Fréchet (2-Wasserstein) distance, squared, of two Gaussians: FID, if the features are Inception's.

        ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)

    Σ₁Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and positive semi-definite, so that
    tr (Σ₁Σ₂)^½ is the sum of their roots; what rounding makes negative is zero. Nothing below zero is
    returned.

    Args:
        mean1, mean2: [F].
        cov1, cov2: [F, F], symmetric, positive semi-definite.

    Raises:
        InputError: shapes that do not fit, or a value that is not finite.

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
    """The Fréchet distance of generated images to the real ones by their 8×8 pixels: cheap, and coarse.

    Compares generators during one training. It is not FID: it sees brightness and layout, no detail.

    Args:
        real: uint8 [N, C, H, W].
        samples: at most so many of them are used, evenly spread.

    Raises:
        InputError: fewer than 2 images, images of another kind, or ``samples`` below 2.
    """

    def __init__(self, real: Tensor, samples: int = 10_000) -> None:
        if samples < 2:
            raise InputError(f"samples must be an integer of at least 2, got {samples!r}")
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
        """The distance of images to the real ones; infinite where one of them has a NaN.

        Args:
            images: batches [n, C, H, W], float in [-1, 1] or uint8, of any size and on any device.

        Raises:
            InputError: fewer than 2 images, or of other channels than the real ones.
        """
        try:
            found = [pixels(eight_bits(batch)).cpu() for batch in images]
        except RunError:
            return math.inf
        features = torch.cat(found) if found else torch.empty(0, 0)
        width = len(self._mean)
        if len(features) < 2 or features.shape[1] != width:
            raise InputError(
                f"images must be at least 2, of {self._channels} channels, got {len(features)} "
                f"of {features.shape[1] * self._channels // width}"
            )
        return frechet(self._mean, self._cov, *_moments(features))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and unbiased covariance [F, F], float64, of [N, F]."""
    features = features.double()
    return features.mean(0), features.T.cov()
