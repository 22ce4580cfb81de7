"""From a picture of any size and mode to uint8 pixels of one size, and from there to what networks are given.

As ``transforms.Resize(size)`` and ``transforms.CenterCrop(size)`` on a PIL image: the seed's transform, with
the crop that pytorch/examples adds.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dcgan.errors import InputError

VERSION = 2
"""Of what is done to a picture; a change of it makes cached pixels anew."""
LONGEST = 256
BITS = "bits a channel"
"""In the ``info`` of a picture from :func:`opened`: those of its file, where these are other than 8."""


def opened(path: str | Path) -> Image.Image:
    """The picture of a file (the first, of several), decoded, the right way up as its EXIF orientation says.

    Raises:
        Exception: the file is missing, unreadable, truncated or no image; Pillow has many for that.
    """
    with Image.open(path) as image:
        # Pillow keeps the upper 8 of 16 bits of colour, and says of what it read only until it has.
        bits = re.search(r";(\d+)", " ".join(str(tile[3]) for tile in image.tile))
        if bits:
            image.info[BITS] = int(bits[1])
        ImageOps.exif_transpose(image, in_place=True)
    return image


def is_grey(image: Image.Image) -> bool:
    """Whether its mode has no colour; a colour image or a palette of greys counts as colour."""
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def depth(image: Image.Image) -> int:
    """Bits of a grey level in memory: 16 or 32 of a mode with so many, and 8 of all others.

    Pillow reads 16-bit PGM as mode I, and stretches its levels to 65535: these are 16.
    """
    if image.mode == "I":
        return 16 if image.format in ("PPM", "PNG") else 32
    return 16 if image.mode.startswith("I;16") else 8


def largest(image: Image.Image) -> int:
    """The largest level of a picture of mode I or I;16, of either byte order.

    Raises:
        ValueError: a level below 0, where black is anyone's guess.
    """
    values = np.asarray(image)
    if values.min() < 0:
        raise ValueError(f"integers from {values.min()} to {values.max()}, and no black is known below 0")
    return int(values.max())


def top_of_16_bits(image: Image.Image) -> int | None:
    """The largest level in a file of 16 bits a channel, or of colour the most it may be; else None.

    Raises:
        ValueError: as :func:`largest`.
    """
    if image.info.get(BITS) != 16 or depth(image) == 32:  # signed 16 bits are of mode I
        return None
    if depth(image) == 16:
        return largest(image)
    upper = np.asarray(image.convert("RGB"))  # without alpha
    return int(upper.max()) << 8 | 255


def white_of(level: int) -> int:
    """The white of pictures whose largest level this is: the least 2^n - 1 that reaches it, at least 255."""
    return max(255, (1 << level.bit_length()) - 1)


def converted(image: Image.Image, channels: int, white: int | None = None) -> Image.Image:
    """The picture in mode L (``channels`` 1) or RGB (3).

    Grey becomes three equal channels; RGB becomes L = 0.299 R + 0.587 G + 0.114 B (ITU-R 601). Alpha is
    dropped, not blended, as torchvision's ImageFolder does. 16 bits of grey are scaled to 8: v·255/65535,
    rounded; the 12 of a TIFF that says so, v·255/4095. Of 32 bits no one uses all, and v·255/``white`` is
    taken. Modes with neither grey nor RGB (CMYK, YCbCr, LAB, palettes) become RGB first.

    Args:
        image: of any mode.
        channels: 1 or 3.
        white: of 32-bit grey; None for :func:`white_of` the picture's own largest level.

    Raises:
        ValueError: floating-point pixels, whose black and white nothing tells, or integers below 0 or above
            the white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save them as 8 or 16-bit integers")
    if depth(image) > 8:
        image = _to_8_bits(image, white)
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of P → RGB where the palette has an alpha
    if channels == 1 and is_grey(image):
        return image.convert("L")
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def _to_8_bits(image: Image.Image, white: int | None) -> Image.Image:
    top = largest(image)
    if depth(image) == 16:
        white = 4095 if image.info.get(BITS) == 12 else 65535
    elif white is None:
        white = white_of(top)
    if top > white:
        raise ValueError(f"integers up to {top}, above the white of {white}")
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to ``size``, antialiased bilinear, and the centre cropped: size × size.

    Raises:
        ValueError: a strip more than :data:`LONGEST` times as long as wide, which would take much memory.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > LONGEST * short:
        raise ValueError(f"a strip of {width}×{height} pixels, which is more than {LONGEST} to 1")
    new_width, new_height = int(size * width / short), int(size * height / short)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def pixels_of(image: Image.Image, channels: int, size: int, white: int | None = None) -> np.ndarray:
    """The picture as uint8 [channels, size, size], contiguous.

    Raises:
        ValueError: as :func:`converted` and :func:`fitted`.
    """
    pixels = np.asarray(fitted(converted(image, channels, white), size)).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resized(pixels: Tensor, channels: int, size: int) -> Tensor:
    """:func:`pixels_of` for many small pictures of one size at once, several times as fast.

    Args:
        pixels: uint8 [N, 1 or 3, H, H], grey or RGB.
        channels: 1 or 3.
        size: of the result.

    Returns:
        uint8 [N, channels, size, size]: PyTorch resizes uint8 in fixed point, as Pillow does.
    """
    if pixels.shape[1] > channels:
        luma = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)  # Pillow's, of 65536
        pixels = ((pixels * luma).sum(1, keepdim=True, dtype=torch.int32) + 32768 >> 16).to(torch.uint8)
    fitting = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return fitting.expand(-1, channels, -1, -1)


def normalise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x/127.5 - 1: grey levels 0 … 255 to [-1, 1], the ends exactly.

    ``ToTensor()`` and ``Normalize(0.5, 0.5)``, (x/255 - 0.5)/0.5, to rounding.

    Args:
        pixels: uint8, any shape and device.
        dtype: of the result; computed in float32, or float64 for float64.

    Raises:
        InputError: ``pixels`` are not uint8, or ``dtype`` is no floating-point type.
    """
    if pixels.dtype != torch.uint8:
        raise InputError(f"pixels must be uint8, got {pixels.dtype}")
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point type, got {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return pixels.to(wide).div_(127.5).sub_(1).to(dtype)
