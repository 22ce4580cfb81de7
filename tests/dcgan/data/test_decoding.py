"""Decoded pixels match torchvision on PIL images for every mode and bit depth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dcgan.data import Images, decoding, load, normalise
from dcgan.errors import InputError
from tests.support.image_files import luma, noise, png, resized, save, tiff, tiff_of

SIZES = [(64, 64), (32, 32), (37, 53), (200, 31), (65, 64), (64, 65), (1, 90), (300, 299)]
"""Width and height."""


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
