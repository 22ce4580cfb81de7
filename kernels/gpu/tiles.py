"""Tile selection: candidates, tuned tiles by GPU, a model-based default, and opt-in tuning.

``configs/default.json`` lists the candidates of each kernel and precision. A tile is looked up in this order:

1. tuned on this machine (``$DCGAN_CACHE``, by default ``~/.cache/dcgan-kernels``);
2. shipped for this GPU, in ``configs/<GPU name>.json``;
3. :func:`estimate`: the candidate predicted fastest by :mod:`.cost_model` among those whose compiled code
   does not spill.

``DCGAN_AUTOTUNE=1`` times every candidate the first time a shape occurs and stores the result on disk.

``configs/refused.json`` lists tiles that a Triton version is known to miscompile, by that version:
``{"3.6.0": ["up/16bit/affine+statistics/128/256/64/8/3"]}``. They are never used, tuned or not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIRECTORY = Path(__file__).parent / "configs"
KERNELS = ("up", "up_narrow", "down", "down_narrow", "dense", "dense_narrow", "wgrad", "wgrad_narrow")
PRECISIONS = ("16bit", "tf32", "ieee")
REFUSED = "refused.json"


class Tile(NamedTuple):
    """Outputs per program (BLOCK_M × BLOCK_N), depth per K step (BLOCK_K), and launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    fused: bool = True
    """Whether prologues are fused; otherwise :mod:`.prologue_kernel` materializes each of them."""


class Problem(NamedTuple):
    """GEMM sizes of a launch: ``copies`` products of rows × columns outputs, each a sum over ``depth``."""

    kernel: str
    precision: str
    rows: int
    columns: int
    depth: int
    channels_in: int
    copies: int = 1
    fusion: str = "none+affine"  # prologue+epilogue; for a weight gradient, both prologues
    elements: tuple[int, ...] = (0,)  # of x; for a weight gradient, of both operands

    def key(self) -> str:
        """Return the key under which tuned tiles are stored."""
        return "/".join(str(v) for v in self[:8])


@functools.cache
def candidates(kernel: str, precision: str) -> tuple[Tile, ...]:
    """Return the tiles that ``configs/default.json`` lists for a kernel and precision."""
    listed = json.loads((DIRECTORY / "default.json").read_text())[kernel]
    return tuple(Tile(*row) for row in listed.get(precision, listed.get("any", ())))


def refused_name(problem: Problem, tile: Tile) -> str:
    """Return the name under which ``refused.json`` lists the product that a problem runs with a tile."""
    from . import cost_model

    seen = problem if tile.fused else cost_model.without_prologue(problem)
    return "/".join(map(str, (seen.kernel, seen.precision, seen.fusion, *tile[:5])))


def read_refused(path: Path) -> dict[str, list[str]]:
    """Return the refused tiles by Triton version; empty if the file does not exist."""
    try:
        found: dict[str, list[str]] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


def refuse(path: Path, *names: str) -> None:
    """Add tiles, named by :func:`refused_name`, to the file's list for this Triton version.

    Safe against concurrent calls from other processes.
    """
    import fcntl

    import triton

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read_refused(path)
        found[triton.__version__] = sorted({*found.get(triton.__version__, ()), *names})
        _replace(path, json.dumps(found, indent=2) + "\n")


@functools.cache
def _refused() -> frozenset[str]:
    import triton

    return frozenset(read_refused(DIRECTORY / REFUSED).get(triton.__version__, ()))


def allowed(problem: Problem, tile: Tile) -> bool:
    """Return whether a tile may be used, that is, this Triton version is not known to miscompile it."""
    return refused_name(problem, tile) not in _refused()


def variants(problem: Problem) -> tuple[Tile, ...]:
    """Return the allowed candidates fitted to a problem, also with ``fused=False`` if it has a prologue."""
    from . import cost_model

    listed = candidates(problem.kernel, problem.precision)
    fitted = list(dict.fromkeys(fit(tile, problem) for tile in listed))
    if set(cost_model.prologues(problem)) != {"none"}:
        fitted += [tile._replace(fused=False) for tile in fitted]
    return tuple(tile for tile in fitted if allowed(problem, tile))


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def fit(tile: Tile, problem: Problem) -> Tile:
    """Shrink the tile to the problem, but not below the 16 per dimension that a matrix instruction needs."""
    if problem.kernel == "dense_narrow":
        return tile._replace(block_k=min(tile.block_k, next_power_of_two(problem.depth)))
    return tile._replace(
        block_n=min(tile.block_n, max(16, next_power_of_two(problem.columns))),
        block_k=min(tile.block_k, max(16, next_power_of_two(problem.channels_in))),
    )


def programs(tile: Tile, problem: Problem) -> int:
    """Return the number of programs that cover the problem."""
    return -(-problem.rows // tile.block_m) * -(-problem.columns // tile.block_n) * problem.copies


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Maximum shared memory per CTA in bytes, by compute capability (CUDA C++ Programming Guide, table 24)."""


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
    from . import cost_model

    ranked = cost_model.ranked(problem, variants(problem), sms, shared)
    if spills is None:
        return ranked[0]
    spilling: set[Tile] = set()
    for tile in ranked:
        # A tile that spills without its prologue also spills with the prologue fused.
        if tile.fused and tile._replace(fused=False) in spilling:
            continue
        if not spills(tile):
            return tile
        spilling.add(tile)
    return ranked[0]


# --- tuned choices ------------------------------------------------------------------------------------------


def gpu_file(name: str) -> str:
    """Return a GPU's file name: 'NVIDIA H100 80GB HBM3' → 'NVIDIA_H100_80GB_HBM3.json'."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name) + ".json"


def cache_file(gpu: str) -> Path:
    """Return the file of this machine's tuned tiles, by GPU and by Triton version, which decides the code."""
    import triton

    root = os.environ.get("DCGAN_CACHE") or Path.home() / ".cache" / "dcgan-kernels"
    return Path(root) / f"triton-{triton.__version__}" / gpu_file(gpu)


def read(path: Path) -> dict[str, Tile]:
    """Return the tuned tiles by :meth:`Problem.key`; empty if the file does not exist.

    Raises:
        ValueError: the file is not in the format of :func:`write`; the message names it.
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
    """Write tuned tiles atomically: a reader sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f'  "{key}": {json.dumps(tile)}' for key, tile in sorted(tuned.items()))
    _replace(path, "{\n" + lines + "\n}\n")


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        f.write(text)
    os.replace(f.name, path)


@functools.cache
def _tuned(gpu: str) -> dict[str, Tile]:
    return read(DIRECTORY / gpu_file(gpu)) | read(cache_file(gpu))


@functools.cache
def _device(index: int) -> tuple[str, int, int]:
    properties: Any = torch.cuda.get_device_properties(index)  # the stub lacks the last attribute
    return properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin


def sm_count(device: torch.device) -> int:
    """Return the number of SMs of a GPU; for Triton's interpreter, that of an H100."""
    if device.type != "cuda":
        return 132
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
            write(cache_file(gpu), read(cache_file(gpu)) | {problem.key(): tile})
            return tile
    return estimate(problem, sms, shared, spills)


TOLERANCE = {"16bit": 2**-7, "tf32": 2**-7, "ieee": 2**-14}
"""Largest ‖error‖/‖result‖ of a correct tile: several times the error of rounding and accumulation."""


def tune(problem: Problem, trial: Trial) -> Tile | None:
    """Return the candidate with the shortest measured time among those with correct results.

    The time is the median device time in a captured CUDA graph. Returns None if no candidate is correct: then
    the data at hand, nearly zero for example, does not rise above rounding.
    """
    import triton
    from triton.runtime.errors import OutOfResources

    from . import aten, cost_model

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
                    f"tile {refused_name(problem, tile)} gives a wrong result with Triton "
                    f"{triton.__version__} (relative error {found:.1e} > "
                    f"{TOLERANCE[problem.precision]:.1e}) and is not used",
                    stacklevel=2,
                )
                continue
            # Outside a CUDA graph, the Python launch overhead would dominate the measurement.
            timed = functools.partial(trial.run, tile)
            times[tile] = triton.testing.do_bench_cudagraph(timed, return_mode="median")
    return min(times, key=lambda tile: times[tile], default=None)
