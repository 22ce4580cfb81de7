"""Algorithm selection by a cost model that is fitted to measurements.

    cost = products / rate  +  weight bytes / bandwidth  +  transforms  [+ packing, unless weights are cached]

in cycles of one core. Products are multiply-adds at the micro-kernel's rate. The weights' term is added, not
overlapped, because that is what measurements show: it dominates at batch 1, and the direct algorithm, with
the fewest bytes, wins where a layer has many weights and few pixels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Limits of csrc.
MAX_LAYERS, MAX_CHANNELS, MAX_SIDE, MAX_KERNEL = 64, 1 << 16, 1 << 14, 64
NARROW = 4  # max image channels for the narrow algorithm

# Sustained multiply-adds per cycle; without FMA, a multiply and an add are two instructions.
RATE = {"avx512": 29.0, "avx2": 14.5, "portable": 3.6}
LIBRARY_RATE = 0.72  # fraction of RATE that a library's direct convolution reaches
BANDWIDTH = 6.5  # bytes per cycle and thread of packed weights read from L3 or memory
PACKING = 0.5  # bytes per cycle and thread written by packing
LANES = {"avx512": 16, "avx2": 8, "portable": 4}
TRANSFORM = {"f2": 25.0, "f4": 70.0}  # cycles per vector of channels of one input or output tile
EPILOGUE = 3.0  # cycles per vector of channels of one pixel


class Geometry(NamedTuple):
    """A layer's shape; height and width are those of the input."""

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
        """Multiply-adds per image of the direct algorithm."""
        height, width = (self.height, self.width) if self.transposed else self.output
        return self.kernel**2 * self.c_in * self.c_out * height * width

    @property
    def fits(self) -> bool:
        """Whether the layer is within csrc's limits."""
        sizes = max(self.c_in, self.c_out), max(self.height, self.width), self.kernel
        return all(n <= limit for n, limit in zip(sizes, (MAX_CHANNELS, MAX_SIDE, MAX_KERNEL), strict=True))

    @property
    def dense(self) -> bool:
        """Whether the convolution is a plain matrix product: a 1×1 map on its smaller side."""
        side = 1 if self.transposed else self.kernel
        return self.padding == 0 and (self.height, self.width) == (side, side)

    @property
    def strided(self) -> bool:
        """Whether it has kernel 4, stride 2, padding 1, and a nonempty output."""
        if (self.kernel, self.stride, self.padding) != (4, 2, 1):
            return False
        return self.transposed or min(self.height, self.width) >= 2


def candidates(g: Geometry) -> tuple[str, ...]:
    """Return the algorithms that support this layer; none if the engine does not cover it."""
    if not g.fits:
        return ()
    if g.dense:
        return ("dense",)
    if not g.strided:
        return ()
    narrow = g.c_out if g.transposed else g.c_in
    return ("narrow",) if narrow <= NARROW else ("direct", "f2", "f4")


def packed_bytes(g: Geometry, algorithm: str) -> int:
    """Estimate the size of the layer's packed weights."""
    points = {"f2": 9 / 4, "f4": 25 / 4}.get(algorithm, 1.0)
    return int(4 * points * g.c_in * g.c_out * g.kernel**2)


@functools.lru_cache(maxsize=1024)
def costs(g: Geometry, images: int, threads: int, isa: str, cached: bool) -> dict[str, float]:
    """Estimate the cycles that each candidate takes for the batch on ``threads`` threads."""
    result = {}
    for algorithm in candidates(g):
        packed = packed_bytes(g, algorithm)
        weights = packed / BANDWIDTH + (0 if cached else packed / PACKING)
        if algorithm in TRANSFORM:
            multiplies, vectors = _winograd(g, 2 if algorithm == "f2" else 4)
            epilogue = vectors / LANES[isa] * TRANSFORM[algorithm]
        else:
            multiplies = g.macs
            epilogue = g.output[0] * g.output[1] * g.c_out / LANES[isa] * EPILOGUE
        result[algorithm] = (images * (multiplies / RATE[isa] + epilogue) + weights) / threads
    return result


def _winograd(g: Geometry, out: int) -> tuple[int, float]:
    """Return the multiply-adds of one image by F(out×out, 2×2), and the channels of tiles transformed.

    A transposed convolution transforms the input once per output parity and each parity's output; a
    convolution transforms the inputs of its four parities and their one sum.
    """
    height, width = (g.height, g.width) if g.transposed else g.output
    tiles = -(-height // out) * -(-width // out)
    outputs = 4 if g.transposed else 1
    return 4 * (out + 1) ** 2 * tiles * g.c_in * g.c_out, tiles * (4 * g.c_in + outputs * g.c_out)


def algorithm(g: Geometry, images: int, threads: int, isa: str, cached: bool) -> str:
    """Return the candidate of minimum cost. ``cached``: the weights need not be packed for this call."""
    table = costs(g, images, threads, isa, cached)
    return min(table, key=table.__getitem__)


def worthwhile(g: Geometry, images: int, threads: int, isa: str) -> bool:
    """Return whether the fastest candidate, packing included, beats a library, which reads weights twice."""
    library = images * g.macs / (RATE[isa] * LIBRARY_RATE) + 2 * packed_bytes(g, "direct") / BANDWIDTH
    return min(costs(g, images, threads, isa, False).values()) < library / threads


FPROP, DGRAD, WGRAD = range(3)


@functools.lru_cache(maxsize=1024)
def training(g: Geometry, product: int, fused: tuple[bool, bool], images: int, threads: int, isa: str) -> str:
    """Choose the algorithm of a layer's product in training; ``fused``: (prologue, statistics)."""
    prologue, stats = fused
    if g.dense:
        return "dense"
    narrow = (g.c_out if g.transposed else g.c_in) <= NARROW
    # The narrow transposed convolution's epilogue is vectorized over pixels and computes no channel sums.
    sums = (g.transposed and product == FPROP and stats) or (
        not g.transposed and product == DGRAD and prologue
    )
    if narrow and not sums:
        return "narrow"
    height, width = (g.height, g.width) if g.transposed else g.output
    tiles = images * -(-height // 4) * -(-width // 4)
    return "f4" if tiles >= 32 else "direct"
