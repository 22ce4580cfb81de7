"""Tiles as data: candidates and a choice that needs no tuning, tuned choices by GPU, and opt-in tuning.

``configs/default.json`` lists the candidates of each kernel and precision. A choice is looked up in order:

1. what tuning on this machine found (``$DCGAN_CACHE``, by default ``~/.cache/dcgan-kernels``);
2. what is shipped for this GPU, ``configs/<GPU name>.json``;
3. :func:`estimate`, the candidate that should be fastest by the model in :mod:`.model` among those whose
   compiled code does not spill.

``DCGAN_AUTOTUNE=1`` times every candidate the first time a shape is met and keeps the result on disk.

``configs/refused.json`` lists tiles that a version of Triton has been seen to miscompile, by that version:
``{"3.6.0": ["up/16bit/affine+statistics/128/256/64/8/3"]}``. None of these is taken, tuned or not.
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


def refusal(problem: Problem, tile: Tile) -> str:
    """How ``refused.json`` names the product that a problem runs with a tile."""
    from . import model

    seen = problem if tile.fused else model.plain(problem)
    return "/".join(map(str, (seen.kernel, seen.precision, seen.fusion, *tile[:5])))


def read_refused(path: Path) -> dict[str, list[str]]:
    """Refused tiles by Triton's version; empty if there is no such file."""
    try:
        found: dict[str, list[str]] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


def refuse(path: Path, *names: str) -> None:
    """Add tiles, named by :func:`refusal`, to those that a file refuses with this version of Triton.

    Other processes may be doing the same.
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
    """Whether a tile may be taken: it is none that this version of Triton miscompiles."""
    return refusal(problem, tile) not in _refused()


def ways(problem: Problem) -> tuple[Tile, ...]:
    """Every allowed candidate fitted to a problem, and with ``fused`` off too where there are prologues."""
    from . import model

    listed = candidates(problem.kernel, problem.precision)
    fitted = list(dict.fromkeys(fit(tile, problem) for tile in listed))
    if set(model.prologues(problem)) != {"none"}:
        fitted += [tile._replace(fused=False) for tile in fitted]
    return tuple(tile for tile in fitted if allowed(problem, tile))


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


def estimate(
    problem: Problem,
    processors: int,
    shared: int = SHARED_LIMIT[90],
    spills: Callable[[Tile], bool] | None = None,
) -> Tile:
    """The candidate predicted fastest (see :mod:`.model`) of those that fit ``shared`` bytes and don't spill.

    ``spills(tile)`` compiles the launch with a tile, and is asked of one after the other until one does not;
    if all do, or without ``spills``, it is the one predicted fastest.
    """
    from . import model

    ranked = model.ranked(problem, ways(problem), processors, shared)
    if spills is None:
        return ranked[0]
    spilling: set[Tile] = set()
    for tile in ranked:
        # What spills after passes of their own for the prologues does so with these inside.
        if tile.fused and tile._replace(fused=False) in spilling:
            continue
        if not spills(tile):
            return tile
        spilling.add(tile)
    return ranked[0]


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
    properties: Any = torch.cuda.get_device_properties(index)  # its stub lacks the last
    return properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's for Triton's interpreter."""
    if device.type != "cuda":
        return 132
    return _device(torch.cuda.current_device() if device.index is None else device.index)[1]


class Trial(NamedTuple):
    """A launch that has no tile yet, for tuning."""

    run: Callable[[Tile], object]
    """Launches it with a tile, and passes of their own before where the tile is not fused."""
    results: Callable[[Tile], tuple[Tensor, ...]]
    """Runs it too, what it writes being NaN before; gives what :func:`.aten.exact` does."""
    expected: Callable[[], tuple[Tensor, ...]]
    """:func:`.aten.exact` of it."""


def choose(
    problem: Problem, device: torch.device, spills: Callable[[Tile], bool], trial: Trial | None = None
) -> Tile:
    """The tile for a problem on a device; ``spills`` as for :func:`estimate`, ``trial`` for tuning."""
    if device.type != "cuda":  # Triton's interpreter, which compiles nothing
        return estimate(problem, multiprocessors(device))
    index = torch.cuda.current_device() if device.index is None else device.index
    gpu, processors, shared = _device(index)
    tuned = _tuned(gpu)
    tile = tuned.get(problem.key())
    if tile is not None and allowed(problem, tile):
        return tile
    wanted = trial is not None and os.environ.get("DCGAN_AUTOTUNE") == "1"
    if trial is not None and wanted and not torch.cuda.is_current_stream_capturing():
        tile = tune(problem, trial)
        if tile is not None:
            tuned[problem.key()] = tile
            write(cache_file(gpu), read(cache_file(gpu)) | {problem.key(): tile})
            return tile
    return estimate(problem, processors, shared, spills)


TOLERANCE = {"16bit": 2**-7, "tf32": 2**-7, "ieee": 2**-14}
"""‖error‖/‖result‖ from which a tile's result is wrong: several times what rounding and accumulation take."""


def tune(problem: Problem, trial: Trial) -> Tile | None:
    """The fastest candidate by measurement (device time in a captured graph, median) of those that are right.

    None if none is: then it is the numbers at hand that cannot be told from rounding, all but zero perhaps.
    """
    import triton
    from triton.runtime.errors import OutOfResources

    from . import aten, model

    # The benchmark's stream does not wait for this one, whose kernels may still read what it overwrites.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    expected = trial.expected()
    times = {}
    for tile in ways(problem):
        if not model.fits(problem, tile):
            continue
        with contextlib.suppress(OutOfResources):  # of a chip with less shared memory
            found = aten.error(trial.results(tile), expected)
            if not found <= TOLERANCE[problem.precision]:
                warnings.warn(
                    f"{refusal(problem, tile)} gives a wrong result with Triton {triton.__version__} "
                    f"(relative error {found:.1e}) and is not taken",
                    stacklevel=2,
                )
                continue
            # Outside a graph the launches' own Python would be what is timed.
            timed = functools.partial(trial.run, tile)
            times[tile] = triton.testing.do_bench_cudagraph(timed, return_mode="median")
    return min(times, key=lambda tile: times[tile], default=None)
