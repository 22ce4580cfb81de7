"""The machine that a result was measured on: its hardware, software versions and limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import DTYPES
from bench.timing import CpuSampler, events
from dcgan.kernels.cpu import library

PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime", "openvino", "zentorch")
SECONDS = 0.25  # per measurement: one matrix size, the copy, or the FMA units with one instruction set
BURSTS = 5  # per FMA measurement


def cores() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Return the one-minute load average, or None where it is not available."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def hardware() -> dict[str, Any]:
    """Describe the CPU and, if there is one, the GPU."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
        found["gpu_processors"] = properties.multi_processor_count
    return found


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the versions of Python, the system and every benchmarked package (None if missing)."""
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        found[package] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"cuda": torch.version.cuda}


def commit() -> str | None:
    """Return the commit of this checkout, with ``+`` if files were modified; None outside a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# --- limits -------------------------------------------------------------------------------------------------


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


def set_precision(device: str, dtype: str) -> None:
    """Turn TF32 on or off for ``dtype``, and cuDNN's algorithm search on."""
    if device != "cuda":
        return
    # Use the older interface, which sets both. After the newer one (``fp32_precision``) torch.compile fails,
    # because it still reads the older one, which then raises.
    tf32 = dtype == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def measure(device: str, dtype: str) -> Ceiling:
    """Measure the limits in a few seconds; a CPU is measured with PyTorch's current thread count.

    ``dtype`` is a key of DTYPES, for which the precision stays set.
    """
    set_precision(device, dtype)
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
    if device == "cuda":
        return min(events(lambda i: call(), SECONDS))
    return min(CpuSampler(lambda x: call(), [None]).burst(SECONDS)["warm"])


def _gemm(device: str, dtype: torch.dtype, n: int) -> float:
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _copy(device: str, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)
