"""Detection of training that has collapsed: D wins every step, or G makes one image of all noise."""

from __future__ import annotations

import torch
from torch import Tensor

from dcgan.training.loss_readback import Row

HORIZON = 100
"""Steps that the moving averages of D(x) and D(G(z)) look back: the decay of a step's weight is 1 - 1/100."""
LOST = 0.005
"""Largest D(G(z)) of a step that G has lost."""
LOST_SHARE = 0.95
"""Share of lost steps, as a moving average from 0: at least 300 steps are needed to reach it."""
D_X = 0.95
"""Smallest D(x) when D wins, relative to the target of real images."""
MIN_STEPS = 300
"""Steps without a verdict on the samples. The first samples of every run are nearly the same."""
MIN_SPREAD = 0.01
"""Smallest standard deviation of samples relative to that of real images."""
REAL_IMAGES = 512
"""Maximum number of real images that their standard deviation is computed from."""

ADVICE = (
    "What people try: a lower --lr, a smaller --ndf, another --seed, --label-smoothing 0.1; on small data "
    "sets --diffaugment color,translation,cutout and --flip; --ema 0.999. A new run can start from the "
    "weights of an earlier checkpoint with --netG and --netD."
)


class CollapseDetector:
    r"""Detects collapsed training from the results of its steps and from its samples, once.

    **D wins.** If D separates real from generated images without error, D(x) is the target of real images
    (1 without label smoothing), D(G(z)) is 0, and G's gradient through D carries no information. Every
    healthy run has such steps, in particular at its start, but not without interruption. With
    :math:`l_t = [D(G(z))_t \le 0.005]`, collapse is

    .. math:: \bar l_t = \bar l_{t-1} + (l_t - \bar l_{t-1}) / 100 \ge 0.95, \qquad \bar l_0 = 0,

    while the same average of D(x) is at least 0.95 of the target. The average of D(x) rather than each value
    is compared because it varies by ±0.1 in small batches. In healthy runs of the reference recipe
    :math:`\bar l` peaked at 0.29 (MNIST at 64×64, step 122), 0.02 (digits at 32×32) and 0.5 (500 digits, step
    250); a multilayer perceptron with a learning rate of 0.05 passed 0.95 at step 310.

    **No variety.** The standard deviation over the samples of the fixed noise, averaged over pixels, is below
    1% of that of real images. In healthy runs on digits it was 2% after 20 steps and at least 13% after 200
    (a perceptron: 2.7%); in the collapsed run it was 0, and 0.3% in one with a learning rate of 0.01. The
    first 300 steps are not judged.

    Args:
        pixels: the training images, uint8 [N, C, H, W].
        real_label: D's target on real images, in (0, 1].
    """

    def __init__(self, pixels: Tensor, real_label: float) -> None:
        chosen = pixels[:: max(1, len(pixels) // REAL_IMAGES)][:REAL_IMAGES]
        self._real_spread = _spread(chosen.float() / 127.5)
        self._real_label, self._d_x, self._lost = real_label, real_label, 0.0
        self._detected = False

    def steps(self, rows: list[Row]) -> str | None:
        """Return what to tell the user after these steps, in order; None if there is nothing to tell."""
        for row in rows:
            self._d_x += (row.d_x - self._d_x) / HORIZON
            self._lost += ((row.d_g_z <= LOST) - self._lost) / HORIZON
            if self._lost >= LOST_SHARE and self._d_x >= D_X * self._real_label:
                seen = f"D(x) {self._d_x:.2f}, D(G(z)) {row.d_g_z:.4f} for hundreds of steps"
                return self._once(row.step, f"D wins every step ({seen}), which teaches G nothing.")
        return None

    def samples(self, images: Tensor, step: int) -> str | None:
        """Return what to tell the user about the samples of a step: images in [-1, 1] [N, C, H, W]."""
        if step < MIN_STEPS:
            return None
        spread = _spread(images)
        if not spread < MIN_SPREAD * self._real_spread:
            return None
        share = f"{spread / self._real_spread:.1%} of the variation of real images"
        return self._once(step, f"G makes nearly the same image from all noise ({share}).")

    def _once(self, step: int, what: str) -> str | None:
        if self._detected:
            return None
        self._detected = True
        return f"Training has collapsed by step {step}: {what}\n{ADVICE}"


def _spread(images: Tensor) -> float:
    """Return the standard deviation over N of images [N, C, H, W], averaged over their pixels."""
    return float(torch.std(images, 0, correction=0).mean())
