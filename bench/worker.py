"""The process of one provider, driven by :mod:`bench.race`: ``python -m bench.worker PIPE THREADS CLASS``.

Within one process, the thread pools of several runtimes would spin during each other's calls. A worker
therefore replies only after its threads have gone to sleep: any wait policy is fine within a burst, and none
disturbs the next burst.

The pipe carries pickled tuples: requests ``(method, *arguments)``, replies ``("ok", value)`` or
``("error", reason)``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pkgutil
import re
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.cases import Case, Materials, Prepared, relative_error
from bench.providers import find
from bench.timing import CpuSampler, CudaSampler, Sampler, Times
from dcgan.kernels.cpu import library

SETTLE_SECONDS = 2.0  # maximum wait for threads to sleep


class Worker:
    """The methods that the coordinator may call."""

    differentiates = False
    """Whether methods run with autograd enabled."""

    def __init__(self) -> None:
        self._baseline = _resident_bytes("VmRSS")
        self._sampler: Sampler | None = None
        self._device = "cpu"

    def prepare(self, case: Case, provider_name: str, materials_path: str) -> Prepared:
        """Build, run and check the provider; its error is the maximum over the inputs."""
        provider = find(provider_name)
        materials = Materials(*load_tensors(materials_path))
        self._device = case.device
        machine.set_precision(case.device, case.dtype)
        network = case.skeleton()
        network.load_state_dict(materials.state)
        network = network.eval().requires_grad_(False).to(case.device, case.torch_dtype)
        inputs = [x.to(case.device) for x in materials.inputs]
        run = provider.build(network, inputs[0], case.threads)

        # Check two rounds: a compiler may run different code in the first call and in later ones.
        errors = [
            relative_error(run(x), expected)
            for _ in range(2)
            for x, expected in zip(inputs, materials.expected, strict=True)
        ]
        del materials
        note = engines(run, inputs[0])
        if case.device == "cuda":
            self._sampler = CudaSampler(run, inputs, capture=not provider.replays)
        else:
            self._sampler = CpuSampler(run, inputs)
        self._reset_peak()
        return Prepared(max(errors), note)

    def burst(self, seconds: float) -> tuple[Times, int]:
        """Return the seconds per call by column, and the peak memory of all bursts so far in bytes.

        On CUDA this is allocated memory. On the CPU it is resident memory beyond that of importing PyTorch:
        weights in every form that a provider keeps, activations, and the runtime's or compiler's code and
        data.
        """
        assert self._sampler is not None
        times = self._sampler.burst(seconds)
        if self._device == "cuda":
            return times, torch.cuda.max_memory_allocated() - self._sampler.overhead
        return times, max(_resident_bytes("VmHWM") - self._baseline, 0)

    def ceiling(self, device: str, dtype: str) -> machine.Ceiling:
        """Measure the machine's limits."""
        return machine.measure(device, dtype)

    def _reset_peak(self) -> None:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # memory that a compiler has freed does not count
            with contextlib.suppress(OSError):  # some sandboxes forbid it; the peak then includes building
                Path("/proc/self/clear_refs").write_text("5")


def load_tensors(path: str) -> Any:
    """Load what the coordinator has saved: the fields of a case's materials."""
    return torch.load(path, map_location="cpu", weights_only=True)


def engines(run: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Describe the engines that a drop-in's layers run on, and why not faster ones; empty for others."""
    fast = sys.modules.get("dcgan.fast")  # a baseline must not import it: that would count as its memory
    if fast is None or not isinstance(run, fast.Generator | fast.Discriminator):
        return ""
    found = {(row.engine, row.reason): None for row in fast.explain(run, x)}
    native = f"native {library.isa()}" if ("native", "") in found else ""
    others = [f"{engine}: {reason}" if reason else engine for engine, reason in found if engine != "native"]
    return "; ".join(filter(None, [native, *others]))


def _resident_bytes(field: str) -> int:
    """Return the resident memory of this process in bytes: ``VmRSS`` is current, ``VmHWM`` the peak."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: only the peak is available, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) * 1024


def _settle() -> None:
    """Wait until all threads sleep, that is until the process's CPU time stops advancing."""
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def serve(pipe: Connection, worker: Worker) -> None:
    """Serve requests until the pipe is closed."""
    while True:
        try:
            method, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            with torch.set_grad_enabled(worker.differentiates):
                value = getattr(worker, method)(*arguments)
        except Exception as error:
            pipe.send(("error", describe(error)))
            continue
        _settle()
        pipe.send(("ok", value))


def describe(error: Exception) -> str:
    """Describe an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    pipe, threads, worker = sys.argv[1:]
    torch.set_num_threads(int(threads))
    serve(Connection(int(pipe)), pkgutil.resolve_name(worker)())


if __name__ == "__main__":
    main()
