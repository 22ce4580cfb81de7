"""A memory-mapped file of decoded pixels, so that a folder of images is decoded once and not in every run.

The file holds the pixels, uint8 [N, C, H, W], then a JSON text that describes them, then the length of that
text and a CRC-32 of everything before. It is written in a single pass as the pixels arrive and is renamed to
its final name once it is complete.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcgan.files import replacing

FORMAT = "dcgan-kernels images 2"
FOOTER = struct.Struct("<QI")
"""Length of the JSON text, then the CRC-32."""


class Note(NamedTuple):
    """A remark about the images that the user should see."""

    text: str


Item = np.ndarray | str | Note
"""An image's pixels, uint8 [C, H, W], contiguous; or why it cannot be read; or a note on all images."""


class Pixels(NamedTuple):
    """The readable images, uint8 [N, C, H, W]; the reasons for unreadable ones, by position; and notes."""

    pixels: Tensor
    unreadable: dict[int, str]
    notes: tuple[str, ...] = ()


class _Unusable(Exception):
    """The file is damaged, of another format, or of other images."""


def load_or_build(
    path: Path,
    key: str,
    items: Callable[[], Iterable[Item]],
    shape: tuple[int, int, int],
    say: Callable[[str], None],
) -> Pixels:
    """Map the cache file copy-on-write; if it is missing or unusable, build it from ``items()`` first.

    The whole file is read once to verify it. While it is being built, memory holds only the items in flight.
    If no file can be written (no permission or no space), the same content is kept in memory.

    Args:
        path: the file; its folder is created if it does not exist.
        key: identifies the images; a file with another key is rebuilt.
        items: called to produce the images if the file has to be built.
        shape: [C, H, W].
        say: receives progress messages.
    """
    try:
        return _read(path, key)
    except _Unusable as why:
        say(f"The cached images in {path} are {why}; rebuilding them.")
    except OSError:  # it does not exist yet or cannot be read; writing it will report the latter
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as file:
            _write(file, key, items(), shape)
        return _read(path, key)
    except (OSError, _Unusable) as error:
        say(f"Keeping the images in memory, because {path.parent} cannot be used as a cache: {error}.")
    memory = io.BytesIO()
    _write(memory, key, items(), shape)
    return _parse(memory.getbuffer(), key)


def _write(file: BinaryIO, key: str, items: Iterable[Item], shape: tuple[int, int, int]) -> None:
    count = crc = 0
    unreadable: dict[int, str] = {}
    notes: list[str] = []
    for item in items:
        if isinstance(item, Note):
            notes.append(item.text)
        elif isinstance(item, str):
            unreadable[count + len(unreadable)] = item
        else:
            file.write(item.data)
            crc = zlib.crc32(item.data, crc)
            count += 1
    header = {"format": FORMAT, "key": key, "shape": [count, *shape]}
    text = json.dumps(header | {"unreadable": unreadable, "notes": notes}).encode()
    file.write(text + FOOTER.pack(len(text), zlib.crc32(text, crc)))


def _read(path: Path, key: str) -> Pixels:
    """Map the file. Raises OSError (missing, no permission) or _Unusable, which states the defect."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if not length:  # which cannot be mapped
            raise _Unusable("damaged")
        # Copy-on-write, so that writes to the tensor never reach the file. Where Python knows the flag, no
        # memory is reserved for the copies; reserving it would fail for a file larger than the memory.
        if hasattr(mmap, "MAP_NORESERVE"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_NORESERVE
            mapped = mmap.mmap(file.fileno(), length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY)
    return _parse(memoryview(mapped), key)


def _parse(content: memoryview, key: str) -> Pixels:
    """Return tensors that share ``content``, which they keep alive. Raises _Unusable."""
    end = len(content) - FOOTER.size
    if end < 0:
        raise _Unusable("damaged")
    text_length, crc = FOOTER.unpack_from(content, end)
    start = end - text_length
    if start < 0 or zlib.crc32(content[:end]) != crc:
        raise _Unusable("damaged")
    header = json.loads(content[start:end].tobytes())
    if header["format"] != FORMAT or header["key"] != key:
        raise _Unusable("out of date")
    pixels = torch.frombuffer(content, dtype=torch.uint8)[:start].view(header["shape"])
    unreadable = {int(position): why for position, why in header["unreadable"].items()}
    return Pixels(pixels, unreadable, tuple(header["notes"]))
