"""Providers that misbehave, for ``--providers rogue:NAME``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from torch import Tensor, nn

Runner = Callable[[Tensor], Tensor]


def wrong(model: nn.Module, example: Tensor, threads: int) -> Runner:
    return lambda x: model(x) * 1.03


def stale(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Right once: gives its first answer for ever."""
    answer = model(example)
    return lambda x: answer


def raises(model: nn.Module, example: Tensor, threads: int) -> Runner:
    raise RuntimeError("no kernel\nand a second line")


def dies(model: nn.Module, example: Tensor, threads: int) -> Runner:
    return lambda x: os._exit(7)


def dies_later(model: nn.Module, example: Tensor, threads: int) -> Runner:
    """Passes the check, then dies while it is timed."""
    calls = 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            os._exit(7)
        output: Tensor = model(x)
        return output

    return run


def hangs(model: nn.Module, example: Tensor, threads: int) -> Runner:
    time.sleep(3600)
    raise AssertionError
