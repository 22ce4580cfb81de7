"""Compile launches in other processes: each is a second or two of one core, and tuning wants hundreds.

The processes leave the code in Triton's cache on disk, where this one's launches find it. Launches are made
anew there, from shapes alone.
"""

from __future__ import annotations

import functools
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
import triton

from bench import machine, pretend
from bench.cases import DTYPES
from bench.layers import Layer, after_pass, layers, training
from dcgan import models
from dcgan.kernels.gpu import tiles, wgrad

NETWORKS = {"G": models.Generator, "D": models.Discriminator}


class Where(NamedTuple):
    """A layer of a network in one phase, by what it can be found again from."""

    network: str
    """Key of NETWORKS."""
    channels: int
    batch: int
    dtype: str
    """Key of DTYPES."""
    position: int
    """In :func:`listed`."""


def listed(network: str, channels: int, batch: int, dtype: str, device: str) -> list[Layer]:
    """Every layer in every phase, those of training first; sets the precision of float32 products."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    made = NETWORKS[network](channels=channels)
    shapes = made, batch, DTYPES[dtype], device
    steps = training(*shapes, input_gradient=True)
    return [*steps, *(shared(layer) for layer in steps if takes_du(layer)), *layers(*shapes)]


def takes_du(layer: Layer) -> bool:
    """Whether it is a weight gradient that could take du from the adjoint's pass."""
    it = layer.operation
    return isinstance(it, wgrad.Gradient) and any(
        prologue.other is not None for prologue in (it.small_prologue, it.large_prologue)
    )


def shared(layer: Layer) -> Layer:
    """The weight gradient after the adjoint's pass, with a du that is there."""
    after = after_pass(layer)
    before, now = layer.operation, after.operation
    assert isinstance(before, wgrad.Gradient)
    assert isinstance(now, wgrad.Gradient)
    for old, new in ((before.small, now.small), (before.large, now.large)):
        if new is not old and not new.is_meta:
            new.normal_()
    return after


@functools.cache
def _on_meta(network: str, channels: int, batch: int, dtype: str) -> list[Layer]:
    return listed(network, channels, batch, dtype, "meta")


def compile_layer(where: Where, tile: tiles.Tile, processors: int) -> None:
    """Leave the code of a layer's launches in Triton's cache."""
    torch.backends.cudnn.allow_tf32 = where.dtype == "tf32"
    launches = _on_meta(*where[:4])[where.position].launches(tile, processors)
    for launch in launches.every():
        launch.compile()


def _start() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(pretend.Driver())


class Compilers:
    """The processes, as a context; without a GPU they compile for a pretended H100."""

    def __init__(self, processes: int | None = None) -> None:
        count = processes or max(1, machine.cores() - 1)
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pool = ProcessPoolExecutor(count, context, initializer=_start)

    def submit(self, where: Where, tile: tiles.Tile, processors: int) -> Future[None]:
        return self._pool.submit(compile_layer, where, tile, processors)

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
