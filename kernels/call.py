"""The arguments of a fused convolution, as :mod:`.ops` passes them to an engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor]
"""(y, mean, var)"""


class Call(NamedTuple):
    """Arguments of a forward call, in the order of the schema."""

    x: Tensor
    weight: Tensor
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    in_act: str = "none"
    out_scale: Tensor | None = None
    out_shift: Tensor | None = None
    out_act: str = "none"
    stats: bool = False
    slope: float = 0.2
    stride: int = 2
    padding: int = 1
    channels_last: bool = True


class Backward(NamedTuple):
    """Arguments of a backward call, in the order of the schema.

    ``dy`` is given even where only the statistics have a gradient. ``y`` and ``mean`` are the forward's saved
    outputs; y is given where ``stats`` or ``out_act`` needs it to compute the gradient.
    """

    dy: Tensor
    dmean: Tensor | None
    dvar: Tensor | None
    x: Tensor
    weight: Tensor
    center: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    in_act: str
    out_scale: Tensor | None
    out_act: str
    y: Tensor | None
    mean: Tensor | None
    stats: bool
    slope: float
    stride: int
    padding: int
    needs: tuple[bool, bool, bool, bool, bool]
    """Whether x, weight, (center, scale, shift), out_scale and out_shift need a gradient."""


class Stage(NamedTuple):
    """A layer of a chain: a convolution, an optional BatchNorm in eval mode, and an activation.

        y = act((conv(x, weight) + bias[c] - mean[c])·scale[c]/√(var[c] + eps) + shift[c])

    Without ``mean`` and ``var``, y = act((conv(x, weight) + bias[c])·scale[c] + shift[c]).
    """

    transposed: bool
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0
    act: str = "none"
    slope: float = 0.0
    stride: int = 2
    padding: int = 1

    @property
    def c_out(self) -> int:
        """The number of output channels."""
        return self.weight.shape[1 if self.transposed else 0]


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Gradients of x, weight, center, scale, shift, out_scale, out_shift; [0] where not needed or absent."""


def output_shape(call: Call, transposed: bool) -> tuple[int, int, int, int]:
    """Return y's shape [N, C_out, H', W'] for a call whose x and weight have 4 dimensions."""
    n, _, h, w = call.x.shape
    first, second, k_h, k_w = call.weight.shape
    s, p = call.stride, call.padding
    if transposed:
        return n, second, (h - 1) * s - 2 * p + k_h, (w - 1) * s - 2 * p + k_w
    return n, first, (h + 2 * p - k_h) // s + 1, (w + 2 * p - k_w) // s + 1
