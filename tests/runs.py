"""Tiny runs, in processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dcgan import checkpoint as checkpoints

TINY = {
    "dataset": "fake",
    "limit": 44,
    "channels": 1,
    "batch_size": 8,
    "image_size": 32,
    "ngf": 4,
    "ndf": 4,
    "nz": 6,
    "epochs": 2,
    "device": "cpu",
    "tensorboard": False,
    "checkpoint_interval": 2,
    "log_interval": 1,
}
STEPS = 12


def life(out: Path, given: dict[str, Any], resume: bool, before: Callable[[], None] | None = None) -> None:
    """One process's part of a run; its exit status is the command's."""
    import typer

    from dcgan.cli.train import train

    torch.set_num_threads(1)
    if before is not None:
        before()
    try:
        train(given, out, None, resume, False)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from end


def context() -> Any:
    """Processes forked from one that has imported all there is to import, and started no thread."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["dcgan.cli.train", "dcgan.training.report", "dcgan.training.run"])
    return found


def start(out: Path, given: dict[str, Any], resume: bool, before: Callable[[], None] | None = None) -> Any:
    process = context().Process(target=life, args=(out, given, resume, before))
    process.start()
    return process


def kill(process: Any, number: int = signal.SIGKILL) -> None:
    if process.is_alive():
        os.kill(process.pid, number)


def final(out: Path) -> checkpoints.Checkpoint:
    return checkpoints.read(out / "checkpoints" / "last.pt")


def assert_same_end(one: Path, other: Path) -> None:
    """Every bit of the last checkpoints, every line of the metrics, every picture, and which one is best."""
    a, b = vars(final(one)), vars(final(other))
    assert_same(a, b, "")
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    for mark in ("last.pt", "best.pt"):
        assert (one / "checkpoints" / mark).readlink() == (other / "checkpoints" / mark).readlink()
    pictures = [sorted((out / "samples").iterdir()) for out in (one, other)]
    assert [p.name for p in pictures[0]] == [p.name for p in pictures[1]]
    for a, b in zip(*pictures, strict=True):
        assert a.read_bytes() == b.read_bytes()


def assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}/{i}")
    else:
        assert a == b, where
