"""Single launches of the training kernels: every candidate tile, any number of splits and tiles, bounds.

Inputs are surrounded by NaN; outputs start as NaN and are surrounded by a sentinel. An element read out of
bounds or not written makes a result NaN, and a write out of bounds changes the sentinel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcgan.kernels import gpu, ops
from dcgan.kernels.gpu import executor, reduce, tiles, wgrad
from dcgan.kernels.gpu.launcher import Product
from dcgan.kernels.reference import empty_gradient
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
    "up_narrow": ("up_narrow_3", "affine_relu", "scale_shift_tanh"),
    "down": ("down", "affine_leaky_relu", "statistics"),
    "down_narrow": ("down_narrow_3", "affine", "statistics"),
    "dense": ("dense_up", "affine_tanh", "statistics"),
    "dense_narrow": ("dense_narrow_3", "affine_leaky_relu", "shift_sigmoid"),
}
ADJOINT = {
    "up": ("down_odd", "affine_leaky_relu", "statistics"),
    "up_narrow": ("down_narrow_3", "plain", "statistics"),
    "down": ("up", "affine_relu", "statistics"),
    "down_narrow": ("up_narrow_3", "affine_relu", "statistics"),
    "dense": ("dense_down", "affine_leaky_relu", "statistics"),
    "dense_narrow": ("dense_up_few", "plain", "statistics"),
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


def run_product(product: Product, kernel: str, tile: tiles.Tile) -> tuple[Tensor | None, int, int]:
    """Launch a product; returns (partial sums or None, rows, rows of the partial sums per row tile)."""
    spec = product.spec
    chosen = gpu.kernel_for(spec)
    assert chosen is not None
    assert chosen.layout is not None
    assert chosen.name.startswith(kernel)
    rows, group = chosen.problem(spec).rows, chosen.rows_per_tile(spec)
    packed = chosen.layout.pack(product.weight, spec.dtype)
    packed = surrounded(packed.flatten()).view(packed.shape)
    shape = chosen.partial(spec, tile, 132)
    if shape is None:
        chosen.launch(product, packed, None, tile)()
        return None, rows, group
    partial = contiguous_output(*shape)
    chosen.launch(product, packed, partial, tile)()
    found = written(partial)
    assert not found.isnan().any()
    return surrounded(found.flatten()).view(found.shape), rows, group


def forward_results(
    call: Call, transposed: bool, kernel: str, tile: tiles.Tile, y: Tensor | None = None
) -> dict[str, Tensor]:
    spec = ops.check(call, transposed)
    y = strided_output(ops.empty(spec)[0]) if y is None else y
    # The layout of y is the tensor's here, not that of a newly allocated one.
    spec = spec._replace(y=spec.y._replace(stride=y.stride()))
    partial, rows, group = run_product(executor.fprop(spec, call, y), kernel, tile)
    if partial is None:
        return {"y": y}
    mean, var = contiguous_output(y.shape[1]), contiguous_output(y.shape[1])
    reduce.statistics_launch(partial, mean, var, rows, group, tile.block_m)()
    return {"y": y, "mean": written(mean), "var": written(var)}


def adjoint_results(
    it: Backward, transposed: bool, kernel: str, tile: tiles.Tile, dx: Tensor | None = None
) -> dict[str, Tensor]:
    dx = strided_output(empty_gradient(it.x)) if dx is None else dx
    partial, _, _ = run_product(executor.dgrad(it, transposed, dx), kernel, tile)
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


# --- offsets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", FORWARD)
def test_outputs_beyond_int32(kernel: str) -> None:
    """y of the forward, and dx of dgrad, whose epilogue also reads x beyond int32."""
    sizes = {"dense_narrow": (1, 1, 128), "up_narrow": (16, 16, 32), "down_narrow": (16, 32, 16)}
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


@pytest.mark.parametrize(
    ("rows", "block_m", "group", "channels"),
    [
        (1, 16, 1, 1),
        (1, 128, 4, 3),
        (15, 16, 1, 20),
        (16, 16, 1, 8),
        (17, 16, 1, 9),
        (33, 16, 4, 20),
        (16 * 128, 16, 1, 3),
        (16 * 128 + 1, 16, 1, 3),
        (16 * 70 + 3, 16, 4, 3),  # more tiles than one step of the loop
    ],
)
def test_statistics_are_merged(rows: int, block_m: int, group: int, channels: int) -> None:
    """The mean is 1000 standard deviations; the last row tile has fewer rows."""
    values = 3000.0 + 3.0 * torch.randn(group, rows, channels, dtype=torch.float64)
    count = -(-rows // block_m)
    partial = torch.empty(2, count, group, channels)
    for t in range(count):
        part = values[:, t * block_m : (t + 1) * block_m]
        partial[0, t] = part.mean(1)
        partial[1, t] = (part - part.mean(1, keepdim=True)).square().sum(1)
    partial = surrounded(partial.flatten()).view(2, count * group, channels)
    mean, var = contiguous_output(channels), contiguous_output(channels)
    reduce.statistics_launch(partial, mean, var, rows, group, block_m)()
    exact = values.reshape(-1, channels)
    # 17 sums per lane and a tree over 128. The tiles' means are float32 numbers of 1000 standard deviations,
    # accurate to 6e-5 of one: the variance is off by at most twice that, E[y²] - E[y]² would be by 6e-2.
    assert relative(written(mean), exact.mean(0)) <= 24 * 2**-24
    torch.testing.assert_close(written(var).double(), exact.var(0, correction=0), rtol=1.2e-4, atol=1e-7)


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
@pytest.mark.parametrize(("size", "splits"), [((20, 24, 4, 4), 3), ((3, 5, 3, 3), 1), ((1, 1, 1, 1), 9)])
def test_split_k_partials_are_reduced(
    size: tuple[int, int, int, int], splits: int, dtype: torch.dtype
) -> None:
    c_small, c_large, k_h, k_w = size
    partial = torch.randn(splits, k_h * k_w, c_small, c_large)
    dweight = strided_output(torch.empty(size, dtype=dtype))
    reduce.split_k_launch(surrounded(partial.flatten()).view(partial.shape), dweight)()
    exact = partial.double().sum(0).view(k_h, k_w, c_small, c_large).permute(2, 3, 0, 1)
    bound = 1e-6 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert relative(written(dweight), exact) <= bound
