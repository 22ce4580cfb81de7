"""Split a network into blocks: a convolution with the BatchNorm and activation that follow it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from bench.cases import Network
from bench.flops import count
from dcgan import fast
from dcgan.kernels.call import Stage
from dcgan.kernels.cpu import Geometry
from dcgan.kernels.cpu.inference import geometry
from dcgan.models import Generator


class Block(NamedTuple):
    """One layer of a network, as modules for eager and as a stage for the native engine."""

    name: str
    modules: nn.Sequential
    """The convolution and the modules that follow it."""
    input_shape: tuple[int, int, int]
    """[C, H, W]."""

    @property
    def convolution(self) -> nn.Conv2d | nn.ConvTranspose2d:
        convolution = self.modules[0]
        assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
        return convolution

    @property
    def stage(self) -> Stage:
        """The modules in eval mode as a stage of the kernels, with shared tensors."""
        (stage,) = fast.stages(list(self.modules.named_children()))
        return stage

    @property
    def geometry(self) -> Geometry:
        stage = self.stage
        _, height, width = self.input_shape
        return geometry(stage.transposed, stage.weight.shape, height, width, stage.stride, stage.padding)

    @property
    def input_floats(self) -> int:
        """Input elements per image."""
        return math.prod(self.input_shape)

    @property
    def flops(self) -> int:
        """FLOP of the direct convolution per image."""
        return count(self.modules, self.input_shape).flops


def blocks(network: Network) -> list[Block]:
    """Return the network's layers in order. The blocks share the network's modules."""
    if isinstance(network, Generator):
        x = torch.zeros(1, network.latent_dim, 1, 1)
    else:
        x = torch.zeros(1, network.channels, network.image_size, network.image_size)
    x = x.to(next(network.parameters()))
    found: list[Block] = []
    modules = list(network.main)
    while modules:
        block = [modules.pop(0)]
        while modules and not isinstance(modules[0], nn.Conv2d | nn.ConvTranspose2d):
            block.append(modules.pop(0))
        sequence = nn.Sequential(*block)
        sequence.training = network.training
        with torch.no_grad():
            y = block[0](x)  # without BatchNorm, which would update its running statistics
        channels, height, width = x.shape[1:]
        name = f"{channels}→{y.shape[1]} @{height}→{y.shape[2]}"
        found.append(Block(name, sequence, (channels, height, width)))
        x = y
    return found
