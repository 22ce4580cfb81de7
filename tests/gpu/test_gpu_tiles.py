"""Every tile of every training kernel: a loop miscompiled at one size, or a border left out, shows here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import real
import torch
from real import TRAINING, backward_of, exact, run, training_call
from torch import Tensor

from bench import shortlist
from bench.cases import DTYPES
from bench.kernels import outputs
from bench.layers import Layer, of_gradient, of_product
from dcgan.kernels import gpu
from dcgan.kernels.gpu import products, tiles
from dcgan.kernels.gpu.launch import Product

pytestmark = pytest.mark.gpu

ONE_A_KERNEL = ["G1", "G2", "G5", "D1", "D2", "D3", "D5"]  # and with each of the prologues
BATCH = 5  # no multiple of a tile


def phases(layer: str, dtype: torch.dtype) -> Iterator[tuple[Layer, tuple[Tensor, ...]]]:
    """A layer's launches in training, and what they are to give, in float64."""
    call, transposed = training_call(layer, BATCH, dtype)
    found, given, _ = run(call, transposed)
    want = exact(call, transposed, found["y"], given)
    forward = products.forward(call, transposed, gpu.output(call, transposed))
    statistics = (want["mean"], want["var"]) if call.stats else ()
    yield of_product(layer, "forward", forward), (want["y"], *statistics)
    back = backward_of(call, given, found["y"], found["mean"])
    adjoint = products.adjoint(back, transposed, torch.empty_like(call.x))
    sums = (want["shift"], want["scale"]) if call.center is not None else ()
    yield of_product(layer, "dgrad", adjoint), (want["x"], *sums)
    yield of_gradient(layer, products.weight_gradient(back, transposed), call.weight), (want["weight"],)


def capability() -> int:
    if real.DEVICE != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability()[0] >= 9 else 80


@pytest.mark.parametrize("layer", ONE_A_KERNEL)
def test_every_tile(layer: str, precision: str) -> None:
    processors = tiles.multiprocessors(torch.device(real.DEVICE))
    for of, want in phases(layer, DTYPES[precision]):
        listed = shortlist.every(of, tiles.SHARED_LIMIT[capability()])
        assert listed
        for tile in listed:
            if isinstance(of.operation, Product):
                of.operation.y.fill_(float("nan"))
            got = outputs(of, tile, processors)
            for number, (part, expected) in enumerate(zip(got, want, strict=True)):
                norm = expected.norm()
                if of.phase == "forward" and number == 1:
                    norm = (expected.square() + want[2]).sum().sqrt()  # a mean beside its deviation
                off = ((part.double() - expected).norm() / norm).item()
                assert off <= 2 * TRAINING[precision], f"{of.phase} {tuple(tile)}: output {number} {off:.1e}"
