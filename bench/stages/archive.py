"""Everything a stage has left in its folder, as one file to be brought back."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

NAME = "gpu.tar.gz"
LIMIT = 16 << 20  # bytes
LONGEST = 512 << 10  # bytes of one log: its end, where errors are
ORDER = (".md", ".jsonl", ".json", ".txt")
"""What matters most first; other files are last. Of each kind the small ones come first."""
CLAIMS = "claims"
"""Folders of the tests' processes that say nothing to anybody else."""


def write(folder: Path, limit: int = LIMIT) -> tuple[Path, list[str]]:
    """The archive, and what did not fit in."""
    path = folder / NAME
    left_out = []
    size = 1024
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(_files(folder), key=_rank):
            data = file.read_bytes()
            if file.suffix == ".txt" and len(data) > LONGEST:
                data = f"(the last {LONGEST} bytes of {len(data)})\n".encode() + data[-LONGEST:]
            name = str(file.relative_to(folder))
            size += len(zlib.compress(data)) + 512  # a little more than it takes among the others
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
