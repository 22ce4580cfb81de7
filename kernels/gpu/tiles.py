"""Tiles as data: candidates and a choice that needs no tuning, tuned choices by GPU, and opt-in tuning.

``configs/default.json`` lists the candidates of each kernel and precision. A choice is looked up in order:

1. what tuning on this machine found (``$DCGAN_CACHE``, by default ``~/.cache/dcgan-kernels``);
2. what is shipped for this GPU, ``configs/<GPU name>.json``;
3. :func:`estimate`, the candidate that should be fastest by the model in :mod:`.model`.

``DCGAN_AUTOTUNE=1`` times every candidate the first time a shape is met and keeps the result on disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

DIRECTORY = Path(__file__).parent / "configs"
KERNELS = ("up", "up_narrow", "down", "down_narrow", "dense", "dense_narrow", "wgrad", "wgrad_narrow")
PRECISIONS = ("16bit", "tf32", "ieee")


class Tile(NamedTuple):
    """BLOCK_M × BLOCK_N outputs a program, BLOCK_K of the reduction a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    fused: bool = True
    """Whether prologues run inside; otherwise each is a pass of its own before (:mod:`.passes`)."""


class Problem(NamedTuple):
    """A launch's sizes: rows × columns outputs, times ``copies`` products, each a sum over ``depth``."""

    kernel: str
    precision: str
    rows: int
    columns: int
    depth: int
    channels_in: int
    copies: int = 1
    fusion: str = "none+affine"  # prologue+epilogue, or both prologues of a weight gradient
    elements: tuple[int, ...] = (0,)  # of x, or of both operands of a weight gradient

    def key(self) -> str:
        return "/".join(str(v) for v in self[:8])


@functools.cache
def candidates(kernel: str, precision: str) -> tuple[Tile, ...]:
    """The tiles to choose from, as ``configs/default.json`` lists them."""
    listed = json.loads((DIRECTORY / "default.json").read_text())[kernel]
    return tuple(Tile(*row) for row in listed.get(precision, listed.get("any", ())))


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def fit(tile: Tile, problem: Problem) -> Tile:
    """The tile, no larger than the problem; a matrix instruction needs 16 in each direction."""
    if problem.kernel == "dense_narrow":
        return tile._replace(block_k=min(tile.block_k, power_of_two(problem.depth)))
    return tile._replace(
        block_n=min(tile.block_n, max(16, power_of_two(problem.columns))),
        block_k=min(tile.block_k, max(16, power_of_two(problem.channels_in))),
    )


def programs(tile: Tile, problem: Problem) -> int:
    """How many programs cover the problem."""
    return -(-problem.rows // tile.block_m) * -(-problem.columns // tile.block_n) * problem.copies


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory a program may use, in bytes, by compute capability (CUDA C++ Programming Guide, table 24)."""


def estimate(problem: Problem, processors: int, shared: int = SHARED_LIMIT[90]) -> Tile:
    """The candidate that should be fastest (see :mod:`.model`) of those that fit ``shared`` bytes."""
    from . import model

    listed = candidates(problem.kernel, problem.precision)
    return model.estimate(problem, listed, processors, shared)


# --- tuned choices ------------------------------------------------------------------------------------------


def gpu_file(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' → 'NVIDIA_H100_80GB_HBM3.json'."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name) + ".json"


def cache_file(gpu: str) -> Path:
    """Where this machine's tuning is kept: by GPU and by Triton's version, which decides the code."""
    import triton

    root = os.environ.get("DCGAN_CACHE") or Path.home() / ".cache" / "dcgan-kernels"
    return Path(root) / f"triton-{triton.__version__}" / gpu_file(gpu)


def read(path: Path) -> dict[str, Tile]:
    """Tuned tiles by :meth:`Problem.key`; empty if there is no such file.

    Raises:
        ValueError: the file is not what :func:`write` writes; names it.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        return {key: Tile(*row) for key, row in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of tuned tiles: {error}. Delete it to tune again.") from error


def write(path: Path, tuned: dict[str, Tile]) -> None:
    """Write tuned tiles so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f'  "{key}": {json.dumps(tile)}' for key, tile in sorted(tuned.items()))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        f.write("{\n" + lines + "\n}\n")
    os.replace(f.name, path)


@functools.cache
def _tuned(gpu: str) -> dict[str, Tile]:
    return read(DIRECTORY / gpu_file(gpu)) | read(cache_file(gpu))


@functools.cache
def _device(index: int) -> tuple[str, int, int]:
    properties: Any = torch.cuda.get_device_properties(index)  # its stub lacks the last
    return properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's for Triton's interpreter."""
    if device.type != "cuda":
        return 132
    return _device(torch.cuda.current_device() if device.index is None else device.index)[1]


def choose(problem: Problem, device: torch.device, run: Callable[[Tile], object]) -> Tile:
    """The tile for a problem on a device; ``run(tile)`` runs it, for tuning."""
    if device.type != "cuda":  # Triton's interpreter
        return estimate(problem, multiprocessors(device))
    index = torch.cuda.current_device() if device.index is None else device.index
    gpu, processors, shared = _device(index)
    tuned = _tuned(gpu)
    tile = tuned.get(problem.key())
    if tile is not None:
        return tile
    if os.environ.get("DCGAN_AUTOTUNE") == "1" and not torch.cuda.is_current_stream_capturing():
        tile = tune(problem, run)
        tuned[problem.key()] = tile
        write(cache_file(gpu), read(cache_file(gpu)) | {problem.key(): tile})
        return tile
    return estimate(problem, processors, shared)


def tune(problem: Problem, run: Callable[[Tile], object]) -> Tile:
    """The fastest candidate by measurement: device time in a captured graph, median."""
    import triton
    from triton.runtime.errors import OutOfResources

    from . import model

    # The benchmark's stream does not wait for this one, whose kernels may still read what run() overwrites.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    fitted = dict.fromkeys(fit(t, problem) for t in candidates(problem.kernel, problem.precision))
    if set(model.prologues(problem)) != {"none"}:
        fitted |= dict.fromkeys(tile._replace(fused=False) for tile in fitted)
    times = {}
    for tile in fitted:
        if not model.fits(problem, tile):
            continue
        with contextlib.suppress(OutOfResources):  # of a chip with less shared memory
            # Outside a graph the launches' own Python would be what is timed.
            timed = functools.partial(run, tile)
            times[tile] = triton.testing.do_bench_cudagraph(timed, return_mode="median")
    return min(times, key=lambda tile: times[tile])
