"""Benchmark single operators with pytest-benchmark: ``python -m pytest bench --benchmark-only``.

Each layer of both networks runs in eval mode, as one fused operator and as PyTorch's convolution, BatchNorm
and activation. A further benchmark measures the dispatch overhead. Results are checked first. Times are wall
clock, including synchronization on CUDA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.blocks import Block, blocks
from bench.cases import NETWORKS, Case, float64, relative_error
from bench.timing import torch_threads
from dcgan.kernels import chain, ops, weight_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = (1, 64)
IMPLEMENTATIONS = ("aten", "fused")
TOLERANCE = 1e-5  # float32, one layer; bench.cases.TOLERANCE is for whole networks


def layers() -> dict[str, Block]:
    """Return the five layers of each network, with random weights and running statistics."""
    found: dict[str, Block] = {}
    for command, network_type in NETWORKS.items():
        case = Case(command, batch=1, dtype="float32", device=DEVICE, threads=1)
        network = case.network().requires_grad_(False).to(DEVICE)
        for block in blocks(network.to(memory_format=torch.channels_last)):
            found[f"{network_type.__name__}-{'x'.join(map(str, block.input_shape))}"] = block
    return found


LAYERS = layers()


def fused(block: Block) -> Callable[[Tensor], Tensor]:
    """Return the block as one fused operator."""
    stage = block.stage
    scale, shift = chain.fold_epilogue(stage, torch.float32)
    op = ops.conv_transpose2d_fused if stage.transposed else ops.conv2d_fused
    how: dict[str, Any] = {"out_scale": scale, "out_shift": shift, "out_act": stage.act, "slope": stage.slope}
    how |= {"stride": stage.stride, "padding": stage.padding}
    # As in eval mode: engines may cache prepacked weights.
    weight_cache.freeze(block.convolution, [stage.weight])
    return lambda x: op(x, stage.weight, **how)[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark: BenchmarkFixture, name: str, batch: int, implementation: str) -> None:
    """Time one layer in float32, channels_last."""
    benchmark.group = f"{name}, batch {batch}, {DEVICE}"
    block = LAYERS[name]
    x = torch.randn(batch, *block.input_shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    run = fused(block) if implementation == "fused" else block.modules

    def synchronized(x: Tensor) -> None:
        run(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        expected = float64(copy.deepcopy(block.modules).cpu(), x.cpu())
        assert relative_error(run(x.clone()), expected) < TOLERANCE
        benchmark(synchronized, x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dispatch(benchmark: BenchmarkFixture, implementation: str) -> None:
    """Time a call on tensors so small that only dispatch overhead remains."""
    benchmark.group = f"dispatch, {DEVICE}"
    x, weight = torch.zeros(2, 1, 1, 4, 4, device=DEVICE)
    run: dict[str, Callable[[], object]] = {
        "aten": lambda: torch.conv2d(x, weight, None, 2, 1),
        "fused": lambda: ops.conv2d_fused(x, weight)[0],
    }
    with torch.no_grad(), torch_threads(1):
        benchmark(run[implementation])
