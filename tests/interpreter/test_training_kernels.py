"""Single launches of the training kernels: every candidate tile, any number of splits and tiles, bounds.

Inputs are surrounded by NaN; outputs start as NaN and are surrounded by a sentinel. An element read out of
bounds or not written makes a result NaN, and a write out of bounds changes the sentinel.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dcgan.kernels import gpu, ops
from dcgan.kernels.gpu import executor, reduce, tiles, wgrad
from dcgan.kernels.gpu.launcher import Product
from dcgan.kernels.reference import empty_gradient, memory_format
from dcgan.kernels.spec import Backward, Call
from tests.interpreter import repair
from tests.interpreter.cases import (
    NAN,
    SHAPES,
    Cotangents,
    Shape,
    assert_accurate,
    backward_of,
    cotangents,
    far_apart,
    listed,
    surrounded,
    training_call,
)
from tests.support.float64_reference import leaves
from tests.support.tolerance import relative

SENTINEL = 7.0
PRECISION = {"16bit": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
PRODUCTS = [name for name in tiles.KERNELS if not name.startswith("wgrad")]
FORWARD = {  # by kernel: shape, prologue, tail
    "up": ("up", "affine_relu", "statistics"),
    "up_block": ("up_block", "affine_leaky_relu", "statistics"),
    "up_narrow": ("up_narrow_3", "affine_relu", "scale_shift_tanh"),
    "down": ("down", "affine_leaky_relu", "statistics"),
    "down_narrow": ("down_narrow_3", "affine", "statistics"),
    "dense": ("dense_up", "affine_tanh", "statistics"),
    "dense_outer": ("dense_outer_4", "affine_tanh", "statistics"),
    "dense_narrow": ("dense_narrow_3", "affine_leaky_relu", "shift_sigmoid"),
}
ADJOINT = {
    "up": ("down_odd_wide", "affine_leaky_relu", "statistics"),
    "up_block": ("down_odd", "affine_leaky_relu", "statistics"),
    "up_narrow": ("down_narrow_3", "plain", "statistics"),
    "down": ("up", "affine_relu", "statistics"),
    "down_narrow": ("up_narrow_3", "affine_relu", "statistics"),
    "dense": ("dense_down", "affine_leaky_relu", "statistics"),
    "dense_narrow": ("dense_outer_4", "plain", "statistics"),
    "dense_outer": ("dense_narrow_3", "affine_relu", "statistics"),
}
WEIGHT = {  # over 72 pixels: 4½ K steps of 16
    "wgrad": Shape(False, 3, 20, 24, 12, 8, 4, 2, 1),
    "wgrad_narrow": Shape(True, 4, 17, 3, 6, 3, 4, 2, 1),
}


def surrounded_by_nan(call: Call, transposed: bool) -> tuple[Call, Cotangents, Backward]:
    """Return the call, its outputs' gradients and the backward call, with every tensor surrounded by NaN."""
    call = call._replace(**{name: surrounded(t) for name, t in leaves(call).items()})
    dy, dmean, dvar = (None if t is None else surrounded(t) for t in cotangents(call, transposed))
    it = backward_of(call, transposed, (dy, dmean, dvar))
    y, mean = (None if t is None else surrounded(t) for t in (it.y, it.mean))
    return call, (dy, dmean, dvar), it._replace(y=y, mean=mean)


def contiguous_output(*size: int) -> Tensor:
    """Return a contiguous output tensor of NaN, surrounded by the sentinel."""
    return surrounded(torch.full(size, NAN).flatten(), SENTINEL).view(size)


def strided_output(like: Tensor) -> Tensor:
    """Return an output tensor of NaN with gaps between its rows, surrounded by the sentinel."""
    return surrounded(torch.full_like(like, NAN), SENTINEL)


def written(t: Tensor) -> Tensor:
    """Return what was written to such an output, after checking that nothing was written around it."""
    values = t.clone()
    t.fill_(SENTINEL)
    assert t._base is not None
    assert (t._base == SENTINEL).all()
    return values


def run_product(product: Product, kernel: str, tile: tiles.Tile) -> Tensor | None:
    """Launch a product; returns its partial sums."""
    spec = product.spec
    chosen = gpu.kernel_for(spec)
    assert chosen is not None
    assert chosen.layout is not None
    assert chosen.problem(spec).kernel == kernel
    packed = chosen.layout.pack(product.weight, spec.dtype)
    packed = surrounded(packed.flatten()).view(packed.shape)
    shape = chosen.partial(spec, tile, 132)
    if shape is None:
        chosen.launch(product, packed, None, tile)()
        return None
    partial = contiguous_output(*shape)
    chosen.launch(product, packed, partial, tile)()
    found = written(partial)
    assert not found.isnan().any()
    return surrounded(found.flatten()).view(found.shape)


def forward_results(
    call: Call, transposed: bool, kernel: str, tile: tiles.Tile, y: Tensor | None = None
) -> dict[str, Tensor]:
    spec = ops.check(call, transposed)
    y = strided_output(ops.empty(spec)[0]) if y is None else y
    # The layout of y is the tensor's here, not that of a newly allocated one.
    spec = spec._replace(y=spec.y._replace(stride=y.stride()))
    partial = run_product(executor.fprop(spec, call, y), kernel, tile)
    if partial is None:
        return {"y": y}
    mean, var = contiguous_output(y.shape[1]), contiguous_output(y.shape[1])
    reduce.statistics_launch(partial, mean, var)()
    return {"y": y, "mean": written(mean), "var": written(var)}


def adjoint_results(
    it: Backward, transposed: bool, kernel: str, tile: tiles.Tile, dx: Tensor | None = None
) -> dict[str, Tensor]:
    dx = strided_output(empty_gradient(it.x)) if dx is None else dx
    partial = run_product(executor.dgrad(it, transposed, dx), kernel, tile)
    if partial is None:
        return {"dx": dx}
    assert it.scale is not None
    dcenter, dscale, dshift = (contiguous_output(it.x.shape[1]) for _ in range(3))
    reduce.sums_launch(partial, it.scale, dcenter, dscale, dshift)()
    return {"dx": dx, "dcenter": written(dcenter), "dscale": written(dscale), "dshift": written(dshift)}


def weight_results(it: Backward, transposed: bool, tile: tiles.Tile, splits: int) -> dict[str, Tensor]:
    gradient = executor.wgrad(it, transposed)
    c_small, c_large, k_h, k_w = gradient.spec.weight
    partial = contiguous_output(splits, k_h * k_w, c_small, c_large)
    wgrad.launch(gradient, None, partial, tile)()
    found = written(partial)
    assert not found.isnan().any()
    dweight = strided_output(it.weight)
    reduce.split_k_launch(surrounded(found.flatten()).view(found.shape), dweight)()
    return {"dweight": written(dweight)}


# --- tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "precision", "tile"), listed(*PRODUCTS))
def test_every_tile_forward(kernel: str, precision: str, tile: tiles.Tile) -> None:
    name, before, after = FORWARD[kernel]
    transposed = SHAPES[name].transposed
    call, grad_outputs, _ = surrounded_by_nan(
        training_call(SHAPES[name], before, after, PRECISION[precision]), transposed
    )
    actual = forward_results(call, transposed, kernel, tile)
    actual["y"] = written(actual["y"])
    assert_accurate(actual, call, transposed, grad_outputs)


@pytest.mark.parametrize(("kernel", "precision", "tile"), listed(*PRODUCTS))
def test_every_tile_dgrad(kernel: str, precision: str, tile: tiles.Tile) -> None:
    name, before, after = ADJOINT[kernel]
    transposed = SHAPES[name].transposed
    call, grad_outputs, it = surrounded_by_nan(
        training_call(SHAPES[name], before, after, PRECISION[precision]), transposed
    )
    actual = adjoint_results(it, transposed, kernel, tile)
    actual["dx"] = written(actual["dx"])
    assert_accurate(actual, call, transposed, grad_outputs)


@pytest.mark.parametrize(("kernel", "precision", "tile"), listed("wgrad", "wgrad_narrow"))
def test_every_tile_wgrad(kernel: str, precision: str, tile: tiles.Tile) -> None:
    """With 2 splits: of 2 steps, and of half a step."""
    shape = WEIGHT[kernel]
    shape = shape._replace(n=2, h=10 if kernel == "wgrad" else 5, w=8 if kernel == "wgrad" else 4)
    call = training_call(shape, "affine_leaky_relu", "statistics", PRECISION[precision])
    call, grad_outputs, it = surrounded_by_nan(call, shape.transposed)
    actual = weight_results(it, shape.transposed, tile, 2)
    assert_accurate(actual, call, shape.transposed, grad_outputs)


@pytest.mark.parametrize("splits", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("kernel", WEIGHT)
def test_any_number_of_splits(kernel: str, splits: int) -> None:
    """5 steps are split as 5; 3 + 2; 2 + 2 + 1 + 0; 1 each; and 1 each followed by empty splits."""
    shape = WEIGHT[kernel]
    call = training_call(shape, "affine_leaky_relu", "scale_shift_tanh")._replace(out_scale=None)
    call, grad_outputs, it = surrounded_by_nan(call, shape.transposed)
    actual = weight_results(it, shape.transposed, tiles.Tile(32, 64, 16, 4, 1), splits)
    assert_accurate(actual, call, shape.transposed, grad_outputs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("c_image", "layout", "dtype", "after"),
    [
        (1, "nchw", torch.float32, "statistics"),
        (2, "nhwc", torch.float16, "tanh"),
        (3, "nchw", torch.bfloat16, "scale_shift_leaky_relu"),
        (3, "nhwc", torch.float32, "tanh"),
        (4, "expanded", torch.float16, "raw"),
    ],
    ids=str,
)
def test_images(c_image: int, layout: str, dtype: torch.dtype, after: str, transposed: bool) -> None:
    """As x or as du, with prologues on both operands: 3 row tiles, up to 4 column tiles, 2 splits of 2 steps.

    A second run gives the same bits.
    """
    sizes = (3, 37, c_image, 4, 5) if transposed else (3, c_image, 37, 8, 10)
    shape = Shape(transposed, *sizes, 4, 2, 1)
    call = training_call(shape, "affine_leaky_relu", after, dtype, layout == "nhwc")._replace(out_scale=None)
    dy, dmean, dvar = cotangents(call, transposed, layout)
    it = backward_of(call, transposed, (dy, dmean, dvar))
    found, again = (weight_results(it, transposed, tiles.Tile(16, 16, 16, 4, 1), 2) for _ in range(2))
    assert torch.equal(found["dweight"], again["dweight"])
    assert_accurate(found, call, transposed, (dy, dmean, dvar))


# --- offsets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", FORWARD)
def test_outputs_beyond_int32(kernel: str) -> None:
    """y of the forward, and dx of dgrad, whose epilogue also reads x beyond int32."""
    sizes = {"dense_narrow": (1, 1, 128), "down_narrow": (16, 32, 16)}
    sizes |= {"up_narrow": (16, 64, 32), "up_block": (16, 128, 32)}  # all columns in one tile
    tile = tiles.Tile(*sizes.get(kernel, (16, 32, 32)), 4, 1)
    name, before, after = FORWARD[kernel]
    shape = SHAPES[name]._replace(n=2)
    call, grad_outputs, _ = surrounded_by_nan(
        training_call(shape, before, after, torch.float16), shape.transposed
    )
    with repair.overflow_checked():
        y = far_apart(torch.full_like(ops.empty(ops.check(call, shape.transposed))[0], NAN))
        actual = forward_results(call, shape.transposed, kernel, tile, y)
    assert_accurate(actual, call, shape.transposed, grad_outputs)

    name, before, after = ADJOINT[kernel]
    shape = SHAPES[name]._replace(n=2)
    call, grad_outputs, it = surrounded_by_nan(
        training_call(shape, before, after, torch.float16), shape.transposed
    )
    with repair.overflow_checked():
        dx, x = far_apart(torch.full_like(call.x, NAN)), far_apart(call.x)
        actual = adjoint_results(it._replace(x=x), shape.transposed, kernel, tile, dx)
    assert_accurate(actual, call, shape.transposed, grad_outputs)


# --- reductions ---------------------------------------------------------------------------------------------


COUNTS: dict[str, list[int]] = {
    "one value": [1],
    "one tile": [16],
    "the last tile has fewer": [16] * 7 + [3],
    "each tile has its own": list(range(1, 41)),
    "some have none": [0, 5, 0, 0, 128, 1, 0],
    "none but the last": [0] * 20 + [3],
    "more than one step": [(7 * t) % 17 for t in range(2500)],
    "lanes without any": [t % 4 if t % 1024 < 7 else 0 for t in range(1100)],
}
"""Rows of each tile, of any product."""


def partial_statistics(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the partial statistics [3, T, C] of values [rows, C] in T tiles of ``counts`` rows.

    A tile without rows may have any mean.
    """
    columns = []
    for rows in values.split(list(counts)):
        mean = rows.mean(0) if len(rows) else torch.full(rows.shape[1:], 5.0, dtype=rows.dtype)
        columns.append(torch.stack([mean, (rows - mean).square().sum(0), torch.full_like(mean, len(rows))]))
    return torch.stack(columns, 1).float()


def assert_merged(mean: Tensor, var: Tensor, values: Tensor, ratio: float) -> None:
    """Compare statistics [C] with those of values [rows, C], of which a mean is ``ratio`` deviations.

    The tiles' means are float32 numbers, accurate to ratio·2⁻²⁴ deviations; the variance is off by at most
    twice that, and by the same in the lanes' means. E[y²] - E[y]² would be off by ratio²·2⁻²⁴.
    """
    assert relative(mean, values.mean(0)) <= 24 * 2**-24
    bound = 4 * ratio * 2**-24 + 2e-6
    torch.testing.assert_close(var.double(), values.var(0, correction=0), rtol=bound, atol=1e-7)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e4])
@pytest.mark.parametrize(("counts", "channels"), [*zip(COUNTS, [1, 3, 20, 8, 9, 17, 3, 5], strict=True)])
def test_statistics_are_merged(counts: str, channels: int, ratio: float) -> None:
    """The mean is ``ratio`` standard deviations."""
    values = 3.0 * (ratio + torch.randn(sum(COUNTS[counts]), channels, dtype=torch.float64))
    partial = partial_statistics(values, COUNTS[counts])
    mean, var = contiguous_output(channels), contiguous_output(channels)
    reduce.statistics_launch(surrounded(partial.flatten()).view(partial.shape), mean, var)()
    assert_merged(written(mean), written(var), values, ratio)


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 20), (128, 8), (129, 9), (300, 3)])
def test_sums_are_reduced(count: int, channels: int) -> None:
    partial, scale = torch.randn(2, count, channels), torch.randn(channels)
    framed = surrounded(partial.flatten()).view(partial.shape)
    dcenter, dscale, dshift = (contiguous_output(channels) for _ in range(3))
    reduce.sums_launch(framed, surrounded(scale), dcenter, dscale, dshift)()
    shift, scaled = partial.double().sum(1)
    error = 1e-6 * partial.abs().sum(1).max().item()
    torch.testing.assert_close(written(dshift).double(), shift, rtol=0, atol=error)
    torch.testing.assert_close(written(dscale).double(), scaled, rtol=0, atol=error)
    center = -scale.double() * shift
    torch.testing.assert_close(
        written(dcenter).double(), center, rtol=0, atol=error * scale.abs().max().item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "splits"),
    [
        ((20, 24, 4, 4), 3),
        ((3, 5, 3, 3), 1),
        ((1, 1, 1, 1), 9),
        ((17, 1, 4, 4), 391),  # one tap and 8 elements per program
        ((6, 3, 5, 2), 70),
        ((2, 3, 1, 2), 1100),  # more splits than a program loads at once
    ],
)
def test_split_k_partials_are_reduced(
    size: tuple[int, int, int, int], splits: int, channels_last: bool, dtype: torch.dtype
) -> None:
    c_small, c_large, k_h, k_w = size
    partial = torch.randn(splits, k_h * k_w, c_small, c_large)
    like = torch.empty(size, dtype=dtype).contiguous(memory_format=memory_format(channels_last))
    dweight = strided_output(like)
    reduce.split_k_launch(surrounded(partial.flatten()).view(partial.shape), dweight)()
    exact = partial.double().sum(0).view(k_h, k_w, c_small, c_large).permute(2, 3, 0, 1)
    bound = 1e-6 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert relative(written(dweight), exact) <= bound
