"""The expected results of the fused convolutions: float64, from F.conv2d, F.conv_transpose2d and autograd.

Every engine is compared with :func:`expected_outputs`. :class:`Problem` describes a call, and draws its
random arguments and output gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.reference import accumulator_dtype

BOTH = pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
GRADIENTS = ("x", "weight", "center", "scale", "shift", "out_scale", "out_shift")


def act(x: Tensor, name: str, slope: float) -> Tensor:
    if name == "leaky_relu":
        return F.leaky_relu(x, slope)
    return {"none": lambda t: t, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[name](x)


def column(v: Tensor) -> Tensor:
    return v[None, :, None, None]


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    f = F.conv_transpose2d if transposed else F.conv2d
    return f(x, weight, None, stride, padding)


def expected_outputs(call: ops.Call, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (y, mean, var) of ``call`` in float64, differentiably; mean and var by their definition."""
    wide = ops.Call(*[v.double() if isinstance(v, Tensor) else v for v in call])
    x = wide.x
    if wide.center is not None and wide.scale is not None and wide.shift is not None:
        x = (x - column(wide.center)) * column(wide.scale) + column(wide.shift)
    u = convolve(act(x, wide.in_act, wide.slope), wide.weight, wide.stride, wide.padding, transposed)
    if wide.stats:
        return u, u.mean((0, 2, 3)), u.var((0, 2, 3), unbiased=False)
    if wide.out_scale is not None:
        u = u * column(wide.out_scale)
    if wide.out_shift is not None:
        u = u + column(wide.out_shift)
    empty = u.new_empty(0)
    return act(u, wide.out_act, wide.slope), empty, empty


@dataclass(frozen=True)
class Problem:
    """The shape and options of a call, from which its tensors are drawn."""

    transposed: bool = False
    batch: int = 2
    c_in: int = 3
    c_out: int = 2
    size: tuple[int, int] = (4, 4)
    kernel: tuple[int, int] = (4, 4)
    stride: int = 2
    padding: int = 1
    prologue: bool = False
    in_act: str = "none"
    out_scale: bool = False
    out_shift: bool = False
    out_act: str = "none"
    stats: bool = False
    slope: float = 0.2
    dtype: torch.dtype = torch.float64
    channels_last: bool = True
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        """Return a short form for test names."""
        tail = "stats" if self.stats else f"{'e' * self.out_scale}{'b' * self.out_shift}-{self.out_act}"
        head = f"{'p-' if self.prologue else ''}{self.in_act}"
        kernel, size = "x".join(map(str, self.kernel)), "x".join(map(str, self.size))
        name, dtype = "up" if self.transposed else "down", str(self.dtype).removeprefix("torch.")
        geometry = f"{size}-k{kernel}s{self.stride}p{self.padding}"
        return f"{name}-{geometry}-{head}-{tail}-{dtype}{'-nhwc' if self.channels_last else ''}"

    def with_(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    @property
    def fits(self) -> bool:
        """Whether the output has at least one pixel."""
        for h, k in zip(self.size, self.kernel, strict=True):
            if self.transposed and (h - 1) * self.stride - 2 * self.padding + k < 1:
                return False
            if not self.transposed and h + 2 * self.padding < k:
                return False
        return True

    def call(self, requires_grad: bool = False, device: str = "cpu") -> ops.Call:
        """Draw the arguments: of order one, representable in the dtype; scales have both signs."""
        g = torch.Generator().manual_seed(self.seed)
        acc = accumulator_dtype(self.dtype)

        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            t = torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)
            return t.requires_grad_(requires_grad)

        def vector(wanted: bool, channels: int) -> Tensor | None:
            return make(channels, dtype=acc) if wanted else None

        order = (self.c_in, self.c_out) if self.transposed else (self.c_out, self.c_in)
        return ops.Call(
            make(self.batch, self.c_in, *self.size, dtype=self.dtype),
            make(*order, *self.kernel, dtype=self.dtype),
            vector(self.prologue, self.c_in),
            vector(self.prologue, self.c_in),
            vector(self.prologue, self.c_in),
            self.in_act,
            vector(self.out_scale, self.c_out),
            vector(self.out_shift, self.c_out),
            self.out_act,
            self.stats,
            self.slope,
            self.stride,
            self.padding,
            self.channels_last,
        )

    def cotangents(self, call: ops.Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Draw dy, dmean and dvar in the outputs' shapes and dtypes; dmean and dvar only with statistics."""
        g = torch.Generator().manual_seed(self.seed + 1)
        y = expected_outputs(
            ops.Call(*[v.detach() if isinstance(v, Tensor) else v for v in call]), self.transposed
        )[0]
        device, acc = call.x.device, accumulator_dtype(self.dtype)
        dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(device, self.dtype)
        if not self.stats:
            return dy, None, None
        dmean, dvar = torch.randn(2, y.shape[1], generator=g, dtype=torch.float64).to(device, acc)
        return dy, dmean, dvar


def op(transposed: bool) -> Any:
    return ops.conv_transpose2d_fused if transposed else ops.conv2d_fused


def leaves(call: ops.Call) -> dict[str, Tensor]:
    """Return the differentiable arguments that are given, by name."""
    return {name: t for name in GRADIENTS if (t := getattr(call, name)) is not None}


def gradients(
    outputs: tuple[Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor, Tensor | None, Tensor | None],
    inputs: dict[str, Tensor],
) -> dict[str, Tensor]:
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    found = torch.autograd.grad([o for o, _ in pairs], list(inputs.values()), [c for _, c in pairs])
    return dict(zip(inputs, found, strict=True))


def pairwise(**options: list[Any]) -> list[dict[str, Any]]:
    """Sample the product of ``options`` so that every pair of values occurs (deterministic, greedy)."""
    names = list(options)
    wanted = {
        (a, i, b, j)
        for n, a in enumerate(names)
        for b in names[n + 1 :]
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    rows: list[dict[str, int]] = []
    while wanted:
        row: dict[str, int] = {}
        a, i, b, j = min(wanted)
        row[a], row[b] = i, j
        for name in names:
            if name in row:
                continue
            gains = [
                sum((name, k, o, v) in wanted or (o, v, name, k) in wanted for o, v in row.items())
                for k in range(len(options[name]))
            ]
            ties = [(gain, (k + len(rows)) % 7) for k, gain in enumerate(gains)]  # break ties in round-robin
            row[name] = ties.index(max(ties))
        rows.append(row)
        wanted -= {(a, row[a], b, row[b]) for n, a in enumerate(names) for b in names[n + 1 :]}
    return [{name: options[name][row[name]] for name in names} for row in rows]
