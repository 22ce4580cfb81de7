"""Diagnosis of files that were given as weights but cannot be loaded: what they are and how to convert them.

Files are identified by their content, never by their name, and nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

HEAD_BYTES = 1024  # enough to identify a file
LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # begins files of torch.save from before it wrote zip archives

_SAVE = 'torch.save({}, "generator.pth")'
_SAVE_IN_TORCH = "save the weights from PyTorch with " + _SAVE.format("model.state_dict()")
_MAGICS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer: fetch the file itself with git lfs pull",
    ),
    (b"\x1f\x8b", "compressed with gzip: decompress it with gunzip {name}"),
    (b"BZh", "compressed with bzip2: decompress it with bunzip2 {name}"),
    (b"\xfd7zXZ\0", "compressed with xz: decompress it with unxz {name}"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard: decompress it with unzstd {name}"),
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file, for example from Keras: {_SAVE_IN_TORCH}"),
    (b"\x93NUMPY", f"a NumPy array: {_SAVE_IN_TORCH}"),
)


def explain(path: Path, error: Exception) -> str:
    """Return why ``torch.load(path, weights_only=True)`` raised ``error``, to follow the path in a message.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    found = _describe(path)
    if found is not None:
        return f"is {found}"
    return _explain_refusal(path, error) or (
        "is not a loadable checkpoint: it is truncated, damaged or of another format"
    )


def _describe(path: Path) -> str | None:
    """Return what the file is, as the end of a sentence "{path} is …"; None if it may be a PyTorch file."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "empty: write or download it again"
    for magic, what in _MAGICS:
        if head.startswith(magic):
            return what.format(name=path.name)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return (
            "an HTML page, probably the web page of the file: download the file itself with "
            "curl -L -o generator.pth and its download URL"
        )
    if head[257:262] == b"ustar":
        return f"a tar archive: extract it with tar -xf {path.name} and pass the file inside"
    if head[:1] == b"\x08" and head[2:3] == b"\x12":  # the IR version, then the producer's name
        return f"an ONNX model: save the original PyTorch network with {_SAVE.format('model.state_dict()')}"
    if zipfile.is_zipfile(path):
        return _describe_archive(path)
    if head[:1] == b"\x80" and LEGACY_MAGIC not in head[:64] and (len(head) > 64 or head.endswith(b".")):
        content = f'pickle.load(open({_quoted(path)}, "rb"))'
        return f"a pickle that torch.save did not write: if you trust it, run {_SAVE.format(content)}"
    return None


def _explain_refusal(path: Path, error: Exception) -> str | None:
    """Explain why a file written by torch.save is refused; None if its content is not the reason."""
    loaded = f"torch.load({_quoted(path)}, weights_only=False)"
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    try:
        protocol, operation, argument = _first_operation(path)
    except (ValueError, IndexError, zipfile.BadZipFile):
        return None
    if found is None:
        if protocol == 2:
            return None
        return f"uses pickle protocol {protocol} instead of 2: if you trust it, run {_SAVE.format(loaded)}"
    if operation == "EMPTY_DICT" or argument == "collections OrderedDict":
        weights = f'{loaded}["state_dict"]'
        what = f"holds a dict that contains more than tensors and plain values, {found[1]}"
    else:
        weights = f"{loaded}.state_dict()"
        what = f"holds a whole object, {found[1]}, instead of its state dict"
    return (
        f"{what}, and is not trusted to run code. If you trust it and have its classes, save only the "
        f"weights: {_SAVE.format(weights)}"
    )


def _describe_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.namelist()
    except zipfile.BadZipFile:
        return None
    names = {*listed, *(name.partition("/")[2] for name in listed)}  # also below the archive's root folder
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        what, loaded = "a TorchScript program", f"torch.jit.load({_quoted(path)}).state_dict()"
    elif "archive_format" in names or "serialized_exported_program.json" in names:
        what, loaded = "a torch.export program", f"torch.export.load({_quoted(path)}).state_dict"
    elif "data.pkl" in names:
        return None
    else:
        return f"a zip archive of other files: extract it with unzip {path.name} and pass the file inside"
    return f"{what}: save only its weights with {_SAVE.format(loaded)}"


def _first_operation(path: Path) -> tuple[object, str, object]:
    """Return the pickle protocol, first opcode and its argument in a file written by torch.save.

    The first opcode reveals the type of the outermost object. The pickle is only parsed, not executed.

    Raises:
        ValueError, IndexError, zipfile.BadZipFile: torch.save did not write the file.
    """
    protocol: object = 0
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            inside = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            file: IO[bytes] = stack.enter_context(archive.open(inside[0]))
        else:
            file = stack.enter_context(path.open("rb"))
            for _ in range(3):  # the magic number, the protocol version and the system information
                for _ in pickletools.genops(file):
                    pass
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "PROTO":
                protocol = argument
            elif operation.name != "FRAME":
                return protocol, operation.name, argument
    return protocol, "", None


def _quoted(path: Path) -> str:
    return json.dumps(path.name, ensure_ascii=False)
