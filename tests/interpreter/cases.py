"""Calls for the kernels' tests (geometries, options, operands), and the comparison with reference results."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.gpu import cost_model, launcher, tiles, tuning, wgrad
from dcgan.kernels.reference import accumulator_dtype, activation_backward, memory_format
from dcgan.kernels.spec import Backward, Call
from tests.support.engine_results import engine_results, exact_results, results
from tests.support.float64_reference import column, leaves, op
from tests.support.tolerance import Cotangents, uncancelled

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")


class Shape(NamedTuple):
    transposed: bool
    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: int
    stride: int
    padding: int


SHAPES = {
    name: Shape(*sizes)
    for name, sizes in {
        "up": (True, 2, 20, 68, 4, 3, 4, 2, 1),
        "up_wide": (True, 1, 33, 72, 3, 5, 4, 2, 1),
        "up_few": (True, 2, 3, 66, 3, 4, 4, 2, 1),
        "up_block": (True, 2, 20, 24, 4, 3, 4, 2, 1),
        "up_block_5": (True, 3, 17, 5, 3, 5, 4, 2, 1),
        "up_block_64": (True, 1, 33, 64, 2, 3, 4, 2, 1),
        "up_block_pixel": (True, 5, 18, 7, 1, 1, 4, 2, 1),
        "up_block_few": (True, 2, 3, 20, 3, 4, 4, 2, 1),
        "up_narrow_1": (True, 3, 24, 1, 5, 3, 4, 2, 1),
        "up_narrow_2": (True, 2, 18, 2, 1, 6, 4, 2, 1),
        "up_narrow_3": (True, 2, 17, 3, 4, 4, 4, 2, 1),
        "up_narrow_4": (True, 4, 33, 4, 1, 1, 4, 2, 1),
        "down": (False, 2, 20, 24, 6, 4, 4, 2, 1),
        "down_odd": (False, 2, 18, 20, 7, 5, 4, 2, 1),
        "down_odd_wide": (False, 2, 66, 20, 5, 7, 4, 2, 1),
        "down_odd_pixel": (False, 3, 6, 20, 3, 3, 4, 2, 1),
        "down_narrow_1": (False, 3, 1, 20, 6, 10, 4, 2, 1),
        "down_narrow_3": (False, 2, 3, 20, 8, 4, 4, 2, 1),
        "down_narrow_odd": (False, 2, 2, 17, 9, 7, 4, 2, 1),
        "dense_up": (True, 5, 20, 12, 1, 1, 4, 1, 0),
        "dense_outer_1": (True, 7, 1, 20, 1, 1, 3, 1, 0),
        "dense_outer_4": (True, 5, 4, 12, 1, 1, 4, 1, 0),
        "dense_down": (False, 5, 12, 20, 4, 4, 4, 1, 0),
        "dense_narrow_1": (False, 5, 20, 1, 4, 4, 4, 1, 0),
        "dense_narrow_3": (False, 2, 16, 3, 3, 3, 3, 1, 0),
    }.items()
}
"""Names start with the kernel that serves the shape; with ``few`` channels the adjoint's kernel is narrow.

The adjoint of ``down_odd`` is an up_block to maps of 2H+1 rows and columns, with ``wide`` an up.
"""


# --- options ------------------------------------------------------------------------------------------------


class PrologueOptions(NamedTuple):
    """Options of a prologue."""

    affine: bool
    act: str


class TailOptions(NamedTuple):
    """Statistics, or options of an epilogue."""

    stats: bool = False
    scale: bool = False
    shift: bool = False
    act: str = "none"


PROLOGUES = {
    "plain": PrologueOptions(False, "none"),
    "relu": PrologueOptions(False, "relu"),
    "leaky_relu": PrologueOptions(False, "leaky_relu"),
    "sigmoid": PrologueOptions(False, "sigmoid"),  # sigmoid(0) ≠ 0 must not leak into the padding
    "affine": PrologueOptions(True, "none"),
    "affine_relu": PrologueOptions(True, "relu"),
    "affine_leaky_relu": PrologueOptions(True, "leaky_relu"),
    "affine_tanh": PrologueOptions(True, "tanh"),
    "affine_sigmoid": PrologueOptions(True, "sigmoid"),
}
TAILS = {
    "statistics": TailOptions(stats=True),
    "raw": TailOptions(),
    "tanh": TailOptions(act="tanh"),
    "scale": TailOptions(scale=True),
    "shift_sigmoid": TailOptions(shift=True, act="sigmoid"),
    "scale_shift_tanh": TailOptions(scale=True, shift=True, act="tanh"),
    "scale_shift_leaky_relu": TailOptions(scale=True, shift=True, act="leaky_relu"),
    "scale_relu": TailOptions(scale=True, act="relu"),
}


# --- operands -----------------------------------------------------------------------------------------------


def exact(*size: int, deviation: float = 1.0) -> Tensor:
    """Return random float32 numbers that every tested dtype represents exactly."""
    return (deviation * torch.randn(*size)).bfloat16().half().float()


def operands(shape: tuple[bool, int, int, int, int, int, int, int, int], dtype: torch.dtype) -> Call:
    transposed, n, c_in, c_out, h, w, k, stride, padding = shape
    x = torch.randn(n, c_in, h, w).to(dtype)
    weight = torch.randn(*((c_in, c_out) if transposed else (c_out, c_in)), k, k).to(dtype)
    return Call(x, weight, stride=stride, padding=padding)


def training_call(
    shape: Shape,
    before: str,
    after: str,
    dtype: torch.dtype = torch.float32,
    x_nhwc: bool = True,
    **changes: Any,
) -> Call:
    """Return a call with the prologue PROLOGUES[before] and the tail TAILS[after]."""
    prologue, tail = PROLOGUES[before], TAILS[after]
    order = (shape.c_in, shape.c_out) if shape.transposed else (shape.c_out, shape.c_in)
    x = exact(shape.n, shape.c_in, shape.h, shape.w).to(dtype)
    center, scale, shift = (exact(shape.c_in) if prologue.affine else None for _ in range(3))
    terms = (
        shape.c_in * (shape.kernel // shape.stride) ** 2 if shape.transposed else shape.c_in * shape.kernel**2
    )
    terms = shape.c_in if (shape.h, shape.w) == (1, 1) else terms
    deviation = max(terms, 1) ** -0.5  # y of order one, where no activation saturates
    call = Call(
        x.contiguous(memory_format=memory_format(x_nhwc)),
        exact(*order, shape.kernel, shape.kernel, deviation=deviation).to(dtype),
        center,
        scale,
        shift,
        prologue.act,
        exact(shape.c_out) if tail.scale else None,
        exact(shape.c_out) if tail.shift else None,
        tail.act,
        tail.stats,
        0.1,
        shape.stride,
        shape.padding,
    )
    return call._replace(**changes)


def cotangents(call: Call, transposed: bool, layout: str = "nhwc") -> Cotangents:
    """Return dy in layout ``nhwc``, ``nchw`` or ``expanded`` (strides of 0), and any dmean and dvar.

    The latter enter du divided by the number of pixels, so they are scaled up by it to matter.
    """
    n, c, h, w = ops.check(call, transposed).shape
    if layout == "expanded":
        dy = exact(1, c, 1, 1).to(call.x.dtype).expand(n, c, h, w)
    else:
        dy = exact(n, c, h, w).to(call.x.dtype).contiguous(memory_format=memory_format(layout == "nhwc"))
    if not call.stats:
        return dy, None, None
    return dy, n * h * w * exact(c), n * h * w * exact(c)


def backward_of(call: Call, transposed: bool, grad_outputs: Cotangents) -> Backward:
    """Return the backward call with all gradients needed, given the reference engine's outputs."""
    with ops.use_engine("reference"):
        y, mean, _ = op(transposed)(*call)
    dy, dmean, dvar = grad_outputs
    dy = torch.zeros_like(y) if dy is None else dy
    saved = y if call.stats or call.out_act != "none" else None
    return Backward(
        dy, dmean, dvar, call.x, call.weight, call.center, call.scale, call.shift, call.in_act,
        call.out_scale, call.out_act, saved, mean if call.stats else None, call.stats,
        call.slope, call.stride, call.padding, (True,) * 5,
    )  # fmt: skip


def surrounded(t: Tensor, value: float = NAN) -> Tensor:
    """Return a copy of t inside a larger tensor filled with ``value``."""
    framed = torch.full([size + 4 for size in t.shape], value, dtype=t.dtype)
    return framed[tuple(slice(2, -2) for _ in t.shape)].copy_(t)


def far_apart(t: Tensor) -> Tensor:
    """Return a copy of t [2, C, H, W] whose two images are more than 2³¹ elements apart.

    The memory between them is never touched, so the operating system never allocates it.
    """
    n, c, h, w = t.shape
    assert n == 2
    far = torch.empty(2**31 + 4096, dtype=t.dtype)
    return far.as_strided((n, c, h, w), (2**31 + 16, 1, w * c, c)).copy_(t)


# --- results ------------------------------------------------------------------------------------------------


triton_results = functools.partial(engine_results, "triton")


# The kernels round a product's operands x̂ and du, and its result, to x's dtype. The reference, whose products
# are float32, rounds only x̂ and the result. The bound for a kernel's error is the larger of two errors, that
# of the reference and that of the reference with du rounded as well; in 16 bits the latter is nearly the
# kernel's own error. A factor of two allows for other summation orders and other tanh and sigmoid functions.
# Where the reference is exact by chance, as one channel's sum often is, a floor allows for float32
# accumulation and a few operands rounded differently. Sums here have K ≤ 2·10³ terms of random sign:
# √K·2⁻²⁴ ≤ 3e-6 of the root of the sum of squared terms, which is about the sum itself unless that cancels,
# and no less than 2⁻²⁴ of Σ|term|.
ERROR_FACTOR = 2
ERROR_FLOOR = 3e-6


def with_du_rounded(call: Call, transposed: bool, grad_outputs: Cotangents) -> dict[str, Tensor]:
    """Return the reference's gradients, except out_shift's, with du rounded to x's dtype."""
    it = backward_of(call, transposed, grad_outputs)
    du, found = it.dy.to(accumulator_dtype(call.x.dtype)), {}
    if call.stats:
        assert it.y is not None
        assert it.mean is not None
        count = it.y.numel() // it.y.shape[1]
        if it.dmean is not None:
            du = du + column(it.dmean / count)
        if it.dvar is not None:
            du = du + column(2 * it.dvar / count) * (it.y - column(it.mean))
    else:
        if it.y is not None:
            du = activation_backward(du, it.y.to(du.dtype), call.out_act, call.slope)
        if call.out_scale is not None:
            linear = call._replace(out_shift=None, out_act="none")
            of_linear = results(linear, transposed, (du.to(call.x.dtype), None, None))
            found["dout_scale"] = of_linear["dout_scale"]
            du = du * column(call.out_scale)
    plain = call._replace(stats=False, out_scale=None, out_shift=None, out_act="none")
    of_plain = results(plain, transposed, (du.to(call.x.dtype), None, None))
    return found | {name: t for name, t in of_plain.items() if name != "y"}


def assert_accurate(
    actual: dict[str, Tensor], call: Call, transposed: bool, grad_outputs: Cotangents
) -> None:
    """Compare every result with float64, wherever that is finite."""
    references = exact_results(call, transposed, grad_outputs)
    sizes = uncancelled(call, transposed, grad_outputs)
    with ops.use_engine("reference"):
        measures = [results(call, transposed, grad_outputs), with_du_rounded(call, transposed, grad_outputs)]
    for name, result in actual.items():
        expected = references[name]
        finite = expected.isfinite()

        def norm(t: Tensor, finite: Tensor = finite) -> float:
            return float(t[finite].double().norm())

        reference_error = max(norm(found[name] - expected) for found in measures if name in found)
        size = max(norm(expected), norm(sizes[name].nan_to_num(0, 0)))
        error, allowed = norm(result - expected), ERROR_FACTOR * reference_error + ERROR_FLOOR * size
        assert error <= allowed, f"{name}: error {error:.2e} (norm {size:.2e}) exceeds {allowed:.2e}"


def check(call: Call, transposed: bool, layout: str = "nhwc") -> dict[str, Tensor]:
    """Check the Triton engine's outputs and all gradients against float64, and return them."""
    grad_outputs = cotangents(call, transposed, layout)
    actual = triton_results(call, transposed, grad_outputs)
    expected = {"y", *(f"d{name}" for name in leaves(call))} | ({"mean", "var"} if call.stats else set())
    assert actual.keys() == expected
    assert actual["y"].dtype == call.x.dtype
    assert all(
        actual[name].dtype == accumulator_dtype(call.x.dtype) for name in ("mean", "var") if call.stats
    )
    assert_accurate(actual, call, transposed, grad_outputs)
    return actual


# --- tiles --------------------------------------------------------------------------------------------------


def shrunk(tile: tiles.Tile, kernel: str) -> tiles.Tile:
    """Shrink a tile, keeping its proportions, so that the tests' small shapes cover several tiles.

    All channels of a block of outputs must fit in the columns of one tile.
    """
    if kernel == "dense_narrow":
        return replace(tile, block_k=tile.block_k // 16)
    return replace(
        tile,
        block_m=max(16, tile.block_m // 4),
        block_n=tile.block_n if kernel in ("up_block", "up_narrow") else max(16, tile.block_n // 4),
        block_k=max(16, tile.block_k // 4),
    )


def blocks(tile: tiles.Tile) -> tuple[int, int, int]:
    return tile.block_m, tile.block_n, tile.block_k


def listed(*kernels: str) -> list[Any]:
    """Return test parameters (kernel, precision, tile) for each candidate, shrunk.

    Tiles that differ only in warps and stages, which the interpreter ignores, are listed once. The fast tests
    contain two per kernel, the smallest and the largest.
    """
    found: dict[tuple[str, str, tuple[int, ...]], Any] = {}
    for kernel in kernels:
        every = [
            blocks(shrunk(tile, kernel)) for p in tiles.PRECISIONS for tile in tiles.candidates(kernel, p)
        ]
        fast = {min(every), max(every)}
        for precision in tiles.PRECISIONS:
            for tile in tiles.candidates(kernel, precision):
                small = shrunk(tile, kernel)
                sizes = blocks(small)
                if (kernel, precision, sizes) in found:
                    continue
                marks = [] if sizes in fast else [pytest.mark.slow]
                fast.discard(sizes)
                name = f"{kernel}-{precision}-{'x'.join(map(str, sizes))}"
                found[kernel, precision, sizes] = pytest.param(kernel, precision, small, id=name, marks=marks)
    return list(found.values())


@contextlib.contextmanager
def prologues(products: bool, gradients: bool) -> Iterator[None]:
    """Fuse the prologues of products and of weight gradients, or make them standalone, on the same tiles."""

    def choose(problem: tiles.Problem, *_: Any) -> tiles.Tile:
        tile = tuning.estimate(problem.without_prologue(), cost_model.SM_COUNT)
        fused = gradients if problem.kernel.startswith("wgrad") else products
        return replace(tile, fused=fused or not problem.has_prologue)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_plans", {})  # plans record which prologues are standalone
        patch.setattr(tuning, "choose", choose)
        patch.setattr(wgrad, "cost_model", types.SimpleNamespace(splits=lambda *_: 2))
        yield
