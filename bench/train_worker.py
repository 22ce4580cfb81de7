"""The process of one way of training: :mod:`bench.worker`, whose calls are whole steps."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from bench import phases
from bench.answers import MOVED, Materials, answers, moved
from bench.cases import Prepared
from bench.providers import find
from bench.timing import CpuSampler, CudaSteps
from bench.train_case import Batch, Training
from bench.ways import WAYS, Loop
from bench.worker import Worker, main, set_precision
from dcgan.kernels.cpu import library


class TrainWorker(Worker):
    """Builds a way of training, and holds one step of it against float64 before it is timed."""

    differentiates = True

    def prepare(self, case: Training, provider_name: str, materials_path: str) -> Prepared:  # type: ignore[override]
        """The error is the worst of both networks' gradients over the batches."""
        materials = Materials.load(Path(materials_path))
        loop = self._build(case, provider_name)
        batches = [Batch(*(t.to(case.device) for t in batch)) for batch in materials.batches]

        # Twice over: a compiler's first call and the calls after it need not be the same code.
        found, expected = answers(loop, 2 * batches), 2 * materials.answers
        errors = [mine.errors(right) for mine, right in zip(found, expected, strict=True)]
        wrong = next((what for _, error, what in errors if not error <= materials.figure_tolerance), "")
        if not wrong and not (error := moved(loop, batches[0])) <= MOVED:
            wrong = f"the parameters moved other than Adam's state says: error {error:.1e} > {MOVED:.0e}"
        note = engines(loop, batches[0])
        del materials, expected, found
        self._sampler = (
            CudaSteps(loop, batches) if case.device == "cuda" else CpuSampler(loop, batches, long=True)
        )
        self._reset_peak()
        return Prepared(max(error for error, _, _ in errors), note, wrong)

    def profile(self, case: Training, provider_name: str, rounds: int) -> phases.Profile:
        """Where the time of a step goes."""
        loop = self._build(case, provider_name)
        batches = [Batch(*(t.to(case.device) for t in batch)) for batch in case.batches()]
        return phases.measure(loop, batches, rounds, case.device)

    def _build(self, case: Training, provider_name: str) -> Loop:
        self._device = case.device
        set_precision(case.device, case.dtype)
        generator, discriminator = (network.to(case.device) for network in case.networks())
        loop: Loop = find(provider_name, WAYS).build(generator, discriminator, case)
        return loop


def engines(loop: Loop, batch: Batch) -> str:
    """How many of a step's operators run on which engine; '' for a step without any of ours."""
    ops = sys.modules.get(
        "dcgan.kernels.ops"
    )  # a rival has not imported it, and its memory is not to have it
    if ops is None:
        return ""
    with ops.recording() as choices:
        loop(batch)
    counts = Counter(choice.engine for choice in choices)
    names = {"native": f"native {library.isa()}"} if "native" in counts else {}
    return ", ".join(f"{names.get(engine, engine)} {count}" for engine, count in counts.items())


if __name__ == "__main__":
    main(TrainWorker)
