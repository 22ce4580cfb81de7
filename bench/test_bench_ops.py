"""The single ops under pytest-benchmark: ``python -m pytest bench --benchmark-only``.

Each layer of both networks in eval mode, fused in one op and as PyTorch's convolution, BatchNorm and
activation; then what calling an op costs at all. Wall clock, up to a synchronisation on CUDA. Results are
checked first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from bench.cases import NETWORKS, Case, relative_error
from dcgan.kernels import ops, weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = (1, 64)
TOLERANCE = 1e-5  # float32, a layer: see bench.cases.TOLERANCE for a network

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


@dataclass
class Layer:
    """A convolution with what follows it, and the shape of one input."""

    name: str
    convolution: nn.Conv2d | nn.ConvTranspose2d
    norm: nn.BatchNorm2d | None
    activation: nn.Module
    input_shape: tuple[int, ...]

    def aten(self) -> Callable[[Tensor], Tensor]:
        parts = [self.convolution, *([self.norm] if self.norm else []), self.activation]
        return nn.Sequential(*parts).eval()

    def fused(self) -> Callable[[Tensor], Tensor]:
        conv, norm = self.convolution, self.norm
        scale = shift = None
        if norm is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()
            shift = norm.bias.detach() - norm.running_mean * scale
        op = ops.conv_transpose2d_fused if isinstance(conv, nn.ConvTranspose2d) else ops.conv2d_fused
        act = ACTIVATIONS[type(self.activation)]
        stride, padding = conv.stride[0], int(conv.padding[0])
        weights.freeze(conv, [conv.weight])  # as in eval mode: what an engine makes of them it may keep

        def run(x: Tensor) -> Tensor:
            y, _, _ = op(
                x, conv.weight, out_scale=scale, out_shift=shift, out_act=act, stride=stride, padding=padding
            )
            return y

        return run


def layers() -> list[Layer]:
    """The five layers of each network, with its random weights and running statistics."""
    found: list[Layer] = []
    for command, network_type in NETWORKS.items():
        case = Case(command, batch=1, dtype="float32", device=DEVICE, threads=1)
        network = case.network().requires_grad_(False).to(DEVICE)
        network = network.to(memory_format=torch.channels_last)
        x = torch.zeros(1, *case.input_shape, device=DEVICE)
        modules = list(network.main)
        while modules:
            convolution, following = modules.pop(0), modules.pop(0)
            assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
            norm = following if isinstance(following, nn.BatchNorm2d) else None
            activation = modules.pop(0) if norm is not None else following
            name = f"{network_type.__name__} {'x'.join(map(str, x.shape[1:]))}"
            layer = Layer(name, convolution, norm, activation, tuple(x.shape[1:]))
            found.append(layer)
            x = layer.aten()(x)
    return found


LAYERS = layers()


def synchronised(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``run``, waiting for the GPU if there is one."""
    if DEVICE == "cpu":
        return run

    def waiting(x: Tensor) -> Tensor:
        y = run(x)
        torch.cuda.synchronize()
        return y

    return waiting


@pytest.mark.parametrize("implementation", ["aten", "fused"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name.replace(" ", "-"))
def test_layer(benchmark: BenchmarkFixture, layer: Layer, batch: int, implementation: str) -> None:
    """One layer in float32, channels_last."""
    benchmark.group = f"{layer.name}, batch {batch}, {DEVICE}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *layer.input_shape, generator=generator).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    run = {"aten": layer.aten, "fused": layer.fused}[implementation]()
    with torch.no_grad():
        assert relative_error(run(x.clone()), expected(layer, x)) < TOLERANCE
        benchmark(synchronised(run), x)


def expected(layer: Layer, x: Tensor) -> Tensor:
    """The layer in float64 on the CPU."""
    parts = copy.deepcopy(layer).aten()
    assert isinstance(parts, nn.Module)
    return parts.cpu().double()(x.cpu().double())  # type: ignore[no-any-return]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", ["aten", "fused"])
def test_dispatch(benchmark: BenchmarkFixture, one_thread: None, implementation: str) -> None:
    """A call on tensors so small that only the call itself is timed."""
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
