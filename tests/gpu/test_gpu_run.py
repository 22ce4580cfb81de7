"""On a real GPU: a whole training run, stopped and resumed on the GPU and on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("PIL", reason="images are read with Pillow, which is not installed")
pytest.importorskip("pydantic", reason="settings are checked with pydantic, which is not installed")

from dcgan.checkpoint import Checkpoint, Folder
from dcgan.data import Images
from dcgan.settings import Settings
from dcgan.training.run import Run, follow
from dcgan.training.stop import Stop

pytestmark = [pytest.mark.gpu, pytest.mark.check]

TINY = {"batch_size": 8, "image_size": 32, "ngf": 16, "ndf": 16, "nz": 16, "epochs": 2}
STEPS = 12


def images() -> Images:
    random = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (44, 1, 32, 32), dtype=torch.uint8, generator=random), "fake")


def run_for(settings: Settings, device: str, folder: Folder, limit: int | None, resume: bool) -> Run:
    saved = folder.resume(print)[0] if resume else None
    run = Run(settings, images(), torch.device(device), saved=saved)
    follow(run, folder, None, Stop(), limit=limit)
    return run


def assert_close(found: Checkpoint, expected: Checkpoint, lr: float) -> None:
    """Adam's first steps are about lr·sign(gradient), and rounding may flip the sign of each."""
    assert (found.step, found.epoch, found.images) == (expected.step, expected.epoch, expected.images)
    for name, value in expected.generator.items():
        if "running" not in name and "tracked" not in name:
            assert float((found.generator[name] - value).abs().max()) <= 2 * STEPS * lr, name


@pytest.mark.parametrize(
    "more", [{}, {"dtype": "bfloat16", "ema": 0.9}, {"dtype": "float16"}, {"dtype": "tf32"}]
)
def test_resume(more: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings.of(TINY | more)
    uninterrupted, resumed = Folder(tmp_path / "uninterrupted"), Folder(tmp_path / "resumed")
    run = run_for(settings, "cuda", uninterrupted, None, False)
    assert run.feed.real(0, 0).device.type == "cuda"
    for resume in (False, True, True):
        run_for(settings, "cuda", resumed, 5, resume)
    found, expected = (folder.resume(print)[0] for folder in (resumed, uninterrupted))
    assert found.step == STEPS
    assert_close(found, expected, settings.lr)


@pytest.mark.parametrize(("before", "after"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_resume_on_another_device(before: str, after: str, tmp_path: Path) -> None:
    settings = Settings.of(TINY)
    folder, cpu_only = Folder(tmp_path / "run"), Folder(tmp_path / "cpu_only")
    run_for(settings, before, folder, 5, False)
    run_for(settings, after, folder, None, True)
    run_for(settings, "cpu", cpu_only, None, False)
    assert_close(folder.resume(print)[0], cpu_only.resume(print)[0], settings.lr)


def test_inputs_are_the_same_on_every_device() -> None:
    def inputs(device: str) -> tuple[Tensor, Tensor]:
        return Run(Settings.of(TINY), images(), torch.device(device)).inputs()

    for here, there in zip(inputs("cpu"), inputs("cuda"), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)
