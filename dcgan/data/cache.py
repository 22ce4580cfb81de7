"""Pixels in a file that is mapped into memory, so that a folder of images is decoded once and not every run.

A file is the pixels, uint8 [N, C, H, W], then a JSON text that says what they are, then that text's length
and a CRC-32 of all before. It is written as the pixels come, in one pass, and moved to its name when whole.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcgan.files import cache_folder, replacing

FORMAT = "dcgan-kernels images 2"
END = struct.Struct("<QI")


class Note(NamedTuple):
    """What a user should know of the images."""

    text: str


Item = np.ndarray | str | Note
"""An image's pixels, uint8 [C, H, W], contiguous; or why there are none; or a note, which is of no image."""


class Pixels(NamedTuple):
    """uint8 [N, C, H, W] of the images that could be read; by position, why the others could not; notes."""

    pixels: Tensor
    unreadable: dict[int, str]
    notes: tuple[str, ...] = ()


class _Unusable(Exception):
    """A file that is damaged, foreign, or of other images."""


def default_folder() -> Path:
    """``$DCGAN_CACHE/images``, or ``~/.cache/dcgan-kernels/images``."""
    return cache_folder("images")


def in_memory(items: Iterable[Item], count: int, shape: tuple[int, int, int]) -> Pixels:
    """``count`` items of ``shape``, without a file."""
    pixels = torch.empty(count, *shape, dtype=torch.uint8)
    rows, found = pixels.numpy(), 0
    unreadable: dict[int, str] = {}
    notes = []
    for item in items:
        if isinstance(item, Note):
            notes.append(item.text)
        elif isinstance(item, str):
            unreadable[found + len(unreadable)] = item
        else:
            rows[found] = item
            found += 1
    return Pixels(pixels[:found], unreadable, tuple(notes))


def kept(
    path: Path,
    key: str,
    items: Callable[[], Iterable[Item]],
    shape: tuple[int, int, int],
    say: Callable[[str], None],
) -> Pixels | None:
    """What the file holds, mapped copy-on-write; made from ``items()`` where it holds nothing of use.

    The whole file is read once to check it. While it is made, memory holds only the items under way.

    Args:
        path: the file; its folder is made where it is missing.
        key: of what the images are; a file with another key is made anew.
        items: called for the images where they have to be made.
        shape: [C, H, W].
        say: is told what happens.

    Returns:
        The pixels; None where no file can be kept, for want of permission or room.
    """
    try:
        return _read(path, key)
    except _Unusable as why:
        say(f"The cached images in {path} are {why}; they are made anew.")
    except OSError:  # there is none yet, or it cannot be read: writing it will tell
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, key, items(), shape)
        return _read(path, key)
    except (OSError, _Unusable) as error:
        say(f"Images are kept in memory, as {path.parent} cannot be used as a cache: {error}.")
        return None


def _write(path: Path, key: str, items: Iterable[Item], shape: tuple[int, int, int]) -> None:
    """Raises OSError: no permission, no room; nothing is left then."""
    count = crc = 0
    unreadable: dict[int, str] = {}
    notes = []
    with replacing(path, durable=True) as file:
        for item in items:
            if isinstance(item, Note):
                notes.append(item.text)
            elif isinstance(item, str):
                unreadable[count + len(unreadable)] = item
            else:
                file.write(item.data)
                crc = zlib.crc32(item.data, crc)
                count += 1
        about = {
            "format": FORMAT,
            "key": key,
            "shape": [count, *shape],
            "unreadable": unreadable,
            "notes": notes,
        }
        text = json.dumps(about).encode()
        file.write(text + END.pack(len(text), zlib.crc32(text, crc)))


def _read(path: Path, key: str) -> Pixels:
    """Raises OSError: no such file, or no permission. Raises _Unusable: says what is wrong with it."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < END.size:
            raise _Unusable("damaged")
        # Copy-on-write, so that nothing done to the tensor reaches the file. Where Python knows the flag, no
        # memory is reserved for the copies, which would fail for a file larger than the memory.
        if hasattr(mmap, "MAP_NORESERVE"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_NORESERVE
            mapped = mmap.mmap(file.fileno(), length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY)
    end = length - END.size
    text_length, crc = END.unpack_from(mapped, end)
    start = end - text_length
    with memoryview(mapped) as view, view[:end] as checked:
        if start < 0 or zlib.crc32(checked) != crc:
            raise _Unusable("damaged")
    about = json.loads(mapped[start:end])
    if about["format"] != FORMAT or about["key"] != key:
        raise _Unusable("not of the images as they are now")
    pixels = torch.frombuffer(mapped, dtype=torch.uint8)[:start].view(about["shape"])
    unreadable = {int(position): why for position, why in about["unreadable"].items()}
    return Pixels(pixels, unreadable, tuple(about["notes"]))
