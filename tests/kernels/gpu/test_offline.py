"""The kernels' code for sm_80 and sm_90: no spill, shared memory that fits, tensor cores, 16-byte copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.cases import DTYPES
from bench.inspect import MULTIPROCESSORS, networks
from bench.layers import Layer, layers, of_product
from dcgan import models
from dcgan.kernels.gpu import offline, tiles
from dcgan.kernels.gpu.launch import Epilogue, Product


@pytest.fixture(autouse=True)
def _restore_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def cases(channels: int, dtype: str) -> list[Layer]:
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    return [layer for network in networks(channels) for layer in layers(network, 64, DTYPES[dtype])]


def check(layer: Layer, tile: tiles.Tile, arch: int) -> None:
    launch = layer.launches(tile, MULTIPROCESSORS[arch]).product
    assert offline.faults(launch, offline.inspect(launch, arch), arch) == [], (layer.name, tile)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles(dtype: str, arch: int) -> None:
    for layer in cases(1, dtype):
        check(layer, tiles.estimate(layer.problem, MULTIPROCESSORS[arch]), arch)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_tiles_with_their_epilogue(dtype: str, arch: int) -> None:
    """Scale, shift and the activation that takes most registers cost no spill."""
    for layer in cases(1, dtype):
        product = layer.operation
        assert isinstance(product, Product)
        vector = torch.empty(product.y.shape[1], device="meta")
        epilogue = Epilogue("affine", "tanh", None, vector, vector)
        product = product._replace(epilogue=epilogue)
        check(
            of_product(layer.name, layer.phase, product),
            tiles.estimate(layer.problem, MULTIPROCESSORS[arch]),
            arch,
        )


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_tile(channels: int, dtype: str, arch: int) -> None:
    for layer in cases(channels, dtype):
        problem = layer.problem
        for tile in tiles.candidates(problem.kernel, problem.precision):
            check(layer, tiles.fit(tile, problem), arch)


def test_a_spilling_tile_is_a_fault() -> None:
    """The bar can be missed: a tile far too large for its warps."""
    layer = next(x for x in cases(1, "bfloat16") if x.kernel == "up")
    launch = layer.launches(tiles.Tile(256, 256, 64, 4, 2), 132).product
    faults = offline.faults(launch, offline.inspect(launch, 90), 90)
    assert any("spills" in fault for fault in faults)


@pytest.mark.parametrize("dtype", ["float16", "tf32"])
def test_channels_that_are_no_multiple_of_16_bytes_compile(dtype: str) -> None:
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    for network in (models.Generator(30, 3, features=5), models.Discriminator(3, features=5)):
        for layer in layers(network, 3, DTYPES[dtype]):
            check(layer, tiles.estimate(layer.problem, 132), 90)
