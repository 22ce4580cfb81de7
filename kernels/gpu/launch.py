"""A kernel launch as data: made from shapes and strides alone, so that it can be run or only compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from .tiles import Tile

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """``kernel[(programs,)](**arguments, **constants, num_warps=…, num_stages=…)``."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile

    def __call__(self) -> Any:
        """Run it on the current device and stream; returns Triton's compiled kernel."""
        return self.kernel[(self.programs,)](
            **self.arguments,
            **self.constants,
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
        )


def precision(dtype: torch.dtype) -> str:
    """How products are formed: '16bit', or for float32 'tf32' or 'ieee' as torch's setting for convolutions.

    The setting is ``torch.backends.cudnn.conv.fp32_precision``; 'none' there defers to the wider ones.
    """
    if dtype != torch.float32:
        return "16bit"
    backends: Any = torch.backends
    for scope in (backends.cudnn.conv, backends.cudnn, backends):
        value = scope.fp32_precision
        if value != "none":
            return "tf32" if value == "tf32" else "ieee"
    return "ieee"


def extent(t: Tensor) -> int:
    """The largest element offset inside ``t``."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def common(call: Call, y: Tensor, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every kernel takes: (arguments, constants) but for weights, sizes and tile.

    Absent vectors are passed as y, which the kernel then does not read.
    """
    arguments = {
        "x_ptr": call.x,
        "y_ptr": y,
        "scale_ptr": y if call.out_scale is None else call.out_scale,
        "shift_ptr": y if call.out_shift is None else call.out_shift,
        "M": rows,
        "slope": float(call.slope),
    }
    # Strides are constants: their exact values are what lets the compiler prove 16-byte accesses.
    names = ("N", "C", "H", "W")
    constants: dict[str, Any] = {f"STRIDE_X{d}": s for d, s in zip(names, call.x.stride(), strict=True)}
    constants |= {f"STRIDE_Y{d}": s for d, s in zip(names, y.stride(), strict=True)}
    constants |= {
        "HAS_SCALE": call.out_scale is not None,
        "HAS_SHIFT": call.out_shift is not None,
        "ACT": call.out_act,
        "PRECISION": "tf32" if precision(call.x.dtype) == "tf32" else "ieee",
        # Rows are rounded up to tiles of at most 256.
        "WIDE": max(extent(call.x), extent(y), rows + 256) > INT32_MAX,
    }
    return arguments, constants
