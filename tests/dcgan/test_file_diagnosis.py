"""Diagnosis of files that hold no loadable weights: errors say what they are and how to convert them."""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import pathlib
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from dcgan import checkpoint, export, models, pretrained
from dcgan.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> models.Generator:
    torch.manual_seed(0)
    return models.Generator(6, 1, 4, 32)


def same(path: Path) -> bool:
    found, state = pretrained.generator(path, engine="reference").state_dict(), network().state_dict()
    return all(torch.equal(found[key], state[key]) for key in state)


QUIET = (  # warnings of the exporters and loaders used here
    "ignore:.torch.jit:FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore:Detected pickle protocol",
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 13330000\n"


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("generator.pth"), io.BytesIO())


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/generator.pth", b"")


def written(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (written(b""), "is empty: write or download it again"),
    "HTML": (written(b"<!DOCTYPE html><html>"), "is an HTML page.*: download the file itself"),
    "HTML in capitals": (written(b"\n\n  <!doctype HTML PUBLIC>"), "is an HTML page"),
    "HTML with a byte order mark": (written(b"\xef\xbb\xbf<HTML lang=en>"), "is an HTML page"),
    "Git LFS": (written(POINTER.encode()), "is a Git LFS pointer: .*git lfs pull"),
    "gzip": (written(gzip.compress(b"x" * 99)), r"is compressed with gzip: .* gunzip file\."),
    "tar": (tar, "is a tar archive: extract it"),
    "zip": (zipped, "is a zip archive of other files: extract it"),
    "ONNX": (
        lambda path: export.onnx(network(), path),
        r"is an ONNX model: .*torch\.save\(model\.state_dict",
    ),
    "torch.export": (lambda path: export.torch_export(network(), path), r"is a torch\.export program: "),
    "TorchScript": (
        lambda path: torch.jit.script(nn.Sequential(nn.Linear(2, 2))).save(str(path)),
        "is a TorchScript program: ",
    ),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps(network().state_dict())),
        "is a pickle that torch.save did not write: if you trust it, ",
    ),
    "text": (written(b"hello"), "is not a loadable checkpoint"),
}


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_the_error_says_what_the_file_is(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    write, message = FOREIGN[kind]
    write(path)
    for read in (pretrained.generator, checkpoint.read, checkpoint.load):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} {message}"):
            read(path)


class Settings:
    """A class of another program, which is not importable when its file is read."""


def saved(content: Any, **arguments: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **arguments)


def container(extra: Any) -> dict[str, Any]:
    return {"state_dict": network().state_dict(), "hyper_parameters": extra}


LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}
REFUSED = {
    "a module": (saved(network()), r"a whole object, dcgan\.models\.Generator, instead of its state dict"),
    "a module, legacy": (saved(network(), **LEGACY), r"a whole object, dcgan\.models\.Generator"),
    "a Namespace": (saved(container(argparse.Namespace(lr=1))), "a dict .*, argparse.Namespace"),
    "a Namespace, legacy": (saved(container(argparse.Namespace(lr=1)), **LEGACY), "a dict .*, argparse.Name"),
    "a class": (saved(container(Settings())), r"a dict .*Settings"),
    "a path": (saved(container(pathlib.PurePosixPath("a"))), "a dict .*, pathlib.PurePosixPath"),
    "a function": (saved(container(functools.partial(int))), "a dict .*, functools.partial"),
    "another protocol": (saved(container(1), pickle_protocol=4), "uses pickle protocol 4"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_names_the_object_and_a_working_conversion(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, message = REFUSED[kind]
    write(tmp_path / "file.ckpt")
    with pytest.raises(CheckpointError, match=message) as raised:
        pretrained.generator(tmp_path / "file.ckpt")
    monkeypatch.chdir(tmp_path)
    line = re.search(r"torch\.save\(.*", str(raised.value))
    assert line is not None
    exec(line[0], {"torch": torch})
    assert same(tmp_path / "generator.pth")


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("kind", ["pickle", "TorchScript", "torch.export"])
def test_the_conversions_of_programs_and_pickles_work(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {"TorchScript": lambda path: torch.jit.trace(network().eval(), torch.zeros(1, 6)).save(str(path))}
    write.get(kind, FOREIGN[kind][0])(tmp_path / "file.pth")
    with pytest.raises(CheckpointError) as raised:
        pretrained.generator(tmp_path / "file.pth")
    monkeypatch.chdir(tmp_path)
    line = re.search(r"torch\.save\(.*", str(raised.value))
    assert line is not None
    exec(line[0], {"torch": torch, "pickle": pickle})
    assert same(tmp_path / "generator.pth")


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".pt", ""])
def test_safetensors_under_another_suffix(suffix: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(network().state_dict(), tmp_path / "plain.safetensors")
    export.safetensors(network(), tmp_path / "ours.safetensors")
    for name in ("plain", "ours"):
        (tmp_path / f"{name}.safetensors").rename(tmp_path / f"{name}{suffix}")
        assert same(tmp_path / f"{name}{suffix}")


def test_torch_under_the_suffix_of_safetensors(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "file.safetensors")
    assert same(tmp_path / "file.safetensors")


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_damaged_archives_are_reported_as_damaged(share: float, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    for write in (saved(network().state_dict()), saved(network().state_dict(), **LEGACY)):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match="it is truncated, damaged or of another format"):
            pretrained.generator(path)
