"""Benchmark single operators with pytest-benchmark: ``python -m pytest bench --benchmark-only``.

Each layer of both networks runs in eval mode, as one fused operator and as PyTorch's convolution, BatchNorm
and activation. A further benchmark measures the dispatch overhead. Results are checked first. Times are wall
clock, including synchronization on CUDA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.blocks import Block, blocks
from bench.cases import NETWORKS, Case, float64, relative_error
from dcgan.kernels import chain, ops, weight_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = (1, 64)
TOLERANCE = 1e-5  # float32, one layer; bench.cases.TOLERANCE is for whole networks


def layers() -> list[tuple[str, Block]]:
    """Return the five layers of each network, with random weights and running statistics."""
    found: list[tuple[str, Block]] = []
    for command, network_type in NETWORKS.items():
        case = Case(command, batch=1, dtype="float32", device=DEVICE, threads=1)
        network = case.network().requires_grad_(False).to(DEVICE)
        network = network.to(memory_format=torch.channels_last)
        found += [
            (f"{network_type.__name__}-{'x'.join(map(str, block.input_shape))}", block)
            for block in blocks(network)
        ]
    return found


def aten(block: Block) -> Callable[[Tensor], Tensor]:
    """Return the block as PyTorch modules."""
    return block.modules


def fused(block: Block) -> Callable[[Tensor], Tensor]:
    """Return the block as one fused operator."""
    stage = block.stage
    scale, shift = chain.fold_epilogue(stage, torch.float32)
    op = ops.conv_transpose2d_fused if stage.transposed else ops.conv2d_fused
    # As in eval mode: engines may cache prepacked weights.
    weight_cache.freeze(block.convolution, [stage.weight])

    def run(x: Tensor) -> Tensor:
        y, _, _ = op(
            x,
            stage.weight,
            out_scale=scale,
            out_shift=shift,
            out_act=stage.act,
            slope=stage.slope,
            stride=stage.stride,
            padding=stage.padding,
        )
        return y

    return run


LAYERS = layers()


def synchronized(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``run`` followed by synchronization with the GPU, if there is one."""
    if DEVICE == "cpu":
        return run

    def synchronizing(x: Tensor) -> Tensor:
        y = run(x)
        torch.cuda.synchronize()
        return y

    return synchronizing


@pytest.mark.parametrize("implementation", ["aten", "fused"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "block"), LAYERS, ids=[name for name, _ in LAYERS])
def test_layer(benchmark: BenchmarkFixture, name: str, block: Block, batch: int, implementation: str) -> None:
    """Time one layer in float32, channels_last."""
    benchmark.group = f"{name}, batch {batch}, {DEVICE}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *block.input_shape, generator=generator).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    run = {"aten": aten, "fused": fused}[implementation](block)
    with torch.no_grad():
        assert (
            relative_error(run(x.clone()), float64(copy.deepcopy(block.modules).cpu(), x.cpu())) < TOLERANCE
        )
        benchmark(synchronized(run), x)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run PyTorch with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", ["aten", "fused"])
def test_dispatch(benchmark: BenchmarkFixture, one_thread: None, implementation: str) -> None:
    """Time a call on tensors so small that only dispatch overhead remains."""
    benchmark.group = f"dispatch, {DEVICE}"
    x = torch.zeros(1, 1, 4, 4, device=DEVICE)
    weight = torch.zeros(1, 1, 4, 4, device=DEVICE)
    run: Callable[[Tensor], Tensor]
    if implementation == "aten":

        def run(x: Tensor) -> Tensor:
            return torch.conv2d(x, weight, None, 2, 1)
    else:

        def run(x: Tensor) -> Tensor:
            return ops.conv2d_fused(x, weight)[0]

    with torch.no_grad():
        benchmark(run, x)
