"""Image and dataset files that tests write, and what torchvision makes of them."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms


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


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ORDER = ["cat/10.JPG", "cat/3.png", "cat/deep/er/1.png", "dog/a.webp", "dog/b.ppm"]


def pixels_of_file(path: Path, channels: int = 3, size: int = 32) -> torch.Tensor:
    mode = "RGB" if channels == 3 else "L"
    return torch.from_numpy(resized(np.asarray(Image.open(path).convert(mode)), size).astype(np.uint8))


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
