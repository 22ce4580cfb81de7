"""Compile launches in parallel processes, since each takes a second or two and tuning needs hundreds.

The processes rebuild the launches from specs and leave the code in Triton's on-disk cache, where the launches
of this process find it.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType

import torch
import triton

from ..tiles import Tile
from . import simulated_gpu
from .layers import Layer


def compile_layer(layer: Layer, tile: Tile, sms: int) -> None:
    """Compile a layer's launches into Triton's cache."""
    for launch in layer.launches(tile, sms).ordered():
        launch.compile()


def _start() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(simulated_gpu.Driver())


class Compilers:
    """A context manager for the compiler processes; without a GPU they compile for a simulated H100."""

    def __init__(self, processes: int | None = None) -> None:
        count = processes or max(1, len(os.sched_getaffinity(0)) - 1)
        context = multiprocessing.get_context("spawn")  # CUDA contexts do not survive a fork
        self._pool = ProcessPoolExecutor(count, context, initializer=_start)

    def submit(self, layer: Layer, tile: Tile, sms: int) -> Future[None]:
        """Schedule the compilation of a layer's launches with a tile, for a GPU with ``sms`` SMs."""
        return self._pool.submit(compile_layer, layer, tile, sms)

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
