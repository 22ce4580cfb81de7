"""The convolutions of a network as the fused kernels see them: shapes without data, on the meta device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcgan import models
from dcgan.kernels import gpu
from dcgan.kernels.call import Call
from dcgan.kernels.gpu.launch import Launch
from dcgan.kernels.gpu.tiles import Problem, Tile

Network = models.Generator | models.Discriminator


class Layer(NamedTuple):
    """One convolution of a network at a batch: its call, and the kernel that serves it."""

    name: str
    transposed: bool
    call: Call
    kernel: gpu.Kernel
    y: Tensor
    packed: Tensor

    def problem(self) -> Problem:
        return self.kernel.problem(self.call, self.y)

    def launch(self, tile: Tile) -> Launch:
        return self.kernel.launch(self.call, self.packed, self.y, tile)


def layers(network: Network, batch: int, dtype: torch.dtype) -> list[Layer]:
    """Every convolution of ``network``, NHWC inside, the image at the door and the output NCHW."""
    found: list[Layer] = []
    network = network.to("meta", dtype)
    last = [m for m in network.main if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)][-1]

    def hook(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        transposed = isinstance(conv, nn.ConvTranspose2d)
        padding = conv.padding[0]
        assert isinstance(padding, int)
        x = inputs[0] if not found else inputs[0].contiguous(memory_format=torch.channels_last)
        call = Call(x, conv.weight, stride=conv.stride[0], padding=padding, channels_last=conv is not last)
        kernel = gpu.kernel_for(call, transposed)
        assert kernel is not None
        c_in, c_out, size = x.shape[1], output.shape[1], output.shape[2]
        name = f"{c_in}→{c_out} @{x.shape[2]}→{size}"
        packed = kernel.pack(conv.weight)
        found.append(Layer(name, transposed, call, kernel, gpu.output(call, transposed), packed))

    handles = [
        m.register_forward_hook(hook) for m in network.main if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    shape = (
        (network.latent_dim,)
        if isinstance(network, models.Generator)
        else (network.channels, network.image_size, network.image_size)
    )
    with torch.no_grad():
        network(torch.empty(batch, *shape, dtype=dtype, device="meta"))
    for handle in handles:
        handle.remove()
    return found
