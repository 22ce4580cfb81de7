"""Grids, PNG files, arrays and animations of generated images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dcgan import generation
from dcgan.errors import InputError, RunError


def random_pixels(n: int, channels: int) -> Tensor:
    return torch.randint(0, 256, (n, channels, 6, 4), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns"), [(1, 8), (7, 3), (8, 8), (3, 8)])
def test_write_grid_matches_save_grid(n: int, columns: int, channels: int, tmp_path: Path) -> None:
    pixels = random_pixels(n, channels)
    generation.write_grid(pixels.split(2), tmp_path / "ours.png", columns)
    generation.save_grid(pixels / 127.5 - 1, tmp_path / "theirs.png", columns)
    ours, theirs = (np.asarray(Image.open(tmp_path / name)) for name in ("ours.png", "theirs.png"))
    assert np.array_equal(ours, theirs)


def from_pil(image: Image.Image, channels: int) -> Tensor:
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_and_array(channels: int, tmp_path: Path) -> None:
    pixels = random_pixels(7, channels)
    assert generation.write_files(pixels.split(3), tmp_path) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:06d}.png" for i in range(7)]
    for i, image in enumerate(pixels):
        with Image.open(tmp_path / f"{i:06d}.png") as opened:
            assert opened.mode == ("L" if channels == 1 else "RGB")
            assert torch.equal(from_pil(opened, channels), image)

    generation.write_npy(pixels.split(3), tmp_path / "a.npy", 7)
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert array.dtype == np.uint8
    assert array.shape == (7, 6, 4, channels)
    assert np.array_equal(array, pixels.permute(0, 2, 3, 1).numpy())


def test_images_of_many_channels_can_only_be_written_as_an_array(tmp_path: Path) -> None:
    pixels = random_pixels(2, 5)
    generation.write_npy([pixels], tmp_path / "a.npy", 2)
    assert np.load(tmp_path / "a.npy").shape == (2, 6, 4, 5)
    for write, name in (
        (generation.write_grid, "grid.png"),
        (generation.write_files, ""),
        (generation.write_animation, "a.gif"),
    ):
        with pytest.raises(InputError, match="an image file needs 1 or 3 channels, but these images have 5"):
            write([pixels], tmp_path / name)  # type: ignore[operator]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
def test_animation(suffix: str, tmp_path: Path) -> None:
    pixels = random_pixels(5, 1)
    path = tmp_path / f"animation{suffix}"
    generation.write_animation(pixels.split(2), path, milliseconds=50)
    with Image.open(path) as opened:
        assert opened.n_frames == 5  # type: ignore[attr-defined]
        assert opened.info["loop"] == 0
        for i, image in enumerate(pixels):
            opened.seek(i)
            opened.load()
            assert opened.info["duration"] == 50
            assert torch.equal(from_pil(opened, 1), image)


def test_animation_with_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path must end in one of \.gif, \.webp, got .*a\.avi"):
        generation.write_animation([random_pixels(2, 1)], tmp_path / "a.avi")


WRITERS = {
    "grid.png": generation.write_grid,
    "a.npy": lambda pixels, path: generation.write_npy(pixels, path, 4),
    "a.gif": generation.write_animation,
}


@pytest.mark.parametrize(("name", "writer"), WRITERS.items(), ids=WRITERS)
def test_an_interrupt_leaves_the_old_file_unchanged(name: str, writer: Any, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Tensor]:
        yield random_pixels(2, 1)
        raise KeyboardInterrupt

    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        writer(interrupted(), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
    writer([random_pixels(4, 1)], tmp_path / name)
    assert (tmp_path / name).read_bytes() != b"old"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RunError, match=r"cannot write .*No such file"):
        writer([random_pixels(4, 1)], tmp_path / "missing" / name)


def test_an_interrupt_leaves_only_complete_files(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Tensor]:
        yield random_pixels(2, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generation.write_files(interrupted(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.png", "000001.png"]


@pytest.mark.parametrize("n", [3, 5])
def test_an_array_of_the_wrong_length_is_discarded(n: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"n must equal the number of images, 4, got {n}"):
        generation.write_npy([random_pixels(4, 1)], tmp_path / "a.npy", n)
    assert not list(tmp_path.iterdir())
