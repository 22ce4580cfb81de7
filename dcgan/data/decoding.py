"""Conversion of images of any size and mode to uint8 pixels of one size, and of pixels to network inputs.

The result equals ``transforms.Resize(size)`` and ``transforms.CenterCrop(size)`` on a PIL image: the
transform of the reference recipe, with the crop that pytorch/examples adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dcgan.errors import InputError

T = TypeVar("T")

VERSION = 2
"""Version of the conversion; raising it invalidates cached pixels."""
MAX_ASPECT_RATIO = 256
BITS = "bits per channel"
"""Key in the ``info`` of an image from :func:`open_image`: the file's bits per channel, if not 8."""


def open_image(path: str | Path) -> Image.Image:
    """Decode a file's (first) image and apply its EXIF orientation.

    Raises:
        Exception: the file is missing, unreadable, truncated or not an image; Pillow raises many types.
    """
    with Image.open(path) as image:
        # Pillow keeps only the upper 8 of 16 bits of colour, and forgets the file's depth after decoding.
        bits = re.search(r";(\d+)", " ".join(str(tile[3]) for tile in image.tile))
        if bits:
            image.info[BITS] = int(bits[1])
        ImageOps.exif_transpose(image, in_place=True)
    return image


def peek(path: str | Path, ask: Callable[[Image.Image], T]) -> T | None:
    """Return ``ask(image)`` for a file's image before it is decoded; None if that fails."""
    try:
        with Image.open(path) as image:
            return ask(image)
    except Exception:  # Pillow's parsers may raise anything; decoding will report the error
        return None


def is_grey(image: Image.Image) -> bool:
    """Return whether the mode has no colour; grey stored as RGB or as a palette counts as colour."""
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def bit_depth(image: Image.Image) -> int:
    """Return the bits per grey level in memory: 16 or 32 for modes that have them, 8 for all others.

    Pillow reads 16-bit PGM as mode I and stretches its levels to 65535; that counts as 16.
    """
    if image.mode == "I":
        return 16 if image.format in ("PPM", "PNG") else 32
    return 16 if image.mode.startswith("I;16") else 8


def max_level(image: Image.Image) -> int:
    """Return the largest level of an image of mode I or I;16, of either byte order.

    Raises:
        ValueError: a level is negative, so that the black level is unknown.
    """
    values = np.asarray(image)
    if values.min() < 0:
        raise ValueError(f"integers from {values.min()} to {values.max()}; negative levels are not supported")
    return int(values.max())


def max_level_of_16_bits(image: Image.Image) -> int | None:
    """Return the largest level of a file with 16 bits per channel (for colour, an upper bound), else None.

    Raises:
        ValueError: as :func:`max_level`.
    """
    if image.info.get(BITS) != 16 or bit_depth(image) == 32:  # signed 16-bit files have mode I
        return None
    if bit_depth(image) == 16:
        return max_level(image)
    upper = np.asarray(image.convert("RGB"))  # without alpha
    return int(upper.max()) << 8 | 255


def white_level(level: int) -> int:
    """Return the white level for images with this largest level: the smallest 2^n - 1 ≥ max(level, 255)."""
    return max(255, (1 << level.bit_length()) - 1)


def convert(image: Image.Image, channels: int, white: int | None = None) -> Image.Image:
    """Convert an image to mode L (``channels`` 1) or RGB (3).

    Grey becomes three equal channels; RGB becomes L = 0.299 R + 0.587 G + 0.114 B (ITU-R 601). Alpha is
    dropped, not blended, as in torchvision's ImageFolder. 16-bit grey is scaled to 8 bits as v·255/65535,
    rounded, and 12-bit grey of a TIFF that declares it as v·255/4095. 32-bit images never use the full range;
    they are scaled by v·255/``white``. Modes that are neither grey nor RGB (CMYK, YCbCr, LAB, palettes) are
    converted to RGB first.

    Args:
        image: an image of any mode.
        channels: 1 or 3.
        white: white level of 32-bit grey; None for :func:`white_level` of the image's own largest level.

    Raises:
        ValueError: floating-point pixels, whose black and white levels are unknown, or integers below 0 or
            above the white level.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save them as 8 or 16-bit integers")
    if bit_depth(image) > 8:
        image = _to_8_bits(image, white)
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns about P → RGB if the palette has an alpha
    if channels == 1 and is_grey(image):
        return image.convert("L")
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def _to_8_bits(image: Image.Image, white: int | None) -> Image.Image:
    top = max_level(image)
    if bit_depth(image) == 16:
        white = 4095 if image.info.get(BITS) == 12 else 65535
    elif white is None:
        white = white_level(top)
    if top > white:
        raise ValueError(f"integers up to {top}, above the white level {white}")
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` (antialiased bilinear) and crop the centre to size × size.

    Raises:
        ValueError: the aspect ratio exceeds :data:`MAX_ASPECT_RATIO`; resizing would need too much memory.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width}×{height} pixels, an aspect ratio of more than {MAX_ASPECT_RATIO}:1")
    from torchvision.transforms import functional  # here, because importing it takes more than a second

    cropped: Image.Image = functional.center_crop(functional.resize(image, [size]), [size])
    return cropped


def to_pixels(image: Image.Image, channels: int, size: int, white: int | None = None) -> np.ndarray:
    """Return the image as contiguous uint8 [channels, size, size].

    Raises:
        ValueError: as :func:`convert` and :func:`resize_and_crop`.
    """
    pixels = np.asarray(resize_and_crop(convert(image, channels, white), size)).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resize_batch(pixels: Tensor, channels: int, size: int) -> Tensor:
    """Do the same as :func:`to_pixels` for many small images of one size at once, several times as fast.

    Args:
        pixels: uint8 [N, 1 or 3, H, H], grey or RGB.
        channels: channels of the result, 1 or 3.
        size: height and width of the result.

    Returns:
        uint8 [N, channels, size, size]. PyTorch resizes uint8 in fixed point, as Pillow does.
    """
    if pixels.shape[1] > channels:
        luma = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)  # Pillow's, over 65536
        pixels = ((pixels * luma).sum(1, keepdim=True, dtype=torch.int32) + 32768 >> 16).to(torch.uint8)
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return resized.expand(-1, channels, -1, -1)


def normalise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map levels 0 … 255 to [-1, 1] by x/127.5 - 1; both ends are exact.

    Equals ``ToTensor()`` followed by ``Normalize(0.5, 0.5)``, (x/255 - 0.5)/0.5, up to rounding.

    Args:
        pixels: uint8, of any shape and device.
        dtype: dtype of the result; the computation is in float32, or in float64 for float64.

    Raises:
        InputError: ``pixels`` are not uint8, or ``dtype`` is not a floating-point type.
    """
    if pixels.dtype != torch.uint8:
        raise InputError(f"pixels must be uint8, got {pixels.dtype}")
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point type, got {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return pixels.to(wide).div_(127.5).sub_(1).to(dtype)
