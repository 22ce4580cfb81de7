"""The parts of a dataset, the classifier and its cache, and the choice of features."""

from __future__ import annotations

import functools
import hashlib
import http.server
import pickle
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcgan import data, evaluation
from dcgan.errors import InputError
from dcgan.evaluation import classifier, features
from dcgan.files import cache_folder
from tests.support.parts import CPU, random_part, silent

pytestmark = pytest.mark.usefixtures("one_thread")


def fake_load(sizes: dict[str, int]) -> Callable[..., object]:
    class Images:
        def __init__(self, n: int, size: int, channels: int) -> None:
            self.pixels = torch.arange(n).view(-1, 1, 1, 1).expand(-1, channels, size, size).to(torch.uint8)
            self.labels, self.classes = torch.arange(n) % 2, ("a", "b")

        def __len__(self) -> int:
            return len(self.pixels)

    def load(
        name: str, root: Path, *, image_size: int, channels: int, split: str, limit: int | None, **_: object
    ) -> Images:
        return Images(min(sizes[split], limit or sizes[split]), image_size, channels)

    return load


def test_parts_are_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", fake_load({"train": 30, "test": 12}))
    train, test = evaluation.parts("mnist", Path("data"), image_size=32, channels=3, say=silent)
    assert (len(train), train.what, len(test), test.what) == (30, "train split", 12, "test split")
    assert next(train.batches(7)).shape == (7, 3, 32, 32)
    assert [len(batch) for batch in test.batches(7)] == [7, 5]
    limited = evaluation.parts("mnist", Path("data"), image_size=32, channels=3, limit=11, say=silent)
    assert list(map(len, limited)) == [11, 12]


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
    assert cache_folder("classifiers") == tmp_path / ".cache" / "dcgan-kernels" / "classifiers"


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


class Site:
    """Serves one file to torch.hub in place of the network, and counts the requests."""

    def __init__(self, folder: Path, content: bytes | None) -> None:
        self.requests: list[str] = []
        folder.mkdir()
        if content is not None:
            (folder / features.INCEPTION_WEIGHTS).write_bytes(content)

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.requests.append(handler.path)
                super().do_GET()

            def log_message(self, *_: object) -> None: ...

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def serve(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[bytes | None], Site]]:
    """Return a function that starts a site with this file of weights, or without any."""
    sites: list[Site] = []

    def start(content: bytes | None) -> Site:
        sites.append(Site(tmp_path / "site", content))
        threading.Thread(target=sites[-1].server.serve_forever, daemon=True).start()
        monkeypatch.setattr(features, "INCEPTION_SOURCE", sites[-1].url)
        return sites[-1]

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield start
    for site in sites:
        site.server.shutdown()
        site.server.server_close()


def test_inception_weights_are_downloaded_once_and_only_if_asked_for(
    serve: Callable[[bytes | None], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"stands for 91 MB"
    digest = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setattr(features, "INCEPTION_WEIGHTS", f"weights-{digest}.pth")
    site, part = serve(content), random_part()
    for name in ("auto", "pixels"):
        evaluation.choose(name, part, part, CPU, silent)
    assert site.requests == []
    path = features.inception_weights()
    assert not path.parent.exists()
    messages: list[str] = []
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError):  # the file is accepted, but is no network
            evaluation.choose("inception", part, part, CPU, messages.append)
        assert path.read_bytes() == content
    assert site.requests == [f"/{path.name}"]
    assert messages == [f"Downloading {site.url}{path.name} into {path.parent}"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("content", "why"), [(b"other", "invalid hash value"), (None, "404")])
def test_a_failed_download_leaves_no_file(
    content: bytes | None, why: str, serve: Callable[[bytes | None], Site]
) -> None:
    serve(content)
    part, path = random_part(), features.inception_weights()
    before = socket.getdefaulttimeout()
    with pytest.raises(InputError) as error:
        evaluation.choose("inception", part, part, CPU, silent)
    for words in (f"downloading {path.name} failed", f"into {path.parent}, ", why, "digits or pixels"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 240 + len(str(path.parent))
    assert list(path.parent.iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_inception_weights_without_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "INCEPTION_SOURCE", (cache.parent / "nowhere").as_uri() + "/")
    part, path = random_part(), features.inception_weights()
    with pytest.raises(InputError, match="No such file") as error:
        evaluation.choose("inception", part, part, CPU, silent)
    for words in (path.name, str(path.parent), "digits or pixels"):
        assert words in str(error.value)
    assert str(path).startswith(str(cache.parent.parent / "torch"))
    assert not path.exists()


def test_nothing_is_downloaded_without_torch_fidelity(
    serve: Callable[[bytes | None], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, part = serve(b""), random_part()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(
        InputError, match=r"'inception' needs torch-fidelity: run pip install 'dcgan-kernels\[inception\]'"
    ):
        evaluation.choose("inception", part, part, CPU, silent)
    assert site.requests == []


def test_inception_weights_that_cannot_be_read(cache: Path) -> None:
    features.inception_weights().mkdir(parents=True)
    part = random_part()
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); download it from https://"):
        evaluation.choose("inception", part, part, CPU, silent)


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
    with pytest.raises(
        InputError, match=r"'inception' needs torch-fidelity: run pip install 'dcgan-kernels\[inception\]'"
    ):
        evaluation.choose("inception", part, part, CPU, silent)
