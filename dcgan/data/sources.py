"""Where each dataset's pictures, labels and classes come from.

Files lie where torchvision puts them below ``root``, and torchvision downloads them where there are none.
"""

from __future__ import annotations

import gzip
import math
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dcgan.data.pictures import is_grey
from dcgan.errors import InputError

DATASETS = ("mnist", "fashion-mnist", "cifar10", "celeba", "folder", "digits", "fake")
TEST_SPLITS = ("mnist", "fashion-mnist", "cifar10", "celeba", "fake")
"""The datasets that have a ``split='test'`` beside ``'train'``."""

DIGIT_SIZE = 8
FAKE_IMAGES = 1024
TIMEOUT = 30.0
"""Seconds without an answer after which a download has failed; torchvision itself would wait for ever."""
SAMPLE = 64
"""Images looked at to tell whether a folder is grey."""

TEN = tuple("0123456789")
IDX = {
    "mnist": ("MNIST", TEN),
    "fashion-mnist": (
        "FashionMNIST",
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset's N pictures, of whatever size and mode they have: an array, or files.

    Args:
        channels: of the pictures; None where only their files tell.
        classes: names of the classes; none where there are no labels.
        labels: int64 [N], positions in ``classes``.
        array: uint8 [N, channels, H, H].
        files: where there is no array, the path of each picture.
        names: how to call these files, relative to the dataset's folder.
    """

    channels: int | None
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    array: Tensor | None = None
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)


def find(
    name: str,
    root: Path,
    split: str,
    image_size: int,
    limit: int | None,
    download: bool,
    say: Callable[[str], None],
) -> Source:
    """The dataset ``name`` of :data:`DATASETS`; arguments as :func:`dcgan.data.load`'s.

    Raises:
        InputError: as :func:`dcgan.data.load`.
    """
    if split == "test" and name not in TEST_SPLITS:
        raise InputError(f"split must be 'train', as {name} has no test split, got 'test'")
    if name == "folder":
        return _folder(root)
    if name == "digits":
        return _digits(image_size)
    if name == "fake":
        return _fake(limit or FAKE_IMAGES, image_size, split)
    read, fetch = {
        "mnist": (_read_idx, _fetch_idx),
        "fashion-mnist": (_read_idx, _fetch_idx),
        "cifar10": (_read_cifar10, _fetch_cifar10),
        "celeba": (_read_celeba, _fetch_celeba),
    }[name]
    try:
        return read(name, root, split)
    except InputError as missing:
        if not download:
            raise InputError(f"{missing}. {_offline(name)}") from missing
        say(f"{missing}. Downloading {name} into {root}.")
        try:
            with _timeout(TIMEOUT):
                fetch(name, root)
        except Exception as error:  # urllib, tarfile, zipfile, gdown and torchvision have each their own
            why = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{missing}, and downloading {name} into {root} failed: {why}. {_offline(name)}"
            ) from error
        return read(name, root, split)


def _offline(name: str) -> str:
    return (
        f"Without a network, put the files of {name} there, or use the dataset 'digits' (1,797 real digits "
        "that come with scikit-learn), 'folder' (a folder of your own images) or 'fake' (noise)"
    )


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- MNIST and Fashion-MNIST --------------------------------------------------------------------------------


def _read_idx(name: str, root: Path, split: str) -> Source:
    """IDX files, gzipped or not.

    Sources: LeCun, Cortes, Burges, *The MNIST Database*, 1998; Xiao, Rasul, Vollgraf, *Fashion-MNIST*, 2017.
    """
    folder, classes = IDX[name]
    prefix = root / folder / "raw" / ("train" if split == "train" else "t10k")
    images = _idx(prefix.with_name(f"{prefix.name}-images-idx3-ubyte"), 3)
    labels = _idx(prefix.with_name(f"{prefix.name}-labels-idx1-ubyte"), 1).astype(np.int64)
    if images.shape != (len(labels), 28, 28) or not len(labels) or labels.max() >= len(classes):
        raise InputError(
            f"{prefix}-*: damaged: images {list(images.shape)}, {len(labels)} labels up to "
            f"{labels.max(initial=0)}"
        )
    return Source(1, classes, labels, torch.from_numpy(images).unsqueeze(1))


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes, or where there is none, ``path``.gz, unpacked in memory.

    Format: bytes 0, 0, 8 (unsigned bytes), the number of dimensions; each dimension as a big-endian 32-bit
    integer; the values, the last dimension fastest.
    """
    packed = path.with_name(f"{path.name}.gz")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there, nor is {packed.name}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} or {packed.name} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4")) if len(data) >= start else ()
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != start + math.prod(shape):
        raise InputError(f"{path} or {packed.name} is no IDX file of {dimensions} dimensions, or damaged")
    return np.frombuffer(bytearray(data), np.uint8, offset=start).reshape(shape)


def _fetch_idx(name: str, root: Path) -> None:
    from torchvision import datasets

    getattr(datasets, IDX[name][0])(str(root), download=True)


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


def _read_cifar10(name: str, root: Path, split: str) -> Source:
    """Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.

    The files are pickles, which torchvision opens only where their MD5 is the published one.
    """
    from torchvision.datasets import CIFAR10

    try:
        made = CIFAR10(str(root), train=split == "train", download=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{root / CIFAR10.base_folder} is not there, or lacks some of the files of CIFAR-10, or they are "
            "damaged"
        ) from error
    array = torch.from_numpy(made.data).permute(0, 3, 1, 2)
    return Source(3, tuple(made.classes), np.asarray(made.targets, np.int64), array)


def _fetch_cifar10(name: str, root: Path) -> None:
    from torchvision.datasets import CIFAR10

    CIFAR10(str(root), download=True)


# --- CelebA -------------------------------------------------------------------------------------------------


def _read_celeba(name: str, root: Path, split: str) -> Source:
    """The aligned and cropped pictures, split as published.

    Source: Liu, Luo, Wang, Tang, *Deep Learning Face Attributes in the Wild*, 2015.
    """
    folder = root / "celeba" / "img_align_celeba"
    partition = root / "celeba" / "list_eval_partition.txt"
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not there")
    try:
        rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{partition}, which says what is 'train' and 'test', cannot be read") from error
    if any(len(row) != 2 or row[1] not in ("0", "1", "2") for row in rows):
        raise InputError(f"{partition} is damaged: each line must be a file's name and 0, 1 or 2")
    names = tuple(file for file, part in rows if part == ("0" if split == "train" else "2"))
    if not names:
        raise InputError(f"{partition} lists no picture of the split {split!r}")
    return Source(3, files=tuple(str(folder / file) for file in names), names=names)


def _fetch_celeba(name: str, root: Path) -> None:
    from torchvision.datasets import CelebA

    CelebA(str(root), download=True)


# --- a folder of images -------------------------------------------------------------------------------------


def _folder(root: Path) -> Source:
    """All images below ``root``; classes are its subfolders that hold some, at any depth.

    Images in ``root`` itself, beside such subfolders, are of the class '.'. Entries whose names start with a
    dot are left out.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not os.path.isdir(root):
        raise InputError(f"root must be a folder of images, got {str(root)!r}, which is no folder")
    try:
        files = tuple(_images_below(str(root), IMG_EXTENSIONS, ()))
    except OSError as error:
        raise InputError(f"root {str(root)!r} cannot be read: {error}") from error
    if not files:
        raise InputError(
            f"root must be a folder of images, got {str(root)!r}, which holds none of "
            f"{', '.join(IMG_EXTENSIONS)} at any depth"
        )
    names = tuple(_printable(file.removeprefix(os.path.join(root, ""))) for file in files)
    of_each = [name.split(os.sep)[0] if os.sep in name else "." for name in names]
    if all(of == "." for of in of_each):
        return Source(None, files=files, names=names)
    classes = tuple(sorted(set(of_each)))
    position = {of: i for i, of in enumerate(classes)}
    labels = np.array([position[of] for of in of_each], np.int64)
    return Source(None, classes, labels, files=files, names=names)


def _images_below(folder: str, extensions: tuple[str, ...], above: tuple[str, ...]) -> Iterator[str]:
    """Files in the order of their names, links followed but for those that lead back up."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_below(entry.path, extensions, (*above, real))
        elif entry.name.lower().endswith(extensions):
            yield entry.path


def _printable(name: str) -> str:
    """Names of files may hold bytes that are no UTF-8, which cannot be printed."""
    return os.fsencode(name).decode(errors="backslashreplace")


def channels_of(source: Source, chosen: np.ndarray, say: Callable[[str], None]) -> int:
    """1 where the pictures are grey, else 3; of files, as many as :data:`SAMPLE`, spread evenly, tell."""
    if source.channels is not None:
        return source.channels
    sample = chosen[evenly(len(chosen), SAMPLE)]
    known = [grey for grey in (_grey(source.files[i]) for i in sample) if grey is not None]
    if known and all(known):
        say(f"Images have 1 channel: {len(known)} of the folder were looked at, and all are grey.")
        return 1
    say(f"Images have 3 channels: {len(known)} of the folder were looked at, and not all are grey.")
    return 3


def _grey(file: str) -> bool | None:
    """None where it cannot be told."""
    try:
        with Image.open(file) as image:
            return is_grey(image)
    except Exception:  # whatever bytes make of Pillow's parsers; who decodes it will say so
        return None


def evenly(count: int, limit: int) -> np.ndarray:
    """Positions of at most ``limit`` of ``count``, evenly spread, ascending."""
    few = min(count, limit)
    return np.arange(few) * count // max(few, 1)


# --- what needs no files ------------------------------------------------------------------------------------


def digits(image_size: int = 64) -> Tensor:
    """scikit-learn's handwritten digits, 1,797 real 8×8 images that come with the package.

    Grey levels 0…16 are mapped to [-1, 1], then resized once, bicubically; the overshoot is clamped.

    Returns:
        float32 [1797, 1, image_size, image_size], ink at 1 and paper at -1.

    Raises:
        ValueError: ``image_size`` is no integer of at least 8.

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998 (its test set).
    """
    from sklearn.datasets import load_digits

    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < DIGIT_SIZE:
        raise ValueError(f"image_size must be an integer of at least {DIGIT_SIZE}, got {image_size!r}")
    grey = torch.from_numpy(load_digits().images).float().unsqueeze(1)
    return F.interpolate(grey / 8 - 1, size=(image_size, image_size), mode="bicubic").clamp_(-1, 1)


def _digits(image_size: int) -> Source:
    from sklearn.datasets import load_digits

    grey = digits(image_size).add_(1).mul_(127.5).round_().to(torch.uint8)
    return Source(1, TEN, load_digits().target.astype(np.int64), grey)


def _fake(count: int, image_size: int, split: str) -> Source:
    """Noise, of torchvision.datasets.FakeData's kind: every level as likely, labels at random."""
    random = np.random.default_rng(0 if split == "train" else 1)
    noise = random.integers(0, 256, (count, 3, image_size, image_size), np.uint8)
    return Source(3, TEN, random.integers(0, len(TEN), count), torch.from_numpy(noise))
