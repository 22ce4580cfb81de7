"""Measure the machine's limits: peak arithmetic throughput and copy bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.cases import DTYPES
from bench.flops import Work
from dcgan.kernels.cpu import library

SECONDS = 0.25  # per measurement: one matrix size, the copy, or the FMA units with one instruction set
BURSTS = 5  # per FMA measurement


@dataclass(frozen=True)
class Ceiling:
    """The machine's limits for a dtype.

    ``flops``, in FLOP/s, is the peak FMA rate of a CPU with all operands in registers, which no direct
    convolution can exceed. On a GPU, and where the native engine that measures it is missing, it is the best
    rate of a large GEMM, about 90% of that peak. ``measure`` names the method. ``bandwidth`` is in bytes/s,
    reads plus writes of a large copy.
    """

    flops: float
    bandwidth: float
    measure: str

    def or_better(self, other: Ceiling | None) -> Ceiling:
        """Return the elementwise maximum of two measurements, since noise can only lower a rate."""
        if other is None:
            return self
        faster = self if self.flops >= other.flops else other
        return replace(faster, bandwidth=max(self.bandwidth, other.bandwidth))

    def images_per_s(self, work: Work) -> float:
        """Return the compute bound of direct convolution at the measured peak. Winograd may exceed it."""
        return self.flops / work.flops

    def memory_images_per_s(self, work: Work, batch: int, itemsize: int) -> float:
        """Return the bandwidth bound: each inter-layer tensor written and read once, without caches."""
        return self.bandwidth / work.bytes_per_image(batch, itemsize)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: str, dtype: str) -> Ceiling:
    """Measure the limits in a few seconds; a CPU is measured with PyTorch's current thread count.

    ``dtype`` is a key of DTYPES.
    """
    if device == "cuda":
        rates = [_gemm(device, DTYPES[dtype], n) for n in (4096, 8192)]
        return Ceiling(max(rates), _copy(device, 1 << 30), f"{dtype} GEMM peak")
    if library.problem() is None:
        flops, name = fma(torch.get_num_threads()), "float32 FMA peak"
    else:
        flops, name = max(_gemm(device, torch.float32, n) for n in (1024, 2048)), "float32 GEMM peak"
    # A CPU without 16-bit arithmetic converts to float32, whose rate is then the ceiling, and a large product
    # would take a minute: a small one decides whether the large ones are worth measuring.
    other = DTYPES[dtype]
    if other != torch.float32 and 4 * _gemm(device, other, 256) > flops:
        flops, name = max(
            (flops, name), *((_gemm(device, other, n), f"{dtype} GEMM peak") for n in (1024, 2048))
        )
    return Ceiling(flops, _copy(device, 256 << 20), name)


def fma(threads: int) -> float:
    """Return the peak FMA rate in FLOP/s, all operands in registers, over all instruction sets.

    The maximum of several bursts is taken, since noise can only lower a rate.
    """
    previous = library.isa()
    best = 0.0
    try:
        for isa in library.isas():
            library.use_isa(isa)
            best = max(best, *(2 * library.peak(threads, SECONDS / BURSTS) for _ in range(BURSTS)))
    finally:
        library.use_isa(previous)
    return best


def _best(call: Callable[[], object], device: str) -> float:
    """Return the shortest time of ``call``, in seconds, over repetitions lasting SECONDS."""
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
