"""Fixtures of the evaluation's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcgan.evaluation import classifier, scores


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, short classifier training, and no Inception weights."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(classifier, "MIN_STEPS", 8)
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(scores, "SUBSETS", 10)
    return tmp_path / "cache" / "classifiers"
