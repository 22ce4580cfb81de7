"""Weight gradients: the split-K count of an image's, and the machine code of these and of the reduction."""

from __future__ import annotations

import pytest
import torch

from dcgan.kernels.gpu import offline, reduce, tiles, wgrad
from dcgan.kernels.gpu.tools.layers import Layer, networks, training


def of_image(channels: int, dtype: str, images: int = 64) -> Layer:
    """Return the weight gradient of D's first layer."""
    layers = training(networks(channels)["D"], images, dtype)
    return next(layer for layer in layers if layer.problem.kernel == "wgrad_narrow")


@pytest.mark.parametrize("sms", [1, 4, 108, 132])
@pytest.mark.parametrize("images", [1, 3, 64, 1024])
@pytest.mark.parametrize("channels", [1, 3])
def test_splits_of_an_image_run_at_once(channels: int, images: int, sms: int) -> None:
    """They load 48 KB of the wide operand per SM and step, or have two steps each; none is empty."""
    layer = of_image(channels, "bfloat16", images)
    tile = tiles.Tile(64, 16, 128, 4, 3)
    shape = layer.kernel.partial(layer.spec, tile, sms)
    assert shape is not None
    splits, *rest = shape
    assert rest == [16, 64, channels]
    steps, column_tiles = layer.problem.depth // 128, channels
    at_once = 3 * sms // column_tiles
    steps_per_split = -(-steps // splits)
    assert (splits - 1) * steps_per_split < steps <= splits * steps_per_split
    assert splits <= max(1, at_once)
    assert steps_per_split == 2 or (steps_per_split - 1) * max(1, at_once) < steps


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_tile_of_an_image(channels: int, dtype: str, arch: int) -> None:
    """The wide operand arrives by 16-byte asynchronous copies alone, though TF32 and sm_80 transpose others.

    The loop has as many 2- or 4-byte loads as the prefetch before it. One channel's partials are stored 16
    bytes at a time.
    """
    layer = of_image(channels, dtype)
    item = layer.spec.dtype.itemsize
    for tile in tiles.candidates("wgrad_narrow", layer.problem.precision):
        fitted = tiles.fit(tile, layer.problem)
        launch = layer.launches(fitted, 132).product
        report = offline.inspect(launch, arch)
        assert offline.faults(launch, report, arch) == []
        assert report.async_copies.keys() == {16}
        assert report.stores_by_width.keys() == ({16} if channels == 1 else {4})
        per_thread = fitted.block_k * 16 * channels // (32 * fitted.num_warps)
        padded = fitted.block_k * fitted.block_n // (32 * fitted.num_warps)
        assert report.loads_by_width.keys() == {item}
        assert 2 * per_thread <= report.loads <= 2 * padded or fitted.block_n < 16 * channels


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "splits", "programs", "width"),
    [
        ((64, 1, 4, 4), 391, 128, 4),
        ((64, 3, 4, 4), 131, 192, 4),
        ((128, 64, 4, 4), 16, 512, 8),
        ((512, 256, 4, 4), 2, 2048, 16),
    ],
)
def test_split_k(
    size: tuple[int, int, int, int],
    splits: int,
    programs: int,
    width: int,
    channels_last: bool,
    dtype: torch.dtype,
    arch: int,
) -> None:
    """At least a program per SM, 16-byte loads, and stores of ``width`` bytes of a float32 weight."""
    c_small, c_large, k_h, k_w = size
    partial = torch.empty(splits, k_h * k_w, c_small, c_large, device="meta")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dweight = torch.empty(size, dtype=dtype, device="meta", memory_format=layout)
    launch = reduce.split_k_launch(partial, dweight)
    assert launch.programs == programs
    report = offline.inspect(launch, arch)
    assert offline.faults(launch, report, arch) == []
    assert report.loads_by_width.keys() == {16}
    assert min(report.stores_by_width) >= width * dtype.itemsize // 4


def test_a_wide_weight_gradient_and_that_of_an_image_are_different_kernels() -> None:
    names = {
        (layer.problem.kernel, layer.launches(tiles.Tile(64, 64, 32, 4, 3), 132).product.kernel.__name__)
        for layer in training(networks(3)["G"], 2, "float32")
        if layer.phase == "wgrad"
    }
    assert names == {("wgrad", "_wgrad_kernel"), ("wgrad_narrow", "_wgrad_narrow_kernel")}
    assert wgrad.WGRAD.name == "wgrad"
