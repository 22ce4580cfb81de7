"""Loading of a dataset, by name, as one uint8 tensor."""

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

from dcgan.choices import DATASETS, IMAGE_SIZES
from dcgan.data import decoding
from dcgan.data.cache import Item, Note, Pixels, load_or_build
from dcgan.data.sources import ROOT, Source, detect_channels, evenly_spaced, find
from dcgan.errors import InputError, check_choice, check_integers, is_integer, one_line
from dcgan.files import cache_folder

Split = Literal["train", "test"]

DECODE_BLOCK = 128
"""Number of images decoded before the first of them is consumed; bounds the memory."""
RESIZE_BLOCK = 1024
"""Number of images of an array resized at a time, for the same reason."""
MAX_NAMED = 5
"""Number of unreadable images named in messages; :attr:`Images.skipped` lists all of them."""
WHITE_12_BITS = 4095
"""White level of 12-bit images; 16-bit images without a level above it are reported as dark."""


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a dataset.

    Args:
        pixels: uint8 [N, C, H, W], contiguous, H = W, N at least 1; in memory, or mapped copy-on-write from a
            file.
        name: name of the dataset.
        classes: names of the classes; empty if there are none.
        labels: int64 [N], indices into ``classes``; None if there are none.
        skipped: unreadable files, relative to the dataset's folder.
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
    """Discard the message."""


def load(
    name: str,
    root: Path = ROOT,
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
    """Load a dataset with its images resized and cropped to ``image_size``, uint8.

    The shorter side is resized to ``image_size`` (antialiased bilinear), then the centre is cropped.

    The pixels equal those of torchvision's ``Resize(image_size)`` and ``CenterCrop(image_size)`` on PIL
    images, the transform of the reference recipe; :func:`dcgan.data.normalise` is the remainder of it.
    :func:`dcgan.data.decoding.convert` documents how modes other than L and RGB are handled; all 32-bit
    integer images share one white level.

    * ``mnist``, ``fashion-mnist``: IDX files, gzipped or not, in root/MNIST/raw, root/FashionMNIST/raw;
      1 channel.
    * ``cifar10``: root/cifar-10-batches-py; 3 channels.
    * ``celeba``: root/celeba; 3 channels, no classes.
    * ``folder``: all images below root. Subfolders that contain images are the classes; images directly in
      root then have the class '.'. 1 channel if all of up to 64 evenly spaced images are grey, else 3.
    * ``digits``: scikit-learn's 1,797 digits, resized bicubically from 8×8; 1 channel.
    * ``fake``: noise, 1,024 images or ``limit``; 3 channels.

    The first four are downloaded through torchvision if they are missing. Only the default root is then
    created; another one has to exist.

    Images from files are cached in ``cache`` after resizing, and rebuilt when a file's size or time changes.
    Cache files may be deleted at any time.

    Args:
        name: one of :data:`DATASETS`.
        root: the folder that contains the dataset; ``digits`` and ``fake`` need none.
        image_size: H and W, one of :data:`dcgan.choices.IMAGE_SIZES`.
        channels: 1 or 3; None for the dataset's default.
        classes: names of the classes to keep; labels then index these, in the dataset's order.
        workers: number of decoding threads; 0 decodes in the calling thread.
        limit: maximum number of images: the first ones, or for image files, which are sorted by class, evenly
            spaced ones.
        split: 'train' or, for the datasets in :data:`TEST_SPLITS`, 'test'.
        download: whether a missing dataset may be downloaded.
        cache: the cache folder; None for ``$DCGAN_CACHE/images``, or ``~/.cache/dcgan-kernels/images`` if
            that variable is not set.
        say: receives progress messages. Without it, only notes on images that may be decoded differently from
            what was intended are reported, as warnings.

    Raises:
        InputError: an invalid argument; the dataset is not in ``root`` and cannot be downloaded; damaged
            files; a folder without images, or without any readable image.
    """
    root = Path(os.path.expanduser(root))
    _check(name, image_size, channels, workers, limit, split)
    source = find(name, root, split, image_size, limit, download, say)
    kept_classes, labels, chosen = _select_classes(name, source, classes)
    if limit is not None:
        chosen = chosen[evenly_spaced(len(chosen), limit)] if source.files else chosen[:limit]
    if channels is None:
        channels = detect_channels(source, chosen, say)
    if source.array is not None:
        found = Pixels(_resize_array(source.array, chosen, channels, image_size), {})
    else:
        request = [name, str(root.resolve()), split, limit, kept_classes, channels, image_size]
        found = _load_files(request, root, source, chosen, channels, image_size, workers, cache, say)

    unreadable = sorted(found.unreadable)
    skipped = tuple(source.names[chosen[i]] for i in unreadable)
    if skipped:
        what = _some([f"{n} ({found.unreadable[i]})" for n, i in zip(skipped, unreadable, strict=True)])
        if not len(found.pixels):
            raise InputError(f"none of the {len(skipped):,} images in {str(root)!r} can be read: {what}")
        say(f"Skipped {len(skipped):,} of {len(chosen):,} images, which cannot be read: {what}.")
    for note in found.notes:
        if say is _silent:
            warnings.warn(note, stacklevel=2)
        else:
            say(note)
    kept_labels = None if labels is None else torch.from_numpy(np.delete(labels[chosen], unreadable))
    return Images(found.pixels, name, kept_classes, kept_labels, skipped)


def _check(
    name: str, image_size: int, channels: int | None, workers: int, limit: int | None, split: str
) -> None:
    check_choice("dataset", name, DATASETS)
    check_choice("image_size", image_size, IMAGE_SIZES)
    if channels is not None and (not is_integer(channels) or channels not in (1, 3)):
        raise InputError(f"channels must be 1 or 3, got {channels!r}")
    check_integers(0, workers=workers)
    if limit is not None:
        check_integers(1, limit=limit)
    check_choice("split", split, get_args(Split))


def _select_classes(
    name: str, source: Source, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray | None, np.ndarray]:
    """Return the kept classes, all images' labels as indices into them, and the kept images' indices."""
    everything = np.arange(len(source))
    if classes is None:
        return source.classes, source.labels, everything
    if isinstance(classes, str) or not classes:
        raise InputError(f"classes must be a sequence of at least one name, got {classes!r}")
    if source.labels is None:
        raise InputError(f"classes must not be given: {name} has no classes here, got {', '.join(classes)}")
    for given in classes:
        if given not in source.classes:
            raise InputError(f"classes must be among {', '.join(source.classes)}, got {given!r}")
    wanted = np.array([own in classes for own in source.classes])
    chosen = everything[wanted[source.labels]]
    names = tuple(itertools.compress(source.classes, wanted))
    if not len(chosen):
        raise InputError(f"classes must have images, but {name} has none of {', '.join(names)}")
    return names, (np.cumsum(wanted) - 1)[source.labels], chosen


def _resize_array(array: Tensor, chosen: np.ndarray, channels: int, size: int) -> Tensor:
    pixels = torch.empty(len(chosen), channels, size, size, dtype=torch.uint8)
    indices = torch.from_numpy(chosen).split(RESIZE_BLOCK)
    for block, some in zip(pixels.split(RESIZE_BLOCK), indices, strict=True):
        block.copy_(decoding.resize_batch(array[some], channels, size))
    return pixels


def _load_files(
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
    def items() -> Iterator[Item]:
        say(f"Decoding {len(chosen):,} images of {root} to {size}×{size}.")
        files, names = ([values[i] for i in chosen] for values in (source.files, source.names))
        return _decode(files, names, channels, size, workers)

    fingerprints = [(source.names[i], _fingerprint(source.files[i])) for i in chosen]
    folder = cache_folder("images") if cache is None else Path(os.path.expanduser(cache))
    path = folder / f"{_hash(request)[:32]}.images"
    key = _hash([decoding.VERSION, request, fingerprints])
    return load_or_build(path, key, items, (channels, size, size), say)


def _decode(
    files: Sequence[str], names: Sequence[str], channels: int, size: int, workers: int
) -> Iterator[Item]:
    """Yield each file's pixels, or why it cannot be read; then notes on 16-bit and 32-bit images."""
    dark: dict[int, int] = {}
    shared_white = _SharedWhite(files, names)

    def decode_one(position: int) -> Item:
        try:
            image = decoding.open_image(files[position])
            top = decoding.max_level_of_16_bits(image)
            if top is not None and 0 < top <= WHITE_12_BITS:
                dark[position] = top
            white = shared_white.white() if decoding.bit_depth(image) == 32 else None
            return decoding.to_pixels(image, channels, size, white)
        except Exception as error:  # Pillow's parsers may raise anything on bytes that are not an image
            return _reason(error)

    Image.init()  # else the first threads to meet a rarer format would race to run it and lose images
    if workers == 0:
        yield from map(decode_one, range(len(files)))
    else:
        with ThreadPoolExecutor(workers) as pool:  # Pillow releases the GIL to decode and resize
            for start in range(0, len(files), DECODE_BLOCK):
                yield from pool.map(decode_one, range(start, min(start + DECODE_BLOCK, len(files))))
    if dark:
        yield Note(
            f"{len(dark):,} 16-bit images have no level above {WHITE_12_BITS}, as 12-bit images do, and will "
            f"look dark because the white level is assumed to be 65535; if it is {WHITE_12_BITS}, multiply "
            f"their levels by 16: {_some([f'{names[i]} (up to {dark[i]})' for i in sorted(dark)])}."
        )
    if shared_white.note:
        yield Note(shared_white.note)


class _SharedWhite:
    """The common white level of all images of 32-bit integers, which preserves their relative brightness.

    The first request scans all files; without 32-bit images there is no scan.
    """

    def __init__(self, files: Sequence[str], names: Sequence[str]) -> None:
        self._images, self._lock = list(zip(files, names, strict=True)), Lock()
        self._white: int | None = None
        self.note = ""

    def white(self) -> int:
        with self._lock:
            if self._white is None:
                tops = ((name, decoding.peek(file, _max_level)) for file, name in self._images)
                known = {name: top for name, top in tops if top is not None}
                name = max(known, key=known.__getitem__, default="")
                self._white = decoding.white_level(known.get(name, 0))
                if known:
                    self.note = (
                        f"{len(known):,} images have 32-bit or signed integers, up to {known[name]} in "
                        f"{name}; the white level of all of them is assumed to be {self._white}, the "
                        "smallest 2^n - 1 that is not below."
                    )
            return self._white


def _max_level(image: Image.Image) -> int | None:
    """Return the largest level of an image of 32-bit integers; None for any other image."""
    return decoding.max_level(image) if decoding.bit_depth(image) == 32 else None


def _some(images: Sequence[str]) -> str:
    """Join the descriptions of the first images and count the others."""
    more = [f"and {len(images) - MAX_NAMED:,} more"] if len(images) > MAX_NAMED else []
    return "; ".join([*images[:MAX_NAMED], *more])


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or one_line(error)


def _fingerprint(file: str) -> tuple[int, int, int] | None:
    """Return (size, mtime, ctime), which change with the file's content; None for a dangling link.

    The ctime also changes with the permissions.
    """
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
