"""Which algorithm runs a layer: the one that a cost model, fitted to measurements, says is fastest.

    cost = products / rate  +  weights' bytes / bandwidth  +  transforms  [+ packing, for weights not kept]

in cycles of one core. Products are multiply-adds in vectors of the micro-kernel; the weights' term is added
and not overlapped because that is how it was measured: at batch 1 it rules, and the direct form, with the
fewest bytes, wins where a layer's weights are many and its pixels few.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# What csrc takes at most.
MAX_LAYERS, MAX_CHANNELS, MAX_SIDE, MAX_KERNEL = 64, 1 << 16, 1 << 14, 64
NARROW = 4  # channels of an image that the narrow form is for

# Multiply-adds a cycle that the products reach; without FMA a multiply and an add are two instructions.
RATE = {"avx512": 29.0, "avx2": 14.5, "portable": 3.6}
LIBRARY_RATE = 0.72  # of that, by a library's direct convolution
BANDWIDTH = 6.5  # bytes a cycle a thread of packed weights, from L3 or memory
PACKING = 0.5  # bytes a cycle a thread that packing makes
LANES = {"avx512": 16, "avx2": 8, "portable": 4}
TRANSFORM = {"f2": 25.0, "f4": 70.0}  # cycles for a vector of channels of one tile, in or out
EPILOGUE = 3.0  # cycles for a vector of channels of one pixel


class Geometry(NamedTuple):
    """A layer's shape; height and width are the input's."""

    transposed: bool
    c_in: int
    c_out: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int

    @property
    def output(self) -> tuple[int, int]:
        """The output map's height and width."""
        k, s, p = self.kernel, self.stride, self.padding
        if self.transposed:
            return (self.height - 1) * s - 2 * p + k, (self.width - 1) * s - 2 * p + k
        return (self.height + 2 * p - k) // s + 1, (self.width + 2 * p - k) // s + 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the direct form, one image."""
        height, width = (self.height, self.width) if self.transposed else self.output
        return self.kernel**2 * self.c_in * self.c_out * height * width

    @property
    def fits(self) -> bool:
        """Whether it is within csrc's limits."""
        sizes = max(self.c_in, self.c_out), max(self.height, self.width), self.kernel
        return all(n <= most for n, most in zip(sizes, (MAX_CHANNELS, MAX_SIDE, MAX_KERNEL), strict=True))

    @property
    def dense(self) -> bool:
        side = 1 if self.transposed else self.kernel
        return self.padding == 0 and (self.height, self.width) == (side, side)

    @property
    def strided(self) -> bool:
        """Kernel 4, stride 2, padding 1, on a map that has an output."""
        if (self.kernel, self.stride, self.padding) != (4, 2, 1):
            return False
        return self.transposed or min(self.height, self.width) >= 2


def candidates(g: Geometry) -> tuple[str, ...]:
    """The algorithms that compute this layer; none where the engine does not cover it."""
    if not g.fits:
        return ()
    if g.dense:
        return ("dense",)
    if not g.strided:
        return ()
    narrow = g.c_out if g.transposed else g.c_in
    return ("narrow",) if narrow <= NARROW else ("direct", "f2", "f4")


def packed_bytes(g: Geometry, algorithm: str) -> int:
    """About what the layer's weights take, packed."""
    points = {"f2": 9 / 4, "f4": 25 / 4}.get(algorithm, 1.0)
    return int(4 * points * g.c_in * g.c_out * g.kernel**2)


@functools.lru_cache(maxsize=1024)
def costs(g: Geometry, images: int, threads: int, isa: str, kept: bool) -> dict[str, float]:
    """Cycles that each candidate takes for the batch, on ``threads`` threads."""
    result = {}
    for algorithm in candidates(g):
        packed = packed_bytes(g, algorithm)
        weights = packed / BANDWIDTH + (0 if kept else packed / PACKING)
        if algorithm in TRANSFORM:
            multiplies, vectors = _winograd(g, 2 if algorithm == "f2" else 4)
            epilogue = vectors / LANES[isa] * TRANSFORM[algorithm]
        else:
            multiplies = g.macs
            epilogue = g.output[0] * g.output[1] * g.c_out / LANES[isa] * EPILOGUE
        result[algorithm] = (images * (multiplies / RATE[isa] + epilogue) + weights) / threads
    return result


def _winograd(g: Geometry, out: int) -> tuple[int, float]:
    """Multiply-adds of one image by F(out×out, 2×2), and the channels of its tiles that are transformed.

    A transposed convolution transforms each parity's input and output, a convolution its four parities'
    inputs and their one sum.
    """
    height, width = (g.height, g.width) if g.transposed else g.output
    tiles = -(-height // out) * -(-width // out)
    outputs = 4 if g.transposed else 1
    return 4 * (out + 1) ** 2 * tiles * g.c_in * g.c_out, tiles * (4 * g.c_in + outputs * g.c_out)


def algorithm(g: Geometry, images: int, threads: int, isa: str, kept: bool) -> str:
    """The candidate of least cost. ``kept``: the packed weights are cached, not made for this call alone."""
    table = costs(g, images, threads, isa, kept)
    return min(table, key=table.__getitem__)


def worthwhile(g: Geometry, images: int, threads: int, isa: str) -> bool:
    """Whether the fastest candidate, packing included, beats a library, which reads the weights twice."""
    library = images * g.macs / (RATE[isa] * LIBRARY_RATE) + 2 * packed_bytes(g, "direct") / BANDWIDTH
    return min(costs(g, images, threads, isa, False).values()) < library / threads


FPROP, DGRAD, WGRAD = range(3)


@functools.lru_cache(maxsize=1024)
def training(
    g: Geometry, product: int, dressed: tuple[bool, bool], images: int, threads: int, isa: str
) -> str:
    """The algorithm of a layer's product in training; ``dressed``: with a prologue, with statistics."""
    prologue, stats = dressed
    if g.dense:
        return "dense"
    few = (g.c_out if g.transposed else g.c_in) <= NARROW
    # The narrow transposed convolution's epilogue goes along pixels, and has no sums by channel.
    sums = (g.transposed and product == FPROP and stats) or (
        not g.transposed and product == DGRAD and prologue
    )
    if few and not sums:
        return "narrow"
    height, width = (g.height, g.width) if g.transposed else g.output
    tiles = images * -(-height // 4) * -(-width // 4)
    return "f4" if tiles >= 32 else "direct"
