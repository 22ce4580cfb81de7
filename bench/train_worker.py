"""Worker process of one training variant: like :mod:`bench.worker`, with whole steps as calls."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from bench import phases
from bench.cases import Prepared
from bench.expected_results import UPDATE_TOLERANCE, Materials, step_results, update_error
from bench.providers import find
from bench.timing import CpuSampler, CudaSteps
from bench.train_case import Batch, Training
from bench.training_variants import VARIANTS, Loop
from bench.worker import Worker, main, set_precision
from dcgan.kernels.cpu import library


class TrainWorker(Worker):
    """Builds a training variant and checks its steps against float64 before they are timed."""

    differentiates = True

    def prepare(self, case: Training, provider_name: str, materials_path: str) -> Prepared:  # type: ignore[override]
        """Build and check a variant; the error is the largest of a network's gradient over the batches."""
        materials = Materials.load(Path(materials_path))
        loop = self._build(case, provider_name)
        batches = [Batch(*(t.to(case.device) for t in batch)) for batch in materials.batches]

        # Check every batch twice: a compiler's first call may run other code than later calls.
        actual, expected = step_results(loop, 2 * batches), 2 * materials.step_results
        errors = [a.errors(e) for a, e in zip(actual, expected, strict=True)]
        wrong = next((what for _, error, what in errors if not error <= materials.figure_tolerance), "")
        if not wrong and not (error := update_error(loop, batches[0])) <= UPDATE_TOLERANCE:
            found = f"error {error:.1e} > {UPDATE_TOLERANCE:.0e}"
            wrong = f"the parameter update does not match Adam's state: {found}"
        note = engines(loop, batches[0])
        del materials, expected, actual
        self._sampler = (
            CudaSteps(loop, batches) if case.device == "cuda" else CpuSampler(loop, batches, long=True)
        )
        self._reset_peak()
        return Prepared(max(error for error, _, _ in errors), note, wrong)

    def profile(self, case: Training, provider_name: str, rounds: int) -> phases.Profile:
        """Profile a step of a variant by layer and phase."""
        loop = self._build(case, provider_name)
        batches = [Batch(*(t.to(case.device) for t in batch)) for batch in case.batches()]
        return phases.measure(loop, batches, rounds, case.device)

    def _build(self, case: Training, provider_name: str) -> Loop:
        self._device = case.device
        set_precision(case.device, case.dtype)
        generator, discriminator = (network.to(case.device) for network in case.networks())
        loop: Loop = find(provider_name, VARIANTS).build(generator, discriminator, case)
        return loop


def engines(loop: Loop, batch: Batch) -> str:
    """Return how many of a step's operators run on each engine; '' if none is this project's."""
    ops = sys.modules.get("dcgan.kernels.ops")  # importing it would add to a baseline's memory
    if ops is None:
        return ""
    with ops.recording() as choices:
        loop(batch)
    counts = Counter(choice.engine for choice in choices)
    names = {"native": f"native {library.isa()}"} if "native" in counts else {}
    return ", ".join(f"{names.get(engine, engine)} {count}" for engine, count in counts.items())


if __name__ == "__main__":
    main(TrainWorker)
