"""Resolution of device names."""

from __future__ import annotations

import torch


def resolve(device: torch.device | str) -> torch.device:
    """Return the device as tensors on it report it: 'cuda' becomes the current GPU's index; 'cpu:0' is 'cpu'.

    ``torch.device("cuda") != torch.device("cuda:0")``, so every device given by a caller is resolved first;
    it then compares equal to the device of every tensor on it.
    """
    return torch.empty(0, device=device).device
