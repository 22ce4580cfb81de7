"""Compile launches in parallel processes, since each takes a second or two and tuning needs hundreds.

The processes rebuild the launches from shapes alone and leave the code in Triton's on-disk cache, where the
launches of this process find it.
"""

from __future__ import annotations

import functools
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
import triton

from bench import machine, simulated_gpu
from bench.cases import DTYPES
from bench.layers import Layer, layers, training, with_materialized_du
from dcgan import models
from dcgan.kernels.gpu import tiles, wgrad

NETWORKS = {"G": models.Generator, "D": models.Discriminator}


class LayerSpec(NamedTuple):
    """A picklable description of one layer in one phase, from which a process can rebuild it."""

    network: str
    """Key of NETWORKS."""
    channels: int
    batch: int
    dtype: str
    """Key of DTYPES."""
    position: int
    """Index in :func:`all_layers`."""


def all_layers(network: str, channels: int, batch: int, dtype: str, device: str) -> list[Layer]:
    """Return every layer in every phase, training first; sets the precision of float32 products."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    made = NETWORKS[network](channels=channels)
    shapes = made, batch, DTYPES[dtype], device
    steps = training(*shapes, input_gradient=True)
    return [*steps, *(with_shared_du(layer) for layer in steps if accepts_shared_du(layer)), *layers(*shapes)]


def accepts_shared_du(layer: Layer) -> bool:
    """Return whether it is a weight gradient that could read the du materialized for dgrad."""
    it = layer.operation
    return isinstance(it, wgrad.Gradient) and any(
        prologue.other is not None for prologue in (it.small_prologue, it.large_prologue)
    )


def with_shared_du(layer: Layer) -> Layer:
    """Return the weight gradient that reads dgrad's materialized du, filled with random values."""
    after = with_materialized_du(layer)
    old_gradient, new_gradient = layer.operation, after.operation
    assert isinstance(old_gradient, wgrad.Gradient)
    assert isinstance(new_gradient, wgrad.Gradient)
    for old, new in (
        (old_gradient.small, new_gradient.small),
        (old_gradient.large, new_gradient.large),
    ):
        if new is not old and not new.is_meta:
            new.normal_()
    return after


@functools.cache
def _meta_layers(network: str, channels: int, batch: int, dtype: str) -> list[Layer]:
    return all_layers(network, channels, batch, dtype, "meta")


def compile_layer(spec: LayerSpec, tile: tiles.Tile, sms: int) -> None:
    """Compile a layer's launches into Triton's cache."""
    torch.backends.cudnn.allow_tf32 = spec.dtype == "tf32"
    launches = _meta_layers(*spec[:4])[spec.position].launches(tile, sms)
    for launch in launches.ordered():
        launch.compile()


def _start() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(simulated_gpu.Driver())


class Compilers:
    """A context manager for the compiler processes; without a GPU they compile for a simulated H100."""

    def __init__(self, processes: int | None = None) -> None:
        count = processes or max(1, machine.cores() - 1)
        context = multiprocessing.get_context("spawn")  # CUDA contexts do not survive a fork
        self._pool = ProcessPoolExecutor(count, context, initializer=_start)

    def submit(self, spec: LayerSpec, tile: tiles.Tile, sms: int) -> Future[None]:
        """Schedule the compilation of a layer's launches with a tile, for a GPU with ``sms`` SMs."""
        return self._pool.submit(compile_layer, spec, tile, sms)

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
