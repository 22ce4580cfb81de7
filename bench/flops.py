"""Count the arithmetic and memory traffic of a network from its layers, for roofline ceilings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """The cost of one image. ``flops`` counts 2 per multiply-add.

    ``activations`` and ``weights`` are element counts: the inputs and outputs of every layer, and each weight
    once. A batch of N moves at least ``N * activations + weights`` elements.
    """

    flops: int
    activations: int
    weights: int

    def bytes_per_image(self, batch: int, itemsize: int) -> float:
        """Return the minimum memory traffic per image of a batch, in bytes."""
        return itemsize * (self.activations + self.weights / batch)


def count(network: nn.Module, input_shape: tuple[int, ...]) -> Work:
    """Return the work of ``network`` on one image; ``input_shape`` excludes the batch dimension.

    A convolution takes ``C_in * kh * kw`` multiply-adds per output. A transposed one takes ``C_out * kh *
    kw`` per *input*: the cost of its polyphase form, which multiplies no inserted zeros. BatchNorm and
    activations are not counted, since fused kernels hide them in the convolutions.
    """
    flops = activations = weights = 0

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal flops, activations, weights
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        taps = math.prod(layer.kernel_size)
        if isinstance(layer, nn.ConvTranspose2d):
            macs = inputs[0].numel() * layer.out_channels * taps // layer.groups
        else:
            macs = output.numel() * layer.in_channels * taps // layer.groups
        flops += 2 * macs
        activations += inputs[0].numel() + output.numel()
        weights += layer.weight.numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    device = next(network.parameters()).device
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *input_shape, device=device))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return Work(flops, activations, weights)
