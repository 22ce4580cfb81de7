"""Precision, recall, density and coverage against their definitions and known cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcgan import evaluation
from dcgan.errors import InputError
from dcgan.evaluation import scores

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(n: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=rng, dtype=torch.float64).to(dtype)


def expected(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float, float, float]:
    """Follow the definitions, with differences in float64 and one pair of images at a time."""

    def distances(a: Tensor, b: Tensor) -> list[list[float]]:
        return [[math.dist(x, y) for y in b.tolist()] for x in a.tolist()]

    def radii(own: list[list[float]]) -> list[float]:
        return [sorted(row[:i] + row[i + 1 :])[k - 1] for i, row in enumerate(own)]

    n, m = len(real), len(generated)
    of_real, of_generated = radii(distances(real, real)), radii(distances(generated, generated))
    d = distances(real, generated)
    near = [[d[i][j] < of_real[i] for j in range(m)] for i in range(n)]
    return (
        sum(any(near[i][j] for i in range(n)) for j in range(m)) / m,
        sum(any(d[i][j] < of_generated[j] for j in range(m)) for i in range(n)) / n,
        sum(map(sum, near)) / (k * m),
        sum(map(any, near)) / n,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "m", "width", "scale", "offset"),
    [
        (60, 60, 3, 1, 0),
        (37, 101, 7, 1.3, 0.3),
        (101, 37, 1, 0.5, 0),
        (50, 64, 130, 1.02, 0.05),
        (6, 6, 2, 1, 0),
    ],
)
@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_overlap_follows_the_definitions(
    n: int,
    m: int,
    width: int,
    scale: float,
    offset: float,
    rows: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "ROWS", rows)
    real = normal(n, width, 1, dtype)
    generated = normal(m, width, 2, dtype) * scale + offset
    found = evaluation.overlap(real, generated)
    assert found == pytest.approx(expected(real, generated), abs=1e-12)
    assert evaluation.overlap(real, generated, scores.radii(real)) == found


def test_overlap_far_from_the_origin() -> None:
    """Distances of about 1 between vectors of length 1e4, of whose squares float32 has 8e7 ± 4."""
    real, generated = normal(80, 8, 1) + 3e3, normal(80, 8, 2) * 1.2 + 3e3
    assert evaluation.overlap(real, generated) == pytest.approx(expected(real, generated), abs=1e-12)


def test_overlap_does_not_depend_on_order_scale_or_place() -> None:
    real, generated = normal(150, 6, 1), normal(120, 6, 2) * 0.8
    found = evaluation.overlap(real, generated)
    rng = torch.Generator().manual_seed(0)
    shuffled = [x[torch.randperm(len(x), generator=rng)] for x in (real, generated)]
    basis = torch.linalg.qr(normal(6, 6, 3)).Q
    for changed in (
        shuffled,
        [x[:, [3, 1, 0, 5, 4, 2]] for x in (real, generated)],
        [7 * x + 3 for x in (real, generated)],
        [x @ basis for x in (real, generated)],
    ):
        assert evaluation.overlap(*changed) == pytest.approx(found, abs=1e-12)


def test_two_samples_of_one_distribution_overlap() -> None:
    """The coverage is then about 1 − 2^−k = 0.97 (Naeem et al. 2020), and the density about 1."""
    precision, recall, density, coverage = evaluation.overlap(normal(2000, 2, 1), normal(2000, 2, 2))
    assert precision > 0.96
    assert recall > 0.96
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.015)


def test_apart_collapsed_and_partial_sets() -> None:
    real = normal(200, 3, 1)
    assert evaluation.overlap(real, real + 100) == (0, 0, 0, 0)
    # One real image over and over is precise, but nothing else.
    precision, recall, density, coverage = evaluation.overlap(real, real[:1].repeat(200, 1))
    assert precision == 1
    assert recall <= 1 / 200
    assert density >= 1 / scores.NEIGHBOURS
    assert coverage <= 0.1
    # Every other image is from one of two clusters, and the generator knows only that.
    both = torch.cat([real, real + 100])
    precision, recall, _, coverage = evaluation.overlap(both, normal(400, 3, 2))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    assert 0.4 < coverage <= 0.5


def test_compare_includes_the_overlap() -> None:
    real, generated = normal(60, 5, 1), normal(40, 5, 2) * 1.5
    found = evaluation.compare(real, generated)
    four = found.precision, found.recall, found.density, found.coverage
    assert four == evaluation.overlap(real, generated)
    assert evaluation.compare(real, generated, first_radii=scores.radii(real)) == found
    other = evaluation.compare(real, generated, first_radii=torch.zeros(60))
    assert (other.precision, other.density, other.coverage) == (0, 0, 0)
    assert other.recall == found.recall


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_rejected(value: float) -> None:
    bad = normal(20, 3, 1)
    bad[4, 1] = value
    for pair in ((bad, normal(20, 3, 2)), (normal(20, 3, 2), bad)):
        with pytest.raises(InputError, match="must be finite"):
            evaluation.compare(*pair)
