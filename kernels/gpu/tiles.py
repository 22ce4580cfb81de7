"""Tiles and the GEMMs they cover, as data: candidates, tuned choices by GPU, and tiles known to be wrong.

``configs/default.json`` lists the candidates of each kernel and precision, ``configs/<GPU name>.json`` the
tuned tiles of a GPU by :meth:`Problem.key`, and ``configs/refused.json`` the tiles that a Triton version is
known to miscompile, by that version: ``{"3.6.0": ["up/16bit/affine+statistics/128/256/64/8/3"]}``.
:mod:`.tuning` chooses among them.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import tempfile
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import triton

DIRECTORY = Path(__file__).parent / "configs"
KERNELS = (
    "up",
    "up_block",
    "up_narrow",
    "down",
    "down_narrow",
    "dense",
    "dense_outer",
    "dense_narrow",
    "wgrad",
    "wgrad_narrow",
)
PRECISIONS = ("16bit", "tf32", "ieee")
REFUSED = "refused.json"
SLICED_FROM = 64
"""Accumulators per thread from which an epilogue runs over column slices.

At 128 it spills otherwise; at 64 it needs at most 128 registers instead of up to 216, so that two CTAs of 8
warps fit on an SM.
"""
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Maximum shared memory per CTA in bytes, by compute capability (CUDA C++ Programming Guide, table 24)."""


@dataclass(frozen=True, order=True)
class Tile:
    """Outputs per program (BLOCK_M × BLOCK_N), depth per K step (BLOCK_K), and launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    fused: bool = True
    """Whether prologues are fused; otherwise :mod:`.prologue_kernel` materializes each of them."""

    def epilogue_slices(self, epilogue: str) -> int:
        """Return into how many column slices the accumulator is split for :attr:`Problem.epilogue`."""
        per_thread = self.block_m * self.block_n // (32 * self.num_warps)
        reads_other = epilogue in ("derivative", "adjoint", "gradient")
        return 4 if reads_other and self.block_n >= 64 and per_thread >= SLICED_FROM else 1

    def max_registers(self, problem: Problem) -> int | None:
        """Return a limit with which two CTAs of 8 warps fit on an SM, for products that need hardly more."""
        few = self.num_warps == 8 and self.block_m * self.block_n <= 64 * 32 * self.num_warps
        statistics = problem.epilogue == "statistics" and problem.kernel in ("up", "down")
        return 128 if few and statistics and not problem.has_prologue else None

    def __str__(self) -> str:
        shape = f"{self.block_m}×{self.block_n}×{self.block_k} w{self.num_warps} s{self.num_stages}"
        return shape if self.fused else f"{shape} after standalone prologues"


@dataclass(frozen=True)
class Problem:
    """GEMM sizes of a launch: ``copies`` products of rows × columns outputs, each a sum over ``depth``."""

    kernel: str
    precision: str
    rows: int
    columns: int
    depth: int
    channels_in: int
    copies: int = 1
    fusion: str = "none+affine"
    """prologue+epilogue; for a weight gradient, both prologues."""
    elements: tuple[int, ...] = (0,)
    """Of x; for a weight gradient, of both operands."""
    groups: int = 1
    """Equal parts of the rows, which no row tile straddles."""

    def key(self) -> str:
        """Return the key under which tuned tiles are stored."""
        sizes = self.rows, self.columns, self.depth, self.channels_in, self.copies
        return "/".join(map(str, (self.kernel, self.precision, *sizes, self.fusion)))

    @property
    def prologues(self) -> tuple[str, ...]:
        """The operands' prologues: one for a convolution, two for a weight gradient."""
        first, second = self.fusion.split("+")
        return (first, second) if self.kernel.startswith("wgrad") else (first,)

    @property
    def epilogue(self) -> str:
        """The epilogue; a weight gradient stores its accumulator."""
        return "affine" if self.kernel.startswith("wgrad") else self.fusion.split("+")[1]

    @property
    def has_prologue(self) -> bool:
        """Whether any operand has a prologue."""
        return set(self.prologues) != {"none"}

    def without_prologue(self) -> Problem:
        """Return the problem of the same product after standalone prologue kernels."""
        second = "none" if self.kernel.startswith("wgrad") else self.epilogue
        return replace(self, fusion=f"none+{second}")


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def row_tiles(rows: int, block_m: int, groups: int) -> int:
    """Return the number of row tiles that cover ``rows`` rows in equal groups."""
    return groups * -(-rows // groups // block_m)


def programs(tile: Tile, problem: Problem) -> int:
    """Return the number of programs that cover the problem."""
    down = row_tiles(problem.rows, tile.block_m, problem.groups)
    return down * -(-problem.columns // tile.block_n) * problem.copies


def fit(tile: Tile, problem: Problem) -> Tile:
    """Shrink the tile to the problem, but not below the 16 per dimension that a matrix instruction needs."""
    if problem.kernel == "dense_narrow":
        return replace(tile, block_k=min(tile.block_k, next_power_of_two(problem.depth)))
    return replace(
        tile,
        block_n=min(tile.block_n, max(16, next_power_of_two(problem.columns))),
        block_k=min(tile.block_k, max(16, next_power_of_two(problem.channels_in))),
    )


@functools.cache
def candidates(kernel: str, precision: str) -> tuple[Tile, ...]:
    """Return the tiles that ``configs/default.json`` lists for a kernel and precision."""
    listed = json.loads((DIRECTORY / "default.json").read_text())[kernel]
    return tuple(Tile(**row) for row in listed.get(precision, listed.get("any", ())))


# --- tuned tiles --------------------------------------------------------------------------------------------


def gpu_file(name: str) -> str:
    """Return a GPU's file name: 'NVIDIA H100 80GB HBM3' → 'NVIDIA_H100_80GB_HBM3.json'."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name) + ".json"


def cache_file(gpu: str) -> Path:
    """Return the file of this machine's tuned tiles, by GPU and by Triton version, which decides the code."""
    root = os.environ.get("DCGAN_CACHE") or Path.home() / ".cache" / "dcgan-kernels"
    return Path(root) / f"triton-{triton.__version__}" / gpu_file(gpu)


def _tile(row: Any) -> Tile:
    """Parse a tile: an object, or a list of its fields as files were written up to version 0.2."""
    return Tile(**row) if isinstance(row, dict) else Tile(*row)


def read(path: Path) -> dict[str, Tile]:
    """Return the tuned tiles by :meth:`Problem.key`; empty if the file does not exist.

    Raises:
        ValueError: the file is not in the format of :func:`write`; the message names it.
    """
    try:
        return {key: _tile(row) for key, row in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of tuned tiles: {error}. Delete it to tune again.") from error


def write(path: Path, tuned: dict[str, Tile]) -> None:
    """Write tuned tiles atomically: a reader sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f'  "{key}": {json.dumps(asdict(tile))}' for key, tile in sorted(tuned.items()))
    _replace(path, "{\n" + lines + "\n}\n")


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        f.write(text)
    os.replace(f.name, path)


# --- refused tiles ------------------------------------------------------------------------------------------


def refused_name(problem: Problem, tile: Tile) -> str:
    """Return the name under which ``refused.json`` lists the product that a problem runs with a tile."""
    seen = problem if tile.fused else problem.without_prologue()
    return "/".join(map(str, (seen.kernel, seen.precision, seen.fusion, *astuple(tile)[:5])))


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read_refused(path)
        found[triton.__version__] = sorted({*found.get(triton.__version__, ()), *names})
        _replace(path, json.dumps(found, indent=2) + "\n")


@functools.cache
def _refused() -> frozenset[str]:
    return frozenset(read_refused(DIRECTORY / REFUSED).get(triton.__version__, ()))


def allowed(problem: Problem, tile: Tile) -> bool:
    """Return whether a tile may be used, that is, this Triton version is not known to miscompile it."""
    return refused_name(problem, tile) not in _refused()
