"""Weight packing, each by one or a few copy kernels; :mod:`..weight_cache` caches the results in eval.

Every packed weight is a matrix [columns, K] with K contiguous: wgmma reads TF32 operands from shared memory
only in that order, and 16-bit operands in either.
"""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = 4  # a layer with at most this many channels is narrow
_VECTOR = 16  # K is padded to a multiple of this many elements, so that rows are 16-byte aligned


def up(weight: Tensor) -> Tensor:
    """Pack [C_in, C_out, 4, 4] → [parity, C_out, r, s, C_in]: kh = 1-a+2r, kw = 1-b+2s, parity = 3-(2a+b).

    Output row 2p+a reads input rows p+a-r. The parities are stored in the order of the kernel's rows in
    memory, so that packing is a single transposition.
    """
    c_in, c_out = weight.shape[:2]
    taps = weight.reshape(c_in, c_out, 2, 2, 2, 2)  # [C_in, C_out, r, 1-a, s, 1-b]
    return taps.permute(3, 5, 1, 2, 4, 0).contiguous()


def up_narrow(weight: Tensor) -> Tensor:
    """Pack [C_in, C_out ≤ 4, 4, 4] → [a, b, 4, u, v, C_in]: all parities as columns over their 3×3 inputs.

    Output (2p+a, 2q+b) reads input (p+1-u, q+1-v) through kh = 2u+a-1, kw = 2v+b-1; taps outside the kernel
    are zero.
    """
    c_in, c_out = weight.shape[:2]
    padded = torch.nn.functional.pad(weight, (1, 1, 1, 1, 0, NARROW - c_out))  # kh + 1 = 2u + a
    taps = padded.view(c_in, NARROW, 3, 2, 3, 2)  # [C_in, 4, u, a, v, b]
    return taps.permute(3, 5, 1, 2, 4, 0).contiguous()


def down(weight: Tensor) -> Tensor:
    """Pack [C_out, C_in, 4, 4] → [C_out, kh, kw, C_in]: a no-op for a channels_last weight."""
    return weight.permute(0, 2, 3, 1).contiguous()


def down_narrow(weight: Tensor) -> Tensor:
    """Make [C_out, C_in, 4, 4] contiguous: K runs over the taps within each channel."""
    return weight.contiguous()


def dense_up(weight: Tensor) -> Tensor:
    """Pack [C_in, C_out, kH, kW] → [kh, kw, C_out, C_in padded]."""
    return _padded(weight.permute(2, 3, 1, 0))


def dense_down(weight: Tensor) -> Tensor:
    """Pack [C_out, C_in, kH, kW] → [C_out, kh, kw, C_in padded]."""
    return _padded(weight.permute(0, 2, 3, 1))


def _padded(packed: Tensor) -> Tensor:
    padding = -packed.shape[-1] % _VECTOR
    return (torch.nn.functional.pad(packed, (0, padding)) if padding else packed).contiguous()
