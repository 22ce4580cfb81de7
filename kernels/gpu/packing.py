"""Weight layouts of the kernels. Each is one or a few copy kernels; :mod:`..weights` keeps them in eval.

Every matrix is [columns, reduction] with the reduction contiguous: TF32 on sm_90 takes its operand from
shared memory only in that order, and 16-bit types take it as well as the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = 4  # channels up to which a layer counts as narrow
_VECTOR = 16  # reduction lengths are padded to this many elements, so that rows start on 16 bytes


def up(weight: Tensor) -> Tensor:
    """[C_in, C_out, 4, 4] → [parity, C_out, r, s, C_in], kh = 1-a+2r, kw = 1-b+2s, parity = 3-(2a+b).

    An output row 2p+a sees input rows p+a-r. The parities are stored in the order in which the kernel rows
    already lie, so that packing is a single transposition.
    """
    c_in, c_out = weight.shape[:2]
    taps = weight.reshape(c_in, c_out, 2, 2, 2, 2)  # [C_in, C_out, r, 1-a, s, 1-b]
    return taps.permute(3, 5, 1, 2, 4, 0).contiguous()


def up_narrow(weight: Tensor) -> Tensor:
    """[C_in, C_out ≤ 4, 4, 4] → [a, b, 4, u, v, C_in]: all parities' columns over the 3×3 inputs they share.

    Output (2p+a, 2q+b) sees input (p+1-u, q+1-v) through kh = 2u+a-1, kw = 2v+b-1; what lies outside the
    kernel is zero.
    """
    c_in, c_out = weight.shape[:2]
    padded = torch.nn.functional.pad(weight, (1, 1, 1, 1, 0, NARROW - c_out))  # kh + 1 = 2u + a
    taps = padded.view(c_in, NARROW, 3, 2, 3, 2)  # [C_in, 4, u, a, v, b]
    return taps.permute(3, 5, 1, 2, 4, 0).contiguous()


def down(weight: Tensor) -> Tensor:
    """[C_out, C_in, 4, 4] → [C_out, kh, kw, C_in]: a channels_last weight's own memory."""
    return weight.permute(0, 2, 3, 1).contiguous()


def down_narrow(weight: Tensor) -> Tensor:
    """[C_out, C_in, 4, 4], contiguous: the reduction runs over taps inside a channel."""
    return weight.contiguous()


def dense_up(weight: Tensor) -> Tensor:
    """[C_in, C_out, kH, kW] → [kh, kw, C_out, C_in padded]."""
    return _padded(weight.permute(2, 3, 1, 0))


def dense_down(weight: Tensor) -> Tensor:
    """[C_out, C_in, kH, kW] → [C_out, kh, kw, C_in padded]."""
    return _padded(weight.permute(0, 2, 3, 1))


def _padded(packed: Tensor) -> Tensor:
    short = -packed.shape[-1] % _VECTOR
    return (torch.nn.functional.pad(packed, (0, short)) if short else packed).contiguous()
