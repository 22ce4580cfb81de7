"""Distances between features against torchmetrics, SciPy and closed forms; the pixel score."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor, distributed
from torchmetrics.image.fid import FrechetInceptionDistance

from dcgan import data, evaluation
from dcgan.errors import InputError, RunError
from dcgan.evaluation import scores
from tests.dcgan.test_distributed import free_port
from tests.support import train_runs
from tests.support.parts import CPU, random_part, silent

pytestmark = pytest.mark.usefixtures("one_thread")


def covariance(width: int, seed: int, rank: int | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    factor = torch.randn(width, rank or 2 * width, generator=rng, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


@pytest.mark.parametrize("width", [1, 2, 7, 100])
def test_frechet_matches_scipy(width: int) -> None:
    c1, c2 = covariance(width, 1), covariance(width, 2) * 3
    m1, m2 = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    root = sqrtm((c1 @ c2).numpy())
    expected = float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace()) - 2 * root.trace().real
    assert evaluation.frechet(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-6)


@given(
    st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 5)] * 2), min_size=1, max_size=6),
    st.integers(0, 100),
)
@settings(max_examples=60)
def test_frechet_of_covariances_that_commute(
    axes: list[tuple[float, float, float, float]], seed: int
) -> None:
    """With common axes it is Σ (m₁ − m₂)² + (s₁ − s₂)² in any basis, even if a standard deviation is 0."""
    m1, m2, s1, s2 = torch.tensor(axes, dtype=torch.float64).T
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(m1), len(m1), generator=rng, dtype=torch.float64)).Q
    c1, c2 = (basis * s**2 @ basis.T for s in (s1, s2))
    expected = float(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())
    found = evaluation.frechet(basis @ m1, c1, basis @ m2, c2)
    assert found >= 0
    assert found == pytest.approx(expected, abs=1e-6)  # a zero computed as 1e-15 has the root 3e-8
    assert evaluation.frechet(basis @ m2, c2, basis @ m1, c1) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 64])
def test_frechet_of_identical_gaussians_is_zero(rank: int) -> None:
    mean, cov = torch.randn(64).double(), covariance(64, 1, rank)
    assert 0 <= evaluation.frechet(mean, cov, mean, cov) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c: (m, c, m[:2], c), r"must be \[F\] and \[F, F\], got \[3\], \[3, 3\], \[2\], \[3, 3\]"),
        (lambda m, c: (m, c[:2], m, c), r"must be \[F\] and \[F, F\]"),
        (lambda m, c: (m, c, m * math.nan, c), "must be finite"),
        (lambda m, c: (m, c * math.inf, m, c), "must be finite"),
    ],
)
def test_frechet_rejects_bad_moments(
    change: Callable[[Tensor, Tensor], tuple[Tensor, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluation.frechet(*change(torch.zeros(3), torch.eye(3)))


def test_compare_matches_torchmetrics_and_the_definition_of_the_kernel_distance() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=rng, dtype=torch.float64)
    y = torch.randn(40, 5, generator=rng, dtype=torch.float64) * 1.5 + 0.5
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = evaluation.compare(x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    identity = torch.nn.Identity()
    identity.num_features = 5
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert found.frechet == pytest.approx(float(metric.compute()), rel=1e-12)
    assert found.frechet == evaluation.frechet(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert found.subset_size == 20
    assert found.images == (60, 40)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 5 + 1) ** 3

    def unbiased(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    whole = float(unbiased(x) + unbiased(y) - 2 * kernel(x, y).mean())
    assert abs(found.kernel - whole) < 3 * found.kernel_std / math.sqrt(scores.SUBSETS) + 0.1 * whole
    again, other = (evaluation.compare(x, y, seed=seed) for seed in (1, 2))
    assert again == found
    assert other.kernel != found.kernel
    assert other.frechet == found.frechet


def test_compare_rejects_bad_features() -> None:
    with pytest.raises(InputError, match="at least 10 images, got 9"):
        evaluation.compare(torch.zeros(9, 2), torch.zeros(10, 2))
    with pytest.raises(InputError, match=r"same number of features, got shapes \[10, 2\] and \[10, 3\]"):
        evaluation.compare(torch.zeros(10, 2), torch.zeros(10, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_score_matches_torchmetrics(channels: int) -> None:
    rng = torch.Generator().manual_seed(0)
    real_images, generated = (
        torch.randint(0, top, (n, channels, 32, 32), generator=rng, dtype=torch.uint8)
        for n, top in ((500, 256), (400, 200))
    )

    class Extractor(torch.nn.Module):
        num_features = 64 * channels

        def forward(self, images: Tensor) -> Tensor:
            means = images.double().unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
            return (means / 127.5 - 1).flatten(1)

    metric = FrechetInceptionDistance(feature=Extractor()).set_dtype(torch.float64)
    metric.update(real_images, real=True)
    metric.update(generated, real=False)
    expected = float(metric.compute())
    score = evaluation.PixelScore(real_images)
    assert score(iter(generated.split(150))) == pytest.approx(expected, rel=1e-6)
    # The same images as floats, which is what a Generator returns.
    assert score(iter(data.normalise(generated).split(90))) == pytest.approx(expected, rel=1e-6)


def test_pixel_score_matches_the_pixel_features_of_eval() -> None:
    part, generated = random_part(200), data.normalise(random_part(100, seed=1).pixels)
    chosen = evaluation.choose("pixels", part, part, CPU, silent)
    found = evaluation.compare(chosen.of(part.batches(64)), chosen.of(generated.split(30)))
    assert evaluation.PixelScore(part.pixels)([generated]) == pytest.approx(found.frechet, rel=1e-6)


def test_pixel_score_ranks_generators() -> None:
    digits = (data.digits(32) * 127.5 + 127.5).round().to(torch.uint8)
    score = evaluation.PixelScore(digits[::2])
    noise = torch.rand(400, 1, 32, 32) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(digits[1::2].float(), 9, 1, 4).to(torch.uint8)
    floor, middle, worst = score([digits[1::2]]), score([blurred]), score([noise])
    assert 0 <= floor < middle / 5 < worst / 5


def test_pixel_score_uses_evenly_spaced_samples() -> None:
    pixels = random_part(100).pixels
    generated = [random_part(50, seed=1).pixels]
    sampled, strided = evaluation.PixelScore(pixels, samples=25), evaluation.PixelScore(pixels[::4])
    assert sampled(generated) == strided(generated)
    assert evaluation.PixelScore(pixels, samples=1000)(generated) == evaluation.PixelScore(pixels)(generated)


def test_a_nan_has_the_worst_score() -> None:
    generated = torch.zeros(20, 1, 32, 32)
    generated[7, 0, 3, 3] = math.nan
    assert evaluation.PixelScore(random_part().pixels)(generated.split(5)) == math.inf
    chosen = evaluation.choose("pixels", random_part(), random_part(), CPU, silent)
    with pytest.raises(RunError, match="NaN"):
        chosen.of(generated.split(5))


def test_pixel_score_rejects_bad_images() -> None:
    pixels = random_part().pixels
    with pytest.raises(InputError, match="samples must be an integer of at least 2, got 1"):
        evaluation.PixelScore(pixels, samples=1)
    for bad in (pixels[:1], pixels.float(), pixels[0]):
        with pytest.raises(InputError, match=r"real must be at least 2 images, uint8 \[N, C, H, W\], got"):
            evaluation.PixelScore(bad)
    score = evaluation.PixelScore(pixels)
    for images, message in (
        ([], "got 0"),
        ([pixels[:1]], "got 1 of 1"),
        ([pixels.expand(-1, 3, -1, -1)], "of 3"),
    ):
        with pytest.raises(InputError, match=f"images must be at least 2 images of 1 channels, .*{message}"):
            score(images)


def first_process_scores(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    address, patience = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=50)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=patience)
    if rank == 0:
        torch.save(evaluation.compare(*features_of_two_sets()).kernel, out)
    distributed.barrier()
    distributed.destroy_process_group()


def features_of_two_sets() -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return first, second + 1


def test_one_process_of_several_can_score(tmp_path: Path) -> None:
    """Nothing waits for the other process, which does not score, and the scores are those of one process."""
    port, context = free_port(), train_runs.forkserver_context()
    out = str(tmp_path / "kernel.pt")
    processes = [context.Process(target=first_process_scores, args=(rank, port, out)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    assert torch.load(out) == evaluation.compare(*features_of_two_sets()).kernel
