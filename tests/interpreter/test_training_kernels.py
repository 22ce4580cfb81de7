"""Single launches of training's kernels: every listed tile, any number of chunks and of tiles, borders.

What a launch reads lies in NaN, and what it writes is NaN in the midst of a sentinel: a number from outside,
or one that is not written, spoils a result, and one that is written outside is seen.
"""

from __future__ import annotations

import pytest
import repair
import torch
from cases import (
    NAN,
    SHAPES,
    Cotangents,
    Shape,
    assert_right,
    backward_of,
    cotangents,
    far_apart,
    listed,
    surrounded,
    training_call,
)
from statement import leaves
from tolerance import relative
from torch import Tensor

from dcgan.kernels import gpu
from dcgan.kernels.call import Backward, Call
from dcgan.kernels.gpu import products, reduce, tiles, wgrad
from dcgan.kernels.gpu.launch import Product
from dcgan.kernels.reference import empty_gradient

SENTINEL = 7.0
PRECISION = {"16bit": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
PRODUCTS = [name for name in tiles.KERNELS if not name.startswith("wgrad")]
FORWARD = {  # what each kernel is to run: geometry, prologue, tail
    "up": ("up", "affine_relu", "statistics"),
    "up_narrow": ("up_narrow_3", "affine_relu", "scale_shift_tanh"),
    "down": ("down", "affine_leaky_relu", "statistics"),
    "down_narrow": ("down_narrow_3", "affine", "statistics"),
    "dense": ("dense_up", "affine_tanh", "statistics"),
    "dense_narrow": ("dense_narrow_3", "affine_leaky_relu", "shift_sigmoid"),
}
ADJOINT = {
    "up": ("down_odd", "affine_leaky_relu", "statistics"),
    "up_narrow": ("down_narrow_3", "as_it_is", "statistics"),
    "down": ("up", "affine_relu", "statistics"),
    "down_narrow": ("up_narrow_3", "affine_relu", "statistics"),
    "dense": ("dense_down", "affine_leaky_relu", "statistics"),
    "dense_narrow": ("dense_up_few", "as_it_is", "statistics"),
}
WEIGHT = {  # over 72 pixels: 4½ steps of 16
    "wgrad": Shape(False, 3, 20, 24, 12, 8, 4, 2, 1),
    "wgrad_narrow": Shape(True, 4, 17, 3, 6, 3, 4, 2, 1),
}


def among_nan(call: Call, transposed: bool) -> tuple[Call, Cotangents, Backward]:
    """The call, gradients of its outputs, and what a backward is given, all surrounded."""
    call = call._replace(**{name: surrounded(t) for name, t in leaves(call).items()})
    dy, dmean, dvar = (None if t is None else surrounded(t) for t in cotangents(call, transposed))
    it = backward_of(call, transposed, (dy, dmean, dvar))
    y, mean = (None if t is None else surrounded(t) for t in (it.y, it.mean))
    return call, (dy, dmean, dvar), it._replace(y=y, mean=mean)


def contiguous(*size: int) -> Tensor:
    """Numbers to be written, without gaps."""
    return surrounded(torch.full(size, NAN).flatten(), SENTINEL).view(size)


def strided(like: Tensor) -> Tensor:
    """Numbers to be written, with gaps."""
    return surrounded(torch.full_like(like, NAN), SENTINEL)


def taken(t: Tensor) -> Tensor:
    """What was written to one of these; nothing was written around it."""
    values = t.clone()
    t.fill_(SENTINEL)
    assert t._base is not None
    assert (t._base == SENTINEL).all()
    return values


def launched(product: Product, kernel: str, tile: tiles.Tile) -> tuple[Tensor | None, int, int]:
    """Run it; (partial sums or None, rows, rows of partial that a row tile leaves)."""
    chosen = gpu.kernel_for(product)
    assert chosen.name.startswith(kernel)
    rows, group = chosen.problem(product).rows, chosen.tiles_a_row(product)
    packed = chosen.pack(product.weight)
    packed = surrounded(packed.flatten()).view(packed.shape)
    if not product.epilogue.sums:
        chosen.launch(product, packed, None, tile)()
        return None, rows, group
    partial = contiguous(2, -(-rows // tile.block_m) * group, product.y.shape[1])
    chosen.launch(product, packed, partial, tile)()
    found = taken(partial)
    assert not found.isnan().any()
    return surrounded(found.flatten()).view(found.shape), rows, group


def forward_results(
    call: Call, transposed: bool, kernel: str, tile: tiles.Tile, y: Tensor | None = None
) -> dict[str, Tensor]:
    y = strided(gpu.output(call, transposed)) if y is None else y
    partial, rows, group = launched(products.forward(call, transposed, y), kernel, tile)
    if partial is None:
        return {"y": y}
    mean, var = contiguous(y.shape[1]), contiguous(y.shape[1])
    reduce.statistics(partial, mean, var, rows, group, tile.block_m)()
    return {"y": y, "mean": taken(mean), "var": taken(var)}


def adjoint_results(
    it: Backward, transposed: bool, kernel: str, tile: tiles.Tile, dx: Tensor | None = None
) -> dict[str, Tensor]:
    dx = strided(empty_gradient(it.x)) if dx is None else dx
    partial, _, _ = launched(products.adjoint(it, transposed, dx), kernel, tile)
    if partial is None:
        return {"dx": dx}
    assert it.scale is not None
    dcenter, dscale, dshift = (contiguous(it.x.shape[1]) for _ in range(3))
    reduce.sums(partial, it.scale, dcenter, dscale, dshift)()
    return {"dx": dx, "dcenter": taken(dcenter), "dscale": taken(dscale), "dshift": taken(dshift)}


def weight_results(it: Backward, transposed: bool, tile: tiles.Tile, splits: int) -> dict[str, Tensor]:
    gradient = products.weight_gradient(it, transposed)
    c_small, c_large, k_h, k_w = gradient.shape
    partial = contiguous(splits, k_h * k_w, c_small, c_large)
    wgrad.launch(gradient, partial, tile)()
    found = taken(partial)
    assert not found.isnan().any()
    dweight = strided(it.weight)
    reduce.chunks(surrounded(found.flatten()).view(found.shape), dweight)()
    return {"dweight": taken(dweight)}


# --- tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "precision", "tile"), listed(*PRODUCTS))
def test_every_tile_forward(kernel: str, precision: str, tile: tiles.Tile) -> None:
    name, before, after = FORWARD[kernel]
    transposed = SHAPES[name].transposed
    call, given, _ = among_nan(training_call(SHAPES[name], before, after, PRECISION[precision]), transposed)
    made = forward_results(call, transposed, kernel, tile)
    made["y"] = taken(made["y"])
    assert_right(made, call, transposed, given)


@pytest.mark.parametrize(("kernel", "precision", "tile"), listed(*PRODUCTS))
def test_every_tile_of_the_adjoint(kernel: str, precision: str, tile: tiles.Tile) -> None:
    name, before, after = ADJOINT[kernel]
    transposed = SHAPES[name].transposed
    call, given, it = among_nan(training_call(SHAPES[name], before, after, PRECISION[precision]), transposed)
    made = adjoint_results(it, transposed, kernel, tile)
    made["dx"] = taken(made["dx"])
    assert_right(made, call, transposed, given)


@pytest.mark.parametrize(("kernel", "precision", "tile"), listed("wgrad", "wgrad_narrow"))
def test_every_tile_of_the_weight_gradient(kernel: str, precision: str, tile: tiles.Tile) -> None:
    """In 2 chunks: of 2 steps, and of half a one."""
    shape = WEIGHT[kernel]
    shape = shape._replace(n=2, h=10 if kernel == "wgrad" else 5, w=8 if kernel == "wgrad" else 4)
    call = training_call(shape, "affine_leaky_relu", "statistics", PRECISION[precision])
    call, given, it = among_nan(call, shape.transposed)
    made = weight_results(it, shape.transposed, tile, 2)
    assert_right(made, call, shape.transposed, given)


@pytest.mark.parametrize("splits", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("kernel", WEIGHT)
def test_any_number_of_chunks(kernel: str, splits: int) -> None:
    """Of 5 steps: 5; 3 and 2; 2, 2, 1 and none; one each; one each and then none."""
    shape = WEIGHT[kernel]
    call = training_call(shape, "affine_leaky_relu", "scale_shift_tanh")._replace(out_scale=None)
    call, given, it = among_nan(call, shape.transposed)
    made = weight_results(it, shape.transposed, tiles.Tile(32, 64, 16, 4, 1), splits)
    assert_right(made, call, shape.transposed, given)


# --- offsets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", FORWARD)
def test_outputs_beyond_int32(kernel: str) -> None:
    """y of the forward, and dx of the adjoint, whose epilogue reads x there too."""
    tile = tiles.Tile(16, 32, 128 if kernel == "dense_narrow" else 32, 4, 1)
    name, before, after = FORWARD[kernel]
    shape = SHAPES[name]._replace(n=2)
    call, given, _ = among_nan(training_call(shape, before, after, torch.float16), shape.transposed)
    with repair.overflow_checked():
        y = far_apart(torch.full_like(gpu.output(call, shape.transposed), NAN))
        made = forward_results(call, shape.transposed, kernel, tile, y)
    assert_right(made, call, shape.transposed, given)

    name, before, after = ADJOINT[kernel]
    shape = SHAPES[name]._replace(n=2)
    call, given, it = among_nan(training_call(shape, before, after, torch.float16), shape.transposed)
    with repair.overflow_checked():
        dx, x = far_apart(torch.full_like(call.x, NAN)), far_apart(call.x)
        made = adjoint_results(it._replace(x=x), shape.transposed, kernel, tile, dx)
    assert_right(made, call, shape.transposed, given)


# --- second steps -------------------------------------------------------------------------------------------


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
        (16 * 70 + 3, 16, 4, 3),  # more tiles than a step of the loop takes
    ],
)
def test_statistics_are_merged(rows: int, block_m: int, group: int, channels: int) -> None:
    """Values whose mean is 1000 of their standard deviations; the last row tile has fewer rows."""
    values = 3000.0 + 3.0 * torch.randn(group, rows, channels, dtype=torch.float64)
    count = -(-rows // block_m)
    partial = torch.empty(2, count, group, channels)
    for t in range(count):
        part = values[:, t * block_m : (t + 1) * block_m]
        partial[0, t] = part.mean(1)
        partial[1, t] = (part - part.mean(1, keepdim=True)).square().sum(1)
    partial = surrounded(partial.flatten()).view(2, count * group, channels)
    mean, var = contiguous(channels), contiguous(channels)
    reduce.statistics(partial, mean, var, rows, group, block_m)()
    exact = values.reshape(-1, channels)
    # 17 sums a lane and a tree of 128. The tiles' means are float32 numbers of 1000 deviations, right to 6e-5
    # of one: the variance is wrong by twice that at most, where E[y²] - E[y]² would be by 6e-2.
    assert relative(taken(mean), exact.mean(0)) <= 24 * 2**-24
    torch.testing.assert_close(taken(var).double(), exact.var(0, correction=0), rtol=1.2e-4, atol=1e-7)


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 20), (128, 8), (129, 9), (300, 3)])
def test_sums_are_added(count: int, channels: int) -> None:
    partial, scale = torch.randn(2, count, channels), torch.randn(channels)
    framed = surrounded(partial.flatten()).view(partial.shape)
    dcenter, dscale, dshift = (contiguous(channels) for _ in range(3))
    reduce.sums(framed, surrounded(scale), dcenter, dscale, dshift)()
    shift, scaled = partial.double().sum(1)
    error = 1e-6 * partial.abs().sum(1).max().item()
    torch.testing.assert_close(taken(dshift).double(), shift, rtol=0, atol=error)
    torch.testing.assert_close(taken(dscale).double(), scaled, rtol=0, atol=error)
    center = -scale.double() * shift
    torch.testing.assert_close(taken(dcenter).double(), center, rtol=0, atol=error * scale.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "splits"), [((20, 24, 4, 4), 3), ((3, 5, 3, 3), 1), ((1, 1, 1, 1), 9)])
def test_chunks_are_added(size: tuple[int, int, int, int], splits: int, dtype: torch.dtype) -> None:
    c_small, c_large, k_h, k_w = size
    partial = torch.randn(splits, k_h * k_w, c_small, c_large)
    dweight = strided(torch.empty(size, dtype=dtype))
    reduce.chunks(surrounded(partial.flatten()).view(partial.shape), dweight)()
    exact = partial.double().sum(0).view(k_h, k_w, c_small, c_large).permute(2, 3, 0, 1)
    bound = 1e-6 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert relative(taken(dweight), exact) <= bound
