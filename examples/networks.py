"""GANs as their users write them: plain torch.nn, typed from the public descriptions that each class names.

``NETWORKS`` lists them with their inputs and losses, for ``python -m bench any``. All images are 64×64 and
all z have 100 values, whatever the number of features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

CLASSES = 10


class DcganG(nn.Module):
    """The generator of pytorch/examples, ``dcgan/main.py``."""

    def __init__(self, ngpu: int = 1, nz: int = 100, ngf: int = 64, nc: int = 3) -> None:
        super().__init__()
        self.ngpu = ngpu
        self.main = nn.Sequential(
            # z, [nz, 1, 1]
            nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 8),
            nn.ReLU(True),
            # [ngf * 8, 4, 4]
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            # [ngf * 4, 8, 8]
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            # [ngf * 2, 16, 16]
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            # [ngf, 32, 32]
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
            # [nc, 64, 64]
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and self.ngpu > 1:
            output = nn.parallel.data_parallel(self.main, input, range(self.ngpu))
        else:
            output = self.main(input)
        return output


class DcganD(nn.Module):
    """The discriminator of pytorch/examples, ``dcgan/main.py``."""

    def __init__(self, ngpu: int = 1, nc: int = 3, ndf: int = 64) -> None:
        super().__init__()
        self.ngpu = ngpu
        self.main = nn.Sequential(
            # an image, [nc, 64, 64]
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            # [ndf, 32, 32]
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            # [ndf * 2, 16, 16]
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            # [ndf * 4, 8, 8]
            nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 8),
            nn.LeakyReLU(0.2, inplace=True),
            # [ndf * 8, 4, 4]
            nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and self.ngpu > 1:
            output = nn.parallel.data_parallel(self.main, input, range(self.ngpu))
        else:
            output = self.main(input)
        return output.view(-1, 1).squeeze(1)


class SpectralD(nn.Module):
    """A spectrally normalized discriminator (Miyato et al., ICLR 2018); used with a hinge loss."""

    def __init__(self, channels: int = 3, features: int = 64) -> None:
        super().__init__()
        widths = [channels, features, features * 2, features * 4, features * 8]
        layers: list[nn.Module] = []
        for c_in, c_out in itertools.pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.LeakyReLU(0.1)]
        layers += [spectral_norm(nn.Conv2d(features * 8, 1, 4, 1, 0))]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x)
        return scores.flatten()


class ConditionalG(nn.Module):
    """A conditional generator (Mirza and Osindero, 2014) with DCGAN's layers; embeds the label."""

    def __init__(
        self, classes: int = CLASSES, embedding: int = 10, nz: int = 100, features: int = 64
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, embedding)
        self.net = nn.Sequential(
            self.block(nz + embedding, features * 8, 4, 1, 0),
            self.block(features * 8, features * 4, 4, 2, 1),
            self.block(features * 4, features * 2, 4, 2, 1),
            self.block(features * 2, features, 4, 2, 1),
            nn.ConvTranspose2d(features, 3, 4, 2, 1),
            nn.Tanh(),
        )

    @staticmethod
    def block(c_in: int, c_out: int, kernel_size: int, stride: int, padding: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ConvTranspose2d(c_in, c_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
        )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        embedding = self.embed(labels).unsqueeze(2).unsqueeze(3)
        image: Tensor = self.net(torch.cat([z, embedding], dim=1))
        return image


class CriticWithInstanceNorm(nn.Module):
    """The critic of WGAN-GP (Gulrajani et al., NeurIPS 2017) with instance normalization; no sigmoid."""

    def __init__(self, channels_img: int = 3, features_d: int = 64) -> None:
        super().__init__()
        self.disc = nn.Sequential(
            nn.Conv2d(channels_img, features_d, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            self._block(features_d, features_d * 2),
            self._block(features_d * 2, features_d * 4),
            self._block(features_d * 4, features_d * 8),
            nn.Conv2d(features_d * 8, 1, kernel_size=4, stride=2, padding=0),
        )

    def _block(self, in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=False),
            nn.InstanceNorm2d(out_channels, affine=True),
            nn.LeakyReLU(0.2),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.disc(x)
        return scores


class Down(nn.Module):
    """A downsampling block of :class:`UnetG`."""

    def __init__(self, in_size: int, out_size: int, normalize: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_size, out_size, 4, 2, 1, bias=not normalize)]
        if normalize:
            layers.append(nn.BatchNorm2d(out_size))
        layers.append(nn.LeakyReLU(0.2))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class Up(nn.Module):
    """An upsampling block of :class:`UnetG`; its output is concatenated with the skip connection."""

    def __init__(self, in_size: int, out_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(in_size, out_size, 4, 2, 1, bias=False),
            nn.BatchNorm2d(out_size),
        ]
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.ReLU(inplace=True))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip_input: Tensor) -> Tensor:
        return torch.cat((self.model(x), skip_input), 1)


class UnetG(nn.Module):
    """The U-Net generator of pix2pix (Isola et al., CVPR 2017), five levels deep for 64×64 images."""

    def __init__(self, in_channels: int = 3, out_channels: int = 3, features: int = 32) -> None:
        super().__init__()
        n = features
        self.down1 = Down(in_channels, n, normalize=False)
        self.down2 = Down(n, n * 2)
        self.down3 = Down(n * 2, n * 4)
        self.down4 = Down(n * 4, n * 8)
        self.down5 = Down(n * 8, n * 8, normalize=False)
        self.up1 = Up(n * 8, n * 8, dropout=0.5)
        self.up2 = Up(n * 16, n * 4, dropout=0.5)
        self.up3 = Up(n * 8, n * 2)
        self.up4 = Up(n * 4, n)
        self.final = nn.Sequential(nn.ConvTranspose2d(n * 2, out_channels, 4, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        d1 = self.down1(x)
        d2 = self.down2(d1)
        d3 = self.down3(d2)
        d4 = self.down4(d3)
        d5 = self.down5(d4)
        u1 = self.up1(d5, d4)
        u2 = self.up2(u1, d3)
        u3 = self.up3(u2, d2)
        u4 = self.up4(u3, d1)
        image: Tensor = self.final(u4)
        return image


class PaperG(nn.Module):
    """The generator of the DCGAN paper (Radford et al., ICLR 2016): 5×5 kernels; half of its 128 features."""

    def __init__(self, nz: int = 100, features: int = 64) -> None:
        super().__init__()
        self.features = features
        self.fc = nn.Linear(nz, features * 8 * 4 * 4, bias=False)
        self.bn0 = nn.BatchNorm2d(features * 8)
        self.deconv1 = nn.ConvTranspose2d(features * 8, features * 4, 5, 2, 2, output_padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features * 4)
        self.deconv2 = nn.ConvTranspose2d(features * 4, features * 2, 5, 2, 2, output_padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features * 2)
        self.deconv3 = nn.ConvTranspose2d(features * 2, features, 5, 2, 2, output_padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(features)
        self.deconv4 = nn.ConvTranspose2d(features, 3, 5, 2, 2, output_padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.fc(z.view(z.size(0), -1)).view(-1, self.features * 8, 4, 4)
        x = F.relu(self.bn0(x))
        x = F.relu(self.bn1(self.deconv1(x)))
        x = F.relu(self.bn2(self.deconv2(x)))
        x = F.relu(self.bn3(self.deconv3(x)))
        return torch.tanh(self.deconv4(x))


class PaperD(nn.Module):
    """The discriminator of the DCGAN paper (Radford et al., ICLR 2016): 5×5 kernels and a linear end."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, features, 5, 2, 2)
        self.conv2 = nn.Conv2d(features, features * 2, 5, 2, 2, bias=False)
        self.bn2 = nn.BatchNorm2d(features * 2)
        self.conv3 = nn.Conv2d(features * 2, features * 4, 5, 2, 2, bias=False)
        self.bn3 = nn.BatchNorm2d(features * 4)
        self.conv4 = nn.Conv2d(features * 4, features * 8, 5, 2, 2, bias=False)
        self.bn4 = nn.BatchNorm2d(features * 8)
        self.fc = nn.Linear(features * 8 * 4 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        x = F.leaky_relu(self.bn3(self.conv3(x)), 0.2)
        x = F.leaky_relu(self.bn4(self.conv4(x)), 0.2)
        return torch.sigmoid(self.fc(x.flatten(1)))


class HandwrittenG(nn.Module):
    """A generator as tutorials on MNIST and CelebA write it: biases, named layers, functionals."""

    def __init__(self, nz: int = 100, d: int = 64) -> None:
        super().__init__()
        self.deconv1 = nn.ConvTranspose2d(nz, d * 8, 4, 1, 0)
        self.deconv1_bn = nn.BatchNorm2d(d * 8)
        self.deconv2 = nn.ConvTranspose2d(d * 8, d * 4, 4, 2, 1)
        self.deconv2_bn = nn.BatchNorm2d(d * 4)
        self.deconv3 = nn.ConvTranspose2d(d * 4, d * 2, 4, 2, 1)
        self.deconv3_bn = nn.BatchNorm2d(d * 2)
        self.deconv4 = nn.ConvTranspose2d(d * 2, d, 4, 2, 1)
        self.deconv4_bn = nn.BatchNorm2d(d)
        self.deconv5 = nn.ConvTranspose2d(d, 1, 4, 2, 1)

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu(self.deconv1_bn(self.deconv1(input)))
        x = F.relu(self.deconv2_bn(self.deconv2(x)))
        x = F.relu(self.deconv3_bn(self.deconv3(x)))
        x = F.relu(self.deconv4_bn(self.deconv4(x)))
        x = torch.tanh(self.deconv5(x))
        return x


class HandwrittenD(nn.Module):
    """A discriminator as tutorials on MNIST and CelebA write it: biases, named layers, functionals."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, d, 4, 2, 1)
        self.conv2 = nn.Conv2d(d, d * 2, 4, 2, 1)
        self.conv2_bn = nn.BatchNorm2d(d * 2)
        self.conv3 = nn.Conv2d(d * 2, d * 4, 4, 2, 1)
        self.conv3_bn = nn.BatchNorm2d(d * 4)
        self.conv4 = nn.Conv2d(d * 4, d * 8, 4, 2, 1)
        self.conv4_bn = nn.BatchNorm2d(d * 8)
        self.conv5 = nn.Conv2d(d * 8, 1, 4, 1, 0)

    def forward(self, input: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(input), 0.2)
        x = F.leaky_relu(self.conv2_bn(self.conv2(x)), 0.2)
        x = F.leaky_relu(self.conv3_bn(self.conv3(x)), 0.2)
        x = F.leaky_relu(self.conv4_bn(self.conv4(x)), 0.2)
        x = torch.sigmoid(self.conv5(x))
        return x


class ResidualBlock(nn.Module):
    """A residual block of :class:`SuperResolution`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.prelu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return x + residual


class SuperResolution(nn.Module):
    """The generator of SRGAN (Ledig et al., CVPR 2017), small: 3×3 kernels throughout, and twice the size."""

    def __init__(self, blocks: int = 4, features: int = 32) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, features, 3, padding=1), nn.PReLU())
        self.body = nn.Sequential(*[ResidualBlock(features) for _ in range(blocks)])
        self.merge = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1, bias=False), nn.BatchNorm2d(features)
        )
        self.upsample = nn.Sequential(
            nn.Conv2d(features, features * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()
        )
        self.tail = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        x = x + self.merge(self.body(x))
        return torch.tanh(self.tail(self.upsample(x)))


# --- the registry -------------------------------------------------------------------------------------------

Inputs = Callable[..., tuple[Tensor, ...]]


class Network(NamedTuple):
    """A network with what it is run on."""

    make: Callable[..., nn.Module]
    """The constructor; all its arguments have defaults."""
    inputs: Inputs
    """``inputs(batch, device, dtype)`` draws the arguments of ``forward``; by default float32, on the CPU."""
    loss: str
    """How its output is trained: ``images`` (a mean square), ``probabilities`` (BCELoss), ``hinge``, or
    ``critic`` (a mean, with a gradient penalty)."""


def normal(*shape: int) -> Inputs:
    """Return a function that draws one tensor [batch, *shape] of standard normal values."""

    def draw(batch: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return (torch.randn(batch, *shape, device=device, dtype=dtype),)

    return draw


def images(channels: int, size: int) -> Inputs:
    """Return a function that draws square images in (-1, 1)."""

    def draw(batch: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return (torch.rand(batch, channels, size, size, device=device, dtype=dtype) * 2 - 1,)

    return draw


def z_and_labels(
    batch: int, device: Any = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Draw z, [batch, 100, 1, 1], and a label for each."""
    (z,) = normal(100, 1, 1)(batch, device, dtype)
    return z, torch.randint(0, CLASSES, (batch,), device=device)


NETWORKS: dict[str, Network] = {
    "DcganG": Network(DcganG, normal(100, 1, 1), "images"),
    "DcganD": Network(DcganD, images(3, 64), "probabilities"),
    "SpectralD": Network(SpectralD, images(3, 64), "hinge"),
    "ConditionalG": Network(ConditionalG, z_and_labels, "images"),
    "CriticWithInstanceNorm": Network(CriticWithInstanceNorm, images(3, 64), "critic"),
    "UnetG": Network(UnetG, images(3, 64), "images"),
    "PaperG": Network(PaperG, normal(100, 1, 1), "images"),
    "PaperD": Network(PaperD, images(3, 64), "probabilities"),
    "HandwrittenG": Network(HandwrittenG, normal(100, 1, 1), "images"),
    "HandwrittenD": Network(HandwrittenD, images(1, 64), "probabilities"),
    "SuperResolution": Network(SuperResolution, images(3, 32), "images"),
}
