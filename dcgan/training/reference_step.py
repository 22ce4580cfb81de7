"""One adversarial training step of the reference recipe."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from dcgan.training.config import Config, Loss


class Result(NamedTuple):
    """The losses and mean outputs of one step: tensors of shape [] on the networks' device, without gradient.

    Reading a value synchronizes with the device, so the caller chooses how often to do it.
    """

    loss_d: Tensor
    loss_g: Tensor
    d_x: Tensor
    """Mean of D(x) over the real images, before D's update."""
    d_g_z: Tensor
    """Mean of D(G(z)) over the generated images, before D's update."""


def optimizers(
    generator: nn.Module, discriminator: nn.Module, config: Config, *, fused: bool = False
) -> tuple[Adam, Adam]:
    """Return the Adam optimizers of the reference recipe, G's and D's.

    Args:
        generator, discriminator: the networks.
        config: lr and beta1.
        fused: use torch's fused kernel, and on CUDA ``capturable=True``, which the CUDA graph of
            :class:`dcgan.training.TrainStep` requires. The mathematics is the same.
    """
    g, d = (
        Adam(
            network.parameters(),
            lr=config.lr,
            betas=(config.beta1, 0.999),
            fused=fused or None,
            capturable=fused and all(p.is_cuda for p in network.parameters()),
        )
        for network in (generator, discriminator)
    )
    return g, d


def train_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: Optimizer,
    optimizer_d: Optimizer,
    real: Tensor,
    noise: Tensor,
    *,
    real_label: float = 0.9,
    loss: Loss = "non-saturating",
) -> Result:
    """Update D, then G, on one batch.

    With BCE(p, t) = -mean(t·log p + (1-t)·log(1-p)) and r the real label::

        D:  loss_d = BCE(D(x), r) + BCE(D(G(z)), 0)
        G:  loss_g = BCE(D(G(z)), r)                    non-saturating: -log D(G(z)) where r is 1
                     mean log(1 - D(G(z)))              minimax: the saturating loss of the original game

    G(z) is computed once. D's loss uses it detached, and G's loss evaluates it with the D just updated. The
    reference recipe smooths the real labels, and its G uses the same labels as targets. G's backward pass
    also accumulates into D's gradients, which nothing reads and the next step clears.

    Args:
        generator: maps noise to images. Its BatchNorm uses batch statistics only in training mode.
        discriminator: maps images to probabilities [N].
        optimizer_g: optimizer of the generator's parameters.
        optimizer_d: optimizer of the discriminator's parameters.
        real: the batch x, [N, channels, size, size], with the networks' dtype and device.
        noise: z, [N, latent_dim, 1, 1] or whatever shape the generator takes.
        real_label: the real label r.
        loss: the generator loss, 'non-saturating' or 'minimax'.

    Raises:
        ValueError: if ``loss`` is unknown.

    Source: Goodfellow et al., *Generative Adversarial Networks*, 2014 (algorithm 1 and both losses).
    """
    if loss not in ("non-saturating", "minimax"):
        raise ValueError(f"loss must be 'non-saturating' or 'minimax', got {loss!r}")
    criterion = nn.BCELoss()

    optimizer_d.zero_grad()
    outputs_real = discriminator(real)
    real_labels = torch.full_like(outputs_real, real_label)
    loss_real = criterion(outputs_real, real_labels)
    fake = generator(noise)
    outputs_fake = discriminator(fake.detach())
    fake_labels = torch.zeros_like(outputs_fake)
    loss_d = loss_real + criterion(outputs_fake, fake_labels)
    loss_d.backward()
    optimizer_d.step()

    optimizer_g.zero_grad()
    outputs = discriminator(fake)
    loss_g = -criterion(outputs, fake_labels) if loss == "minimax" else criterion(outputs, real_labels)
    loss_g.backward()
    optimizer_g.step()

    return Result(
        loss_d.detach(), loss_g.detach(), outputs_real.detach().mean(), outputs_fake.detach().mean()
    )
