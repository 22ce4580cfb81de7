"""PNG grids of generated images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image

from dcgan.files import replacing


def save_grid(images: Tensor, path: Path, columns: int = 8, scale: int = 1) -> None:
    """Write one PNG with the images row by row, separated by black lines of 2 pixels.

    Args:
        images: [N, 1 or 3, H, W] in [-1, 1], black to white, on any device.
        path: output file, replaced atomically.
        columns: images per row.
        scale: integer factor by which small images are enlarged, by repeating pixels.

    Raises:
        OSError: ``path`` cannot be written.
    """
    pixels = F.interpolate(images.detach().float(), scale_factor=scale, mode="nearest")
    with replacing(path) as file:
        save_image(pixels, file, format="png", nrow=columns, normalize=True, value_range=(-1, 1))
