"""Analytical model of a launch's time on an H100 or H200: it ranks tiles for shapes that are not tuned.

An SM runs its programs (CTAs) in waves of at most ``ctas_per_sm``. They start together and take equally long,
so the programs of a wave are in their K loops together, and in their epilogues together. A K step of a wave
of k programs takes the longest of

    matrix          k · BLOCK_M·BLOCK_N·BLOCK_K / FMAs per clock
    shared memory   k · (bytes written by copies + bytes read by matrix instructions) / 122 per clock
    instructions    k · instructions / 2 warps per clock, as most compute addresses and masks: integers
    one CTA         matrix + instructions / 4 warps per clock, as matrix instructions are asynchronous and
                    hide half of the others, + what stalls a program in every step
    latency         of a load / the steps for which copies are issued ahead

and what precedes and follows the loop takes the longest of

    stores          k · bytes / 64 per clock
    instructions    k · instructions / 4 warps per clock
    one CTA         PIPELINE_LATENCY + 4 clocks per instruction, each of which waits for the one before

    wave = steps · step + the rest
    launch = max(Σ waves, bytes / bandwidth, FLOPs / measured peak) + LAUNCH_GAP

wgmma reads both operands from shared memory: for its 64 × n outputs a warpgroup reads 64·k elements of A and
n·k of B. A tile of 128 × 256 so keeps shared memory as busy as the tensor cores, and one of 128 × 64 or
64 × 128 takes 1.75 times as long as the tensor cores need, which explains what an H200 measured.

Each constant is from a data sheet, from compiled code, or fitted to bench/results/h200-kernels.jsonl, the
times of an H200 that tests/kernels/gpu/test_cost_model.py compares with the predictions.
:mod:`.tools.predict` prints the predictions next to the roofline and to these times.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .tiles import Problem, Tile, programs

# Data sheet of H100 and H200 (SXM).
SM_COUNT = 132
CLOCK = 1.83e9  # at which the FMAs below make the data sheet's 989 TFLOP/s
FMA_PER_CLOCK = {"16bit": 2048, "tf32": 1024, "ieee": 104}  # per SM; ieee: four fifths of its 128 lanes
L2_BYTES_PER_CLOCK = 64  # per SM; in the K loop shared memory is always the narrower
WARPS_PER_CLOCK = 4  # per SM: one instruction of one warp per scheduler
INTEGER_WARPS_PER_CLOCK = 2  # 64 integer lanes per SM: addresses and masks
SHARED_PER_SM = 227 * 1024
REGISTERS_PER_SM = 65536
MAX_CTAS_PER_SM = 32
ITEM_SIZE = {"16bit": 2, "tf32": 4, "ieee": 4}
# Assumed: the measurements do not determine them.
L2_BW = 5.5e12  # bytes/s, whole tensors that stay in L2 between kernels
DEPENDENT_GAP = 0.4e-6  # before a dependent launch, whose programs have started when the kernel before ends
MMA_SYNC_FRACTION = 0.6  # rate of mma.sync relative to wgmma, for tiles with fewer than wgmma's 64 rows
# Measured and fitted on an H200.
ADAM_BW = 2.1e12  # bytes/s: with 65,536 parameters per block there are fewer blocks than SMs
SHARED_BYTES_PER_CLOCK = 122  # per SM, read or written: 95% of the data sheet's 128
DEPENDENT_CLOCKS = 4  # between two instructions of a warp, the second of which needs the result of the first
PIPELINE_LATENCY = 1.4e-6  # of a program: its start, its first load, its last store
LOAD_LATENCY = 0.8e-6  # of a load that a program waits for
L2_LATENCY = 0.6e-6  # of one in the K loop or the epilogue of a product whose tensors fit in L2
LAUNCH_GAP = 1.0e-6  # between kernels in a captured CUDA graph: with PIPELINE_LATENCY, the least of a launch
# With wgmma a fused prologue stalls each step: its operand has to arrive in registers, which the previous
# wgmma must have read.
PROLOGUE_LATENCY = 0.5e-6
# Of a store by which a row of an accumulator's fragment, in four threads, fills no sector of 32 bytes.
PARTIAL_SECTOR_CLOCKS = 8
FRAGMENT_ROWS = 8  # that one instruction of a warp stores
# Counted in compiled code: instructions per element, but per thread where noted.
PROLOGUE_INSTRUCTIONS = {"none": 1.4, "act": 4.0, "affine": 6.5, "gradient": 6.5, "statistics": 8.5}
WEIGHT_INSTRUCTIONS = 0.3
GATHER_INSTRUCTIONS = 1.6  # more, for each operand of a wgrad: its pixels change from step to step
PIXEL_INSTRUCTIONS = 10.0  # more, for an image's pixels, which are loaded one at a time instead of eight
STEP_INSTRUCTIONS = 70  # per thread and K step of a convolution: taps and masks
PROGRAM_INSTRUCTIONS = 250  # per thread and program, outside the K loop and besides what follows per element
BEFORE_LOOP_INSTRUCTIONS = 100  # of these
EPILOGUE_INSTRUCTIONS = {
    "affine": 4.0,
    "statistics": 9.0,
    "derivative": 10.0,  # the adjoint without sums
    "adjoint": 23.0,
    "gradient": 25.0,
}
SPLIT_K_INSTRUCTIONS = 6.0  # the epilogue of a wgrad
SPLITS_IN_FLIGHT = 512  # partials of one gradient that the split-K reduction loads at once
# Of the map with more channels, loaded by an SM's programs of wgrad_narrow in a step, with two steps in
# flight. An HBM of 4.2 TB/s delivers 32 KB per SM in a latency of 1 µs.
NARROW_BYTES_PER_SM = 48 * 1024
# Epilogues that read a second tensor, of the size of the result.
READS_OTHER = ("derivative", "adjoint", "gradient")


class Gpu(NamedTuple):
    """The rates of a GPU that depend on its model."""

    name: str
    tensor_flops: float  # FLOP/s of a large 16-bit product; TF32 has half of it
    hbm: float  # bytes/s of a copy
    l2_size: float  # bytes, four fifths of L2, up to which the next kernel still finds a tensor in it

    def flops(self, precision: str) -> float:
        """Return the FLOP/s of products."""
        return {"16bit": self.tensor_flops, "tf32": self.tensor_flops / 2, "ieee": 50e12}[precision]


# Measured on an H200. The H100 has the same SMs, and by the data sheets 3.35 / 4.8 of the HBM bandwidth.
H200 = Gpu("H200", 786e12, 4.24e12, 48e6)
H100 = Gpu("H100", 786e12, 2.96e12, 40e6)
GPUS = {"h100": H100, "h200": H200}


class Resources(NamedTuple):
    """Resources of one program (CTA), and properties of its code that a problem does not determine."""

    registers: int  # per thread
    shared: int  # bytes
    store_bytes: int = 16  # that a thread stores of the result with one instruction
    stalls: int = 0  # loads in each K step that the program waits for, instead of copies in flight
    epilogue: int = 0  # instructions of a thread after the K loop; 0 if they are to be estimated


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
    addresses = 32 if problem.kernel in ("down_narrow", "dense_outer") else 56  # without a pipelined loop
    # A slice of columns is in all warps' registers if these are along M; elsewhere slices save none.
    sliced = tile.epilogue_slices(problem.epilogue) > 1 or problem.kernel == "up_block"
    if sliced and tile.block_m >= 16 * tile.num_warps:
        registers = 32 + int(1.5 * accumulator)
    else:
        # Next to the accumulator, statistics hold the deviations from the mean, and gradients hold x and g.
        factor = {"affine": 1.0, "statistics": 1.1, "derivative": 1.5}.get(problem.epilogue, 2.2)
        registers = addresses + int(accumulator * factor)
    registers += int(1.7 * in_registers) // (4 * threads)
    stalls = int(problem.kernel == "down_narrow")
    return Resources(min(registers, 255), staged * item * tile.num_stages, stalls=stalls)


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


def _shared_bytes(problem: Problem, tile: Tile, copied: int) -> int:
    """Return the bytes per K step that copies write to shared memory and matrix instructions read from it.

    Triton arranges the warpgroups along the accumulator's first axis while each still has 64 elements of it,
    and along the second from there on.
    """
    m, n = _accumulator(problem, tile)
    if m >= 64:
        along_n = max(1, 64 * (tile.num_warps // 4) // m)
        read = along_n * m + m // 64 * n
    else:
        read = tile.num_warps * m + n  # the warps are along N
    return (copied + read) * tile.block_k * ITEM_SIZE[problem.precision]


def _accumulator(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Return the sizes of the accumulator: statistics swap rows and columns."""
    blocks = tile.block_m, tile.block_n
    return blocks[::-1] if problem.epilogue == "statistics" else blocks


def _warpgroup(problem: Problem, tile: Tile) -> bool:
    """Return whether a product runs on wgmma, not on mma.sync."""
    narrow = problem.kernel == "wgrad_narrow"
    return problem.precision != "ieee" and not narrow and _accumulator(problem, tile)[0] >= 64


class _Loop(NamedTuple):
    """Clocks of a program in a K step, and the instructions of each of its threads."""

    matrix: float
    shared: float
    instructions: float


def _loop(problem: Problem, tile: Tile) -> _Loop:
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    kinds, widths = problem.prologues, (m, n)
    narrow = problem.kernel.endswith("narrow") and not problem.kernel.startswith("up")
    warpgroup = _warpgroup(problem, tile)
    rate = FMA_PER_CLOCK[problem.precision] * (
        1.0 if warpgroup or problem.precision == "ieee" else MMA_SYNC_FRACTION
    )
    copied = sum(_tensors_read(kind) * width for kind, width in zip(kinds, widths, strict=False))
    per_depth = sum(PROLOGUE_INSTRUCTIONS[kind] * width for kind, width in zip(kinds, widths, strict=False))
    per_thread = 0.0
    if len(kinds) == 1:
        copied += n
        per_depth += WEIGHT_INSTRUCTIONS * n
        per_thread = 0.0 if narrow else STEP_INSTRUCTIONS
    else:
        per_depth += GATHER_INSTRUCTIONS * (m + n)
    if narrow:
        per_depth += PIXEL_INSTRUCTIONS * widths[len(kinds) - 1]  # the image is x, or of a wgrad the second
    return _Loop(
        m * n * k / rate,
        _shared_bytes(problem, tile, copied) / SHARED_BYTES_PER_CLOCK,
        per_thread + per_depth * k / (32 * tile.num_warps),
    )


def _epilogue(problem: Problem, tile: Tile, resources: Resources) -> tuple[float, float]:
    """Return (instructions per thread, clocks of the program's loads and stores)."""
    outputs = tile.block_m * tile.block_n
    wgrad = len(problem.prologues) == 2
    reads_other = problem.epilogue in READS_OTHER
    per_element = SPLIT_K_INSTRUCTIONS if wgrad else EPILOGUE_INSTRUCTIONS[problem.epilogue]
    item = 4 if wgrad else ITEM_SIZE[problem.precision]
    stores = outputs * item * (1 + reads_other) / L2_BYTES_PER_CLOCK
    if 4 * resources.store_bytes < 32 and not problem.kernel.endswith("narrow"):
        instructions = outputs * item / resources.store_bytes / 32
        stores = max(stores, instructions * FRAGMENT_ROWS * PARTIAL_SECTOR_CLOCKS)
    if resources.epilogue:
        return BEFORE_LOOP_INSTRUCTIONS + resources.epilogue, stores
    return PROGRAM_INSTRUCTIONS + per_element * outputs / (32 * tile.num_warps), stores


def predict(
    problem: Problem,
    tile: Tile,
    splits: int = 1,
    resources: Resources | None = None,
    sms: int = SM_COUNT,
    gpu: Gpu = H100,
    dependent: bool = False,
) -> Prediction:
    """Predict the product alone, without the kernel that reduces its partial sums.

    ``dependent`` tells whether it is a dependent launch.
    """
    gap = DEPENDENT_GAP if dependent else LAUNCH_GAP
    scale = sms / SM_COUNT
    resources = resources or estimate_resources(problem, tile)
    registers = 8 * -(-resources.registers // 8)  # the granularity of their allocation
    ctas_per_sm = min(
        SHARED_PER_SM // (resources.shared + 1024),
        REGISTERS_PER_SM // (registers * 32 * tile.num_warps),
        64 // tile.num_warps,
        MAX_CTAS_PER_SM,
    )
    ctas_per_sm = max(ctas_per_sm, 1)
    flops = 2 * problem.rows * problem.columns * problem.depth * problem.copies
    bytes_moved = min_bytes(problem)
    total = programs(tile, problem) * splits
    memory = transfer_seconds(bytes_moved, gpu) / scale
    busiest = -(-total // sms)  # programs of the SM with the most
    if problem.kernel in ("dense_narrow", "dense_outer"):  # no matrix instructions: bound by bytes
        program = PIPELINE_LATENCY + LOAD_LATENCY
        seconds = max(memory, program * busiest / ctas_per_sm) + program + gap
        roofline = max(flops / gpu.flops("ieee") / scale, memory)
        return Prediction(seconds, roofline, ctas_per_sm, busiest / ctas_per_sm, "bytes", flops, bytes_moved)

    loop = _loop(problem, tile)
    instructions, stores = _epilogue(problem, tile, resources)
    latency = LOAD_LATENCY if bytes_moved > gpu.l2_size else L2_LATENCY
    wait = latency if problem.epilogue in READS_OTHER else 0.0
    stall = resources.stalls * latency
    if _warpgroup(problem, tile) and problem.has_prologue:
        stall += PROLOGUE_LATENCY
    per_warp = tile.num_warps / WARPS_PER_CLOCK  # clocks in which all warps issue an instruction
    steps = -(-problem.depth // (tile.block_k * splits))
    ahead = 1 if problem.kernel == "wgrad_narrow" else max(tile.num_stages - 1, 1)  # steps, of loads

    def wave(concurrent: int) -> tuple[float, str]:
        one = loop.matrix + loop.instructions * per_warp
        terms = {
            "matrix": concurrent * loop.matrix / CLOCK,
            "shared memory": concurrent * loop.shared / CLOCK,
            "instructions": concurrent * loop.instructions * tile.num_warps / INTEGER_WARPS_PER_CLOCK / CLOCK,
            "one CTA": one / CLOCK,
        }
        first = max(terms.values())  # whose loads PIPELINE_LATENCY includes
        terms["one CTA"] += stall
        terms["latency"] = latency / ahead
        bound = max(terms, key=lambda name: terms[name])
        in_loop = first + (steps - 1) * terms[bound]
        around = max(
            concurrent * stores / CLOCK,
            concurrent * instructions * per_warp / CLOCK,
            PIPELINE_LATENCY + wait + instructions * DEPENDENT_CLOCKS / CLOCK,
        )
        return in_loop + around, bound if in_loop > around else "epilogue"

    full, rest = divmod(busiest, ctas_per_sm)
    compute, bound = wave(min(ctas_per_sm, busiest))
    compute *= full
    if rest:
        last, last_bound = wave(rest)
        compute += last
        bound = bound if full else last_bound
    peak = flops / gpu.flops(problem.precision) / scale
    roofline = max(peak, memory)
    if roofline > compute:
        bound = "bytes" if memory > peak else "peak"
    seconds = max(compute, roofline) + gap
    return Prediction(seconds, roofline, ctas_per_sm, busiest / ctas_per_sm, bound, flops, bytes_moved)


def split_k_seconds(
    problem: Problem, splits: int, gpu: Gpu = H100, in_flight: int = SPLITS_IN_FLIGHT
) -> float:
    """Predict the kernel that reduces a weight gradient's split-K partials to a float32 gradient.

    It loads the partials of ``in_flight`` splits at a time; what it waits for the first is in
    PIPELINE_LATENCY.
    """
    elements = problem.rows * problem.columns * problem.copies
    waits = LOAD_LATENCY * (-(-splits // in_flight) - 1)
    return PIPELINE_LATENCY + max(waits, transfer_seconds(4 * elements * (splits + 1), gpu)) + LAUNCH_GAP


def merge_seconds(steps: int) -> float:
    """Predict a merge of partial sums in ``steps`` steps, each of which waits for its loads."""
    return PIPELINE_LATENCY + steps * LOAD_LATENCY + LAUNCH_GAP


def batchnorm_forward_seconds(partial: tuple[int, ...], groups: int = 1) -> float:
    """Predict ``batchnorm.forward``: every program loops over its group's tiles, 1024 a step."""
    return merge_seconds(-(-partial[1] // groups // 1024))


def batchnorm_backward_seconds(partial: tuple[int, ...], groups: int = 1) -> float:
    """Predict ``batchnorm.backward``: every program loops over the groups and each group's tiles."""
    return merge_seconds(groups * -(-partial[1] // groups // 1024))


def apply_bytes(elements: int, precision: str, x_hat: bool = True) -> int:
    """Return the bytes that ``batchnorm.apply`` moves: it reads g and y and writes du and, if wanted, x̂."""
    return elements * ITEM_SIZE[precision] * (4 if x_hat else 3)


def pack_seconds(weights: int, precision: str, gpu: Gpu = H100) -> float:
    """Predict the launch that packs a network's ``weights`` elements, float32, for fprop and for dgrad."""
    return sweep_seconds(weights * (4 + 2 * ITEM_SIZE[precision]), gpu)


def prepare_seconds() -> float:
    """Predict ``prepare`` where no weight has changed: it loads its state, and then samples."""
    return PIPELINE_LATENCY + 2 * L2_LATENCY + LAUNCH_GAP


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
    """Return the least split-K count within 5% of the least time, reduction included; no split is empty.

    Within what the predictions are worth, fewer splits take less memory. wgrad_narrow, which bytes bound, has
    as many splits as programs run at once, of at least two steps.
    """
    steps = -(-problem.depth // tile.block_k)
    if problem.kernel == "wgrad_narrow":
        size = ITEM_SIZE[problem.precision] * tile.block_m * tile.block_k
        wanted = max(1, sms * max(1, NARROW_BYTES_PER_SM // size) // programs(tile, problem))
        return -(-steps // max(2, -(-steps // wanted)))
    counts = {
        -(-steps // -(-steps // wanted))
        for wanted in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96, 128, 192, 256)
        if wanted <= steps
    }
    times = {n: predict(problem, tile, n, sms=sms).seconds + split_k_seconds(problem, n) for n in counts}
    least = min(times.values())
    return min(n for n in counts if times[n] <= 1.05 * least)


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
