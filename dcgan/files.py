"""Files that are either the old ones or the new ones, never half of either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_folder(name: str) -> Path:
    """``$DCGAN_CACHE/name``, or without that variable ``~/.cache/dcgan-kernels/name``."""
    return Path(os.environ.get("DCGAN_CACHE") or Path.home() / ".cache" / "dcgan-kernels") / name


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write in place of ``path``, which it takes in one move once the block ends without an error.

    Args:
        path: the file, in a folder that exists.
        durable: wait until the disk has the content before the move, and the move afterwards, so that not
            even a power cut leaves half a file, or none.

    Raises:
        OSError: the folder is missing or does not let us write, or the disk is full; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove what :func:`replacing` has left there in processes that were killed while they wrote."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the disk knows the folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(link: Path, name: str) -> None:
    """Make ``link`` a relative symbolic link to its neighbour ``name``, in one move."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)
