"""A kernel launch as data: made from shapes and strides alone, so that it can be run or only compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .tiles import Problem, Tile

INT32_MAX = 2**31 - 1


class Prologue(NamedTuple):
    """What a convolution takes in place of an operand, as :func:`.device.prologue` says.

    ``kind``: 'none', 'act', 'affine', 'gradient' or 'statistics'.
    """

    kind: str = "none"
    act: str = "none"
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    other: Tensor | None = None


class Epilogue(NamedTuple):
    """What becomes of the accumulator, as :func:`.device.epilogue` says.

    ``kind``: 'affine', 'statistics' or 'adjoint'. ``input``, for the last, is x as the forward took it.
    """

    kind: str = "affine"
    act: str = "none"
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    input: Tensor | None = None

    @property
    def sums(self) -> bool:
        """Whether it leaves two numbers a tile and channel."""
        return self.kind == "statistics" or (self.kind == "adjoint" and self.scale is not None)


class Product(NamedTuple):
    """epilogue(conv(prologue(x), weight)): a forward convolution, or the adjoint of one, in one launch."""

    x: Tensor
    weight: Tensor
    """[C_in, C_out, kH, kW] if ``transposed``, else [C_out, C_in, kH, kW], for this direction."""
    transposed: bool
    y: Tensor
    """The output to be written."""
    prologue: Prologue = Prologue()
    epilogue: Epilogue = Epilogue()
    slope: float = 0.0
    stride: int = 2
    padding: int = 1

    def problem(
        self, kernel: str, rows: int, columns: int, depth: int, channels_in: int, copies: int = 1
    ) -> Problem:
        """Its sizes, for the choice of a tile."""
        fusion = f"{self.prologue.kind}+{self.epilogue.kind}"
        sizes = (rows, columns, depth, channels_in, copies)
        return Problem(kernel, precision(self.x.dtype), *sizes, fusion, (self.x.numel(),))


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

    def compile(self) -> Any:
        """Triton's compiled kernel for the current device; nothing is launched."""
        return self.kernel.warmup(
            **self.arguments,
            **self.constants,
            grid=(self.programs,),
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
        )

    def spills(self) -> bool:
        """Whether its code for the current device spills registers, or needs more than the device has.

        Compiles it; a launch after that finds the code compiled.
        """
        try:
            compiled = self.compile()
            compiled[(self.programs, 1, 1)]  # loads the code, from which Triton then reads what it takes
        except OutOfResources:
            return True
        return bool(compiled.n_spills > 0)


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


def wide(*tensors: Tensor | None, count: int) -> bool:
    """Whether an offset, or a row number, needs 64 bits. Rows are rounded up to tiles of at most 256."""
    return max(*(0 if t is None else extent(t) for t in tensors), count + 256) > INT32_MAX


def operand(name: str, x: Tensor, prologue: Prologue, absent: Tensor) -> dict[str, Any]:
    """Pointers of an operand and of its prologue; what the kernel will not read is passed as ``absent``."""

    def present(t: Tensor | None) -> Tensor:
        return absent if t is None else t

    return {
        f"{name}_ptr": x,
        f"{name}_other_ptr": present(prologue.other),
        f"{name}_center_ptr": present(prologue.center),
        f"{name}_scale_ptr": present(prologue.scale),
        f"{name}_shift_ptr": present(prologue.shift),
    }


def operand_constants(name: str, x: Tensor, prologue: Prologue) -> dict[str, Any]:
    """Its strides and its prologue: exact strides are what lets the compiler prove 16-byte accesses."""
    return {
        f"{name}_STRIDE".upper(): x.stride(),
        f"{name}_OTHER_STRIDE".upper(): x.stride() if prologue.other is None else prologue.other.stride(),
        f"{name}_PROLOGUE".upper(): prologue.kind,
        f"{name}_ACT".upper(): prologue.act,
        f"{name}_SCALED".upper(): prologue.scale is not None,
    }


def common(
    product: Product, packed: Tensor, partial: Tensor | None, rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every kernel of a :class:`Product` takes: (arguments, constants) but for the tile."""
    x, y, prologue, epilogue = product.x, product.y, product.prologue, product.epilogue
    arguments = operand("x", x, prologue, absent=y) | {
        "w_ptr": packed,
        "y_ptr": y,
        "input_ptr": y if epilogue.input is None else epilogue.input,
        "center_ptr": y if epilogue.center is None else epilogue.center,
        "scale_ptr": y if epilogue.scale is None else epilogue.scale,
        "shift_ptr": y if epilogue.shift is None else epilogue.shift,
        "partial_ptr": y if partial is None else partial,
        "M": rows,
        "TILES": 0 if partial is None else partial.shape[1],
        "slope": float(product.slope),
        "per_count": 1.0 / max(x.numel() // x.shape[1], 1) if prologue.kind == "statistics" else 0.0,
    }
    constants = operand_constants("x", x, prologue) | {
        "X_SIZE": (x.shape[1], x.shape[2], x.shape[3]),
        "Y_SIZE": (y.shape[1], y.shape[2], y.shape[3]),
        "Y_STRIDE": y.stride(),
        "INPUT_STRIDE": y.stride() if epilogue.input is None else epilogue.input.stride(),
        "EPILOGUE": epilogue.kind,
        "ACT": epilogue.act,
        "HAS_SCALE": epilogue.scale is not None,
        "HAS_SHIFT": epilogue.shift is not None,
        "PRECISION": "tf32" if precision(x.dtype) == "tf32" else "ieee",
        "WIDE": wide(x, y, prologue.other, epilogue.input, count=rows),
    }
    return arguments, constants
