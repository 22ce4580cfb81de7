"""The precisions that GPU tests run in, and a share of the tests for each of several processes.

Compiling takes longest, a second or two of one core a kernel, and every test wants its own: ``make gpu`` runs
as many processes beside each other as DCGAN_SHARE=I/N tells apart.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from bench.cases import DTYPES


def share(count: int, which: str) -> set[int]:
    """The positions of share ``which`` = 'I/N', I from 0, of ``count`` tests, dealt from a shuffled pack.

    Raises:
        ValueError: it is no such share.
    """
    try:
        index, of = map(int, which.split("/"))
        if not 0 <= index < of:
            raise ValueError
    except ValueError:
        raise ValueError(f"DCGAN_SHARE must be I/N with 0 ≤ I < N, got {which!r}") from None
    order = list(range(count))
    random.Random(0).shuffle(order)  # neighbours differ in a parameter whose values may take longer or not
    return set(order[index::of])


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    which = os.environ.get("DCGAN_SHARE")
    if which is not None:
        kept = share(len(items), which)
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i not in kept])
        items[:] = [item for i, item in enumerate(items) if i in kept]


@pytest.fixture(params=DTYPES)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.backends.cudnn.allow_tf32 = before
