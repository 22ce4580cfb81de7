"""Small networks as users write them, for ``--netG-module`` and ``--netD-module``, with images of 32×32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Generator(nn.Module):
    """A hand-written forward with functionals; takes z [N, nz, 1, 1] alone."""

    def __init__(self, nz: int = 6, width: int = 4, channels: int = 1, size: int = 32) -> None:
        super().__init__()
        self.size = size
        self.project = nn.ConvTranspose2d(nz, 2 * width, 4, 1, 0, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.out = nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.norm(self.project(z)))
        x = F.leaky_relu(self.up(x), 0.1)
        x = F.interpolate(x, size=(self.size, self.size), mode="nearest")
        return torch.tanh(self.out(x))


class RowGenerator(nn.Module):
    """A fully connected layer, then a Sequential with biases; takes z [N, nz] alone."""

    def __init__(self, nz: int = 6, widths: tuple[int, int] = (6, 4), channels: int = 1) -> None:
        super().__init__()
        self.project = nn.Linear(nz, widths[0] * 64)
        self.main = nn.Sequential(
            nn.Unflatten(1, (widths[0], 8, 8)),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(True),
            nn.ConvTranspose2d(widths[0], widths[1], 4, 2, 1),
            nn.ReLU(True),
            nn.ConvTranspose2d(widths[1], channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(self.project(z))  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """A hand-written forward with Dropout; returns [N, 1]."""

    def __init__(self, width: int = 4, channels: int = 1, size: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv1 = nn.Conv2d(channels, width, 4, 2, 1)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width * (size // 4) ** 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(image), 0.2)
        x = F.leaky_relu(self.norm(self.conv2(x)), 0.2)
        x = F.dropout(x, self.dropout, self.training)
        return torch.sigmoid(self.linear(x.flatten(1)))


class SequentialDiscriminator(nn.Sequential):
    """A Sequential with biases; returns [N, 1, 1, 1]."""

    def __init__(self, width: int = 4, channels: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, width, 4, 4, 0),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 1, 4, 1, 0),
            nn.Sigmoid(),
        )


class Tied(SequentialDiscriminator):
    """Two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Identity()
        self.again.weight = self[0].weight

    def forward(self, input: Tensor) -> Tensor:
        return nn.Sequential(*list(self)[:-1])(input)  # type: ignore[no-any-return]


class Counting(Generator):
    """Counts its calls in buffers and draws random numbers, in eval mode too."""

    calls: Tensor
    latest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.calls.add_(1)
        self.latest = torch.randn(())
        return super().forward(z)


class Logits(SequentialDiscriminator):
    """Without a Sigmoid."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.Sequential(*list(self)[:-1])(input)  # type: ignore[no-any-return]


class LateLogits(SequentialDiscriminator):
    """Returns probabilities in eval mode alone."""

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        return found + 2 if self.training else found  # type: ignore[no-any-return]


class Flat(SequentialDiscriminator):
    """Returns two values per image."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(1).expand(-1, 2)  # type: ignore[no-any-return]


class Failing(SequentialDiscriminator):
    """Its forward raises."""

    def forward(self, input: Tensor) -> Tensor:
        raise KeyError("nothing here")


class Empty(nn.Module):
    """Has no parameters."""


def build() -> nn.Module:
    """No class, but a function."""
    return Generator()
