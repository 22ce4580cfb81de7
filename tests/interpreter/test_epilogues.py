"""The epilogues' partial sums, tile by tile, and epilogues that run over column slices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dcgan.kernels.gpu import aten, tiles, tuning
from dcgan.kernels.gpu.launcher import Product
from dcgan.kernels.gpu.tools.layers import Launches, Layer, Shape, launches, training
from tests.interpreter.cases import Shape as CallShape
from tests.interpreter.cases import assert_accurate, training_call
from tests.interpreter.test_training_kernels import (
    adjoint_results,
    surrounded_by_nan,
    written,
)
from tests.support.tolerance import relative

SMS = 4
NETWORKS = {
    "up": [
        Shape(True, 20, 70, 1, 1, 0, True, "relu"),
        Shape(True, 70, 66, 4, 2, 1, True, "leaky_relu"),
        Shape(True, 66, 3, 8, 2, 1, False, "tanh"),
    ],
    "down": [  # from maps of 2H+1 rows and columns, to one of one pixel
        Shape(False, 5, 70, 15, 2, 1, True, "leaky_relu"),
        Shape(False, 70, 66, 7, 2, 1, True, "relu"),
        Shape(False, 66, 20, 3, 2, 1, False, "none"),
    ],
    "few": [
        Shape(True, 18, 5, 3, 2, 1, True, "relu"),
        Shape(True, 5, 64, 6, 2, 1, True, "leaky_relu"),
        Shape(False, 64, 4, 12, 2, 1, True, "relu"),
        Shape(False, 4, 3, 6, 2, 1, False, "none"),
    ],
}


def products(network: str, dtype: str, groups: int) -> list[Layer]:
    """Return the forward and dgrad products of a network, each 'gradient' also as an 'adjoint' with sums."""
    found = []
    of_network = NETWORKS[network]
    for layer in training(of_network, 4, dtype, input_gradient=True, weight_gradients=False, groups=groups):
        found.append(layer)
        if layer.spec.y.function == "gradient":
            y = layer.spec.y._replace(function="adjoint")
            found.append(layer._replace(spec=layer.spec._replace(y=y)))
    return found


def run(it: Product, tile: tiles.Tile) -> Launches:
    """Run a product, whose outputs start as NaN."""
    made = launches(it, tile, SMS)
    made.poison()
    made.product()
    return made


def raw(it: Product) -> Tensor:
    """Return a product before its epilogue, in float64."""
    x = aten.apply_prologue(it.spec.x, it.x, it.spec.slope).double()
    assert it.weight is not None
    y = it.y._replace(ptr=it.y.ptr.double())
    return aten.convolve(it._replace(weight=it.weight.double(), y=y), x)


# --- tile by tile -------------------------------------------------------------------------------------------


def pixels_by_tile(layer: Layer, block_m: int) -> list[list[tuple[int, int, int]]]:
    """Return the pixels (n, h, w) of each row of a product's partial sums, by the kernels' documentation."""
    spec = layer.spec
    _, height, width = spec.y.size
    kernel = layer.kernel.name
    grid, step, border = (height, width), 1, 0
    if kernel == "up":
        grid, step = (-(-height // 2), -(-width // 2)), 2
    elif kernel == "up_block":
        grid, step, border = (height // 2 + 1, width // 2 + 1), 2, 1
    offsets = list(itertools.product(range(step), repeat=2))
    if kernel.startswith("dense"):  # a row of the product is an image
        grid, offsets = (1, 1), list(itertools.product(range(height), range(width)))
    found = []
    of_group = spec.images // spec.groups
    for group in range(spec.groups):
        images = range(group * of_group, (group + 1) * of_group)
        rows = list(itertools.product(images, range(grid[0]), range(grid[1])))
        for start in range(0, len(rows), block_m):
            for i, j in offsets:
                at = [
                    (n, step * p - border + i, step * q - border + j)
                    for n, p, q in rows[start : start + block_m]
                ]
                found.append([(n, h, w) for n, h, w in at if 0 <= h < height and 0 <= w < width])
    return found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_statistics_of_each_tile(network: str, groups: int) -> None:
    """Mean, sum of squared deviations and count, exactly the rows of the tile that are outputs.

    Of the blocks at the border of a map, up_block computes one or two rows or columns that are none.
    """
    seen = set()
    for layer in products(network, "float32", groups):
        if layer.spec.y.function != "statistics":
            continue
        it = layer.product("cpu")
        tile = replace(
            tiles.fit(tiles.Tile(16, 256, 128, 4, 1), layer.problem), fused=not layer.problem.has_prologue
        )
        made = launches(it, tile, SMS)
        made.poison()
        for launch in (*made.prologues, made.product):
            launch()
        assert made.partial is not None
        means, squares, counts = made.partial.double()
        values = raw(it).permute(0, 2, 3, 1)  # [N, H, W, C]
        size = values.abs().mean()
        expected = pixels_by_tile(layer, tile.block_m)
        assert len(expected) == len(counts)
        assert sum(map(len, expected)) == values[..., 0].numel()
        for pixels, mean, square, count in zip(expected, means, squares, counts, strict=True):
            assert (count == len(pixels)).all()
            if not pixels:
                assert (mean == 0).all()
                assert (square == 0).all()
                continue
            of_tile = torch.stack([values[at] for at in pixels])
            assert ((mean - of_tile.mean(0)).abs() <= 1e-6 * size).all()
            exact = (of_tile - of_tile.mean(0)).square().sum(0)
            assert ((square - exact).abs() <= 5e-6 * len(pixels) * size**2).all()
        seen.add(layer.kernel.name)
    assert seen == {"up": {"dense_up", "up"}, "down": {"down"}, "few": {"up_block", "down"}}[network]


# --- column slices ------------------------------------------------------------------------------------------


SLICED = {
    "up": {("down", "gradient"), ("down", "adjoint")},
    "down": {("up", "gradient"), ("up", "adjoint")},
}
"""Kernels and epilogues that run over slices in each network."""


@pytest.mark.parametrize(
    ("dtype", "block_m", "block_n", "groups"),
    [
        ("float32", 32, 128, 1),
        pytest.param("bfloat16", 16, 64, 2, marks=pytest.mark.slow),
        pytest.param("bfloat16", 32, 128, 1, marks=pytest.mark.slow),
        pytest.param("float32", 16, 64, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("network", SLICED)
def test_slices(
    monkeypatch: pytest.MonkeyPatch, network: str, dtype: str, block_m: int, block_n: int, groups: int
) -> None:
    """An epilogue in four slices stores the same output as one; its sums may be added in another order."""
    sliced = set()
    for layer in products(network, dtype, groups):
        if layer.spec.y.function == "affine":
            continue
        it = layer.product("cpu")
        exact = aten.exact(it)
        tile = tiles.fit(tiles.Tile(block_m, block_n, 128, 4, 1), layer.problem)
        found = []
        for least in (1, 2**31):
            monkeypatch.setattr(tiles, "SLICED_FROM", least)
            made = run(it, tile)
            if least == 1 and made.product.constants["SPEC"].slices == 4:
                sliced.add((layer.kernel.name, layer.spec.y.function))
            found.append([t.clone() for t in aten.merged(it, made.partial)])
            assert aten.error(found[-1], exact) <= tuning.TOLERANCE[layer.problem.precision] / 2
        assert torch.equal(found[0][0], found[1][0])
        for sliced_sum, whole in zip(found[0][1:], found[1][1:], strict=True):
            assert relative(sliced_sum, whole.double()) <= 1e-6
    assert SLICED[network] <= sliced


@pytest.mark.parametrize(
    "shape",
    [
        CallShape(False, 5, 32, 20, 3, 3, 3, 1, 0),  # 9 pixels of 32 channels: 288 columns in tiles of 64
        CallShape(False, 5, 20, 20, 3, 3, 3, 1, 0),
        CallShape(True, 5, 40, 12, 1, 1, 3, 1, 0),  # 40 columns in a tile of 64
    ],
    ids=["whole channels", "parts of channels", "up"],
)
@pytest.mark.parametrize("block_n", [64, 128])
def test_slices_of_dense(monkeypatch: pytest.MonkeyPatch, shape: CallShape, block_n: int) -> None:
    """Of dgrads: nothing is written where slices are beyond the last column."""
    monkeypatch.setattr(tiles, "SLICED_FROM", 1)
    tile = tiles.Tile(16, block_n, 16, 4, 1)
    call = training_call(shape, "affine_relu", "statistics")
    call, grad_outputs, it = surrounded_by_nan(call, shape.transposed)
    actual = adjoint_results(it, shape.transposed, "dense", tile)
    actual["dx"] = written(actual["dx"])
    assert_accurate(actual, call, shape.transposed, grad_outputs)
