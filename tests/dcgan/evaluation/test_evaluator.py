"""The evaluator: real features computed once, any number of scores, and the real images of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import data, evaluation, generation
from dcgan.errors import InputError, RunError
from dcgan.evaluation import Evaluator, classifier, scores
from dcgan.models import Generator
from tests.support.parts import CPU, random_part, silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "SUBSETS", 10)


def pixel_features() -> evaluation.Features:
    part = random_part()
    return evaluation.choose("pixels", part, part, CPU, silent)


def evaluator(num: int = 30, seed: int = 0, batch_size: int = 16) -> Evaluator:
    return Evaluator(pixel_features(), random_part(80), random_part(50, seed=1), num, seed, batch_size)


def small_generator() -> nn.Module:
    torch.manual_seed(0)
    return Generator(features=4, image_size=32).eval()


@pytest.mark.parametrize(("num", "seed", "batch_size"), [(30, 0, 16), (1000, 3, 7)])
def test_scores_are_those_of_compare(num: int, seed: int, batch_size: int) -> None:
    features, train, test = pixel_features(), random_part(80), random_part(50, seed=1)
    found = Evaluator(features, train, test, num, seed, batch_size)
    real, held_out = train.choose(num, seed), test.choose(num, seed)
    assert torch.equal(found.real.index, real.index)
    assert torch.equal(found.held_out.index, held_out.index)
    real_features = features.of(real.batches(64))
    network = small_generator()
    images = list(generation.images(network, num, seed=seed, batch=batch_size))
    expected = evaluation.compare(real_features, features.of(images), seed)
    assert found(images) == found(torch.cat(images).split(9)) == found.of(network) == expected
    assert found.floor() == evaluation.compare(real_features, features.of(held_out.batches(64)), seed)


def test_real_features_are_computed_once() -> None:
    counted: list[int] = []
    features = pixel_features()

    def function(images: Tensor) -> Tensor:
        counted.append(len(images))
        return images.float().flatten(1)[:, :4]

    object.__setattr__(features, "function", function)
    found = Evaluator(features, random_part(80), random_part(50, seed=1), 40)
    assert sum(counted) == 40
    for _ in range(3):
        found([random_part(12, seed=2).pixels])
    assert sum(counted) == 40 + 3 * 12


def test_scoring_again_gives_the_same_and_leaves_the_rng_alone() -> None:
    found, network = evaluator(), small_generator()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = found.of(network)
    assert torch.equal(torch.get_rng_state(), state)
    found([random_part(20, seed=5).pixels])
    assert found.of(network) == first
    assert evaluator().of(network) == first
    assert evaluator(seed=1).of(network) != first


def test_row_for_the_metrics_file() -> None:
    found = evaluator()
    one = found([random_part(25, seed=2).pixels])
    assert found.row(one) == {
        "features": "pixels",
        "frechet": one.frechet,
        "kernel": one.kernel,
        "kernel_std": one.kernel_std,
        "precision": one.precision,
        "recall": one.recall,
        "density": one.density,
        "coverage": one.coverage,
        "images": 25,
    }


def test_a_nan_is_an_error_that_leaves_the_evaluator_usable() -> None:
    found, network = evaluator(), small_generator()
    before = found.of(network)
    bad = torch.zeros(20, 1, 32, 32)
    bad[13, 0, 5, 5] = math.nan
    with pytest.raises(RunError, match="NaN"):
        found(bad.split(8))
    nn.init.constant_(next(network.parameters()), math.nan)
    with pytest.raises(RunError, match="NaN"):
        found.of(network)
    assert found.of(small_generator()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 9}, "num must be an integer of at least 10, got 9"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Evaluator(pixel_features(), random_part(), random_part(), **({"num": 10} | arguments))


def test_bad_images() -> None:
    found = evaluator()
    with pytest.raises(InputError, match="at least 10 images, got 9"):
        found([random_part(9).pixels])
    with pytest.raises(InputError, match="same number of features"):
        found([random_part(20, channels=3).pixels])
    with pytest.raises(InputError, match="eval mode"):
        found.of(small_generator().train())


def load(features: Any = "pixels", **selection: Any) -> Evaluator:
    sizes: dict[str, Any] = {"image_size": 32, "channels": 1, "num": 2000}
    return Evaluator.load(
        "digits", Path("data"), **sizes, **selection, features=features, device=CPU, say=silent
    )


def test_real_images_are_selected_as_the_run_selects_them() -> None:
    digits = data.load("digits", image_size=32, classes=["3", "8"], limit=90)
    found = load(classes=["3", "8"], limit=90)
    assert len(found.real) + len(found.held_out) == 90
    assert torch.equal(found.real.pixels, digits.pixels)
    assert set(found.real.index.tolist()) | set(found.held_out.index.tolist()) == set(range(90))
    assert len(load().real) + len(load().held_out) == 1797


def test_a_test_split_is_not_limited() -> None:
    """The noise of 'fake' has a test split of 1,024 images."""
    found = Evaluator.load(
        "fake", Path("data"), image_size=32, channels=3, limit=40, num=2000, device=CPU, say=silent
    )
    assert (len(found.real), found.real.what) == (40, "train split")
    assert (len(found.held_out), found.held_out.what) == (1024, "test split")


def test_selections_are_scored_by_the_same_classifier(cache: Path) -> None:
    whole, some = load("digits"), load("auto", classes=["3"], limit=60)
    assert whole.features.facts["classifier"] == some.features.facts["classifier"]
    assert len(list(cache.iterdir())) == 1
    assert (len(some.real), len(some.held_out)) == (30, 30)
    images = [some.real.pixels[:20]]
    assert torch.equal(whole.features.of(images), some.features.of(images))


def test_floor_of_real_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out digits overlap with the others, noise does not; in features of a trained classifier."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(classifier, "MIN_STEPS", 60)
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    found = load("digits")
    floor = found.floor()
    assert floor.images == (899, 898)
    assert min(floor.precision, floor.recall, floor.coverage) > 0.85
    assert floor.density == pytest.approx(1, abs=0.2)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (300, 1, 32, 32), dtype=torch.uint8, generator=rng)
    other = found([noise])
    assert max(other.precision, other.density) < 0.5
    assert max(other.recall, other.coverage) < 0.1
    assert other.frechet > 10 * floor.frechet
