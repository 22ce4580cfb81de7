"""Folders of images: files, classes, channels, and images that cannot be read."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcgan.data import Images, load
from dcgan.errors import InputError
from tests.support.image_files import ORDER, chunk, noise, pixels_of_file, save


def test_a_folder_of_classes(folder: Path) -> None:
    images = load("folder", folder, image_size=32)
    assert isinstance(images, Images)
    assert images.name == "folder"
    assert (len(images), images.channels, images.image_size) == (5, 3, 32)
    assert images.classes == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.skipped == ()
    assert images.pixels.is_contiguous()
    assert torch.equal(images.pixels, torch.stack([pixels_of_file(folder / name) for name in ORDER]))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_does_not_matter(workers: int, folder: Path, tmp_path: Path) -> None:
    images = load("folder", folder, image_size=32, workers=workers, cache=tmp_path / str(workers))
    assert torch.equal(images.pixels, torch.stack([pixels_of_file(folder / name) for name in ORDER]))


def test_more_images_than_one_decode_block(tmp_path: Path) -> None:
    for i in range(300):
        save(tmp_path / "images" / f"{i:03}.png", np.full((32, 32), i % 256, np.uint8))
    for cache in (tmp_path / "cache", Path(__file__) / "none"):
        images = load("folder", tmp_path / "images", image_size=32, cache=cache)
        assert images.pixels[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]


def test_a_selection_of_classes(folder: Path) -> None:
    save(folder / "eel" / "x.png", noise(40, 40, 3))
    images = load("folder", folder, image_size=32, classes=["eel", "cat"])
    assert images.classes == ("cat", "eel")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1]
    assert len(images.pixels) == 4


def test_a_flat_folder_has_no_classes(folder: Path) -> None:
    images = load("folder", folder / "dog", image_size=32)
    assert images.classes == ()
    assert images.labels is None
    assert len(images) == 2
    with pytest.raises(InputError, match="classes must not be given: folder has no classes here, got cat"):
        load("folder", folder / "dog", image_size=32, classes=["cat"])


def test_images_next_to_class_folders(folder: Path) -> None:
    save(folder / "a.png", noise(40, 40, 3))
    images = load("folder", folder, image_size=32)
    assert images.classes == (".", "cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1, 1, 2, 2]


def test_files_without_an_image_suffix_and_hidden_files_are_ignored(folder: Path) -> None:
    (folder / "readme.txt").write_text("no image")
    (folder / "empty").mkdir()
    save(folder / ".hidden" / "x.png", noise(40, 40))
    (folder / "cat" / "._3.png").write_bytes(b"macOS metadata")
    images = load("folder", folder, image_size=32)
    assert (len(images), images.classes, images.skipped) == (5, ("cat", "dog"), ())


def test_symlinks(folder: Path) -> None:
    (folder / "cow").symlink_to(folder / "dog")
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "dog" / "gone.png").symlink_to(folder / "nowhere.png")
    images = load("folder", folder, image_size=32)
    assert images.classes == ("cat", "cow", "dog")
    assert len(images) == 3 + 2 + 2
    assert images.skipped == ("cow/gone.png", "dog/gone.png")


def test_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", noise(40, 40))
    path = os.fsencode(tmp_path / "images") + b"/\xff.png"
    Path(os.fsdecode(path)).write_bytes(b"no image")
    images = load("folder", tmp_path / "images", image_size=32)
    assert images.skipped == ("\\xff.png",)


def test_limit_selects_from_all_classes(folder: Path) -> None:
    images = load("folder", folder, image_size=32, limit=2)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0]
    assert load("folder", folder, image_size=32, limit=3).labels.tolist() == [0, 0, 1]  # type: ignore[union-attr]
    assert len(load("folder", folder, image_size=32, limit=100)) == 5


@pytest.mark.parametrize(
    ("greys", "colours", "channels"), [(3, 0, 1), (2, 1, 3), (0, 2, 3)], ids=["grey", "mixed", "colour"]
)
def test_channels_of_a_folder(greys: int, colours: int, channels: int, tmp_path: Path) -> None:
    for i in range(greys):
        save(tmp_path / f"grey-{i}.png", noise(40, 40))
    for i in range(colours):
        save(tmp_path / f"colour-{i}.png", noise(40, 40, 3))
    (tmp_path / "damaged.png").write_bytes(b"")
    messages: list[str] = []
    assert load("folder", tmp_path, image_size=32, say=messages.append).channels == channels
    total = greys + colours
    assert any(
        f"Using {channels} channel" in line and f"the {total} images inspected" in line for line in messages
    )


def damage(path: Path, kind: str) -> None:
    if kind == "truncated":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("no image at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "floats":
        Image.fromarray(np.ones((40, 40), np.float32)).save(path, format="TIFF")
    elif kind == "negative integers":
        Image.fromarray(np.full((40, 40), -1, np.int32)).save(path, format="TIFF")
    elif kind == "bomb":
        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        )
    elif kind == "strip":
        Image.new("RGB", (3, 1000)).save(path)


KINDS = {
    "truncated": r"truncated|Truncated",
    "text": "not an image",
    "empty": "not an image",
    "floats": "floating-point",
    "negative integers": "integers from -1 to -1",
    "bomb": "decompression bomb",
    "strip": "3×1000 pixels, an aspect ratio of more than 256:1",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreadable_image_is_skipped_and_named(kind: str, folder: Path) -> None:
    damage(folder / "cat" / "3.png", kind)
    good = [name for name in ORDER if name != "cat/3.png"]
    for _ in range(2):  # decoded, then from the cache
        messages: list[str] = []
        images = load("folder", folder, image_size=32, say=messages.append)
        assert images.skipped == ("cat/3.png",)
        assert images.labels is not None
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert torch.equal(images.pixels, torch.stack([pixels_of_file(folder / name) for name in good]))
        line = next(line for line in messages if "Skipped" in line)
        assert "Skipped 1 of 5 images" in line
        assert "cat/3.png (" in line
        assert re.search(KINDS[kind], line)
        assert str(folder) not in line


def test_many_unreadable_images_are_counted(folder: Path) -> None:
    for i in range(8):
        (folder / f"dog/{i}.jpg").write_bytes(b"x")
    messages: list[str] = []
    images = load("folder", folder, image_size=32, say=messages.append)
    assert len(images.skipped) == 8
    assert len(images) == 5
    assert "Skipped 8 of 13 images" in messages[-1]
    assert "and 3 more" in messages[-1]


def test_a_folder_without_readable_images_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(
        InputError, match=r"none of the 2 images in '.*' can be read: a\.jpg \(not an image\)"
    ):
        load("folder", tmp_path)


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_a_root_that_is_not_a_folder_of_images(what: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    if what == "file":
        root.write_text("")
    elif what == "empty":
        root.mkdir()
    expected = "which contains no .jpg, .jpeg, .png" if what == "empty" else "which is not a folder"
    with pytest.raises(InputError) as error:
        load("folder", root)
    if what == "missing":
        assert str(error.value) == f"root {str(root)!r} does not exist"
        assert not root.exists()
    else:
        assert f"root must be a folder of images, got {str(root)!r}, {expected}" in str(error.value)
