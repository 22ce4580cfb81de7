"""Distances against torchmetrics, SciPy and closed forms; features; the classifier cache; ``dcgan eval``."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from typer.testing import CliRunner

from dcgan import data, evaluation
from dcgan.checkpoint import Checkpoint, Folder
from dcgan.cli import evaluate as command
from dcgan.cli.app import app
from dcgan.errors import InputError, RunError
from dcgan.evaluation import classifier, features, real, scores
from dcgan.models import Discriminator, Generator
from dcgan.networks import Architecture

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: the tensors are too small for a second one, which only waits on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(_: str) -> None:
    """Discard the message."""


def random_part(
    n: int = 40, dataset: str = "digits", size: int = 32, channels: int = 1, seed: int = 0
) -> evaluation.Part:
    """Return random images of two classes that differ in brightness."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=rng)
    pixels = torch.randint(0, 128, (n, channels, size, size), generator=rng) + 127 * labels.view(-1, 1, 1, 1)
    return evaluation.Part(dataset, "part", pixels.to(torch.uint8), labels, 2, torch.arange(n))


def covariance(width: int, seed: int, rank: int | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    factor = torch.randn(width, rank or 2 * width, generator=rng, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


# ---- distances


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


def test_compare_matches_frechet_and_the_definition_of_the_kernel_distance() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=rng, dtype=torch.float64)
    y = torch.randn(40, 5, generator=rng, dtype=torch.float64) * 1.5 + 0.5
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = evaluation.compare(x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    expected = evaluation.frechet(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert found.frechet == pytest.approx(expected, rel=1e-6)
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


# ---- pixels


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


# ---- real images


def fake_load(sizes: dict[str, int]) -> Callable[..., object]:
    class Images:
        def __init__(self, n: int, size: int, channels: int) -> None:
            self.pixels = torch.arange(n).view(-1, 1, 1, 1).expand(-1, channels, size, size).to(torch.uint8)
            self.labels, self.classes = torch.arange(n) % 2, ("a", "b")

        def __len__(self) -> int:
            return len(self.pixels)

    def load(name: str, root: Path, *, image_size: int, channels: int, split: str, say: object) -> Images:
        return Images(sizes[split], image_size, channels)

    return load


def test_parts_are_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", fake_load({"train": 30, "test": 12}))
    train, test = evaluation.parts("mnist", Path("data"), image_size=32, channels=3, say=silent)
    assert (len(train), train.what, len(test), test.what) == (30, "train split", 12, "test split")
    assert next(train.batches(7)).shape == (7, 3, 32, 32)
    assert [len(batch) for batch in test.batches(7)] == [7, 5]


def test_parts_are_fixed_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", fake_load({"train": 31}))
    first, second = evaluation.parts("digits", Path("data"), image_size=32, channels=1, say=silent)
    assert len(first) - len(second) == 1
    combined = torch.cat([first.index, second.index])
    assert torch.equal(combined.sort().values, torch.arange(31))
    torch.manual_seed(9)
    again, _ = evaluation.parts("digits", Path("data"), image_size=32, channels=1, say=silent)
    assert torch.equal(first.index, again.index)
    chosen, same, other = (first.choose(8, seed) for seed in (1, 1, 2))
    assert len(chosen) == 8
    assert set(chosen.index.tolist()) <= set(first.index.tolist())
    assert len(set(chosen.index.tolist())) == 8
    assert torch.equal(chosen.index, same.index)
    assert not torch.equal(chosen.index, other.index)
    assert len(first.choose(100, 1)) == len(first)


@pytest.mark.parametrize(("name", "sizes"), [("mnist", {"train": 30, "test": 9}), ("folder", {"train": 19})])
def test_parts_reject_small_datasets(
    name: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", fake_load(sizes))
    with pytest.raises(InputError, match=f"the dataset {name} has 9 images in .*at least 10"):
        evaluation.parts(name, Path("data"), image_size=32, channels=1, say=silent)


# ---- the classifier


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, short classifier training, and no Inception weights."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(classifier, "MIN_STEPS", 8)
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(scores, "SUBSETS", 10)
    return tmp_path / "cache" / "classifiers"


def test_classifier_is_trained_once_and_cached(cache: Path) -> None:
    messages: list[str] = []
    train, test = random_part(200), random_part(50, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = classifier.load_or_train(train, test, CPU, messages.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert messages == ["Training the digits classifier on 200 images of digits, once"]
    assert first.accuracy > 0.9  # dark and bright noise
    assert re.fullmatch(r"digits-32-v1-[0-9a-f]{12}", first.name)
    assert [path.name for path in cache.iterdir()] == [f"{first.name}.pt"]
    again = classifier.load_or_train(train, test, CPU, messages.append)
    assert len(messages) == 1
    assert (again.name, again.accuracy) == (first.name, first.accuracy)
    x = test.pixels
    assert torch.equal(again.network(x), first.network(x))
    found = first.network.features(x)
    assert found.shape == (50, 128)
    assert found.min() >= 0
    # Training again gives the same network; other images give another name.
    (cache / f"{first.name}.pt").unlink()
    assert torch.equal(classifier.load_or_train(train, test, CPU, silent).network(x), first.network(x))
    for other in (
        random_part(200, seed=2),
        random_part(199),
        random_part(200, size=64),
        random_part(200, "mnist"),
    ):
        assert classifier.load_or_train(other, test, CPU, silent).name != first.name


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other network"])
def test_a_damaged_classifier_is_replaced(damage: str, cache: Path) -> None:
    train, test = random_part(), random_part(seed=1)
    first = classifier.load_or_train(train, test, CPU, silent)
    path = cache / f"{first.name}.pt"
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "foreign":
        path.write_text("not a file of PyTorch's")
    else:
        torch.save({"state": torch.nn.Linear(1, 1).state_dict(), "accuracy": 1.0}, path)
    messages: list[str] = []
    again = classifier.load_or_train(train, test, CPU, messages.append)
    assert "cannot be used and is trained again" in messages[0]
    assert torch.equal(again.network(test.pixels), first.network(test.pixels))
    assert classifier.load_or_train(train, test, CPU, messages.append).accuracy == first.accuracy
    assert len(messages) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "file"))
    messages: list[str] = []
    found = classifier.load_or_train(random_part(), random_part(), CPU, messages.append)
    assert not found.network.training
    assert "Cannot cache the classifier as" in messages[-1]
    assert str(tmp_path / "file") in messages[-1]


def test_default_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCGAN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert classifier.folder() == tmp_path / ".cache" / "dcgan-kernels" / "classifiers"


def test_classifier_learns_real_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn's digits: 898 for training, 899 for testing; chance level is 10 %."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(classifier, "MIN_STEPS", 120)
    monkeypatch.setattr(classifier, "BATCH", 64)
    train, test = evaluation.parts("digits", Path("data"), image_size=32, channels=1, say=silent)
    chosen = evaluation.choose("digits", train, test, CPU, silent)
    assert chosen.facts["classifier_accuracy"] > 0.93
    assert chosen.facts["classifier_test_images"] == len(test)
    accuracy = chosen.facts["classifier_accuracy"]
    assert f"an accuracy of {accuracy:.2%} on {len(test)} others" in chosen.about
    of_train, of_test = (chosen.of(part.batches(200)) for part in (train, test))
    floor = evaluation.compare(of_train, of_test)
    noise = torch.randint(0, 256, (500, 1, 32, 32), dtype=torch.uint8)
    assert floor.frechet < evaluation.compare(of_train, chosen.of(noise.split(100))).frechet / 10


# ---- choice of features


def test_automatic_choice(cache: Path) -> None:
    part = random_part()
    assert evaluation.choose("auto", part, part, CPU, silent).name == "digits"
    colour = random_part(dataset="cifar10", channels=3)
    chosen = evaluation.choose("auto", colour, colour, CPU, silent)
    assert chosen.name == "pixels"
    assert chosen.of(colour.batches(16)).shape == (40, 192)


def test_distances_are_named_after_their_features(cache: Path) -> None:
    part = random_part()
    names = [evaluation.choose(name, part, part, CPU, silent) for name in ("digits", "pixels")]
    assert [found.frechet for found in names] == [
        "Fréchet distance, digits classifier features (digits)",
        "Fréchet distance, 8×8 pixel features",
    ]
    assert not any("FID" in found.frechet or "KID" in found.kernel for found in names)


def test_choose_rejects_unsuitable_features(cache: Path) -> None:
    part = random_part(dataset="folder")
    with pytest.raises(InputError, match="mnist, fashion-mnist, digits, got 'folder'"):
        evaluation.choose("digits", part, part, CPU, silent)
    with pytest.raises(InputError, match="auto, inception, digits, pixels, got 'vgg'"):
        evaluation.choose("vgg", part, part, CPU, silent)


def test_missing_inception_weights_are_reported_with_path_and_url(cache: Path) -> None:
    part = random_part()
    with pytest.raises(InputError) as error:
        evaluation.choose("inception", part, part, CPU, silent)
    for words in (str(features.inception_weights()), "No such file", "https://", "digits or pixels"):
        assert words in str(error.value)
    assert str(features.inception_weights()).startswith(str(cache.parent.parent / "torch"))


def test_damaged_inception_weights_are_refused(cache: Path) -> None:
    path = features.inception_weights()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half of it")
    part = random_part()
    with pytest.raises(InputError, match="damaged or a different one: its SHA-256 must start with 6726825d"):
        evaluation.choose("auto", part, part, CPU, silent)


def test_inception_with_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use random weights of the right shapes: the published ones are a 91 MB download."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    shapes: dict[str, Tensor] = {}
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: shapes, raising=True)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, _: None)
        torch.manual_seed(0)
        shapes = fidelity.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    path = features.inception_weights()
    path.parent.mkdir(parents=True)
    torch.save(shapes, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(features, "INCEPTION_WEIGHTS", f"weights-{digest}.pth")
    path.rename(features.inception_weights())
    part = random_part(2)
    chosen = evaluation.choose("auto", part, part, CPU, silent)
    assert (chosen.name, chosen.frechet, chosen.kernel) == ("inception", "FID (Inception)", "KID (Inception)")
    # A grey image is treated as a colour image with three equal channels.
    grey, colour = part.pixels[:1], part.pixels[:1].repeat(1, 3, 1, 1)
    found = chosen.of([grey, colour])
    assert found.shape == (2, 2048)
    assert torch.equal(found[0], found[1])
    monkeypatch.setitem(sys.modules, fidelity.__name__, None)
    with pytest.raises(InputError, match=r"run pip install 'dcgan-kernels\[inception\]'"):
        evaluation.choose("inception", part, part, CPU, silent)


# ---- the command


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "generator.pth"
    torch.save(Generator(features=4, image_size=32).state_dict(), path)
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(
        app, ["eval", *map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )


@pytest.mark.parametrize("chosen", ["pixels", "digits"])
def test_command(chosen: str, generator: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    arguments = (generator, "--dataset", "digits", "--num", 100, "--device", "cpu", "--json", out)
    result = invoke(*arguments, "--features", chosen)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["features"] == chosen
    assert (found["generator"], found["moving_average"]) == (str(generator), False)
    assert found["frechet"] in result.output
    assert found["kernel"] in result.output
    assert ("classifier_accuracy" in found) == (chosen == "digits")
    generated, floor = found["scores"]["generated"], found["scores"]["floor"]
    assert generated["images"] == floor["images"] == [100, 100]
    assert generated["frechet"] > 2 * floor["frechet"] >= 0  # an untrained Generator's images are plain grey
    assert f"{generated['frechet']:.4g}" in result.output
    assert "100 real (the other half)" in result.output
    before = out.read_text()
    assert invoke(*arguments, "--features", chosen).exit_code == 0
    assert out.read_text() == before
    assert invoke(*arguments, "--features", chosen, "--seed", 1, "--batch-size", 33).exit_code == 0
    assert out.read_text() != before


def test_a_runs_folder_and_its_moving_average(tmp_path: Path, cache: Path) -> None:
    """Use a colour network: grey datasets then have three equal channels, which the classifier supports."""
    sizes = {"features": 4, "channels": 3, "image_size": 32}
    torch.manual_seed(0)
    states = [Generator(**sizes).state_dict() for _ in range(2)]
    architecture = Architecture(channels=3, features_g=4, features_d=4, image_size=32)
    saved = Checkpoint(architecture, states[0], Discriminator(**sizes).state_dict(), ema=states[1])
    Folder(tmp_path / "run" / "checkpoints").save(saved)
    found = []
    for option in ("--ema", "--no-ema"):
        out = tmp_path / f"{option}.json"
        arguments = ("--dataset", "digits", "--num", 20, "--device", "cpu", "--json", out, option)
        result = invoke(tmp_path / "run", *arguments)
        assert result.exit_code == 0, result.output
        found.append(json.loads(out.read_text()))
    assert [one["moving_average"] for one in found] == [True, False]
    generated, floors = ([one["scores"][row]["frechet"] for one in found] for row in ("generated", "floor"))
    assert generated[0] != generated[1]
    assert floors[0] == floors[1]


def test_command_reports_the_number_of_real_images(generator: Path, cache: Path) -> None:
    result = invoke(
        generator, "--dataset", "digits", "--num", 1000, "--features", "pixels", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "Distance to 899 real images (digits, one half) of:" in result.output
    assert "1,000 generated" in result.output
    assert "898 real (the other half)" in result.output


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--num", "9", "integer of at least 10"),
        ("--num", "x", "integer of at least 10"),
        ("--features", "vgg", "'auto', 'inception', 'digits', 'pixels'"),
        ("--seed", "-1", "integer of at least 0"),
        ("--batch-size", "0", "integer of at least 1"),
        ("--device", "tpu", "'auto', 'cpu', 'cuda'"),
        ("--engine", "fast", "'auto', 'reference', 'triton', 'native'"),
        ("--which", "first", "'last', 'best'"),
        ("--dataset", "imagenet", "digits"),
        ("--json", "/dev/null/scores.json", "cannot make the folder"),
    ],
)
def test_usage_errors(option: str, value: str, allowed: str, generator: Path, cache: Path) -> None:
    arguments = {"--dataset": "digits", "--device": "cpu", option: value}
    result = invoke(generator, *(word for pair in arguments.items() for word in pair))
    assert result.exit_code == 2
    for words in (option.removeprefix("--"), Path(value).parent.name or value, allowed):
        assert words in result.output


def test_missing_arguments(generator: Path) -> None:
    for arguments, name in (((generator,), "--dataset"), (("--dataset", "digits"), "FROM")):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert name in result.output


def test_a_file_that_is_not_a_generator(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "discriminator.pth"
    torch.save(Discriminator(features=4, image_size=32).state_dict(), path)
    for source in (path, tmp_path / "none.pth"):
        result = invoke(source, "--dataset", "digits", "--device", "cpu")
        assert result.exit_code == 2
        assert source.name in result.output


def test_json_that_is_a_folder(tmp_path: Path, generator: Path) -> None:
    result = invoke(generator, "--dataset", "digits", "--json", tmp_path)
    assert result.exit_code == 2
    assert "--json" in result.output
    assert "is a directory" in result.output


def test_a_missing_dataset(tmp_path: Path, generator: Path, cache: Path) -> None:
    result = invoke(generator, "--dataset", "folder", "--dataroot", tmp_path / "nowhere", "--device", "cpu")
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_a_generator_of_nans_exits_with_1(tmp_path: Path, cache: Path) -> None:
    model = Generator(features=4, image_size=32)
    torch.nn.init.constant_(model.main[0].weight, math.nan)
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    result = invoke(
        tmp_path / "nan.pth", "--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu"
    )
    assert result.exit_code == 1
    assert "NaN" in result.output


def test_an_unsupported_engine_is_a_usage_error(generator: Path, cache: Path) -> None:
    arguments = ("--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu")
    result = invoke(generator, *arguments, "--engine", "triton")
    assert result.exit_code == 2
    assert "--engine: engine 'triton' is forced" in result.output


def test_the_command_and_the_library_agree_about_the_minimum() -> None:
    assert command.MIN_IMAGES == real.MIN_IMAGES
