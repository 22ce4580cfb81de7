"""One call of a fused convolution, as :mod:`.ops` hands it to an engine."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor]
"""(y, mean, var)"""


class Call(NamedTuple):
    """One call's arguments, in the schema's order."""

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


def output_shape(call: Call, transposed: bool) -> tuple[int, int, int, int]:
    """y's shape [N, C_out, H', W'] for a call with operands of 4 dimensions."""
    n, _, h, w = call.x.shape
    first, second, k_h, k_w = call.weight.shape
    s, p = call.stride, call.padding
    if transposed:
        return n, second, (h - 1) * s - 2 * p + k_h, (w - 1) * s - 2 * p + k_w
    return n, first, (h + 2 * p - k_h) // s + 1, (w + 2 * p - k_w) // s + 1
