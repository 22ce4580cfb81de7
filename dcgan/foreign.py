"""Files that are given for weights and hold none that can be read: what each is, and the one line that helps.

A file is known by its content, never by its name, and nothing in it is executed.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

HEAD = 1024  # bytes that tell what a file is
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # the number that begins a file of torch.save before its archives

_SAVE = 'torch.save({}, "generator.pth")'
_IN_TORCH = _SAVE.format("model.state_dict()") + " in PyTorch"
_BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: get what it points to, git lfs pull"),
    (b"\x1f\x8b", "compressed by gzip: unpack it, gunzip {name}"),
    (b"BZh", "compressed by bzip2: unpack it, bunzip2 {name}"),
    (b"\xfd7zXZ\0", "compressed by xz: unpack it, unxz {name}"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard: unpack it, unzstd {name}"),
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file, as of Keras: {_IN_TORCH}"),
    (b"\x93NUMPY", f"a NumPy array: {_IN_TORCH}"),
)


def described(path: Path) -> str | None:
    """What the file is, such that "{path} is …" is a sentence; None where it may well be of PyTorch.

    Raises:
        OSError: it is missing or cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "empty: write or download it again"
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what.format(name=path.name)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return (
            "an HTML page, as of a site that shows or guards the file: download the file itself, "
            "curl -L -o generator.pth with the address of its download"
        )
    if head[257:262] == b"ustar":
        return f"a tar archive: unpack it, tar -xf {path.name}, and give the file inside"
    if head[:1] == b"\x08" and head[2:3] == b"\x12":  # its version, then who made it
        return f"an ONNX model: {_SAVE.format('model.state_dict()')} of the network that it was made from"
    if zipfile.is_zipfile(path):
        return _archive(path)
    if head[:1] == b"\x80" and LEGACY not in head[:64] and (len(head) > 64 or head.endswith(b".")):
        content = f'pickle.load(open({_quoted(path)}, "rb"))'
        return f"a pickle that torch.save did not write: where you trust it, {_SAVE.format(content)}"
    return None


def refused(path: Path, error: Exception) -> str | None:
    """What a file of torch.save holds for which ``torch.load(path, weights_only=True)`` raised ``error``.

    A sentence's end as :func:`described`'s: None where that was for another reason.
    """
    loaded = f"torch.load({_quoted(path)}, weights_only=False)"
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    try:
        protocol, operation, argument = _begins(path)
    except (ValueError, IndexError, zipfile.BadZipFile):
        return None
    if found is None:
        if protocol == 2:
            return None
        return f"is of pickle protocol {protocol} and not 2: where you trust it, {_SAVE.format(loaded)}"
    if operation == "EMPTY_DICT" or argument == "collections OrderedDict":
        weights = f'{loaded}["state_dict"]'
        what = f"holds a dict with more than tensors and plain values in it, {found[1]}"
    else:
        weights = f"{loaded}.state_dict()"
        what = f"holds a whole object, {found[1]}, and not its state dict"
    return (
        f"{what}, and is not trusted to run code. Where you trust it and have its classes, save the weights "
        f"alone: {_SAVE.format(weights)}"
    )


def _archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.namelist()
    except zipfile.BadZipFile:
        return None
    names = {*listed, *(name.partition("/")[2] for name in listed)}  # within the archive's own folder too
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        what, loaded = "a TorchScript program", f"torch.jit.load({_quoted(path)}).state_dict()"
    elif "archive_format" in names or "serialized_exported_program.json" in names:
        what, loaded = "a torch.export program", f"torch.export.load({_quoted(path)}).state_dict"
    elif "data.pkl" in names:
        return None
    else:
        return f"a zip archive of other files: unpack it, unzip {path.name}, and give the file inside"
    return f"{what}: save its weights alone, {_SAVE.format(loaded)}"


def _begins(path: Path) -> tuple[object, str, object]:
    """The protocol of a file of torch.save, and the first operation, which tells the outermost object's kind.

    Its pickle is looked at, not run.

    Raises:
        ValueError, IndexError, zipfile.BadZipFile: it is no such file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(inside[0]) as file:
                return _first(file)
    with path.open("rb") as file:
        for _ in range(3):  # the number, the version, the system
            for _ in pickletools.genops(file):
                pass
        return _first(file)


def _first(file: IO[bytes]) -> tuple[object, str, object]:
    protocol: object = 0
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "PROTO":
            protocol = argument
        elif operation.name != "FRAME":
            return protocol, operation.name, argument
    return protocol, "", None


def _quoted(path: Path) -> str:
    return json.dumps(path.name, ensure_ascii=False)
