"""Downloads through torchvision and their failures; the files of CIFAR-10 and CelebA."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from dcgan.data import load
from dcgan.errors import InputError
from tests.support.image_files import RAW, luma, noise, pixels_of_file, resized, save, write_idx

EXPECTED_FOLDER = {**RAW, "cifar10": "cifar-10-batches-py", "celeba": "celeba/img_align_celeba"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each download create its folders, as torchvision does, and then fail."""

    def refuse(self: torchvision.datasets.VisionDataset) -> None:
        folder = Path(self.root)
        if isinstance(self, torchvision.datasets.MNIST):
            folder = Path(self.raw_folder)
        elif isinstance(self, torchvision.datasets.CelebA):
            folder /= self.base_folder
        folder.mkdir(parents=True, exist_ok=True)
        raise URLError("Name or service not known")

    for kind in (torchvision.datasets.MNIST, torchvision.datasets.CIFAR10, torchvision.datasets.CelebA):
        monkeypatch.setattr(kind, "download", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", EXPECTED_FOLDER)
@pytest.mark.parametrize("exists", [True, False])
def test_the_error_without_network_access_gives_alternatives(
    name: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only folders that existed before the download are left; a missing default root may be created."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "given" if exists else Path("data")
    if exists:
        root.mkdir()
    messages: list[str] = []
    with pytest.raises(InputError) as error:
        load(name, root, say=messages.append)
    for words in (str(root / EXPECTED_FOLDER[name]), "Name or service not known", "'digits'", "'fake'"):
        assert words in str(error.value)
    assert f"Downloading {name} into {root}" in messages[0]
    assert list(tmp_path.rglob("*")) == ([root] if exists else [])


@pytest.mark.usefixtures("no_network")
def test_files_of_an_incomplete_download_are_kept(tmp_path: Path) -> None:
    part = tmp_path / EXPECTED_FOLDER["mnist"] / "train-images-idx3-ubyte.gz"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"part")
    with pytest.raises(InputError, match=r"failed: .*Name or service not known"):
        load("mnist", tmp_path)
    assert part.read_bytes() == b"part"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", EXPECTED_FOLDER)
def test_a_missing_root_other_than_the_default_is_not_created(name: str, tmp_path: Path) -> None:
    root = tmp_path / "dta"
    with pytest.raises(InputError) as error:
        load(name, root)
    expected = f"root {str(root)!r} does not exist; create it to let {name} be downloaded into it"
    assert str(error.value) == expected
    assert not root.exists()


@pytest.mark.parametrize("name", EXPECTED_FOLDER)
@pytest.mark.parametrize("exists", [True, False])
def test_download_disabled(name: str, exists: bool, tmp_path: Path) -> None:
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    with pytest.raises(InputError) as error:
        load(name, root, download=False)
    place = str(root / EXPECTED_FOLDER[name]) if exists else f"root {str(root)!r} does not exist"
    for words in (place, "'digits'", "'folder'"):
        assert words in str(error.value)
    assert root.exists() == exists


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_root_that_is_not_writable(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"failed: .*(Not a directory|File exists)") as error:
        load(name, tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


def test_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready"
    made = write_idx(ready, "mnist", packed=False)

    def fetch(self: torchvision.datasets.MNIST) -> None:
        shutil.copytree(ready, self.root, dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    monkeypatch.chdir(tmp_path)
    images = load("mnist", image_size=32)
    assert (tmp_path / "data" / RAW["mnist"]).is_dir()
    assert np.abs(images.pixels[3].numpy() - resized(made["train"][3], 32)).max() <= 1


# --- CIFAR-10, CelebA ---------------------------------------------------------------------------------------


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = {"data_batch_1": noise(4, 3, 32, 32), "test_batch": noise(2, 3, 32, 32, seed=1)}
    sums = {}
    for file in (*pixels, "batches.meta"):
        content: dict[str, object] = {"label_names": ["airplane", "bird"]}
        if file in pixels:
            count = len(pixels[file])
            content = {"data": pixels[file].reshape(count, -1), "labels": [i % 2 for i in range(count)]}
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        sums[file] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    for split, file in (("train", "data_batch_1"), ("test", "test_batch")):
        images = load("cifar10", tmp_path, image_size=32, split=split, download=False)  # type: ignore[arg-type]
        assert np.array_equal(images.pixels.numpy(), pixels[file])
        assert images.classes == ("airplane", "bird")
        assert images.labels is not None
        assert images.labels.tolist() == [i % 2 for i in range(len(pixels[file]))]
    grey = load("cifar10", tmp_path, image_size=32, channels=1)
    expected = luma(pixels["data_batch_1"].transpose(0, 2, 3, 1)).astype(int)
    assert np.abs(grey.pixels[:, 0].numpy() - expected).max() <= 1

    (folder / "data_batch_1").write_bytes(b"something else, whose MD5 is not the published one")
    with pytest.raises(InputError, match="damaged"):
        load("cifar10", tmp_path, image_size=32, download=False)


def test_celeba(tmp_path: Path) -> None:
    parts = [0, 0, 1, 2, 0]
    for i in range(5):
        save(tmp_path / "celeba" / "img_align_celeba" / f"{i:06}.jpg", noise(218, 178, 3, seed=i))
    partition = tmp_path / "celeba" / "list_eval_partition.txt"
    partition.write_text("".join(f"{i:06}.jpg {part}\n" for i, part in enumerate(parts)))
    for split, numbers in (("train", [0, 1, 4]), ("test", [3])):
        images = load("celeba", tmp_path, image_size=32, split=split)  # type: ignore[arg-type]
        assert images.pixels.shape == (len(numbers), 3, 32, 32)
        assert images.labels is None
        for got, i in zip(images.pixels, numbers, strict=True):
            file = tmp_path / "celeba" / "img_align_celeba" / f"{i:06}.jpg"
            assert torch.equal(got, pixels_of_file(file))
    with pytest.raises(InputError, match="classes must not be given: celeba has no classes here"):
        load("celeba", tmp_path, classes=["Smiling"])
    partition.write_text("000000.jpg 1\n")
    with pytest.raises(InputError, match="lists no image of the split 'train'"):
        load("celeba", tmp_path, download=False)
    partition.write_text("000000.jpg\n")
    with pytest.raises(InputError, match=r"list_eval_partition\.txt is damaged"):
        load("celeba", tmp_path, download=False)
    partition.unlink()
    with pytest.raises(InputError, match=r"list_eval_partition\.txt, .*, cannot be read"):
        load("celeba", tmp_path, download=False)
