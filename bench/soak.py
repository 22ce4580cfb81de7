"""``python -m bench learn --soak``: long training of fast networks, with fixed and varying batch sizes.

The criterion (:attr:`Soak.problems`):

* every loss, D(x) and D(G(z)) of every step is finite, as is every parameter and buffer at the end;
* from step ``WARM`` to the end, the process's resident memory grows by at most ``MAX_GROWTH`` bytes, the
  number of tensors does not grow and the number of Python objects grows by at most ``OBJECTS``: a leak of one
  tensor or object per step would add 1,500;
* over the last ``LAST`` steps, D has neither given up (D(x) - D(G(z)) is at least ``MIN_MARGIN``) nor won
  (D(G(z)) is at least ``MIN_D_G_Z``, so that the Generator still learns).
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench import records, table
from bench.learning import LATENT, Settings
from dcgan import fast
from dcgan.training import Result, TrainStep, optimizers

STEPS = 2000
WARM = 500
LAST = 500
MAX_GROWTH = 8 << 20
OBJECTS = 100
MIN_MARGIN = 0.05
MIN_D_G_Z = 0.01
SETTINGS = Settings(steps=STEPS, features=16, image_size=32, batch=16)
MIXED = (1.0, 0.0625, 0.4375, 2.0, 0.3125)
"""Batch sizes of the second run relative to ``batch``: 16, 1, 7, 32, 5 for a batch of 16."""


@dataclass(frozen=True)
class Soak:
    """The measurements of one run."""

    batches: tuple[int, ...]
    """Batch sizes, used cyclically."""
    steps: int
    finite: bool
    """Whether every figure of every step, and every parameter and buffer at the end, is finite."""
    resident_bytes: tuple[int, int]
    """Resident memory of the process after ``WARM`` steps and at the end."""
    tensors: tuple[int, int]
    """Live tensors after ``WARM`` steps and at the end."""
    objects: tuple[int, int]
    """Objects tracked by Python's garbage collector after ``WARM`` steps and at the end."""
    last: dict[str, float]
    """Means over the last ``LAST`` steps, keyed by the fields of :class:`dcgan.training.Result`."""
    seconds: float

    @property
    def growth(self) -> int:
        return self.resident_bytes[1] - self.resident_bytes[0]

    @property
    def problems(self) -> list[str]:
        """Return a description of every violation of the criterion; empty for a pass."""
        d_x, d_g_z = self.last["d_x"], self.last["d_g_z"]
        found = {
            "a loss or a parameter is not finite": self.finite,
            f"the process grew by {self.growth / 1e6:.1f} MB": self.growth <= MAX_GROWTH,
            f"tensors grew from {self.tensors[0]} to {self.tensors[1]}": self.tensors[1] <= self.tensors[0],
            f"objects grew from {self.objects[0]} to {self.objects[1]}": self.objects[1]
            <= self.objects[0] + OBJECTS,
            f"D has given up: D(x) {d_x:.3f}, D(G(z)) {d_g_z:.3f}": d_x - d_g_z >= MIN_MARGIN,
            f"D has won: D(G(z)) {d_g_z:.4f}": d_g_z >= MIN_D_G_Z,
        }
        return [problem for problem, ok in found.items() if not ok]


def soak(settings: Settings, sizes: tuple[int, ...], seed: int = 0) -> Soak:
    """Train fast networks on digits, cycling through the batch sizes ``sizes``."""
    start = time.perf_counter()
    generator, discriminator = (fast.convert(network) for network in settings.networks(seed))
    step = TrainStep(generator, discriminator, *optimizers(generator, discriminator, settings.config(seed)))
    figures = torch.full((settings.steps, len(Result._fields)), torch.nan)
    images = settings.images()
    random = torch.Generator(images.device).manual_seed(seed)
    warm = min(WARM, settings.steps)
    before = _memory()
    for i in range(settings.steps):
        count = sizes[i % len(sizes)]
        chosen = torch.randint(len(images), (count,), generator=random, device=images.device)
        noise = torch.randn(count, LATENT, 1, 1, generator=random, device=images.device)
        figures[i] = torch.stack(step(images[chosen], noise))
        if i + 1 == warm:
            before = _memory()
    after = _memory()
    state = [tensor for network in (generator, discriminator) for tensor in network.state_dict().values()]
    finite = all(bool(tensor.isfinite().all()) for tensor in (figures, *state))
    last = dict(zip(Result._fields, figures[-LAST:].mean(0).tolist(), strict=True))
    resident, tensors, objects = zip(before, after, strict=True)
    seconds = time.perf_counter() - start
    return Soak(sizes, settings.steps, finite, resident, tensors, objects, last, seconds)


def _memory() -> tuple[int, int, int]:
    """Return the resident bytes, the live tensors and the tracked objects."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = gc.get_objects()
    return pages * os.sysconf("SC_PAGE_SIZE"), sum(issubclass(type(o), Tensor) for o in found), len(found)


def runs(settings: Settings) -> Iterator[Soak]:
    """Run the soak with a fixed batch size, then with varying ones."""
    yield soak(settings, (settings.batch,))
    yield soak(settings, tuple(max(1, round(settings.batch * share)) for share in MIXED))


def run(changes: dict[str, Any], folder: Path | None, out: Console, log: Callable[[str], None]) -> int:
    """Run both soaks, print them and write soak.json. Return 1 if either has a problem, else 0."""
    settings = replace(SETTINGS, **changes)
    found = []
    for outcome in runs(settings):
        found.append(outcome)
        log(f"batches {outcome.batches}: {outcome.steps} steps in {outcome.seconds:.0f} s")
    shown = table.start(
        f"{settings.steps} steps of fast networks · {settings.title} · {settings.device}",
        ["batches"],
        ["finite", "RSS MB", "growth MB", "tensors", "objects", *Result._fields],
    )
    for o in found:
        shown.add_row(
            ", ".join(map(str, o.batches)),
            str(o.finite),
            table.rate(o.resident_bytes[1] / 1e6),
            f"{o.growth / 1e6:.2f}",
            *(f"{a} → {b}" for a, b in (o.tensors, o.objects)),
            *(f"{value:.3f}" for value in o.last.values()),
        )
    out.print(shown)
    problems = [problem for outcome in found for problem in outcome.problems]
    out.print("; ".join(problems) or "PASS")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shared = records.common("soak") | {"settings": asdict(settings)}
        report = shared | {"runs": [asdict(o) | {"problems": o.problems} for o in found]}
        (folder / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(problems))
