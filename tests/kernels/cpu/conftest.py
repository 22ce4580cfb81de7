"""Fixtures for the tests of the native engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import native


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Fill new memory with NaN, which reveals elements that are not written."""
    with native.fresh_memory_is_nan():
        yield


@pytest.fixture
def threads_restored() -> Iterator[None]:
    """Restore the number of threads after a test that changes it."""
    yield
    torch.set_num_threads(native.THREADS)
