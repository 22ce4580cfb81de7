"""Several processes that train one pair of networks, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, distributed

from dcgan.devices import settled
from dcgan.errors import InputError
from dcgan.training.feed import ALONE, Share

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Share, torch.device]]:
    """This process's share and device, in a process group where ``torchrun`` has started several.

    NCCL on GPUs, one a process, gloo on CPUs. Without ``torchrun`` it is one process, and no group.

    Args:
        device: 'auto', 'cpu' or 'cuda'; auto is the GPU where there is one.

    Raises:
        InputError: 'cuda' where PyTorch finds no GPU, or fewer than processes on this machine.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise InputError("device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'")
    on_gpu = bool(gpus) and device != "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, settled("cuda" if on_gpu else "cpu")
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local >= gpus:
        raise InputError(f"process {local} of this machine has no GPU of its own: PyTorch finds {gpus}")
    where = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield Share(distributed.get_rank(), distributed.get_world_size()), where
    finally:
        distributed.destroy_process_group()


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over all processes; with one, the values themselves."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


def largest_of_all(value: int, device: torch.device) -> int:
    """The largest of all processes' numbers; with one, its own."""
    if not distributed.is_initialized():
        return value
    agreed = torch.tensor(value, device=device)
    distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
    return int(agreed)


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()
