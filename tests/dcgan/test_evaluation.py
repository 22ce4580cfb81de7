"""Distances against torchmetrics, scipy and closed forms; features; the classifier and its cache; eval."""

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
    """Nothing here is large enough for a second core, whose waits are long where it has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(_: str) -> None:
    """Nobody listens."""


def random_part(
    n: int = 40, dataset: str = "digits", size: int = 32, channels: int = 1, seed: int = 0
) -> evaluation.Part:
    """Random images, brighter by label, so that two classes can be told apart."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=random)
    pixels = torch.randint(0, 128, (n, channels, size, size), generator=random) + 127 * labels.view(
        -1, 1, 1, 1
    )
    return evaluation.Part(dataset, "part", pixels.to(torch.uint8), labels, 2, torch.arange(n))


def covariance(width: int, seed: int, rank: int | None = None) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    factor = torch.randn(width, rank or 2 * width, generator=random, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


# ---- distances


@pytest.mark.parametrize("width", [1, 2, 7, 100])
def test_frechet_is_scipys(width: int) -> None:
    c1, c2 = covariance(width, 1), covariance(width, 2) * 3
    m1, m2 = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    root = sqrtm((c1 @ c2).numpy())
    expected = float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace()) - 2 * root.trace().real
    assert evaluation.frechet(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-6)


@given(
    st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 5)] * 2), min_size=1, max_size=6),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_frechet_of_covariances_that_commute(
    axes: list[tuple[float, float, float, float]], seed: int
) -> None:
    """With common axes it is Σ (m₁ − m₂)² + (s₁ − s₂)², in any basis, also where a deviation is 0."""
    m1, m2, s1, s2 = torch.tensor(axes, dtype=torch.float64).T
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(m1), len(m1), generator=random, dtype=torch.float64)).Q
    c1, c2 = (basis * s**2 @ basis.T for s in (s1, s2))
    expected = float(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())
    found = evaluation.frechet(basis @ m1, c1, basis @ m2, c2)
    assert found >= 0
    assert found == pytest.approx(expected, abs=1e-6)  # a zero of 1e-15 has a root of 3e-8
    assert evaluation.frechet(basis @ m2, c2, basis @ m1, c1) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 64])
def test_frechet_of_the_same_is_nothing(rank: int) -> None:
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
def test_frechet_refuses(change: Callable[[Tensor, Tensor], tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluation.frechet(*change(torch.zeros(3), torch.eye(3)))


def test_compare_is_ours_and_the_kernel_distance_by_its_definition() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=random, dtype=torch.float64)
    y = torch.randn(40, 5, generator=random, dtype=torch.float64) * 1.5 + 0.5
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


def test_compare_refuses() -> None:
    with pytest.raises(InputError, match="at least 10, got 9"):
        evaluation.compare(torch.zeros(9, 2), torch.zeros(10, 2))
    with pytest.raises(InputError, match=r"of one kind, got shapes \[10, 2\] and \[10, 3\]"):
        evaluation.compare(torch.zeros(10, 2), torch.zeros(10, 3))


# ---- pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_score_is_torchmetrics(channels: int) -> None:
    random = torch.Generator().manual_seed(0)
    real_images, made = (
        torch.randint(0, top, (n, channels, 32, 32), generator=random, dtype=torch.uint8)
        for n, top in ((500, 256), (400, 200))
    )

    class Extractor(torch.nn.Module):
        num_features = 64 * channels

        def forward(self, images: Tensor) -> Tensor:
            means = images.double().unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
            return (means / 127.5 - 1).flatten(1)

    metric = FrechetInceptionDistance(feature=Extractor()).set_dtype(torch.float64)
    metric.update(real_images, real=True)
    metric.update(made, real=False)
    expected = float(metric.compute())
    score = evaluation.PixelScore(real_images)
    assert score(iter(made.split(150))) == pytest.approx(expected, rel=1e-6)
    # The same images as floats, as a Generator makes them.
    assert score(iter(data.normalise(made).split(90))) == pytest.approx(expected, rel=1e-6)


def test_pixel_score_is_what_eval_says_of_pixels() -> None:
    part, made = random_part(200), data.normalise(random_part(100, seed=1).pixels)
    chosen = evaluation.choose("pixels", part, part, CPU, silent)
    found = evaluation.compare(chosen.of(part.batches(64)), chosen.of(made.split(30)))
    assert evaluation.PixelScore(part.pixels)([made]) == pytest.approx(found.frechet, rel=1e-6)


def test_pixel_score_orders_generators() -> None:
    digits = (data.digits(32) * 127.5 + 127.5).round().to(torch.uint8)
    score = evaluation.PixelScore(digits[::2])
    noise = torch.rand(400, 1, 32, 32) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(digits[1::2].float(), 9, 1, 4).to(torch.uint8)
    floor, middle, worst = score([digits[1::2]]), score([blurred]), score([noise])
    assert 0 <= floor < middle / 5 < worst / 5


def test_pixel_score_takes_at_most_so_many_real_images_evenly() -> None:
    pixels = random_part(100).pixels
    made = [random_part(50, seed=1).pixels]
    assert evaluation.PixelScore(pixels, samples=25)(made) == evaluation.PixelScore(pixels[::4])(made)
    assert evaluation.PixelScore(pixels, samples=1000)(made) == evaluation.PixelScore(pixels)(made)


def test_a_nan_has_the_worst_score() -> None:
    made = torch.zeros(20, 1, 32, 32)
    made[7, 0, 3, 3] = math.nan
    assert evaluation.PixelScore(random_part().pixels)(made.split(5)) == math.inf
    chosen = evaluation.choose("pixels", random_part(), random_part(), CPU, silent)
    with pytest.raises(RunError, match="NaN"):
        chosen.of(made.split(5))


def test_pixel_score_refuses() -> None:
    pixels = random_part().pixels
    with pytest.raises(InputError, match="samples must be an integer of at least 2, got 1"):
        evaluation.PixelScore(pixels, samples=1)
    for bad in (pixels[:1], pixels.float(), pixels[0]):
        with pytest.raises(InputError, match=r"real must be at least 2 images, uint8 \[N, C, H, W\], got"):
            evaluation.PixelScore(bad)
    score = evaluation.PixelScore(pixels)
    for images, said in (
        ([], "got 0"),
        ([pixels[:1]], "got 1 of 1"),
        ([pixels.expand(-1, 3, -1, -1)], "of 3"),
    ):
        with pytest.raises(InputError, match=f"images must be at least 2, of 1 channels, .*{said}"):
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


def test_parts_are_halves_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", fake_load({"train": 31}))
    first, second = evaluation.parts("digits", Path("data"), image_size=32, channels=1, say=silent)
    assert len(first) - len(second) == 1
    both = torch.cat([first.index, second.index])
    assert torch.equal(both.sort().values, torch.arange(31))
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
def test_parts_refuse_few_images(name: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", fake_load(sizes))
    with pytest.raises(InputError, match=f"the dataset {name} has 9 images in .*at least 10"):
        evaluation.parts(name, Path("data"), image_size=32, channels=1, say=silent)


# ---- the classifier


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, training that takes a moment, and no Inception."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(classifier, "MINIMUM_STEPS", 8)
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(scores, "SUBSETS", 10)
    return tmp_path / "cache" / "classifiers"


def test_classifier_is_trained_once_and_kept(cache: Path) -> None:
    said: list[str] = []
    train, test = random_part(200), random_part(50, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = classifier.obtain(train, test, CPU, said.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert said == ["Training the digits classifier on 200 images of digits, once"]
    assert first.accuracy > 0.9  # dark and bright noise
    assert re.fullmatch(r"digits-32-v1-[0-9a-f]{12}", first.name)
    assert [path.name for path in cache.iterdir()] == [f"{first.name}.pt"]
    again = classifier.obtain(train, test, CPU, said.append)
    assert len(said) == 1
    assert (again.name, again.accuracy) == (first.name, first.accuracy)
    x = test.pixels
    assert torch.equal(again.network(x), first.network(x))
    found = first.network.features(x)
    assert found.shape == (50, 128)
    assert found.min() >= 0
    # Training anew gives the same network; other images give another name.
    (cache / f"{first.name}.pt").unlink()
    assert torch.equal(classifier.obtain(train, test, CPU, silent).network(x), first.network(x))
    for other in (
        random_part(200, seed=2),
        random_part(199),
        random_part(200, size=64),
        random_part(200, "mnist"),
    ):
        assert classifier.obtain(other, test, CPU, silent).name != first.name


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other network"])
def test_a_damaged_classifier_is_replaced(damage: str, cache: Path) -> None:
    train, test = random_part(), random_part(seed=1)
    first = classifier.obtain(train, test, CPU, silent)
    path = cache / f"{first.name}.pt"
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "foreign":
        path.write_text("not a file of PyTorch's")
    else:
        torch.save({"state": torch.nn.Linear(1, 1).state_dict(), "accuracy": 1.0}, path)
    said: list[str] = []
    again = classifier.obtain(train, test, CPU, said.append)
    assert "can't be used, a new one is trained" in said[0]
    assert torch.equal(again.network(test.pixels), first.network(test.pixels))
    assert classifier.obtain(train, test, CPU, said.append).accuracy == first.accuracy
    assert len(said) == 2


def test_a_cache_that_can_not_be_written_costs_only_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    found = classifier.obtain(random_part(), random_part(), CPU, said.append)
    assert not found.network.training
    assert "can't be kept as" in said[-1]
    assert str(tmp_path / "file") in said[-1]


def test_default_cache_is_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCGAN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert classifier.folder() == tmp_path / ".cache" / "dcgan-kernels" / "classifiers"


def test_classifier_learns_real_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn's digits, 898 to learn from and 899 to be tested with; a tenth would be chance."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(classifier, "MINIMUM_STEPS", 120)
    monkeypatch.setattr(classifier, "BATCH", 64)
    train, test = evaluation.parts("digits", Path("data"), image_size=32, channels=1, say=silent)
    chosen = evaluation.choose("digits", train, test, CPU, silent)
    assert chosen.facts["classifier_accuracy"] > 0.93
    assert chosen.facts["classifier_test_images"] == len(test)
    assert f"right about {chosen.facts['classifier_accuracy']:.2%} of {len(test)} others" in chosen.about
    of_train, of_test = (chosen.of(part.batches(200)) for part in (train, test))
    floor = evaluation.compare(of_train, of_test)
    noise = torch.randint(0, 256, (500, 1, 32, 32), dtype=torch.uint8)
    assert floor.frechet < evaluation.compare(of_train, chosen.of(noise.split(100))).frechet / 10


# ---- which features


def test_auto(cache: Path) -> None:
    part = random_part()
    assert evaluation.choose("auto", part, part, CPU, silent).name == "digits"
    colour = random_part(dataset="cifar10", channels=3)
    chosen = evaluation.choose("auto", colour, colour, CPU, silent)
    assert chosen.name == "pixels"
    assert chosen.of(colour.batches(16)).shape == (40, 192)


def test_distances_are_named_by_their_features(cache: Path) -> None:
    part = random_part()
    names = [evaluation.choose(name, part, part, CPU, silent) for name in ("digits", "pixels")]
    assert [found.frechet for found in names] == [
        "Fréchet distance, digits classifier features (digits)",
        "Fréchet distance, 8×8 pixel features",
    ]
    assert not any("FID" in found.frechet or "KID" in found.kernel for found in names)


def test_features_refuse(cache: Path) -> None:
    part = random_part(dataset="folder")
    with pytest.raises(InputError, match="mnist, fashion-mnist, digits, got 'folder'"):
        evaluation.choose("digits", part, part, CPU, silent)
    with pytest.raises(InputError, match="auto, inception, digits, pixels, got 'vgg'"):
        evaluation.choose("vgg", part, part, CPU, silent)


def test_inception_without_weights_says_what_goes_where(cache: Path) -> None:
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
    with pytest.raises(InputError, match="damaged or another one; its SHA-256 must start with 6726825d"):
        evaluation.choose("auto", part, part, CPU, silent)


def test_inception_with_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights of the right shapes: the published ones are 91 MB that tests do without."""
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
    # A grey image is seen as the colour image of three equal channels.
    grey, colour = part.pixels[:1], part.pixels[:1].repeat(1, 3, 1, 1)
    found = chosen.of([grey, colour])
    assert found.shape == (2, 2048)
    assert torch.equal(found[0], found[1])
    monkeypatch.setitem(sys.modules, fidelity.__name__, None)
    with pytest.raises(InputError, match=r"need torch-fidelity: pip install 'dcgan-kernels\[inception\]'"):
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
    made, floor = found["scores"]["generated"], found["scores"]["floor"]
    assert made["images"] == floor["images"] == [100, 100]
    assert made["frechet"] > 2 * floor["frechet"] >= 0  # what an untrained Generator makes is grey
    assert f"{made['frechet']:.4g}" in result.output
    assert "100 real (the other half)" in result.output
    before = out.read_text()
    assert invoke(*arguments, "--features", chosen).exit_code == 0
    assert out.read_text() == before
    assert invoke(*arguments, "--features", chosen, "--seed", 1, "--batch-size", 33).exit_code == 0
    assert out.read_text() != before


def test_a_runs_folder_and_its_moving_average(tmp_path: Path, cache: Path) -> None:
    """In colour too: grey datasets then are three equal channels, which the classifier learns as well."""
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
    made, floors = ([one["scores"][of]["frechet"] for one in found] for of in ("generated", "floor"))
    assert made[0] != made[1]
    assert floors[0] == floors[1]


def test_command_says_how_many_real_images_there_are(generator: Path, cache: Path) -> None:
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


def test_a_file_that_is_no_generator(tmp_path: Path, cache: Path) -> None:
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


def test_no_dataset_there(tmp_path: Path, generator: Path, cache: Path) -> None:
    result = invoke(generator, "--dataset", "folder", "--dataroot", tmp_path / "nowhere", "--device", "cpu")
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_a_generator_of_nans_is_exit_1(tmp_path: Path, cache: Path) -> None:
    model = Generator(features=4, image_size=32)
    torch.nn.init.constant_(model.main[0].weight, math.nan)
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    result = invoke(
        tmp_path / "nan.pth", "--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu"
    )
    assert result.exit_code == 1
    assert "NaN" in result.output


def test_an_engine_that_does_not_cover_is_a_usage_error(generator: Path, cache: Path) -> None:
    arguments = ("--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu")
    result = invoke(generator, *arguments, "--engine", "triton")
    assert result.exit_code == 2
    assert "--engine: engine 'triton' was asked for" in result.output


def test_the_commands_minimum_is_the_librarys() -> None:
    assert command.MINIMUM == real.MINIMUM
