"""Devices are resolved on entry, so 'cpu:0' and 'cuda' work although tensors report another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcgan import devices
from dcgan.checkpoint import Folder
from dcgan.cli import options
from dcgan.data import Images
from dcgan.devices import resolve
from dcgan.settings import Settings
from dcgan.training import distributed
from dcgan.training.feed import Feed
from dcgan.training.run import Run, follow
from dcgan.training.stop import Stop

NAMED = torch.device("cpu", 0)
TINY = {"batch_size": 8, "image_size": 32, "ngf": 4, "ndf": 4, "nz": 6, "epochs": 1, "ema": 0.9}


def images() -> Images:
    return Images(torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8), "fake")


def test_a_resolved_device_equals_its_tensors_device() -> None:
    here = torch.empty(1, device=NAMED).device
    assert here != NAMED, "nothing to resolve"
    for name in (NAMED, "cpu", "cpu:0", torch.device("cpu"), here):
        assert resolve(name) == here
    assert resolve("meta") == torch.empty(1, device="meta").device


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_on_a_device_with_an_index(dtype: str, tmp_path: Path) -> None:
    """Batches, steps, samples, checkpoints and resuming work."""
    settings = Settings.of(TINY | {"dtype": dtype, "checkpoint_interval": 1})
    for limit in (1, None):
        folder = Folder(tmp_path)
        saved = folder.resume(print)[0] if folder.last() is not None else None
        run = Run(settings, images(), NAMED, saved=saved)
        assert run.device == next(run.generator.parameters()).device
        follow(run, folder, None, Stop(), limit=limit)
    assert run.position.step == 3
    assert run.samples().isfinite().all()


def test_a_feed_accepts_any_name_of_its_device() -> None:
    pixels = images().pixels
    named, plain = (Feed(pixels, 8, 0, 6, device) for device in (NAMED, torch.device("cpu")))
    assert torch.equal(named.real(0, 0), plain.real(0, 0))
    assert torch.equal(named.noise(0, 8), plain.noise(0, 8))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_commands_resolve_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_resolve = {"cuda": torch.device("cuda", 3)}.__getitem__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for module in (devices, distributed):
        monkeypatch.setattr(module, "resolve", fake_resolve)
    assert options.choose_device(name).index == 3
    with distributed.process_group(name) as (_, where):
        assert where.index == 3
