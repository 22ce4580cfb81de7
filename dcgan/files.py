"""Atomic replacement of files, and pointer files (symlinks or their text equivalent)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dcgan.errors import RunError

MAX_NAME_BYTES = 255  # limit of common file systems


def cache_folder(name: str) -> Path:
    """Return ``$DCGAN_CACHE/name``, or ``~/.cache/dcgan-kernels/name`` if that variable is not set."""
    return Path(os.environ.get("DCGAN_CACHE") or Path.home() / ".cache" / "dcgan-kernels") / name


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that atomically replaces ``path`` when the block ends without an error.

    Args:
        path: the file to replace, in an existing folder.
        durable: fsync the content before the rename and the folder after it, so that not even a power cut
            leaves a partial file or none.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; ``path`` is unchanged.
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


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Do the same as :func:`replacing`, but raise RunError, which names ``path`` and the reason."""
    with reporting_errors(str(path)), replacing(path) as file:
        yield file


@contextmanager
def reporting_errors(target: str) -> Iterator[None]:
    """Turn an OSError in the block into a RunError, "cannot write ``target``" and the reason."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error


def sweep(folder: Path) -> None:
    """Remove the temporary files that processes killed within :func:`replacing` left behind."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """fsync the folder's entries where the system supports it.

    Windows cannot open folders, and some network drives cannot synchronise them.
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
    """Atomically make ``link`` a pointer file to ``name`` in the same folder.

    A pointer file is a relative symlink, or where symlinks are not supported (exFAT, network drives, Windows
    without the privilege) a text file with the name as its only line. :func:`read_pointer` reads both.

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


def read_pointer(link: Path) -> Path | None:
    """Return the path that the pointer file ``link`` refers to, whether or not that exists.

    Returns None if ``link`` is missing or not a pointer file. A text file is a pointer file only if it
    contains nothing but a file name without a folder.
    """
    if link.is_symlink():
        return link.parent / link.readlink()
    try:
        with link.open("rb") as file:
            text = file.read(MAX_NAME_BYTES + 2)
    except OSError:
        return None
    name = re.fullmatch(rb"(\w[\w.-]*)\r?\n?", text)
    return link.with_name(name[1].decode()) if name else None
