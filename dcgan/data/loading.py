"""A dataset by its name, as one tensor of uint8."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dcgan.data import pictures
from dcgan.data.cache import Item, Note, Pixels, default_folder, in_memory, kept
from dcgan.data.sources import DATASETS, Source, channels_of, evenly, find
from dcgan.errors import InputError
from dcgan.models import IMAGE_SIZES

Split = Literal["train", "test"]

TOGETHER = 128
"""Images decoded before the first of them is taken, which bounds the memory."""
ROWS = 1024
"""Images of an array that are resized at a time, for the same reason."""
NAMED = 5
"""Unreadable images that are named to the user; all of them are in :attr:`Images.skipped`."""
DARK = 4095
"""The white of 12 bits; 16-bit images without a level above it are said to be dark."""


@dataclass(frozen=True, eq=False)
class Images:
    """A dataset's images.

    Args:
        pixels: uint8 [N, C, H, W], contiguous, H = W, N at least 1; in memory, or mapped from a file,
            copy-on-write.
        name: the dataset's.
        classes: names of the classes; empty where there are none.
        labels: int64 [N], positions in ``classes``; None where there are none.
        skipped: files that cannot be read, relative to their folder.
    """

    pixels: Tensor
    name: str
    classes: tuple[str, ...] = ()
    labels: Tensor | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def image_size(self) -> int:
        return self.pixels.shape[2]


def _silent(message: str) -> None:
    """Nothing is said."""


def load(
    name: str,
    root: Path = Path("data"),
    *,
    image_size: int = 64,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    workers: int = 4,
    limit: int | None = None,
    split: Split = "train",
    download: bool = True,
    cache: Path | None = None,
    say: Callable[[str], None] = _silent,
) -> Images:
    """A dataset, decoded and resized once: shorter side to ``image_size``, antialiased bilinear, centre crop.

    Pixels are those of torchvision's ``Resize(image_size)`` and ``CenterCrop(image_size)`` on PIL images,
    the seed's transform; :func:`dcgan.data.normalise` is the rest of it. What is done to other modes than L
    and RGB, :func:`dcgan.data.pictures.converted` says; 32-bit integers have one white for all files.

    * ``mnist``, ``fashion-mnist``: IDX files, gzipped or not, in root/MNIST/raw, root/FashionMNIST/raw;
      1 channel.
    * ``cifar10``: root/cifar-10-batches-py; 3 channels.
    * ``celeba``: root/celeba; 3 channels, no classes.
    * ``folder``: all images below root. Its subfolders that hold some are the classes, '.' is that of images
      beside them. 1 channel where each of up to 64 images, spread evenly, is grey, and else 3.
    * ``digits``: scikit-learn's 1,797 digits, resized bicubically from 8×8; 1 channel.
    * ``fake``: noise, 1,024 images or ``limit``; 3 channels.

    The first four are downloaded through torchvision where they are not there.

    Images that are files are kept resized in ``cache``, and made anew when a file's size or time changes.
    Files of the cache may be deleted at any time.

    Args:
        name: one of :data:`DATASETS`.
        root: the folder that the dataset is in, or below; ``digits`` and ``fake`` need none.
        image_size: H and W, one of :data:`dcgan.models.IMAGE_SIZES`.
        channels: 1 or 3; None for the dataset's own.
        classes: the names of those to keep; labels are then positions among these, in the dataset's order.
        workers: threads that decode; 0 decodes in the caller's.
        limit: at most so many images: the first, or of files, which are sorted by class, evenly spread ones.
        split: 'train' or, of the datasets in :data:`TEST_SPLITS`, 'test'.
        download: whether what is not there may be downloaded.
        cache: the folder of the cache; None for ``$DCGAN_CACHE/images``, or without that variable
            ``~/.cache/dcgan-kernels/images``.
        say: is given a line for the user now and then; without it, only what may make pictures come out other
            than meant is told, as a warning.

    Raises:
        InputError: an argument that is not allowed; a root without the dataset, where it cannot be
            downloaded either; damaged files; a folder without images, or of which none can be read.
    """
    root = Path(os.path.expanduser(root))
    _check(name, image_size, channels, workers, limit, split)
    source = find(name, root, split, image_size, limit, download, say)
    kept_classes, labels, chosen = _of_classes(name, source, classes)
    if limit is not None:
        chosen = chosen[evenly(len(chosen), limit)] if source.files else chosen[:limit]
    if channels is None:
        channels = channels_of(source, chosen, say)
    if source.array is not None:
        found = Pixels(_resized(source.array, chosen, channels, image_size), {})
    else:
        request = [name, str(root.resolve()), split, limit, kept_classes, channels, image_size]
        found = _of_files(request, root, source, chosen, channels, image_size, workers, cache, say)

    unreadable = sorted(found.unreadable)
    skipped = tuple(source.names[chosen[i]] for i in unreadable)
    if skipped:
        first = [f"{n} ({found.unreadable[i]})" for n, i in zip(skipped[:NAMED], unreadable, strict=False)]
        what = "; ".join(first) + (f"; and {len(skipped) - NAMED:,} more" if len(skipped) > NAMED else "")
        if not len(found.pixels):
            raise InputError(f"none of the {len(skipped):,} images in {str(root)!r} can be read: {what}")
        say(f"Skipped {len(skipped):,} of {len(chosen):,} images, which cannot be read: {what}.")
    for note in found.notes:
        if say is _silent:
            warnings.warn(note, stacklevel=2)
        else:
            say(note)
    of_found = None if labels is None else torch.from_numpy(np.delete(labels[chosen], unreadable))
    return Images(found.pixels, name, kept_classes, of_found, skipped)


def _check(
    name: str, image_size: int, channels: int | None, workers: int, limit: int | None, split: str
) -> None:
    def is_integer(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    if name not in DATASETS:
        raise InputError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if not is_integer(image_size) or image_size not in IMAGE_SIZES:
        raise InputError(f"image_size must be one of {', '.join(map(str, IMAGE_SIZES))}, got {image_size!r}")
    if channels is not None and (not is_integer(channels) or channels not in (1, 3)):
        raise InputError(f"channels must be 1 or 3, got {channels!r}")
    if not is_integer(workers) or workers < 0:
        raise InputError(f"workers must be an integer of at least 0, got {workers!r}")
    if limit is not None and (not is_integer(limit) or limit < 1):
        raise InputError(f"limit must be an integer of at least 1, got {limit!r}")
    if split not in get_args(Split):
        raise InputError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")


def _of_classes(
    name: str, source: Source, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray | None, np.ndarray]:
    """Names of the classes kept, labels among them for all images, positions of the images that are kept."""
    everything = np.arange(len(source))
    if classes is None:
        return source.classes, source.labels, everything
    if isinstance(classes, str) or not classes:
        raise InputError(f"classes must be a sequence of at least one name, got {classes!r}")
    if source.labels is None:
        raise InputError(f"classes must be None, as {name} has no classes here, got {', '.join(classes)}")
    for given in classes:
        if given not in source.classes:
            raise InputError(f"classes must be among {', '.join(source.classes)}, got {given!r}")
    wanted = np.array([of in classes for of in source.classes])
    chosen = everything[wanted[source.labels]]
    names = tuple(itertools.compress(source.classes, wanted))
    if not len(chosen):
        raise InputError(f"classes {', '.join(names)}: {name} has no images of these")
    return names, (np.cumsum(wanted) - 1)[source.labels], chosen


def _resized(array: Tensor, chosen: np.ndarray, channels: int, size: int) -> Tensor:
    pixels = torch.empty(len(chosen), channels, size, size, dtype=torch.uint8)
    rows = torch.from_numpy(chosen).split(ROWS)
    for into, some in zip(pixels.split(ROWS), rows, strict=True):
        into.copy_(pictures.resized(array[some], channels, size))
    return pixels


def _of_files(
    request: Sequence[object],
    root: Path,
    source: Source,
    chosen: np.ndarray,
    channels: int,
    size: int,
    workers: int,
    cache: Path | None,
    say: Callable[[str], None],
) -> Pixels:
    shape = (channels, size, size)

    def items() -> Iterator[Item]:
        say(f"Decoding {len(chosen):,} images of {root} to {size}×{size}.")
        files, names = ([of[i] for i in chosen] for of in (source.files, source.names))
        return _decoded(files, names, channels, size, workers)

    state = [(source.names[i], _state(source.files[i])) for i in chosen]
    folder = default_folder() if cache is None else Path(os.path.expanduser(cache))
    path = folder / f"{_hash(request)[:32]}.images"
    found = kept(path, _hash([pictures.VERSION, request, state]), items, shape, say)
    return in_memory(items(), len(chosen), shape) if found is None else found


def _decoded(
    files: Sequence[str], names: Sequence[str], channels: int, size: int, workers: int
) -> Iterator[Item]:
    """Each file's pixels, or why it has none; then what is to be said of pictures of 16 and 32 bits."""
    dark: dict[int, int] = {}
    wide = _Wide(files, names)

    def one(position: int) -> Item:
        try:
            image = pictures.opened(files[position])
            top = pictures.top_of_16_bits(image)
            if top is not None and 0 < top <= DARK:
                dark[position] = top
            white = wide.white() if pictures.depth(image) == 32 else None
            return pictures.pixels_of(image, channels, size, white)
        except Exception as error:  # whatever bytes that are no image make of Pillow's parsers
            return _why(error)

    Image.init()  # in the first threads to meet a rarer format, Pillow would race to do it, and lose images
    if workers == 0:
        yield from map(one, range(len(files)))
    else:
        with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes without Python's lock
            for start in range(0, len(files), TOGETHER):
                yield from pool.map(one, range(start, min(start + TOGETHER, len(files))))
    if dark:
        few = "; ".join(f"{names[i]} (up to {dark[i]})" for i in sorted(dark)[:NAMED])
        more = f"; and {len(dark) - NAMED:,} more" if len(dark) > NAMED else ""
        yield Note(
            f"{len(dark):,} images of 16 bits have no level above {DARK}, as if of 12 bits, and come out "
            f"dark, as white is taken to be 65535; where it is {DARK}, multiply them by 16: {few}{more}."
        )
    if wide.said:
        yield Note(wide.said)


class _Wide:
    """The white of pictures of 32-bit integers, one for all of them, so that none is brighter than it was.

    All of them are looked at, but only once there is one.
    """

    def __init__(self, files: Sequence[str], names: Sequence[str]) -> None:
        self._files, self._names, self._lock = files, names, Lock()
        self._white: int | None = None
        self.said = ""

    def white(self) -> int:
        with self._lock:
            if self._white is None:
                tops = {name: _top(file) for file, name in zip(self._files, self._names, strict=True)}
                known = {name: top for name, top in tops.items() if top is not None}
                name = max(known, key=known.__getitem__, default="")
                self._white = pictures.white_of(known.get(name, 0))
                if known:
                    self.said = (
                        f"{len(known):,} images are of 32-bit or signed integers, up to {known[name]} in "
                        f"{name}: white is taken to be {self._white} in all of them, the least 2^n - 1 that "
                        "reaches that."
                    )
            return self._white


def _top(file: str) -> int | None:
    """The largest level of a picture of 32-bit integers; None for all else."""
    try:
        with Image.open(file) as image:
            return pictures.largest(image) if pictures.depth(image) == 32 else None
    except Exception:  # as in decoding, which says what it is
        return None


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _state(file: str) -> tuple[int, int, int] | None:
    """What changes when the file does; its ctime also when its permissions do. None for a link to nowhere."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
