"""Long training of fast networks, with fixed and with varying batch sizes.

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
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dcgan import fast
from dcgan.training import Result, TrainStep, optimizers
from tests.learning.criterion import LATENT, Settings

WARM = 500
LAST = 500
MAX_GROWTH = 8 << 20
OBJECTS = 100
MIN_MARGIN = 0.05
MIN_D_G_Z = 0.01
SETTINGS = Settings(steps=2000, features=16, image_size=32, batch=16)
MIXED = (1.0, 0.0625, 0.4375, 2.0, 0.3125)
"""Batch sizes of the second run relative to ``batch``: 16, 1, 7, 32, 5 for a batch of 16."""


class Soak(NamedTuple):
    """The measurements of one run; pairs are of ``WARM`` steps and of the end."""

    batches: tuple[int, ...]  # sizes, used cyclically
    steps: int
    finite: bool  # every figure of every step, and every parameter and buffer at the end
    resident_bytes: tuple[int, int]
    tensors: tuple[int, int]
    objects: tuple[int, int]  # tracked by Python's garbage collector
    last: dict[str, float]  # means over the last LAST steps, keyed by the fields of dcgan.training.Result
    seconds: float

    @property
    def growth(self) -> int:
        return self.resident_bytes[1] - self.resident_bytes[0]

    @property
    def problems(self) -> list[str]:
        """Return a description of every violation of the criterion; empty for a pass."""
        d_x, d_g_z = self.last["d_x"], self.last["d_g_z"]
        (tensors, tensors_now), (objects, objects_now) = self.tensors, self.objects
        found = {
            "a loss or a parameter is not finite": self.finite,
            f"the process grew by {self.growth / 1e6:.1f} MB": self.growth <= MAX_GROWTH,
            f"tensors grew from {tensors} to {tensors_now}": tensors_now <= tensors,
            f"objects grew from {objects} to {objects_now}": objects_now <= objects + OBJECTS,
            f"D has given up: D(x) {d_x:.3f}, D(G(z)) {d_g_z:.3f}": d_x - d_g_z >= MIN_MARGIN,
            f"D has won: D(G(z)) {d_g_z:.4f}": d_g_z >= MIN_D_G_Z,
        }
        return [problem for problem, ok in found.items() if not ok]


def soak(settings: Settings, sizes: tuple[int, ...], seed: int = 0) -> Soak:
    """Train fast networks on digits, cycling through the batch sizes ``sizes``."""
    start = time.perf_counter()
    g, d = (fast.convert(network) for network in settings.networks(seed))
    step = TrainStep(g, d, *optimizers(g, d, settings.config(seed)))
    figures = torch.full((settings.steps, len(Result._fields)), torch.nan)
    images = settings.images()
    random = torch.Generator(images.device).manual_seed(seed)
    before = _memory()
    for i in range(settings.steps):
        count = sizes[i % len(sizes)]
        chosen = torch.randint(len(images), (count,), generator=random, device=images.device)
        noise = torch.randn(count, LATENT, 1, 1, generator=random, device=images.device)
        figures[i] = torch.stack(step(images[chosen], noise))
        if i + 1 == min(WARM, settings.steps):
            before = _memory()
    after = _memory()
    state = [tensor for network in (g, d) for tensor in network.state_dict().values()]
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


def batches(settings: Settings) -> list[tuple[int, ...]]:
    """Return the batch sizes of both runs: a fixed one, and varying ones."""
    return [(settings.batch,), tuple(max(1, round(settings.batch * share)) for share in MIXED)]
