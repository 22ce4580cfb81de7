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
@pytest.mark.parametrize(("n", "columns", "scale"), [(1, 8, 2), (7, 3, 1), (8, 8, 1), (3, 8, 5)])
def test_write_grid_matches_save_grid(
    n: int, columns: int, scale: int, channels: int, tmp_path: Path
) -> None:
    pixels = random_pixels(n, channels)
    generation.write_grid(pixels.split(2), tmp_path / "ours.png", columns, scale)
    generation.save_grid(pixels / 127.5 - 1, tmp_path / "theirs.png", columns, scale)
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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpegs(suffix: str, channels: int, tmp_path: Path) -> None:
    """Levels that vary slowly are kept within a few of 255, colours that differ from pixel to pixel too."""
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(16), indexing="ij")
    ramp = torch.stack([10 * rows, 15 * columns, 5 * (rows + columns)])[:channels].to(torch.uint8)
    pixels = torch.stack([ramp, 255 - ramp])
    assert generation.write_files([pixels], tmp_path, suffix=suffix) == 2
    generation.write_grid([pixels], tmp_path / f"grid{suffix}", columns=1)
    names = [f"000000{suffix}", f"000001{suffix}", f"grid{suffix}"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name, expected in zip(names, pixels, strict=False):
        with Image.open(tmp_path / name) as opened:
            assert (opened.format, opened.mode) == ("JPEG", "L" if channels == 1 else "RGB")
            difference = from_pil(opened, channels).int() - expected.int()
            assert difference.abs().max() <= 12
            assert difference.abs().float().mean() < 2
    with Image.open(tmp_path / names[2]) as opened:
        assert opened.size == (16 + 4, 2 * 24 + 6)
        components = opened.layer  # type: ignore[attr-defined]
    assert [(across, down) for _, across, down, _ in components] == [(1, 1)] * 3  # full chroma


@pytest.mark.parametrize("name", ["a.bmp", "a"])
def test_grids_and_files_with_another_suffix(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path must end in one of \.png, \.jpg, \.jpeg, got "):
        generation.write_grid([random_pixels(2, 1)], tmp_path / name)
    with pytest.raises(InputError, match=r"path must end in one of \.png, \.jpg, \.jpeg, got "):
        generation.write_files([random_pixels(2, 1)], tmp_path, suffix=Path(name).suffix)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "limit"), [("a.jpg", 65_500), ("a.gif", 65_535), ("a.webp", 16_383)])
def test_images_larger_than_their_format_allows(name: str, limit: int, tmp_path: Path) -> None:
    """The largest size is written; one more pixel is an error that says so, and no file."""
    write = generation.write_grid if name == "a.jpg" else generation.write_animation
    with pytest.raises(InputError, match=f"at most {limit:,} pixels .* would have 1 and {limit + 1:,};"):
        write([torch.zeros(1, 1, 1, limit + 1, dtype=torch.uint8)], tmp_path / name)
    assert not list(tmp_path.iterdir())
    write([torch.zeros(1, 1, 1, limit, dtype=torch.uint8)], tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        assert opened.size == (limit, 1)


def test_a_scale_beyond_memory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="enlarged 1000000000000 times do not fit into memory"):
        generation.write_grid([random_pixels(1, 1)], tmp_path / "a.png", scale=10**12)


def test_images_of_many_channels_can_only_be_written_as_an_array(tmp_path: Path) -> None:
    pixels = random_pixels(2, 5)
    generation.write_npy([pixels], tmp_path / "a.npy", 2)
    assert np.load(tmp_path / "a.npy").shape == (2, 6, 4, 5)
    for write, name in (
        (generation.write_grid, "grid.png"),
        (generation.write_files, ""),
        (generation.write_animation, "a.gif"),
        (generation.write_grid, "grid.jpg"),
    ):
        with pytest.raises(InputError, match="an image file needs 1 or 3 channels, but these images have 5"):
            write([pixels], tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
def test_animation(suffix: str, scale: int, tmp_path: Path) -> None:
    pixels = random_pixels(5, 1)
    path = tmp_path / f"animation{suffix}"
    generation.write_animation(pixels.split(2), path, 50, scale)
    with Image.open(path) as opened:
        assert opened.n_frames == 5  # type: ignore[attr-defined]
        assert opened.info["loop"] == 0
        for i, image in enumerate(pixels):
            opened.seek(i)
            opened.load()
            assert opened.info["duration"] == 50
            assert torch.equal(
                from_pil(opened, 1), image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            )


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
