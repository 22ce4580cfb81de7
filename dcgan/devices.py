"""Which device a name stands for."""

from __future__ import annotations

import torch


def settled(device: torch.device | str) -> torch.device:
    """The device as its own tensors name it: 'cuda' is the current GPU, with its index; 'cpu:0' is 'cpu'.

    ``torch.device("cuda") != torch.device("cuda:0")``, so a device that a caller names is settled where it
    comes in, and is then equal to that of every tensor on it.
    """
    return torch.empty(0, device=device).device
