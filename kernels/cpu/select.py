"""Which algorithm runs a layer: the one that a cost model, fitted to measurements, says is fastest.

    cost = products / rate  +  weights' bytes / bandwidth  +  transforms  [+ packing, for weights not kept]

in cycles of one core. Products are multiply-adds in vectors of the micro-kernel; the weights' term is added
and not overlapped because that is how it was measured: at batch 1 it rules, and the direct form, with the
fewest bytes, wins where a layer's weights are many and its pixels few.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

LANES = {"avx512": 16, "avx2": 8, "portable": 4}
NARROW = 4  # channels of an image that the narrow form is for


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
    def pixels(self) -> int:
        """Output pixels (of one parity, for a transposed convolution of stride 2)."""
        return self.height * self.width if self.transposed else (self.height // 2) * (self.width // 2)

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
        if self.dense:
            return self.c_in * self.c_out * self.kernel**2
        return 16 * self.c_in * self.c_out * self.pixels

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
    lanes = LANES.get(isa, 4)
    rate = (
        2 * lanes * 0.9 * (1 if isa != "portable" else 0.5)
    )  # multiply-adds a cycle; without FMA half of it
    for algorithm in candidates(g):
        packed = packed_bytes(g, algorithm)
        weights = packed / 6.5  # bytes a cycle a thread, from L3 or memory
        if not kept:
            weights += packed / PACKING
        if algorithm in ("f2", "f4"):
            out = 2 if algorithm == "f2" else 4
            points = (out + 1) ** 2
            height, width = (g.height, g.width) if g.transposed else (g.height // 2, g.width // 2)
            tiles = images * -(-height // out) * -(-width // out)
            products = 4 * points * tiles * g.c_in * g.c_out / rate
            channels = 4 * (g.c_in + (g.c_out if g.transposed else g.c_out / 4))
            transforms = tiles * channels / lanes * TRANSFORM[algorithm]
        else:
            products = images * g.macs / rate
            transforms = images * g.pixels * (4 * g.c_out if g.transposed else g.c_out) / lanes * 3
        result[algorithm] = (products + weights + transforms) / threads
    return result


PACKING = 1.0  # bytes a cycle a thread that packing makes
TRANSFORM = {"f2": 25.0, "f4": 70.0}  # cycles for a vector of channels of one tile, in or out


def algorithm(g: Geometry, images: int, threads: int, isa: str, kept: bool) -> str:
    """The candidate of least cost. ``kept``: the packed weights are cached, not made for this call alone."""
    table = costs(g, images, threads, isa, kept)
    return min(table, key=table.__getitem__)


def worthwhile(g: Geometry, images: int, threads: int, isa: str) -> bool:
    """Whether the fastest candidate, packing included, beats a library's direct convolution."""
    rate = 2 * LANES.get(isa, 4) * 0.65
    library = (images * g.macs / rate + 2 * packed_bytes(g, "direct") / 6.5) / threads
    return min(costs(g, images, threads, isa, False).values()) < library
