"""Data-parallel training in several processes started by ``torchrun``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, distributed

from dcgan.devices import resolve
from dcgan.errors import InputError
from dcgan.training.feed import SINGLE_PROCESS, Share

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for the other processes before it fails."""


@contextlib.contextmanager
def process_group(device: str) -> Iterator[tuple[Share, torch.device]]:
    """Yield this process's share and device, inside a process group if ``torchrun`` has started several.

    The backend is NCCL on GPUs, with one GPU per process, and gloo on CPUs. Without ``torchrun`` there is one
    process and no group.

    Args:
        device: 'auto', 'cpu' or 'cuda'; 'auto' is a GPU if there is one.

    Raises:
        InputError: if ``device`` is 'cuda' and PyTorch finds no GPU, or on GPUs if this host has fewer GPUs
            than processes.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise InputError("device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'")
    on_gpu = bool(gpus) and device != "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield SINGLE_PROCESS, resolve("cuda" if on_gpu else "cpu")
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local >= gpus:
        raise InputError(
            f"local rank {local} has no GPU: PyTorch finds {gpus}; start one process per GPU, at most {gpus}"
        )
    target = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(target)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield Share(distributed.get_rank(), distributed.get_world_size()), target
    finally:
        distributed.destroy_process_group()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average the values over all processes, in place; a no-op with one process."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


def max_over_processes(value: int, device: torch.device) -> int:
    """Return the maximum of `value` over all processes."""
    if not distributed.is_initialized():
        return value
    maximum = torch.tensor(value, device=device)
    distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
    return int(maximum)


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()
