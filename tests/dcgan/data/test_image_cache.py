"""The cache of decoded images: when it is used, rebuilt, or impossible."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcgan.data import Images, decoding, load
from tests.support.image_files import noise, save


def load_and_check(folder: Path, **arguments: object) -> tuple[Images, bool, list[str]]:
    """Load a folder; return the images, whether they were decoded rather than cached, and the messages."""
    messages: list[str] = []
    images = load("folder", folder, image_size=32, say=messages.append, **arguments)  # type: ignore[arg-type]
    return images, any("Decoding" in line for line in messages), messages


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "caches" / "images").iterdir())


def test_images_are_decoded_only_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, decoded, _ = load_and_check(folder)
    assert decoded
    before = [(path, path.read_bytes()) for path in cache_files(tmp_path)]
    assert len(before) == 1

    def never(path: str) -> Image.Image:
        raise AssertionError

    monkeypatch.setattr(decoding, "open_image", never)
    second, decoded, _ = load_and_check(folder)
    assert not decoded
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.labels, second.labels)  # type: ignore[arg-type]
    second.pixels.zero_()  # changes only this process's copy
    assert torch.equal(load_and_check(folder)[0].pixels, first.pixels)
    assert [(path, path.read_bytes()) for path in cache_files(tmp_path)] == before


def test_location_of_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_and_check(folder, cache=tmp_path / "elsewhere" / "deep")
    assert len(list((tmp_path / "elsewhere" / "deep").iterdir())) == 1
    assert not (tmp_path / "caches").exists()
    monkeypatch.delenv("DCGAN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_and_check(folder)
    assert len(list((tmp_path / "home" / ".cache" / "dcgan-kernels" / "images").iterdir())) == 1


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "renamed"])
def test_a_changed_folder_is_decoded_again(change: str, folder: Path, tmp_path: Path) -> None:
    load_and_check(folder)
    path = folder / "cat" / "3.png"
    if change == "content":
        save(path, noise(50, 50, 3, seed=9))
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "added":
        save(folder / "cat" / "4.png", noise(40, 40, 3))
    elif change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(folder / "cat" / "5.png")
    images, decoded, messages = load_and_check(folder)
    assert decoded
    assert any("are out of date; rebuilding them" in line for line in messages)
    fresh = load("folder", folder, image_size=32, cache=tmp_path / "fresh")
    assert torch.equal(images.pixels, fresh.pixels)
    assert len(cache_files(tmp_path)) == 1  # it replaces the old one
    assert not load_and_check(folder)[1]


@pytest.mark.parametrize(
    "other", [{"channels": 1}, {"limit": 2}, {"classes": ["cat"]}, {"image_size": 64}], ids=str
)
def test_other_requests_use_other_cache_files(other: dict[str, object], folder: Path, tmp_path: Path) -> None:
    load_and_check(folder)
    load("folder", folder, **{"image_size": 32} | other)  # type: ignore[arg-type]
    assert len(cache_files(tmp_path)) == 2
    assert not load_and_check(folder)[1]


@pytest.mark.parametrize(
    "damage", ["first", "middle", "text", "last", "short", "empty", "tiny", "longer", "foreign"]
)
def test_a_damaged_cache_is_rebuilt(damage: str, folder: Path, tmp_path: Path) -> None:
    expected, _, _ = load_and_check(folder)
    expected_pixels = expected.pixels.clone()
    (path,) = cache_files(tmp_path)
    data = bytearray(path.read_bytes())
    where = {"first": 0, "middle": 5000, "text": len(data) - 40, "last": len(data) - 1}.get(damage)
    if where is not None:
        data[where] ^= 1
    content = {"short": data[:-100], "empty": b"", "tiny": b"x", "longer": data + b"x" * 20}
    foreign = b"something else entirely, and long enough to end in a length"
    path.unlink()  # because `expected` maps its pages
    path.write_bytes(foreign if damage == "foreign" else content.get(damage, data))
    images, decoded, messages = load_and_check(folder)
    assert decoded
    assert any(f"{path} are damaged; rebuilding them" in line for line in messages)
    assert torch.equal(images.pixels, expected_pixels)
    assert not load_and_check(folder)[1]


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    expected, _, _ = load_and_check(folder)
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        images, _, messages = load_and_check(folder, cache=cache)
        assert torch.equal(images.pixels, expected.pixels)
        assert any(f"{cache} cannot be used as a cache" in line for line in messages)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    expected = load("folder", folder, image_size=32, cache=tmp_path / "other")
    monkeypatch.setattr(os, "fsync", full)
    images, _, messages = load_and_check(folder)
    assert torch.equal(images.pixels, expected.pixels)
    assert any("No space left on device" in line for line in messages)
    assert cache_files(tmp_path) == []
