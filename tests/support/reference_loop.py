"""The step of the reference recipe, written out, which faster steps are checked against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn, optim


def reference_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_G: optim.Optimizer,
    optimizer_D: optim.Optimizer,
    real_images: Tensor,
    noise: Tensor,
    *,
    minimax: bool = False,
    between: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The body of the reference recipe's inner loop; ``between`` is called between its two phases.

    It returns loss_D, loss_G, and the means of D(x) and D(G(z)). Two additions to the recipe: the labels have
    the images' dtype, so that it runs in float64, and the minimax loss of the GAN paper can be selected.
    """
    device, dtype = real_images.device, real_images.dtype
    criterion = nn.BCELoss()

    batch_size = real_images.size(0)
    real_labels = torch.full((batch_size,), 0.9, device=device, dtype=dtype)
    fake_labels = torch.full((batch_size,), 0.0, device=device, dtype=dtype)

    optimizer_D.zero_grad()
    outputs_real = discriminator(real_images)
    loss_real = criterion(outputs_real, real_labels)
    fake_images = generator(noise)
    outputs_fake = discriminator(fake_images.detach())
    loss_fake = criterion(outputs_fake, fake_labels)
    loss_D = loss_real + loss_fake
    loss_D.backward()
    optimizer_D.step()
    between()

    optimizer_G.zero_grad()
    outputs = discriminator(fake_images)
    loss_G = torch.log(1 - outputs).mean() if minimax else criterion(outputs, real_labels)
    loss_G.backward()
    optimizer_G.step()
    return loss_D.detach(), loss_G.detach(), outputs_real.detach().mean(), outputs_fake.detach().mean()
