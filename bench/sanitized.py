"""Run every kernel once on tensors of a few kilobytes, for compute-sanitizer: ``python -m bench.sanitized``.

Covers each layer of two small networks in every phase, with fused prologues and with standalone prologue
kernels, followed by a whole training step of each network. ``python -m bench.sanitized cpu`` runs the same in
Triton's interpreter, as a smoke test of this script.
"""

from __future__ import annotations

import sys

import torch

from bench.layers import layers, training
from dcgan import fast, models
from dcgan.kernels import ops
from dcgan.kernels.gpu import tiles

BATCH = 3
SMS = 4  # few enough that weight gradients still use split-K


def _networks(device: str) -> list[models.Generator | models.Discriminator]:
    return [fast.Generator(12, 3, 8, 32).to(device), fast.Discriminator(1, 8, 32).to(device)]


def run(device: str, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> int:
    """Run all launches and return how many single-layer launches there were."""
    count = 0
    for dtype in dtypes:
        for network in _networks(device):
            shapes = network, BATCH, dtype, device
            for layer in training(*shapes, input_gradient=True) + layers(*shapes):
                tile = tiles.estimate(layer.problem, SMS)
                for fused in (True, False):
                    layer.launches(tile._replace(fused=fused), SMS)()
                    count += 1
    with ops.use_engine("triton"):
        for network in _networks(device):
            shape = (12,) if isinstance(network, models.Generator) else (1, 32, 32)
            x = torch.randn(BATCH, *shape, device=device, requires_grad=True)
            network.train()(x).square().sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    print(f"{run(sys.argv[1] if len(sys.argv) > 1 else 'cuda')} single-layer launches, two training steps")
