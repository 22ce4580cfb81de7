"""Analytical model of a launch's time on an H100: it ranks tiles for shapes that have not been tuned.

An SM runs its programs (CTAs) in waves of at most ``ctas_per_sm``. A step of the K loop costs one program
``matrix`` seconds of the tensor cores (or FMA units), ``loads`` seconds of L2-to-SMEM bandwidth, and
``arithmetic`` seconds of other instructions: addresses, masks, the prologue. Matrix instructions and copies
are asynchronous and overlap with everything else; arithmetic and matrix instructions are serial within one
program but overlap between two. With wgmma a fused prologue also stalls each step: its operand has to arrive
in registers, and the previous wgmma must have read the registers that the prologue overwrites.

    step of k programs = max(k·matrix, k·loads, k·arithmetic, matrix + arithmetic + PROLOGUE_LATENCY)
    wave = steps·step + k·epilogue + PIPELINE_LATENCY
    launch = max(Σ waves, bytes / (L2 or HBM bandwidth)) + LAUNCH_GAP

Tiles are ranked by the rates of an H100 SXM with 132 SMs, from its data sheet unless noted; :data:`GPUS` has
those that differ on other GPUs. Instruction counts per element are rounded from the compiled code.
:mod:`.tools.predict` prints the predictions next to the roofline, and next to measurements where there are
any.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from .tiles import Problem, Tile, programs

CLOCK = 1.755e9
INSTRUCTIONS_PER_CLOCK = 128  # per SM
L2_BW = 5.5e12  # bytes/s, whole tensors that stay in L2 between kernels
L2_TO_SMEM_BW = 10e12  # bytes/s, tiles that many programs share: 43 of 64 bytes per clock and SM
ADAM_BW = 2.1e12  # bytes/s, measured: with 65,536 parameters per block there are fewer blocks than SMs
MMA_SYNC_FRACTION = 0.6  # rate of mma.sync relative to wgmma, for tiles with fewer than wgmma's 64 rows
SM_COUNT = 132
PIPELINE_LATENCY = 1.0e-6  # to fill and drain the software pipeline
# Fitted: tuning on an H200 found every wide product in training faster after a standalone prologue kernel;
# without this term a quarter of them would be predicted faster with the prologue fused.
PROLOGUE_LATENCY = 0.5e-6
LAUNCH_GAP = 1.0e-6  # between kernels in a captured CUDA graph
SHARED_PER_SM = 227 * 1024
REGISTERS_PER_SM = 65536
ITEM_SIZE = {"16bit": 2, "tf32": 4, "ieee": 4}
# Instructions per element.
PROLOGUE_INSTRUCTIONS = {"none": 1.0, "act": 4.0, "affine": 6.5, "gradient": 6.5, "statistics": 8.5}
WEIGHT_INSTRUCTIONS = 0.6
EPILOGUE_INSTRUCTIONS = {"affine": 6.0, "statistics": 8.0, "adjoint": 16.0, "gradient": 15.0}
READS_OTHER = ("adjoint", "gradient")  # epilogues that read a second tensor, of the size of the result


class Gpu(NamedTuple):
    """The rates of a GPU that depend on its model."""

    name: str
    tensor_flops: float  # FLOP/s of 16-bit products, measured; TF32 has half of it
    hbm: float  # bytes/s, measured
    l2_size: float  # bytes, four fifths of L2, up to which the next kernel still finds a tensor in it

    def flops(self, precision: str) -> float:
        """Return the FLOP/s of products."""
        return {"16bit": self.tensor_flops, "tf32": self.tensor_flops / 2, "ieee": 50e12}[precision]


H100 = Gpu("H100", 800e12, 3.0e12, 40e6)
GPUS = {"h100": H100, "h200": Gpu("H200", 786e12, 4.24e12, 48e6)}


class Resources(NamedTuple):
    """Resources of one program (CTA)."""

    registers: int  # per thread
    shared: int  # bytes


class Prediction(NamedTuple):
    """Predicted time of a launch and what bounds it."""

    seconds: float
    roofline: float  # max(FLOPs / peak, minimum bytes / bandwidth): a lower bound for every tile
    ctas_per_sm: int
    waves: float
    bound: str
    flops: int
    bytes: int

    @property
    def roofline_fraction(self) -> float:
        """Predicted speed as a fraction of the roofline."""
        return self.roofline / self.seconds


def _tensors_read(kind: str) -> int:
    return 2 if kind in ("gradient", "statistics") else 1


def estimate_resources(problem: Problem, tile: Tile) -> Resources:
    """Estimate, before compilation: accumulator, operands that a prologue keeps in registers, addresses."""
    threads = 32 * tile.num_warps
    item = ITEM_SIZE[problem.precision]
    kinds = problem.prologues
    widths = (tile.block_m, tile.block_n)
    staged = sum(
        _tensors_read(kind) * width * tile.block_k for kind, width in zip(kinds, widths, strict=False)
    )
    if len(kinds) == 1:
        staged += tile.block_n * tile.block_k
    in_registers = sum(
        width * tile.block_k * item for kind, width in zip(kinds, widths, strict=False) if kind != "none"
    )
    accumulator = tile.block_m * tile.block_n // threads
    # Next to the accumulator, statistics hold the deviations from the mean, and the gradients hold x and g.
    factor = {"statistics": 1.6, "adjoint": 2.2, "gradient": 2.2}.get(problem.epilogue, 1.0)
    registers = 56 + int(accumulator * (factor if len(kinds) == 1 else 1.0))
    registers += int(1.7 * in_registers) // (4 * threads)
    return Resources(min(registers, 255), staged * item * tile.num_stages)


def min_bytes(problem: Problem) -> int:
    """Return the bytes moved if every tensor is read or written exactly once."""
    item = ITEM_SIZE[problem.precision]
    kinds = problem.prologues
    reads = sum(_tensors_read(kind) * n for kind, n in zip(kinds, problem.elements, strict=False))
    if len(kinds) == 2:
        return item * reads + item * problem.rows * problem.columns * problem.copies
    weight = problem.columns * problem.depth * problem.copies
    outputs = problem.rows * problem.columns * problem.copies
    return item * (reads + weight + outputs * (2 if problem.epilogue in READS_OTHER else 1))


def transfer_seconds(size: float, gpu: Gpu = H100) -> float:
    """Return the time to move ``size`` bytes of whole tensors; those that fit in L2 are still in it."""
    return size / (gpu.hbm if size > gpu.l2_size else L2_BW)


def sweep_seconds(size: float, gpu: Gpu = H100) -> float:
    """Predict an elementwise kernel that reads and writes ``size`` bytes in all."""
    return PIPELINE_LATENCY + transfer_seconds(size, gpu) + LAUNCH_GAP


def predict(
    problem: Problem,
    tile: Tile,
    splits: int = 1,
    resources: Resources | None = None,
    sms: int = SM_COUNT,
    gpu: Gpu = H100,
) -> Prediction:
    """Predict the product alone, without the kernel that reduces its partial sums."""
    scale = sms / SM_COUNT
    resources = resources or estimate_resources(problem, tile)
    threads = 32 * tile.num_warps
    ctas_per_sm = min(
        SHARED_PER_SM // max(resources.shared + 1024, 1),
        REGISTERS_PER_SM // (resources.registers * threads),
        2048 // threads,
    )
    ctas_per_sm = max(ctas_per_sm, 1)
    item = ITEM_SIZE[problem.precision]
    kinds = problem.prologues
    flops = 2 * problem.rows * problem.columns * problem.depth * problem.copies
    bytes_moved = min_bytes(problem)
    total = programs(tile, problem) * splits
    if problem.kernel == "dense_narrow":  # one dot product per program: bound by bytes
        memory = transfer_seconds(bytes_moved, gpu) / scale
        seconds = max(memory, PIPELINE_LATENCY * total / (sms * ctas_per_sm)) + PIPELINE_LATENCY + LAUNCH_GAP
        roofline = max(flops / gpu.flops("ieee") / scale, memory)
        return Prediction(
            seconds, roofline, ctas_per_sm, total / sms / ctas_per_sm, "bytes", flops, bytes_moved
        )

    m, n, k = tile.block_m, tile.block_n, tile.block_k
    rate = gpu.flops(problem.precision) / SM_COUNT
    warpgroup = problem.precision != "ieee" and m >= 64
    if problem.precision != "ieee" and not warpgroup:
        rate *= MMA_SYNC_FRACTION
    matrix = 2 * m * n * k / rate
    widths = (m, n)
    elements = sum(_tensors_read(kind) * width for kind, width in zip(kinds, widths, strict=False)) * k
    work = sum(PROLOGUE_INSTRUCTIONS[kind] * width for kind, width in zip(kinds, widths, strict=False)) * k
    if len(kinds) == 1:
        elements += n * k
        work += WEIGHT_INSTRUCTIONS * n * k
    if problem.kernel.endswith("narrow") and not problem.kernel.startswith("up"):
        work *= 4  # the image's pixels are loaded one at a time instead of eight
    loads = elements * item / (L2_TO_SMEM_BW / SM_COUNT)
    arithmetic = work / (INSTRUCTIONS_PER_CLOCK * CLOCK)
    latency = PROLOGUE_LATENCY if warpgroup and set(kinds) != {"none"} else 0.0
    steps = -(-problem.depth // (k * splits))
    epilogue_kind = problem.epilogue
    stored = m * n * (4 if len(kinds) == 2 else item * (2 if epilogue_kind in READS_OTHER else 1))
    epilogue = EPILOGUE_INSTRUCTIONS[epilogue_kind] * m * n / (INSTRUCTIONS_PER_CLOCK * CLOCK) + stored / (
        L2_TO_SMEM_BW / SM_COUNT
    )

    def wave(concurrent: int) -> tuple[float, str]:
        terms = {
            "products": concurrent * matrix,
            "L2": concurrent * loads,
            "arithmetic": concurrent * arithmetic,
            "single CTA": matrix + arithmetic + latency,
        }
        bound = max(terms, key=lambda name: terms[name])
        return steps * terms[bound] + concurrent * epilogue + PIPELINE_LATENCY, bound

    busiest = -(-total // sms)  # programs of the SM with the most
    full, rest = divmod(busiest, ctas_per_sm)
    compute, bound = wave(min(ctas_per_sm, busiest))
    compute *= full
    if rest:
        last, last_bound = wave(rest)
        compute += last
        bound = bound if full else last_bound
    memory = transfer_seconds(bytes_moved, gpu) / scale
    seconds = max(compute, memory) + LAUNCH_GAP
    if memory > compute:
        bound = "bytes"
    roofline = max(flops / gpu.flops(problem.precision) / scale, memory)
    return Prediction(seconds, roofline, ctas_per_sm, busiest / ctas_per_sm, bound, flops, bytes_moved)


def split_k_seconds(problem: Problem, splits: int, gpu: Gpu = H100) -> float:
    """Predict the kernel that reduces a weight gradient's split-K partials to a float32 gradient."""
    elements = problem.rows * problem.columns * problem.copies
    return sweep_seconds(4 * elements * (splits + 1), gpu)


def _merge_seconds(partial: tuple[int, ...], steps: int) -> float:
    """Predict the merge of partial sums [2, T, C] by C/8 programs, whose loops take 1024 rows per step."""
    return PIPELINE_LATENCY * (1 + steps) + 4 * math.prod(partial) / (L2_BW / 8) + LAUNCH_GAP


def batchnorm_forward_seconds(partial: tuple[int, ...], groups: int = 1) -> float:
    """Predict ``batchnorm.forward``: two loops over each group's tiles, for the mean and for the variance."""
    return _merge_seconds(partial, 2 * -(-partial[1] // groups // 1024))


def batchnorm_backward_seconds(partial: tuple[int, ...], groups: int = 1) -> float:
    """Predict ``batchnorm.backward``: every program loops over the groups and each group's tiles."""
    return _merge_seconds(partial, groups * -(-partial[1] // groups // 1024))


def apply_bytes(elements: int, precision: str, x_hat: bool = True) -> int:
    """Return the bytes that ``batchnorm.apply`` moves: it reads g and y and writes du and, if wanted, x̂."""
    return elements * ITEM_SIZE[precision] * (4 if x_hat else 3)


def pack_seconds(weights: int, precision: str, gpu: Gpu = H100) -> float:
    """Predict the launch that packs a network's ``weights`` elements, float32, for fprop and for dgrad."""
    return sweep_seconds(weights * (4 + 2 * ITEM_SIZE[precision]), gpu)


def adam_seconds(parameters: int) -> float:
    """Predict PyTorch's fused Adam, which reads four float32 tensors and writes all but the gradient."""
    return PIPELINE_LATENCY + 7 * 4 * parameters / ADAM_BW + LAUNCH_GAP


def standalone_prologue_seconds(problem: Problem, gpu: Gpu = H100) -> float:
    """Predict the standalone prologue kernels that materialize the prologues' results.

    du, which two tensors make, is an operand of both dgrad and wgrad: each is charged half of its kernel.
    """
    seconds = 0.0
    for kind, elements in zip(problem.prologues, problem.elements, strict=False):
        if kind != "none":
            tensors = _tensors_read(kind)
            kernel = sweep_seconds(elements * (tensors + 1) * ITEM_SIZE[problem.precision], gpu)
            seconds += kernel / tensors
    return seconds


@functools.cache
def splits(problem: Problem, tile: Tile, sms: int) -> int:
    """Return the split-K count with the least time, reduction included; no split is empty."""
    steps = -(-problem.depth // tile.block_k)
    counts = {
        -(-steps // -(-steps // wanted))
        for wanted in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96, 128, 192, 256)
        if wanted <= steps
    }
    return min(
        sorted(counts),
        key=lambda n: predict(problem, tile, n, sms=sms).seconds + split_k_seconds(problem, n),
    )


def product_seconds(problem: Problem, tile: Tile, sms: int) -> float:
    """Predict a product, including the split-K reduction if it is a weight gradient."""
    if not problem.kernel.startswith("wgrad"):
        return predict(problem, tile, sms=sms).seconds
    count = splits(problem, tile, sms)
    return predict(problem, tile, count, sms=sms).seconds + split_k_seconds(problem, count)


def seconds(problem: Problem, tile: Tile, sms: int) -> float:
    """Predict a product with the standalone prologue kernels and split-K reduction that its tile needs."""
    if tile.fused:
        return product_seconds(problem, tile, sms)
    return product_seconds(problem.without_prologue(), tile, sms) + standalone_prologue_seconds(problem)


def fits(problem: Problem, tile: Tile, shared: int = SHARED_PER_SM) -> bool:
    """Return whether a program's shared memory fits in ``shared`` bytes; this is known before compilation."""
    return (
        estimate_resources(problem if tile.fused else problem.without_prologue(), tile).shared
        <= shared - 1024
    )


@functools.cache
def ranked(
    problem: Problem, listed: tuple[Tile, ...], sms: int, shared: int = SHARED_PER_SM
) -> tuple[Tile, ...]:
    """Return the listed tiles that fit, in order of predicted time."""
    fitting = [tile for tile in listed if fits(problem, tile, shared)]
    return tuple(sorted(fitting, key=lambda tile: seconds(problem, tile, sms)))
