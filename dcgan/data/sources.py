"""Sources of each dataset's images, labels and classes.

Files are expected where torchvision stores them below ``root``; torchvision downloads missing ones.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcgan.choices import TEST_SPLITS
from dcgan.data.decoding import is_grey, peek
from dcgan.errors import InputError, check_integers, one_line

ROOT = Path("data")
"""The default root, the only one that a download creates: another one that is missing may be misspelt."""
DIGIT_SIZE = 8
FAKE_IMAGES = 1024
TIMEOUT = 30.0
"""Seconds without a response after which a download fails; torchvision itself would wait forever."""
CHANNEL_SAMPLE = 64
"""Number of images inspected to decide whether a folder is grey."""

DIGIT_CLASSES = tuple("0123456789")
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}
"""Names of torchvision's classes for the datasets that it can download."""


@dataclass(frozen=True, eq=False)
class Source:
    """The N images of a dataset in their original size and mode, either as an array or as files.

    Args:
        channels: channels of the images; None if that is known only from the files.
        classes: names of the classes; empty if there are no labels.
        labels: int64 [N], indices into ``classes``.
        array: uint8 [N, channels, H, H].
        files: if there is no array, the path of each image.
        names: names of these files in messages, relative to the dataset's folder.
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
    """Return the source of dataset ``name``; the arguments are those of :func:`dcgan.data.load`.

    Raises:
        InputError: as :func:`dcgan.data.load`.
    """
    if split == "test" and name not in TEST_SPLITS:
        raise InputError(f"split must be 'train' because {name} has no test split, got 'test'")
    if name == "folder":
        return _folder(root)
    if name == "digits":
        return _digits(image_size)
    if name == "fake":
        return _fake(limit or FAKE_IMAGES, image_size, split)
    read = {"cifar10": _read_cifar10, "celeba": _read_celeba}.get(name, _read_idx)
    try:
        return read(name, root, split)
    except InputError as missing:
        if root != ROOT and not root.exists():
            hint = f"create it to let {name} be downloaded into it" if download else _offline_hint(name)
            raise InputError(f"root {str(root)!r} does not exist; {hint}") from missing
        if not download:
            raise InputError(f"{missing}. {_offline_hint(name)}") from missing
        say(f"{missing}. Downloading {name} into {root}.")
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)
        try:
            with _removing_empty_folders(root, name):
                _torchvision(name)(str(root), download=True)
        except Exception as error:  # urllib, tarfile, zipfile, gdown and torchvision raise unrelated types
            raise InputError(
                f"{missing}, and downloading {name} into {root} failed: {one_line(error)}. "
                f"{_offline_hint(name)}"
            ) from error
        finally:
            socket.setdefaulttimeout(before)
        return read(name, root, split)


@contextlib.contextmanager
def _removing_empty_folders(root: Path, name: str) -> Iterator[None]:
    """If the block fails, remove the folders that torchvision has created for a download and left empty."""
    own = root / TORCHVISION[name]
    missing = [path for path in (own / "raw", own, root / "celeba", root) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # it does not exist, or is not empty
                path.rmdir()
        raise


def _torchvision(name: str) -> Any:
    """Return torchvision's class for a dataset; it is imported here because that takes more than a second."""
    from torchvision import datasets

    return getattr(datasets, TORCHVISION[name])


def _offline_hint(name: str) -> str:
    return (
        f"Without network access, copy the files of {name} there, or use the dataset 'digits' (1,797 real "
        "digits that come with scikit-learn), 'folder' (a folder of your own images) or 'fake' (noise)"
    )


# --- MNIST and Fashion-MNIST --------------------------------------------------------------------------------


def _read_idx(name: str, root: Path, split: str) -> Source:
    """Read IDX files, gzipped or not.

    Sources: LeCun, Cortes, Burges, *The MNIST Database*, 1998; Xiao, Rasul, Vollgraf, *Fashion-MNIST*, 2017.
    """
    classes = DIGIT_CLASSES if name == "mnist" else tuple(_torchvision(name).classes)
    prefix = root / TORCHVISION[name] / "raw" / ("train" if split == "train" else "t10k")
    images = _idx(prefix.with_name(f"{prefix.name}-images-idx3-ubyte"), 3)
    labels = _idx(prefix.with_name(f"{prefix.name}-labels-idx1-ubyte"), 1).astype(np.int64)
    if images.shape != (len(labels), 28, 28) or not len(labels) or labels.max() >= len(classes):
        raise InputError(
            f"{prefix}-*: the files are damaged: images have shape {list(images.shape)}, and there are "
            f"{len(labels)} labels up to {labels.max(initial=0)}"
        )
    return Source(1, classes, labels, torch.from_numpy(images).unsqueeze(1))


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of bytes, or ``path``.gz, decompressed in memory, if ``path`` does not exist.

    torchvision's reader needs a decompressed file, and reports a damaged one by a bare assertion.

    Format: bytes 0, 0, 8 (unsigned bytes), the number of dimensions; each dimension as a big-endian 32-bit
    integer; the values, last dimension fastest.
    """
    packed = path.with_name(f"{path.name}.gz")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"neither {path} nor {packed.name} exists") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} or {packed.name} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4")) if len(data) >= start else ()
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != start + math.prod(shape):
        raise InputError(f"{path} or {packed.name} is damaged or not an IDX file of {dimensions} dimensions")
    return np.frombuffer(bytearray(data), np.uint8, offset=start).reshape(shape)


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


def _read_cifar10(name: str, root: Path, split: str) -> Source:
    """Read CIFAR-10 through torchvision.

    The files are pickles; torchvision opens them only if their MD5 is the published one.

    Source: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """
    kind = _torchvision(name)
    try:
        dataset = kind(str(root), train=split == "train", download=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{root / kind.base_folder} does not exist, or its CIFAR-10 files are incomplete or damaged"
        ) from error
    array = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    return Source(3, tuple(dataset.classes), np.asarray(dataset.targets, np.int64), array)


# --- CelebA -------------------------------------------------------------------------------------------------


def _read_celeba(name: str, root: Path, split: str) -> Source:
    """Read the aligned and cropped images with the published split.

    Source: Liu, Luo, Wang, Tang, *Deep Learning Face Attributes in the Wild*, 2015.
    """
    folder = root / "celeba" / "img_align_celeba"
    partition = root / "celeba" / "list_eval_partition.txt"
    if not os.path.isdir(folder):
        raise InputError(f"{folder} does not exist")
    try:
        rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{partition}, which defines the splits, cannot be read") from error
    if any(len(row) != 2 or row[1] not in ("0", "1", "2") for row in rows):
        raise InputError(f"{partition} is damaged: each line must be a file name and 0, 1 or 2")
    names = tuple(file for file, part in rows if part == ("0" if split == "train" else "2"))
    if not names:
        raise InputError(f"{partition} lists no image of the split {split!r}")
    return Source(3, files=tuple(str(folder / file) for file in names), names=names)


# --- a folder of images -------------------------------------------------------------------------------------


def _folder(root: Path) -> Source:
    """List all images below ``root``; its subfolders that contain images, at any depth, are the classes.

    If there are such subfolders, images directly in ``root`` have the class '.'. Entries whose names start
    with a dot are ignored.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not os.path.exists(root):
        raise InputError(f"root {str(root)!r} does not exist")
    if not os.path.isdir(root):
        raise InputError(f"root must be a folder of images, got {str(root)!r}, which is not a folder")
    try:
        files = tuple(_image_files(str(root), IMG_EXTENSIONS, ()))
    except OSError as error:
        raise InputError(f"root {str(root)!r} cannot be read: {error}") from error
    if not files:
        raise InputError(
            f"root must be a folder of images, got {str(root)!r}, which contains no "
            f"{', '.join(IMG_EXTENSIONS)} file at any depth"
        )
    names = tuple(_printable(file.removeprefix(os.path.join(root, ""))) for file in files)
    class_names = [name.split(os.sep)[0] if os.sep in name else "." for name in names]
    if all(class_name == "." for class_name in class_names):
        return Source(None, files=files, names=names)
    classes = tuple(sorted(set(class_names)))
    index = {class_name: i for i, class_name in enumerate(classes)}
    labels = np.array([index[class_name] for class_name in class_names], np.int64)
    return Source(None, classes, labels, files=files, names=names)


def _image_files(folder: str, extensions: tuple[str, ...], parents: tuple[str, ...]) -> Iterator[str]:
    """Yield files in name order; links are followed unless they lead back to a parent folder."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    with os.scandir(folder) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _image_files(entry.path, extensions, (*parents, real))
        elif entry.name.lower().endswith(extensions):
            yield entry.path


def _printable(name: str) -> str:
    """Escape bytes of a file name that are not UTF-8 and so could not be printed."""
    return os.fsencode(name).decode(errors="backslashreplace")


def detect_channels(source: Source, chosen: np.ndarray, say: Callable[[str], None]) -> int:
    """Return 1 if the images are grey, else 3; files are judged by a sample of :data:`CHANNEL_SAMPLE`."""
    if source.channels is not None:
        return source.channels
    sample = chosen[evenly_spaced(len(chosen), CHANNEL_SAMPLE)]
    known = [grey for grey in (peek(source.files[i], is_grey) for i in sample) if grey is not None]
    if known and all(known):
        say(f"Using 1 channel: all of the {len(known)} images inspected in the folder are grey.")
        return 1
    say(f"Using 3 channels: not all of the {len(known)} images inspected in the folder are grey.")
    return 3


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Return min(``count``, ``limit``) evenly spaced indices below ``count``, ascending."""
    few = min(count, limit)
    return np.arange(few) * count // max(few, 1)


# --- digits and noise: no files needed ----------------------------------------------------------------------


def digits(image_size: int = 64) -> Tensor:
    """Return scikit-learn's handwritten digits, 1,797 real 8×8 images that ship with the package.

    Grey levels 0…16 are mapped to [-1, 1], then resized bicubically; the overshoot is clamped.

    Returns:
        float32 [1797, 1, image_size, image_size], ink at 1 and paper at -1.

    Raises:
        ValueError: ``image_size`` is not an integer of at least 8.

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998 (its test set).
    """
    from sklearn.datasets import load_digits

    check_integers(DIGIT_SIZE, ValueError, image_size=image_size)
    grey = torch.from_numpy(load_digits().images).float().unsqueeze(1)
    return F.interpolate(grey / 8 - 1, size=(image_size, image_size), mode="bicubic").clamp_(-1, 1)


def _digits(image_size: int) -> Source:
    from sklearn.datasets import load_digits

    grey = digits(image_size).add_(1).mul_(127.5).round_().to(torch.uint8)
    return Source(1, DIGIT_CLASSES, load_digits().target.astype(np.int64), grey)


def _fake(count: int, image_size: int, split: str) -> Source:
    """Return noise like torchvision.datasets.FakeData: uniform levels and random labels."""
    rng = np.random.default_rng(0 if split == "train" else 1)
    noise = rng.integers(0, 256, (count, 3, image_size, image_size), np.uint8)
    labels = rng.integers(0, len(DIGIT_CLASSES), count)
    return Source(3, DIGIT_CLASSES, labels, torch.from_numpy(noise))
