"""MNIST and Fashion-MNIST as IDX files, gzipped or not, intact or damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision import transforms

from dcgan.data import load
from dcgan.errors import InputError
from tests.support.image_files import RAW, resized, write_idx


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
    with pytest.raises(InputError, match=r"classes must have images, but mnist has none of 9"):
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
