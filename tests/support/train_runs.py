"""Tiny training runs in child processes that tests can kill."""

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


def run_train(
    out: Path, given: dict[str, Any], resume: bool, before: Callable[[], None] | None = None
) -> None:
    """Run ``dcgan train`` in this process; its exit status is that of the command."""
    import typer

    from dcgan.cli.train import train

    torch.set_num_threads(1)
    if before is not None:
        before()
    try:
        train(given, out, None, resume, False)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from end


def forkserver_context() -> Any:
    """Return a forkserver context whose server has all imports preloaded and runs no other thread."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["dcgan.cli.train", "dcgan.training.report", "dcgan.training.run"])
    return forkserver


def start(out: Path, given: dict[str, Any], resume: bool, before: Callable[[], None] | None = None) -> Any:
    process = forkserver_context().Process(target=run_train, args=(out, given, resume, before))
    process.start()
    return process


def send_signal(process: Any, number: int = signal.SIGKILL) -> None:
    if process.is_alive():
        os.kill(process.pid, number)


def final(out: Path) -> checkpoints.Checkpoint:
    return checkpoints.read(out / "checkpoints" / "last.pt")


def assert_same_end(first: Path, second: Path) -> None:
    """Check that two runs have identical last checkpoints, metrics but for times, grids and pointer files."""
    a, b = vars(final(first)), vars(final(second))
    assert_same(a, b, "")
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (first, second)]
    measured, expected = ([line for line in some if '"seconds"' not in line] for some in lines)
    assert measured == expected
    for pointer in ("last.pt", "best.pt"):
        assert (first / "checkpoints" / pointer).readlink() == (second / "checkpoints" / pointer).readlink()
    grids = [sorted((out / "samples").iterdir()) for out in (first, second)]
    assert [p.name for p in grids[0]] == [p.name for p in grids[1]]
    for a, b in zip(*grids, strict=True):
        assert a.read_bytes() == b.read_bytes()


def assert_same(a: Any, b: Any, path: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        for i, (first, second) in enumerate(zip(a, b, strict=True)):
            assert_same(first, second, f"{path}/{i}")
    else:
        assert a == b, path
