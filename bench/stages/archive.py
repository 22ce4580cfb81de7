"""Pack the output directory of a stage into one archive."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

NAME = "gpu.tar.gz"
LIMIT = 16 << 20  # bytes
MAX_LOG = 512 << 10  # bytes kept of each log, from its end, where errors are
ORDER = (".md", ".jsonl", ".json", ".txt")
"""Archive order, most important first; other files are last. Within a kind, small files come first."""
CLAIMS = "claims"
"""Folders with the claims of test processes (see :mod:`.deal`), which are left out."""


def write(folder: Path, limit: int = LIMIT) -> tuple[Path, list[str]]:
    """Write the archive. Return its path and the names of the files that did not fit."""
    path = folder / NAME
    left_out = []
    size = 1024
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(_files(folder), key=_rank):
            data = file.read_bytes()
            if file.suffix == ".txt" and len(data) > MAX_LOG:
                data = f"(the last {MAX_LOG} bytes of {len(data)})\n".encode() + data[-MAX_LOG:]
            name = str(file.relative_to(folder))
            # An upper bound: compressed together with the others it takes less.
            size += len(zlib.compress(data)) + 512
            if size > limit:
                left_out.append(name)
                size -= len(zlib.compress(data)) + 512
                continue
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size, entry.mtime = len(data), int(file.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(data))
    return path, left_out


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != NAME]
    return [path for path in found if CLAIMS not in path.relative_to(folder).parts]


def _rank(path: Path) -> tuple[int, int, str]:
    kind = ORDER.index(path.suffix) if path.suffix in ORDER else len(ORDER)
    return kind, path.stat().st_size, str(path)
