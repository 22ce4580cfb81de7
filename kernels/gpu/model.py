"""How long a launch should take on an H100, counted: what chooses tiles where nothing has been tuned.

A multiprocessor runs its programs in groups of as many as are resident at once. A step of the reduction
costs a program ``matrix`` seconds of the tensor cores (or FMA units), ``loads`` of the path from L2,
``arithmetic`` of the other instructions: addresses, masks, the prologue. Products and copies are asynchronous
and overlap with all else; arithmetic and products of one program follow each other, those of two programs
overlap. Before a warpgroup's instruction a prologue also makes a step wait: for its operand to come into
registers, and for the product before to have read those that it is to be put into.

    step of k programs = max(k·matrix, k·loads, k·arithmetic, matrix + arithmetic + PROLOGUE_LATENCY)
    launch = max(Σ over groups (steps·step + epilogue + LATENCY), bytes / (L2 or HBM)) + GAP

The rates are those of an H100 (SXM, 132 multiprocessors), its data sheet's unless noted.
Instructions an element are rounded from the compiled code. ``python -m bench predict`` prints it all beside
what the roofline allows, and beside measurements where there are some.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from .tiles import Problem, Tile, programs

CLOCK = 1.755e9
LANES = 128  # a multiprocessor's instructions a clock
HBM = 3.0e12  # bytes/s, measured
L2 = 5.5e12  # bytes/s of whole tensors through L2
TILES = 10e12  # bytes/s of tiles that many programs share: 43 bytes a clock and multiprocessor, of 64
L2_SIZE = 40e6  # of 50 MB, what a tensor may take and be found again by the next kernel
FLOPS = {"16bit": 800e12, "tf32": 400e12, "ieee": 50e12}  # 16bit measured; tf32 half of it
HMMA = 0.6  # of a warpgroup's rate, for tiles too low for its instruction
PROCESSORS = 132
LATENCY = 1.0e-6  # filling the pipeline and draining it
# Fitted: on an H200 tuning has found all wide products of training faster after passes for their prologues,
# a quarter of which would without it be predicted faster with these inside.
PROLOGUE_LATENCY = 0.5e-6
GAP = 1.0e-6  # between the kernels of a captured graph
SHARED = 227 * 1024
REGISTERS = 65536
ITEM = {"16bit": 2, "tf32": 4, "ieee": 4}
INSTRUCTIONS = {"none": 1.0, "act": 4.0, "affine": 6.5, "gradient": 6.5, "statistics": 8.5}  # an element
WEIGHT_INSTRUCTIONS = 0.6
EPILOGUE = {"affine": 6.0, "statistics": 8.0, "adjoint": 16.0}


class Resources(NamedTuple):
    """What a program takes of a multiprocessor."""

    registers: int  # a thread
    shared: int  # bytes


class Prediction(NamedTuple):
    """Seconds of a launch, and where they go."""

    seconds: float
    roofline: float  # the larger of FLOPs and least bytes at their ceilings: no tile is predicted below it
    resident: int  # programs a multiprocessor
    waves: float
    bound: str
    flops: int
    bytes: int

    @property
    def share(self) -> float:
        """Of the roofline."""
        return self.roofline / self.seconds


def prologues(problem: Problem) -> tuple[str, ...]:
    """Of the operands: one of a product, two of a weight gradient."""
    first, second = problem.fusion.split("+")
    return (first, second) if problem.kernel.startswith("wgrad") else (first,)


def _reads(kind: str) -> int:
    return 2 if kind in ("gradient", "statistics") else 1


def guess(problem: Problem, tile: Tile) -> Resources:
    """Before compilation: accumulator, operands in registers where a prologue makes them, addresses."""
    threads = 32 * tile.num_warps
    item = ITEM[problem.precision]
    kinds = prologues(problem)
    widths = (tile.block_m, tile.block_n)
    staged = sum(_reads(kind) * width * tile.block_k for kind, width in zip(kinds, widths, strict=False))
    if len(kinds) == 1:
        staged += tile.block_n * tile.block_k
    made = sum(
        width * tile.block_k * item for kind, width in zip(kinds, widths, strict=False) if kind != "none"
    )
    accumulator = tile.block_m * tile.block_n // threads
    # Statistics hold what is apart from the mean beside the accumulator, the adjoint x and g.
    beside = {"statistics": 1.6, "adjoint": 2.2}.get(problem.fusion.split("+")[1], 1.0)
    registers = 56 + int(accumulator * (beside if len(kinds) == 1 else 1.0))
    registers += int(1.7 * made) // (4 * threads)
    return Resources(min(registers, 255), staged * item * tile.num_stages)


def least_bytes(problem: Problem) -> int:
    """Every tensor once."""
    item = ITEM[problem.precision]
    kinds = prologues(problem)
    reads = sum(_reads(kind) * n for kind, n in zip(kinds, problem.elements, strict=False))
    if len(kinds) == 2:
        return item * reads + item * problem.rows * problem.columns * problem.copies
    weight = problem.columns * problem.depth * problem.copies
    outputs = problem.rows * problem.columns * problem.copies
    return item * (reads + weight + outputs * (2 if problem.fusion.endswith("adjoint") else 1))


def moving(amount: float) -> float:
    """Seconds for so many bytes of whole tensors: what fits in L2 lies there still from the kernel before."""
    return amount / (HBM if amount > L2_SIZE else L2)


def predict(
    problem: Problem,
    tile: Tile,
    splits: int = 1,
    resources: Resources | None = None,
    processors: int = PROCESSORS,
) -> Prediction:
    """Of the product alone, without the kernel that merges its partial sums."""
    scale = processors / PROCESSORS
    resources = resources or guess(problem, tile)
    threads = 32 * tile.num_warps
    resident = min(
        SHARED // max(resources.shared + 1024, 1),
        REGISTERS // (resources.registers * threads),
        2048 // threads,
    )
    resident = max(resident, 1)
    item = ITEM[problem.precision]
    kinds = prologues(problem)
    flops = 2 * problem.rows * problem.columns * problem.depth * problem.copies
    bytes_moved = least_bytes(problem)
    total = programs(tile, problem) * splits
    if problem.kernel == "dense_narrow":  # a dot product a program, all bytes
        memory = moving(bytes_moved) / scale
        seconds = max(memory, LATENCY * total / (processors * resident)) + LATENCY + GAP
        roofline = max(flops / FLOPS["ieee"] / scale, memory)
        return Prediction(
            seconds, roofline, resident, total / processors / resident, "bytes", flops, bytes_moved
        )

    m, n, k = tile.block_m, tile.block_n, tile.block_k
    rate = FLOPS[problem.precision] / PROCESSORS
    warpgroup = problem.precision != "ieee" and m >= 64
    if problem.precision != "ieee" and not warpgroup:
        rate *= HMMA
    matrix = 2 * m * n * k / rate
    widths = (m, n)
    elements = sum(_reads(kind) * width for kind, width in zip(kinds, widths, strict=False)) * k
    work = sum(INSTRUCTIONS[kind] * width for kind, width in zip(kinds, widths, strict=False)) * k
    if len(kinds) == 1:
        elements += n * k
        work += WEIGHT_INSTRUCTIONS * n * k
    if problem.kernel.endswith("narrow") and not problem.kernel.startswith("up"):
        work *= 4  # pixels of the image are gathered one by one, not eight at once
    loads = elements * item / (TILES / PROCESSORS)
    arithmetic = work / (LANES * CLOCK)
    latency = PROLOGUE_LATENCY if warpgroup and set(kinds) != {"none"} else 0.0
    steps = -(-problem.depth // (k * splits))
    epilogue_kind = "affine" if len(kinds) == 2 else problem.fusion.split("+")[1]
    stored = m * n * (4 if len(kinds) == 2 else item * (2 if epilogue_kind == "adjoint" else 1))
    epilogue = EPILOGUE[epilogue_kind] * m * n / (LANES * CLOCK) + stored / (TILES / PROCESSORS)

    def group(programs_together: int) -> tuple[float, str]:
        terms = {
            "products": programs_together * matrix,
            "L2": programs_together * loads,
            "arithmetic": programs_together * arithmetic,
            "one program": matrix + arithmetic + latency,
        }
        bound = max(terms, key=lambda name: terms[name])
        return steps * terms[bound] + programs_together * epilogue + LATENCY, bound

    mine = -(-total // processors)  # programs of the busiest multiprocessor
    full, rest = divmod(mine, resident)
    compute, bound = group(min(resident, mine))
    compute *= full
    if rest:
        last, last_bound = group(rest)
        compute += last
        bound = bound if full else last_bound
    memory = moving(bytes_moved) / scale
    seconds = max(compute, memory) + GAP
    if memory > compute:
        bound = "bytes"
    roofline = max(flops / FLOPS[problem.precision] / scale, memory)
    return Prediction(seconds, roofline, resident, mine / resident, bound, flops, bytes_moved)


def chunks_seconds(problem: Problem, splits: int) -> float:
    """Of the kernel that adds the chunks of a weight gradient."""
    elements = problem.rows * problem.columns * problem.copies
    moved = elements * (4 * splits + ITEM[problem.precision])
    return LATENCY + moving(moved) + GAP


def reduction_seconds(problem: Problem, partial: tuple[int, ...]) -> float:
    """Of the kernel that puts a launch's partial sums together: chunks, or sums [2, T, C] of T tiles.

    The latter are C/8 programs that take 1024 rows a step, one step after the other, twice for a variance.
    """
    if problem.kernel.startswith("wgrad"):
        return chunks_seconds(problem, partial[0])
    steps = -(-partial[1] // 1024) * (2 if problem.fusion.endswith("statistics") else 1)
    return LATENCY * (1 + steps) + 4 * math.prod(partial) / (L2 / 8) + GAP


def pack_seconds(kernels: int) -> float:
    """Of the kernels that pack weights: up to 4 MB each, transposed."""
    return kernels * (LATENCY + 8e6 / L2 / 2 + GAP)


def pass_seconds(problem: Problem, shared: bool = True) -> float:
    """Of writing what the prologues make in passes of their own.

    du is wanted by the adjoint and by the weight gradient: if ``shared``, half of its pass is the other's.
    """
    seconds = 0.0
    for kind, elements in zip(prologues(problem), problem.elements, strict=False):
        if kind != "none":
            moved = elements * (_reads(kind) + 1) * ITEM[problem.precision]
            once = LATENCY + moving(moved) + GAP
            seconds += once / 2 if shared and _reads(kind) == 2 else once
    return seconds


def plain(problem: Problem) -> Problem:
    """The same after passes of their own for the prologues."""
    second = "none" if problem.kernel.startswith("wgrad") else problem.fusion.split("+")[1]
    return problem._replace(fusion=f"none+{second}")


@functools.cache
def splits(problem: Problem, tile: Tile, processors: int) -> int:
    """Chunks of a weight gradient's reduction: the fewest seconds, adding them included; none is empty."""
    steps = -(-problem.depth // tile.block_k)
    counts = {
        -(-steps // -(-steps // wanted))
        for wanted in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96, 128, 192, 256)
        if wanted <= steps
    }
    return min(
        sorted(counts),
        key=lambda n: predict(problem, tile, n, processors=processors).seconds + chunks_seconds(problem, n),
    )


def product_seconds(problem: Problem, tile: Tile, processors: int) -> float:
    """Of a product, and of adding its chunks if it is a weight gradient."""
    if not problem.kernel.startswith("wgrad"):
        return predict(problem, tile, processors=processors).seconds
    count = splits(problem, tile, processors)
    return predict(problem, tile, count, processors=processors).seconds + chunks_seconds(problem, count)


def seconds(problem: Problem, tile: Tile, processors: int) -> float:
    """Of a product with what its tile asks for besides: passes for the prologues, the sum of chunks."""
    if tile.fused:
        return product_seconds(problem, tile, processors)
    return product_seconds(plain(problem), tile, processors) + pass_seconds(problem)


def fits(problem: Problem, tile: Tile, shared: int = SHARED) -> bool:
    """Whether a program has the shared memory it needs, which is known before compilation."""
    return guess(problem if tile.fused else plain(problem), tile).shared <= shared - 1024


@functools.cache
def ranked(
    problem: Problem, listed: tuple[Tile, ...], processors: int, shared: int = SHARED
) -> tuple[Tile, ...]:
    """Those of the listed tiles that fit, the one predicted fastest first."""
    fitting = [tile for tile in listed if fits(problem, tile, shared)]
    return tuple(sorted(fitting, key=lambda tile: seconds(problem, tile, processors)))
