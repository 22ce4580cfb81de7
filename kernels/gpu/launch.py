"""Kernel launches as data, built from shapes and strides alone, to be run or only compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .tiles import Problem, Tile

INT32_MAX = 2**31 - 1


class Prologue(NamedTuple):
    """The elementwise function applied to a convolution's operand; see :func:`.device_functions.prologue`.

    ``kind`` is 'none', 'act', 'affine', 'gradient' or 'statistics'.
    """

    kind: str = "none"
    act: str = "none"
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    other: Tensor | None = None


class Epilogue(NamedTuple):
    """The function applied to the accumulator; see :func:`.device_functions.epilogue`.

    ``kind`` is 'affine', 'statistics' or 'adjoint'. ``input``, for 'adjoint', is the forward's x.
    """

    kind: str = "affine"
    act: str = "none"
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    input: Tensor | None = None

    @property
    def sums(self) -> bool:
        """Whether the epilogue stores two partial sums per tile and channel."""
        return self.kind == "statistics" or (self.kind == "adjoint" and self.scale is not None)


class Product(NamedTuple):
    """One launch that computes y = epilogue(conv(prologue(x), weight)): a convolution or an adjoint."""

    x: Tensor
    weight: Tensor
    """[C_in, C_out, kH, kW] if ``transposed``, else [C_out, C_in, kH, kW], from x to y."""
    transposed: bool
    y: Tensor
    """The output, which the launch writes."""
    prologue: Prologue = Prologue()
    epilogue: Epilogue = Epilogue()
    slope: float = 0.0
    stride: int = 2
    padding: int = 1

    def problem(
        self, kernel: str, rows: int, columns: int, depth: int, channels_in: int, copies: int = 1
    ) -> Problem:
        """Return the product's :class:`Problem` for tile selection."""
        fusion = f"{self.prologue.kind}+{self.epilogue.kind}"
        sizes = (rows, columns, depth, channels_in, copies)
        return Problem(kernel, precision(self.x.dtype), *sizes, fusion, (self.x.numel(),))


@dataclass(frozen=True)
class Launch:
    """A launch ``kernel[(programs,)](**arguments, **constants, num_warps=…, num_stages=…)``."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile

    def __call__(self) -> Any:
        """Launch on the current device and stream; returns Triton's compiled kernel."""
        return self.kernel[(self.programs,)](
            **self.arguments,
            **self.constants,
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
        )

    def compile(self) -> Any:
        """Compile for the current device without launching; returns Triton's compiled kernel."""
        return self.kernel.warmup(
            **self.arguments,
            **self.constants,
            grid=(self.programs,),
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
        )

    def spills(self) -> bool:
        """Return whether the code for the current device spills registers or exceeds the device's resources.

        Compiles the kernel; a later launch reuses the compiled code.
        """
        try:
            compiled = self.compile()
            compiled[(self.programs, 1, 1)]  # loads the code, which makes Triton read n_spills
        except OutOfResources:
            return True
        return bool(compiled.n_spills > 0)


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products: '16bit', or for float32 'tf32' or 'ieee' by PyTorch's setting.

    The setting is ``torch.backends.cudnn.conv.fp32_precision``; 'none' defers to the enclosing scopes.
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
    """Return the largest element offset in ``t``."""
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def wide(*tensors: Tensor | None, count: int) -> bool:
    """Return whether an offset or row index needs 64 bits; rows are rounded up to tiles of at most 256."""
    return max(*(0 if t is None else extent(t) for t in tensors), count + 256) > INT32_MAX


def operand(name: str, x: Tensor, prologue: Prologue, absent: Tensor) -> dict[str, Any]:
    """Return the pointers of an operand and its prologue, with ``absent`` for those that are not read."""

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
    """Return an operand's strides and prologue; constant strides let the compiler use 16-byte accesses."""
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
    """Return (arguments, constants) that all kernels of a :class:`Product` share, without the tile."""
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
