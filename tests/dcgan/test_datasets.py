"""Datasets: pixels match torchvision on PIL images for every mode and layout; errors name the cause."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from dcgan.data import DATASETS, Images, decoding, digits, load, normalise
from dcgan.data import cache as image_cache
from dcgan.data.order import permutation
from dcgan.errors import InputError

SIZES = [(64, 64), (32, 32), (37, 53), (200, 31), (65, 64), (64, 65), (1, 90), (300, 299)]
"""Width and height."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "caches"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize and crop [H, W] or [H, W, 3] with torchvision on a PIL image; int [C, size, size]."""
    pipeline = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    return np.asarray(pipeline(Image.fromarray(pixels)), int).reshape(size, size, -1).transpose(2, 0, 1)


def luma(rgb: np.ndarray) -> np.ndarray:
    return (rgb @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)


# --- pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_match_torchvision(width: int, height: int, size: int, channels: int) -> None:
    pixels = noise(height, width, 3) if channels == 3 else noise(height, width)
    got = decoding.to_pixels(Image.fromarray(pixels), channels, size)
    assert got.shape == (channels, size, size)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.array_equal(got, resized(pixels, size))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32, 64, 100])
@pytest.mark.parametrize("source_channels", [1, 3])
def test_resize_batch_matches_to_pixels(source_channels: int, size: int, channels: int) -> None:
    pixels = noise(5, source_channels, 28, 28)
    got = decoding.resize_batch(torch.from_numpy(pixels), channels, size)
    assert got.shape == (5, channels, size, size)
    for image, one in zip(got, pixels, strict=True):
        pil_image = Image.fromarray(np.squeeze(one.transpose(1, 2, 0)))
        expected = decoding.to_pixels(pil_image, channels, size).astype(int)
        assert np.abs(image.numpy() - expected).max() <= 1  # without AVX2, PyTorch may round once more


def test_the_transform_of_the_reference_recipe(tmp_path: Path) -> None:
    pixels = noise(37, 37)
    save(tmp_path / "a.png", pixels)
    reference = transforms.Compose(
        [transforms.Resize(64), transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    )
    got = normalise(load("folder", tmp_path).pixels[0])
    assert (got - reference(Image.fromarray(pixels))).abs().max() <= 2**-22


def modes() -> dict[str, tuple[str, Callable[[Path], None], np.ndarray]]:
    """Return, by name, a file extension, a writer and the expected colours, [H, W] or [H, W, 3]."""
    grey, rgb, alpha = noise(40, 33), noise(40, 33, 3, seed=1), noise(40, 33, seed=2)
    index, colours = noise(40, 33, seed=3) % 16, noise(16, 3, seed=4)
    deep = np.random.default_rng(5).integers(0, 65536, (40, 33), np.uint16)
    scaled = np.floor(deep * (255 / 65535) + 0.5).astype(np.uint8)
    bits = grey > 127
    cmyk = noise(40, 33, 4, seed=6)
    ink = cmyk / 255
    from_cmyk = np.rint(255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])).astype(np.uint8)

    def palette(path: Path, **extra: object) -> None:
        image = Image.fromarray(index)
        image.putpalette(colours.tobytes())
        image.save(path, **extra)

    def write(image: Image.Image) -> Callable[[Path], None]:
        return lambda path: image.save(path)

    return {
        "L": (".png", write(Image.fromarray(grey)), grey),
        "RGB": (".png", write(Image.fromarray(rgb)), rgb),
        "RGB BMP": (".BMP", write(Image.fromarray(rgb)), rgb),
        "RGB WebP": (".webp", lambda path: Image.fromarray(rgb).save(path, lossless=True), rgb),
        "RGBA": (".png", write(Image.fromarray(np.dstack([rgb, alpha]))), rgb),
        "RGB with a transparent colour": (
            ".png",
            lambda path: Image.fromarray(rgb).save(path, transparency=tuple(rgb[0, 0].tolist())),
            rgb,
        ),
        "LA": (".png", write(Image.fromarray(np.dstack([grey, alpha]))), grey),
        "1": (".png", write(Image.fromarray(bits)), bits.astype(np.uint8) * 255),
        "P": (".png", palette, colours[index]),
        "P with a transparent colour": (".png", lambda path: palette(path, transparency=3), colours[index]),
        "P with an alpha": (
            ".png",
            lambda path: palette(path, transparency=bytes(range(0, 256, 16))),
            colours[index],
        ),
        "I;16 PNG": (".png", write(Image.fromarray(deep)), scaled),
        "I;16 TIFF": (".tif", write(Image.fromarray(deep)), scaled),
        "I;16B TIFF": (
            ".tiff",
            write(Image.frombytes("I;16B", (33, 40), deep.astype(">u2").tobytes())),
            scaled,
        ),
        "I, as 16-bit PGM": (
            ".pgm",
            lambda path: path.write_bytes(b"P5 33 40 65535\n" + deep.astype(">u2").tobytes()),
            scaled,
        ),
        "CMYK": (
            ".tif",
            write(Image.frombytes("CMYK", (33, 40), cmyk.tobytes())),
            from_cmyk,
        ),
    }


@pytest.mark.filterwarnings("error:Palette images:UserWarning")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", modes())
def test_every_mode(mode: str, channels: int, tmp_path: Path) -> None:
    extension, write, colours = modes()[mode]
    write(tmp_path / f"a{extension}")
    messages: list[str] = []
    images = load("folder", tmp_path, image_size=32, channels=channels, say=messages.append)
    assert not images.skipped
    if channels == 3 and colours.ndim == 2:
        colours = np.repeat(colours[:, :, None], 3, axis=2)
    if channels == 1 and colours.ndim == 3:
        colours = luma(colours)
    assert np.abs(images.pixels[0].numpy() - resized(colours, 32)).max() <= 1


def test_grey_and_colour_agree_about_white_and_black(tmp_path: Path) -> None:
    Image.new("I;16", (40, 40), 65535).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "b.png")
    Image.new("I;16", (40, 40), 0).save(tmp_path / "c.png")
    images = load("folder", tmp_path, image_size=32, channels=1)
    assert [x.unique().tolist() for x in images.pixels] == [[255], [255], [0]]


def png(path: Path, levels: np.ndarray) -> None:
    """Write a 16-bit PNG of [H, W] or [H, W, 3 or 4]; Pillow writes only grey ones."""
    height, width = levels.shape[:2]
    kind = {2: 0, 3: {3: 2, 4: 6}.get(levels.shape[-1])}[levels.ndim]
    rows = levels.astype(">u2").reshape(height, -1).view(np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def tiff(path: Path, levels: np.ndarray) -> None:
    """Write a TIFF of any integer dtype; Pillow writes only a few."""
    tiff_of(path, levels, levels.astype(levels.dtype.newbyteorder("<")).tobytes(), 8 * levels.itemsize)


def tiff_of(path: Path, levels: np.ndarray, data: bytes, bits: int) -> None:
    """Write an uncompressed TIFF: the data, then the tags (number, type, count and value)."""
    signed = levels.dtype.kind == "i"
    height, width = levels.shape
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, height), (279, 4, 1, len(data))]
    tags += [(339, 3, 1, 2 if signed else 1)]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + b"\0\0\0\0")


def load_grey(folder: Path, **arguments: object) -> tuple[Images, list[str]]:
    """Load a folder as 32×32 grey images; return them and the messages."""
    messages: list[str] = []
    return load("folder", folder, image_size=32, channels=1, say=messages.append, **arguments), messages


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@pytest.mark.parametrize(
    ("top", "white"),
    [
        (200, 255),
        (255, 255),
        (256, 511),
        (4095, 4095),
        (40000, 65535),
        (65536, 131071),
        (2**31 - 1, 2**31 - 1),
    ],
)
def test_32_bit_integers_share_one_white_level(top: int, white: int, dtype: type, tmp_path: Path) -> None:
    """It is the smallest 2^n - 1 not below the largest level of all images, so darker images stay darker."""
    levels = np.random.default_rng(0).integers(0, top, (3, 32, 32), endpoint=True)
    levels[0, 0, 0] = top
    levels[1] //= 4
    for i, one in enumerate(levels):
        tiff(tmp_path / f"{i}.tif", one.astype(dtype))
    save(tmp_path / "3.png", noise(32, 32))
    for workers in (0, 2):
        images, messages = load_grey(tmp_path, workers=workers, cache=tmp_path / f"cache-{workers}")
        assert not images.skipped
        expected = np.floor(levels * 255.0 / white + 0.5)
        assert np.abs(images.pixels[:3, 0].numpy() - expected).max() <= 1
        assert images.pixels[0].max() >= 127
        assert torch.equal(images.pixels[3, 0], torch.from_numpy(noise(32, 32)))
        line = next(line for line in messages if "3 images have 32-bit or signed integers" in line)
        assert f"up to {top} in 0.tif; the white level of all of them is assumed to be {white}" in line


def test_images_of_unknown_black_level_are_skipped_and_named(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", np.array([[-5, 7], [1, 2]], np.int32))
    tiff(tmp_path / "b.tif", np.array([[0, 3_000_000_000], [1, 2]], np.uint32))  # Pillow's own are signed
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "c.tif")
    tiff(tmp_path / "d.tif", np.array([[0, 255], [1, 2]], np.int32))
    images, messages = load_grey(tmp_path)
    assert images.skipped == ("a.tif", "b.tif", "c.tif")
    line = next(line for line in messages if "Skipped 3" in line)
    assert "a.tif (integers from -5 to 7; negative levels are not supported)" in line
    assert (
        "c.tif (floating-point pixels, whose range is not known; save them as 8 or 16-bit integers)" in line
    )
    assert any("up to 255 in d.tif" in line for line in messages)


def test_convert_derives_the_white_level_from_a_single_32_bit_image() -> None:
    for top, white in ((3, 255), (300, 511)):
        levels = np.array([[0, top]], np.int32)
        got = np.asarray(decoding.convert(Image.fromarray(levels), 1))
        assert got.tolist() == [[0, round(top * 255 / white)]]
        got = np.asarray(decoding.convert(Image.fromarray(levels), 1, 1023))
        assert got.tolist() == [[0, round(top * 255 / 1023)]]
    with pytest.raises(ValueError, match="integers up to 300, above the white level 299"):
        decoding.convert(Image.fromarray(levels), 1, 299)


DEEP: dict[str, tuple[str, Callable[[Path, np.ndarray], None]]] = {
    "grey PNG": (".png", png),
    "grey PNG of Pillow": (".png", lambda path, levels: Image.fromarray(levels.astype(np.uint16)).save(path)),
    "colour PNG": (".png", lambda path, levels: png(path, np.stack(3 * [levels], 2))),
    "PNG with alpha": (".png", lambda path, levels: png(path, np.stack([*3 * [levels], levels | 65535], 2))),
    "grey TIFF": (".tif", lambda path, levels: tiff(path, levels.astype(np.uint16))),
}


@pytest.mark.parametrize(
    ("top", "dark"), [(0, False), (255, True), (1023, True), (4095, True), (4096, False), (65535, False)]
)
@pytest.mark.parametrize("kind", DEEP)
def test_12_bit_levels_in_16_bit_files_are_reported(kind: str, top: int, dark: bool, tmp_path: Path) -> None:
    """They are reported both when decoded and when read from the cache, and are scaled as 16-bit levels."""
    suffix, write = DEEP[kind]
    levels = np.linspace(0, top, 32 * 32).round().astype(np.int64).reshape(32, 32)
    if kind in ("colour PNG", "PNG with alpha"):  # Pillow keeps only their upper 8 bits
        top, dark = top | 255, dark or top == 0
    write(tmp_path / f"a{suffix}", levels)
    save(tmp_path / "b.png", noise(32, 32))
    for _ in range(2):
        images, messages = load_grey(tmp_path)
        assert not images.skipped
        assert np.abs(images.pixels[0, 0].numpy() - levels * 255 / 65535).max() <= 1
        lines = [line for line in messages if "look dark" in line]
        assert len(lines) == dark
        if dark:
            assert f"a{suffix} (up to {top})" in lines[0]
            assert "1 16-bit images have no level above 4095" in lines[0]
            assert "assumed to be 65535; if it is 4095, multiply their levels by 16" in lines[0]


def test_many_dark_images_are_counted(tmp_path: Path) -> None:
    for i in range(7):
        png(tmp_path / f"{i}.png", np.full((32, 32), 100 + i))
    _, messages = load_grey(tmp_path)
    line = next(line for line in messages if "look dark" in line)
    assert line.startswith("7 16-bit images")
    assert "0.png (up to 100); 1.png" in line
    assert line.endswith("4.png (up to 104); and 2 more.")


def test_dark_images_are_a_warning_without_say(tmp_path: Path) -> None:
    png(tmp_path / "a.png", np.full((32, 32), 4095))
    with pytest.warns(UserWarning, match=r"look dark.*a\.png"):
        load("folder", tmp_path, image_size=32)


def test_tiff_that_declares_12_bits(tmp_path: Path) -> None:
    levels = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 4
    bits = np.unpackbits(levels.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    tiff_of(tmp_path / "a.tif", levels, np.packbits(bits).tobytes(), 12)
    images, messages = load_grey(tmp_path)
    assert np.abs(images.pixels[0, 0].numpy() - levels * 255.0 / 4095).max() <= 1
    assert not any("dark" in line for line in messages)


def test_tiff_of_signed_16_bits_is_treated_as_32_bits(tmp_path: Path) -> None:
    levels = np.arange(1024, dtype=np.int16).reshape(32, 32) * 4
    tiff(tmp_path / "a.tif", levels)
    images, messages = load_grey(tmp_path)
    assert np.abs(images.pixels[0, 0].numpy() - levels * 255.0 / 4095).max() <= 1
    line = next(line for line in messages if "up to 4092 in a.tif" in line)
    assert "the white level of all of them is assumed to be 4095" in line


def test_pgm_of_12_bits_is_scaled_by_its_declared_maximum(tmp_path: Path) -> None:
    levels = np.arange(1024).reshape(32, 32) * 4
    (tmp_path / "a.pgm").write_bytes(b"P5 32 32 4095\n" + levels.astype(">u2").tobytes())
    images, messages = load_grey(tmp_path)
    assert np.abs(images.pixels[0, 0].numpy() - levels * 255 / 4095).max() <= 1
    assert not any("dark" in line for line in messages)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    pixels = noise(48, 48)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # The stored image, which a viewer displays as `pixels`.
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels, -1),
    }[orientation]
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load("folder", tmp_path, image_size=32).pixels[0].numpy(), resized(pixels, 32))


# --- normalise ----------------------------------------------------------------------------------------------


def test_normalise_matches_totensor_and_normalize() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    got = normalise(levels)
    assert got.dtype == torch.float32
    assert (got - reference(Image.fromarray(levels[0].numpy()))).abs().max() <= 2**-22
    assert got.min() == -1
    assert got.max() == 1
    exact = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 2**-23), (torch.bfloat16, 2**-8)):
        got = normalise(levels, dtype)
        assert got.dtype == dtype
        assert (got.double().flatten() - exact).abs().max() <= tolerance
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8).view(1, 16, 16))


def test_normalise_rejects_other_dtypes() -> None:
    with pytest.raises(InputError, match=r"pixels must be uint8, got torch\.float32"):
        normalise(torch.zeros(1))
    with pytest.raises(InputError, match=r"dtype must be a floating-point type, got torch\.int32"):
        normalise(torch.zeros(1, dtype=torch.uint8), torch.int32)


# --- folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two classes of three and two images, at different depths."""
    root = tmp_path / "images"
    for i, name in enumerate(["cat/3.png", "cat/10.JPG", "cat/deep/er/1.png", "dog/a.webp", "dog/b.ppm"]):
        save(root / name, noise(40, 40, 3, seed=i))
    return root


ORDER = ["cat/10.JPG", "cat/3.png", "cat/deep/er/1.png", "dog/a.webp", "dog/b.ppm"]


def pixels_of_file(path: Path, channels: int = 3, size: int = 32) -> torch.Tensor:
    mode = "RGB" if channels == 3 else "L"
    return torch.from_numpy(resized(np.asarray(Image.open(path).convert(mode)), size).astype(np.uint8))


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
    with pytest.raises(InputError, match="classes must be None because folder has no classes here, got cat"):
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


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


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
    assert f"root must be a folder of images, got {str(root)!r}, {expected}" in str(error.value)


# --- the cache ----------------------------------------------------------------------------------------------


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
    assert image_cache.default_folder() == tmp_path / "home" / ".cache" / "dcgan-kernels" / "images"


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


# --- MNIST and Fashion-MNIST --------------------------------------------------------------------------------

RAW = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}


def write_idx(root: Path, name: str, packed: bool, train: int = 12, test: int = 5) -> dict[str, np.ndarray]:
    """Write tiny files of both splits; return the pixels by split."""
    folder = root / RAW[name]
    folder.mkdir(parents=True)
    made = {}
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        made[split] = noise(count, 28, 28, seed=count)
        contents = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">4BIII", 0, 0, 8, 3, count, 28, 28)
            + made[split].tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, count)
            + bytes(i % 10 for i in range(count)),
        }
        for file, data in contents.items():
            if packed:
                (folder / f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / file).write_bytes(data)
    return made


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "gzipped"])
@pytest.mark.parametrize("name", RAW)
def test_idx_files(name: str, packed: bool, tmp_path: Path) -> None:
    made = write_idx(tmp_path, name, packed)
    before = sorted(tmp_path.rglob("*"))
    for split, pixels in made.items():
        images = load(name, tmp_path, split=split, download=False)  # type: ignore[arg-type]
        assert images.pixels.shape == (len(pixels), 1, 64, 64)
        assert images.pixels.is_contiguous()
        assert images.labels is not None
        assert images.labels.tolist() == [i % 10 for i in range(len(pixels))]
        for got, source in zip(images.pixels, pixels, strict=True):
            assert np.abs(got.numpy() - resized(source, 64)).max() <= 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written into root


def test_idx_files_match_torchvision(tmp_path: Path) -> None:
    write_idx(tmp_path, "mnist", packed=False)
    theirs = torchvision.datasets.MNIST(str(tmp_path), transform=transforms.Resize(32))
    ours = load("mnist", tmp_path, image_size=32)
    assert len(theirs) == len(ours)
    for (image, label), pixels, own in zip(theirs, ours.pixels, ours.labels, strict=True):  # type: ignore[arg-type]
        assert np.abs(np.asarray(image, int) - pixels[0].numpy()).max() <= 1
        assert label == own


def test_an_uncompressed_file_takes_precedence_over_a_gzipped_one(tmp_path: Path) -> None:
    write_idx(tmp_path, "mnist", packed=False)
    for path in (tmp_path / RAW["mnist"]).iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(b"damaged")
    assert len(load("mnist", tmp_path, image_size=32)) == 12


def test_classes_limit_and_channels_of_mnist(tmp_path: Path) -> None:
    write_idx(tmp_path, "mnist", packed=True)
    whole = load("mnist", tmp_path, image_size=32)
    assert whole.classes == tuple("0123456789")
    assert whole.labels is not None
    some = load("mnist", tmp_path, image_size=32, classes=["7", "1"], channels=3)
    assert some.classes == ("1", "7")
    assert some.labels is not None
    assert some.labels.tolist() == [0, 1, 0]
    assert some.channels == 3
    for channel in range(3):
        assert torch.equal(some.pixels[:, channel], whole.pixels[[1, 7, 11], 0])
    few = load("mnist", tmp_path, image_size=32, limit=4)
    assert torch.equal(few.pixels, whole.pixels[:4])
    assert few.labels is not None
    assert few.labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"classes 9: mnist has no images of these classes"):
        load("mnist", tmp_path, image_size=32, split="test", classes=["9"])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte.gz", b"no gzip"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"no IDX")),
        ("train-images-idx3-ubyte.gz", gzip.compress(struct.pack(">4BIII", 0, 0, 8, 3, 12, 28, 28))),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"x" * 5000)[:20]),
        ("train-labels-idx1-ubyte.gz", gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 1) + b"\0")),
        ("train-labels-idx1-ubyte.gz", gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 12) + b"\xff" * 12)),
        ("train-labels-idx1-ubyte", b""),
    ],
)
def test_damaged_idx_files(file: str, content: bytes, tmp_path: Path) -> None:
    write_idx(tmp_path, "mnist", packed=True)
    (tmp_path / RAW["mnist"] / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        load("mnist", tmp_path, download=False)
    assert str(tmp_path / RAW["mnist"] / "train-") in str(error.value)
    assert "damaged" in str(error.value) or "cannot be read" in str(error.value)


# --- downloads ----------------------------------------------------------------------------------------------

EXPECTED_FOLDER = {**RAW, "cifar10": "cifar-10-batches-py", "celeba": "celeba/img_align_celeba"}


@pytest.mark.parametrize("name", EXPECTED_FOLDER)
def test_the_error_without_network_access_gives_alternatives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", refuse)
    monkeypatch.setattr(torchvision.datasets.CelebA, "download", refuse)
    messages: list[str] = []
    with pytest.raises(InputError) as error:
        load(name, tmp_path / "data", say=messages.append)
    for words in (
        str(tmp_path / "data" / EXPECTED_FOLDER[name]),
        "Name or service not known",
        "'digits'",
        "'fake'",
    ):
        assert words in str(error.value)
    assert f"Downloading {name} into {tmp_path / 'data'}" in messages[0]


@pytest.mark.parametrize("name", EXPECTED_FOLDER)
def test_download_disabled(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(name, tmp_path / "data", download=False)
    for words in (str(tmp_path / "data" / EXPECTED_FOLDER[name]), "'digits'", "'folder'"):
        assert words in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_root_that_is_not_writable(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"failed: .*(Not a directory|File exists)") as error:
        load(name, tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


def test_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready"
    made = write_idx(ready, "mnist", packed=False)

    def fetch(self: torchvision.datasets.MNIST) -> None:
        shutil.copytree(ready, self.root, dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    images = load("mnist", tmp_path / "data", image_size=32)
    assert np.abs(images.pixels[3].numpy() - resized(made["train"][3], 32)).max() <= 1


# --- CIFAR-10, CelebA ---------------------------------------------------------------------------------------


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = {"data_batch_1": noise(4, 3, 32, 32), "test_batch": noise(2, 3, 32, 32, seed=1)}
    sums = {}
    for file in (*pixels, "batches.meta"):
        content: dict[str, object] = {"label_names": ["airplane", "bird"]}
        if file in pixels:
            count = len(pixels[file])
            content = {"data": pixels[file].reshape(count, -1), "labels": [i % 2 for i in range(count)]}
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        sums[file] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    for split, file in (("train", "data_batch_1"), ("test", "test_batch")):
        images = load("cifar10", tmp_path, image_size=32, split=split, download=False)  # type: ignore[arg-type]
        assert np.array_equal(images.pixels.numpy(), pixels[file])
        assert images.classes == ("airplane", "bird")
        assert images.labels is not None
        assert images.labels.tolist() == [i % 2 for i in range(len(pixels[file]))]
    grey = load("cifar10", tmp_path, image_size=32, channels=1)
    expected = luma(pixels["data_batch_1"].transpose(0, 2, 3, 1)).astype(int)
    assert np.abs(grey.pixels[:, 0].numpy() - expected).max() <= 1

    (folder / "data_batch_1").write_bytes(b"something else, whose MD5 is not the published one")
    with pytest.raises(InputError, match="damaged"):
        load("cifar10", tmp_path, image_size=32, download=False)


def test_celeba(tmp_path: Path) -> None:
    parts = [0, 0, 1, 2, 0]
    for i in range(5):
        save(tmp_path / "celeba" / "img_align_celeba" / f"{i:06}.jpg", noise(218, 178, 3, seed=i))
    partition = tmp_path / "celeba" / "list_eval_partition.txt"
    partition.write_text("".join(f"{i:06}.jpg {part}\n" for i, part in enumerate(parts)))
    for split, numbers in (("train", [0, 1, 4]), ("test", [3])):
        images = load("celeba", tmp_path, image_size=32, split=split)  # type: ignore[arg-type]
        assert images.pixels.shape == (len(numbers), 3, 32, 32)
        assert images.labels is None
        for got, i in zip(images.pixels, numbers, strict=True):
            file = tmp_path / "celeba" / "img_align_celeba" / f"{i:06}.jpg"
            assert torch.equal(got, pixels_of_file(file))
    with pytest.raises(InputError, match="classes must be None because celeba has no classes here"):
        load("celeba", tmp_path, classes=["Smiling"])
    partition.write_text("000000.jpg 1\n")
    with pytest.raises(InputError, match="lists no image of the split 'train'"):
        load("celeba", tmp_path, download=False)
    partition.write_text("000000.jpg\n")
    with pytest.raises(InputError, match=r"list_eval_partition\.txt is damaged"):
        load("celeba", tmp_path, download=False)
    partition.unlink()
    with pytest.raises(InputError, match=r"list_eval_partition\.txt, .*, cannot be read"):
        load("celeba", tmp_path, download=False)


# --- digits, fake -------------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match="got '~nobody-here/images', which is not a folder"):
        load("folder", Path("~nobody-here/images"))


def test_an_unknown_class_of_a_folder(folder: Path) -> None:
    with pytest.raises(InputError, match="classes must be among cat, dog, got 'cow'"):
        load("folder", folder, classes=["cow"])


# --- order --------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 300), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
def test_an_epoch_contains_every_image_once(n: int, seed: int, epoch: int) -> None:
    state = torch.get_rng_state()
    order = permutation(n, seed, epoch)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(n, seed, epoch))
    assert torch.equal(torch.get_rng_state(), state)


def test_epochs_and_seeds_are_independent() -> None:
    n = 1000
    pairs = [(seed, epoch) for seed in (0, 1, 2, 3, 2**32, 2**32 + 1) for epoch in (0, 1, 2, 2**32)]
    orders = torch.stack([permutation(n, *pair) for pair in pairs])
    for i in range(len(pairs)):
        # Independent orders agree in one place on average (Poisson); 12 or more has probability 1e-9.
        agree = (orders == orders[i]).sum(1)
        agree[i] = 0
        assert agree.max() < 12, pairs[i]


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (4, -1, 0), (4, 0, -1), (4.0, 0, 0), (4, True, 0)])
def test_permutation_rejects_bad_arguments(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="must be an integer of at least 0, got"):
        permutation(*arguments)
