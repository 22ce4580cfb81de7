"""The list of retired words: it finds them, and nothing in the repository uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import vocabulary

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("word", ["anew", "rivals", "told from", "as the seed", "GPU's multiprocessors"])
def test_retired_words_are_found(word: str) -> None:
    assert len(vocabulary.findings(f"first line\n# {word}, here")) == 1
    assert vocabulary.findings("renewed weights; the RNG seed; arrivals") == []


def test_the_vocabulary_check_reads_the_sources() -> None:
    done = subprocess.run(
        [sys.executable, "tests/vocabulary.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert done.returncode == 0
