"""The choice of a tile: tuned choices by GPU, a default from the cost model, and opt-in tuning.

A tile is looked up in this order:

1. tuned on this machine (``$DCGAN_CACHE``, by default ``~/.cache/dcgan-kernels``);
2. shipped for this GPU, in ``configs/<GPU name>.json``;
3. :func:`estimate`: the candidate predicted fastest by :mod:`.cost_model` among those whose compiled code
   does not spill.

``DCGAN_AUTOTUNE=1`` times every candidate the first time a shape occurs and stores the result on disk.

``triton.autotune`` offers pruning and a disk cache too, but it can neither refuse a tile whose result is
wrong, nor one that spills, nor choose between a fused and a standalone prologue, which are two launches.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import cost_model, tiles
from .tiles import SHARED_LIMIT, Problem, Tile, allowed


def variants(problem: Problem) -> tuple[Tile, ...]:
    """Return the allowed candidates fitted to a problem, also with ``fused=False`` if it has a prologue."""
    listed = tiles.candidates(problem.kernel, problem.precision)
    fitted = list(dict.fromkeys(tiles.fit(tile, problem) for tile in listed))
    if problem.has_prologue:
        fitted += [replace(tile, fused=False) for tile in fitted]
    return tuple(tile for tile in fitted if allowed(problem, tile))


def estimate(
    problem: Problem,
    sms: int,
    shared: int = SHARED_LIMIT[90],
    spills: Callable[[Tile], bool] | None = None,
) -> Tile:
    """Return the candidate predicted fastest that fits in ``shared`` bytes and does not spill.

    The order is :mod:`.cost_model`'s. ``spills(tile)`` compiles the launch with a tile; it is called in that
    order until a tile does not spill. If all spill, or without ``spills``, the first is returned.
    """
    ranked = cost_model.ranked(problem, variants(problem), sms, shared)
    if spills is None:
        return ranked[0]
    spilling: set[Tile] = set()
    for tile in ranked:
        # A tile that spills without its prologue also spills with the prologue fused.
        if tile.fused and replace(tile, fused=False) in spilling:
            continue
        if not spills(tile):
            return tile
        spilling.add(tile)
    return ranked[0]


@functools.cache
def _tuned(gpu: str) -> dict[str, Tile]:
    return tiles.read(tiles.DIRECTORY / tiles.gpu_file(gpu)) | tiles.read(tiles.cache_file(gpu))


@functools.cache
def _device(index: int) -> tuple[str, int, int]:
    properties: Any = torch.cuda.get_device_properties(index)  # the stub lacks the last attribute
    return properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin


def sm_count(device: torch.device) -> int:
    """Return the number of SMs of a GPU; for Triton's interpreter, that of an H100."""
    if device.type != "cuda":
        return cost_model.SM_COUNT
    return _device(torch.cuda.current_device() if device.index is None else device.index)[1]


class Trial(NamedTuple):
    """A launch to be tuned, as functions of its tile."""

    run: Callable[[Tile], object]
    """Launch with a tile, after standalone prologue kernels if the tile is not fused."""
    results: Callable[[Tile], tuple[Tensor, ...]]
    """Launch with outputs prefilled with NaN; returns the same tensors as :func:`.aten.exact`."""
    expected: Callable[[], tuple[Tensor, ...]]
    """Return the expected results, from :func:`.aten.exact`."""


def choose(
    problem: Problem, device: torch.device, spills: Callable[[Tile], bool], trial: Trial | None = None
) -> Tile:
    """Return the tile for a problem on a device; ``spills`` as in :func:`estimate`, ``trial`` for tuning."""
    if device.type != "cuda":  # Triton's interpreter, which compiles nothing
        return estimate(problem, sm_count(device))
    index = torch.cuda.current_device() if device.index is None else device.index
    gpu, sms, shared = _device(index)
    tuned = _tuned(gpu)
    tile = tuned.get(problem.key())
    if tile is not None and allowed(problem, tile):
        return tile
    autotune = os.environ.get("DCGAN_AUTOTUNE") == "1"
    if trial is not None and autotune and not torch.cuda.is_current_stream_capturing():
        tile = tune(problem, trial)
        if tile is not None:
            tuned[problem.key()] = tile
            cache = tiles.cache_file(gpu)
            tiles.write(cache, tiles.read(cache) | {problem.key(): tile})
            return tile
    return estimate(problem, sms, shared, spills)


TOLERANCE = {"16bit": 2**-7, "tf32": 2**-7, "ieee": 2**-14}
"""Largest ‖error‖/‖result‖ of a correct tile: several times the error of rounding and accumulation."""


def tune(problem: Problem, trial: Trial) -> Tile | None:
    """Return the candidate with the shortest measured time among those with correct results.

    The time is the median device time in a captured CUDA graph. Returns None if no candidate is correct: then
    the data at hand, nearly zero for example, does not rise above rounding.
    """
    from . import aten

    # The benchmark's stream does not wait for this one, whose kernels may still read buffers it overwrites.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    expected = trial.expected()
    times = {}
    for tile in variants(problem):
        if not cost_model.fits(problem, tile):
            continue
        with contextlib.suppress(OutOfResources):  # a GPU with less shared memory
            found = aten.error(trial.results(tile), expected)
            if not found <= TOLERANCE[problem.precision]:
                warnings.warn(
                    f"tile {tiles.refused_name(problem, tile)} gives a wrong result with Triton "
                    f"{triton.__version__} (relative error {found:.1e} > "
                    f"{TOLERANCE[problem.precision]:.1e}) and is not used",
                    stacklevel=2,
                )
                continue
            # Outside a CUDA graph, the Python launch overhead would dominate the measurement.
            timed = functools.partial(trial.run, tile)
            times[tile] = triton.testing.do_bench_cudagraph(timed, return_mode="median")
    return min(times, key=lambda tile: times[tile], default=None)
