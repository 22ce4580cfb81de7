"""``dcgan.data.load``: datasets without files, and arguments that are not allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from dcgan.data import DATASETS, digits, load
from dcgan.errors import InputError


@pytest.mark.parametrize("size", [32, 64])
def test_digits(size: int) -> None:
    images = load("digits", Path("nowhere"), image_size=size)
    levels = (digits(size).double() + 1) * 127.5
    assert images.pixels.shape == levels.shape
    assert (images.pixels.double() - levels).abs().max() <= 0.5 + 1e-4
    assert images.classes == tuple("0123456789")
    assert images.labels is not None
    assert images.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(load("digits", limit=7)) == 7


def test_fake() -> None:
    images = load("fake", Path("nowhere"), image_size=32)
    assert images.pixels.shape == (1024, 3, 32, 32)
    assert torch.equal(images.pixels, load("fake", image_size=32).pixels)
    test = load("fake", image_size=32, split="test")
    assert not torch.equal(images.pixels, test.pixels)
    assert abs(images.pixels.float().mean() - 127.5) < 0.5
    assert load("fake", image_size=64, limit=3, channels=1).pixels.shape == (3, 1, 64, 64)
    assert len(load("fake", image_size=32, limit=1100)) == 1100


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, f"dataset must be one of {', '.join(DATASETS)}, got 'imagenet'"),
        ({"image_size": 48}, "image_size must be one of 32, 64, 128, 256, got 48"),
        ({"image_size": 64.0}, "image_size must be one of 32, 64, 128, 256, got 64.0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"channels": True}, "channels must be 1 or 3, got True"),
        ({"workers": -1}, "workers must be an integer of at least 0, got -1"),
        ({"workers": 1.5}, "workers must be an integer of at least 0, got 1.5"),
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
        ({"limit": True}, "limit must be an integer of at least 1, got True"),
        ({"split": "val"}, "split must be one of train, test, got 'val'"),
        ({"split": "test"}, "split must be 'train' because digits has no test split, got 'test'"),
        ({"classes": []}, "classes must be a sequence of at least one name, got []"),
        ({"classes": "3,7"}, "classes must be a sequence of at least one name, got '3,7'"),
        ({"classes": ["3", "ten"]}, "classes must be among 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got 'ten'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        load(**{"name": "digits"} | arguments)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_a_relative_root_and_a_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    for root in (".", "../images", "~/images", "cat/.."):
        assert load("folder", Path(root), image_size=32).classes == ("cat", "dog")
    with pytest.raises(InputError, match="root '~nobody-here/images' does not exist"):
        load("folder", Path("~nobody-here/images"))


def test_an_unknown_class_of_a_folder(folder: Path) -> None:
    with pytest.raises(InputError, match="classes must be among cat, dog, got 'cow'"):
        load("folder", folder, classes=["cow"])


# --- the digits as floats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_digits_shape_and_range(size: int) -> None:
    images = digits(size)
    assert images.shape == (1797, 1, size, size)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1


def test_digits_match_scikit_learn() -> None:
    grey = torch.from_numpy(load_digits().images).float()
    assert torch.equal((digits(8)[:, 0] + 1) * 8, grey)
    # Upscaled, each block of pixels averages to its source pixel within one of the 16 grey levels.
    blocks = torch.nn.functional.avg_pool2d(digits(32), 4)[:, 0]
    assert ((blocks + 1) * 8 - grey).abs().mean() < 1


def test_digits_are_deterministic() -> None:
    assert torch.equal(digits(32), digits(32))


@pytest.mark.parametrize("size", [7, 0, -32, 32.0, "32", True, None])
def test_digits_reject_other_sizes(size: object) -> None:
    with pytest.raises(ValueError, match=f"image_size must be an integer of at least 8, got {size!r}"):
        digits(size)
