"""Files that are either the old ones or the new ones, never half of either."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LONGEST_NAME = 255  # bytes that file systems allow


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
    """Wait until the disk knows the folder's entries, where the system can be asked to.

    Windows opens no folders, and some network drives synchronise none.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def point(link: Path, name: str) -> None:
    """Make ``link`` a mark of its neighbour ``name``, in one move.

    A mark is a relative symbolic link, or where there can be none (exFAT, network drives, Windows without the
    privilege) a text file of that one line. :func:`pointed` reads both.

    Raises:
        OSError: neither can be written.
    """
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name)
    except (OSError, NotImplementedError):
        with replacing(link, durable=True) as file:
            file.write(f"{name}\n".encode())
    else:
        os.replace(temporary, link)


def pointed(link: Path) -> Path | None:
    """The neighbour that :func:`point` made ``link`` a mark of, whether or not it is there.

    None where ``link`` is missing or no mark. A text is one only where it is nothing but the name of a file,
    without a folder.
    """
    if link.is_symlink():
        return link.parent / link.readlink()
    try:
        with link.open("rb") as file:
            text = file.read(LONGEST_NAME + 2)
    except OSError:
        return None
    name = re.fullmatch(rb"(\w[\w.-]*)\r?\n?", text)
    return link.with_name(name[1].decode()) if name else None
