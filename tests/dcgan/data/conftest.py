"""Fixtures of the datasets' tests: a cache of their own, no network, and a folder of images."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest

from tests.support.image_files import noise, save


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "caches"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two classes of three and two images, at different depths."""
    root = tmp_path / "images"
    for i, name in enumerate(["cat/3.png", "cat/10.JPG", "cat/deep/er/1.png", "dog/a.webp", "dog/b.ppm"]):
        save(root / name, noise(40, 40, 3, seed=i))
    return root
