"""What the machine can do at most: arithmetic and copy bandwidth, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.cases import DTYPES
from bench.flops import Work
from dcgan.kernels.cpu import library

SECONDS = 0.25  # a measurement of one matrix size, of the copy, or of one instruction set's FMA units
BURSTS = 5  # that the FMA units' time is divided into


@dataclass(frozen=True)
class Ceiling:
    """The machine's limits with the given dtype.

    ``flops`` in FLOP/s is, on a CPU, what its FMA units do with every operand in a register, which no direct
    convolution can exceed; elsewhere, and without the native engine that measures it, the best rate of a
    large matrix product, some 90% of that. ``measure`` names it. ``bandwidth`` in bytes/s: what a large copy
    reads and writes.
    """

    flops: float
    bandwidth: float
    measure: str

    def or_better(self, other: Ceiling | None) -> Ceiling:
        """The best of two measurements: whatever disturbs one can only lower it."""
        if other is None:
            return self
        faster = self if self.flops >= other.flops else other
        return replace(faster, bandwidth=max(self.bandwidth, other.bandwidth))

    def images_per_s(self, work: Work) -> float:
        """The most a direct convolution can do: its arithmetic at the measured peak. Winograd may do more."""
        return self.flops / work.flops

    def memory_images_per_s(self, work: Work, batch: int, itemsize: int) -> float:
        """The most that memory allows: each tensor between two layers written and read once, no cache."""
        return self.bandwidth / work.bytes_per_image(batch, itemsize)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: str, dtype: str) -> Ceiling:
    """Measures; takes a few seconds. ``dtype`` is a key of DTYPES. On a CPU: with PyTorch's threads."""
    if device == "cuda":
        rates = [_gemm(device, DTYPES[dtype], n) for n in (4096, 8192)]
        return Ceiling(max(rates), _copy(device, 1 << 30), f"{dtype} GEMM peak")
    if library.problem() is None:
        flops, name = fma(torch.get_num_threads()), "float32 FMA peak"
    else:
        flops, name = max(_gemm(device, torch.float32, n) for n in (1024, 2048)), "float32 GEMM peak"
    # A CPU without 16-bit arithmetic converts to float32, which is then the ceiling, and takes a minute for a
    # large product: a small one tells.
    other = DTYPES[dtype]
    if other != torch.float32 and 4 * _gemm(device, other, 256) > flops:
        flops, name = max(
            (flops, name), *((_gemm(device, other, n), f"{dtype} GEMM peak") for n in (1024, 2048))
        )
    return Ceiling(flops, _copy(device, 256 << 20), name)


def fma(threads: int) -> float:
    """FLOP/s of the FMA units with every operand in a register, by the instruction set that does most.

    The best of several bursts: whatever disturbs one can only lower it.
    """
    used = library.isa()
    best = 0.0
    try:
        for isa in library.isas():
            library.use_isa(isa)
            best = max(best, *(2 * library.peak(threads, SECONDS / BURSTS) for _ in range(BURSTS)))
    finally:
        library.use_isa(used)
    return best


def _best(call: Callable[[], object], device: str) -> float:
    """Shortest time of ``call`` in SECONDS, in seconds."""
    call()
    best = float("inf")
    end = time.perf_counter() + SECONDS
    runs = 0
    while runs < 2 or time.perf_counter() < end:
        if device == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            elapsed = first.elapsed_time(last) / 1e3
        else:
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
        best = min(best, elapsed)
        runs += 1
    return best


def _gemm(device: str, dtype: torch.dtype, n: int) -> float:
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _copy(device: str, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)
