"""Networks for the tests of train_chain: run by PyTorch module by module, or as one operator."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dcgan.kernels import cpu, ops
from dcgan.kernels.spec import TrainCall, TrainStage
from dcgan.kernels.train_chain import _BACKWARD_OP, _OP, _Columns, specs, track_, train_chain
from tests.support import native, networks

OP, BACKWARD_OP, TRACK_OP = _OP, _BACKWARD_OP, torch.ops.dcgan.track_.default
ACTS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
MIDDLE_ACTS = ("none", "relu", "leaky_relu")
LAST_ACTS = (*MIDDLE_ACTS, "tanh", "sigmoid")
AFFINE = ("both", "gamma", "beta", "neither")


class Engine(NamedTuple):
    """An engine, the dtype to test it in, and its error relative to a tensor's norm, through all layers."""

    name: str
    dtype: torch.dtype
    tolerance: float


REFERENCE = Engine("reference", torch.float64, networks.EXACT)
NATIVE = Engine("native", torch.float32, native.NETWORK)
ENGINES = [
    pytest.param(REFERENCE, id="reference"),
    pytest.param(NATIVE, id="native", marks=native.NEEDED),
]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Force each engine in turn."""
    with ops.use_engine(request.param.name):
        yield request.param


@dataclass(frozen=True)
class Layer:
    """A convolution, an optional BatchNorm, and an activation."""

    transposed: bool
    channels: int
    """The number of output channels."""
    kernel: int | tuple[int, int] = 4
    stride: int = 2
    padding: int = 1
    norm: bool = False
    affine: str = "both"
    """The BatchNorm's parameters, one of AFFINE."""
    act: str = "none"
    eps: float = 1e-5
    momentum: float | None = 0.1
    bias: bool = False
    """Whether the convolution has a bias, which it has only without a BatchNorm."""

    def __str__(self) -> str:
        """Return a short form for test names."""
        norm = f"-norm-{self.affine}" if self.norm else "-bias" if self.bias else ""
        return f"{'up' if self.transposed else 'down'}{self.channels}{norm}-{self.act}"


class Eager(nn.Sequential):
    """The layers as PyTorch's modules, called once for each of ``groups`` parts of the batch, in order."""

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return super().forward(x)  # type: ignore[no-any-return]
        return torch.cat([super(Eager, self).forward(part) for part in x.chunk(self.groups)])


class Chain(nn.Sequential):
    """The same modules as one operator, which updates their running statistics as well."""

    groups = 1
    channels_last = True

    def call(self, x: Tensor) -> TrainCall:
        slopes = [m.negative_slope for m in self if isinstance(m, nn.LeakyReLU)]
        return TrainCall(x, stages(self), slopes[0] if slopes else 0.2, self.groups, self.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        y, stats = train_chain(self.call(x))
        norms: list[Any] = [m for m in self if isinstance(m, nn.BatchNorm2d)]
        sizes = map_sizes(self, x.shape[2], x.shape[3])
        track_(
            [norm.running_mean for norm in norms],
            [norm.running_var for norm in norms],
            [norm.num_batches_tracked for norm in norms],
            stats,
            [norm.momentum for norm in norms],
            [x.shape[0] // self.groups * h * w for h, w in sizes],
        )
        return y


def map_sizes(modules: nn.Sequential, h: int, w: int) -> list[tuple[int, int]]:
    """Return the height and width of each BatchNorm's input."""
    found = []
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            (k_h, k_w), s, p = module.kernel_size, module.stride[0], int(module.padding[0])
            if isinstance(module, nn.ConvTranspose2d):
                h, w = (h - 1) * s - 2 * p + k_h, (w - 1) * s - 2 * p + k_w
            else:
                h, w = (h + 2 * p - k_h) // s + 1, (w + 2 * p - k_w) // s + 1
        elif isinstance(module, nn.BatchNorm2d):
            found.append((h, w))
    return found


def stages(modules: nn.Sequential) -> list[TrainStage]:
    """Return the layers of a sequence of convolutions, BatchNorms and activations."""
    found: list[TrainStage] = []
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            transposed = isinstance(module, nn.ConvTranspose2d)
            geometry: Any = {"stride": module.stride[0], "padding": module.padding[0]}
            found.append(TrainStage(transposed, module.weight, beta=module.bias, **geometry))
        elif isinstance(module, nn.BatchNorm2d):
            assert found[-1].beta is None
            changes: Any = {"gamma": module.weight, "beta": module.bias, "norm": True, "eps": module.eps}
            found[-1] = found[-1]._replace(**changes)
        else:
            found[-1] = found[-1]._replace(act=ACTS[type(module)])
    return found


def build(c_in: int, layers: Sequence[Layer], slope: float = 0.2) -> Eager:
    """Draw a network in float32: maps are of order one; biases and the BatchNorms' parameters nontrivial."""
    modules: list[nn.Module] = []
    acts = {
        "relu": nn.ReLU,
        "leaky_relu": lambda: nn.LeakyReLU(slope),
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
    }
    for layer in layers:
        make: Any = nn.ConvTranspose2d if layer.transposed else nn.Conv2d
        conv = make(c_in, layer.channels, layer.kernel, layer.stride, layer.padding, bias=layer.bias)
        taps = conv.weight[0, 0].numel() / (layer.stride**2 if layer.transposed else 1)
        nn.init.normal_(conv.weight, 0.0, (c_in * max(taps, 1)) ** -0.5)
        if layer.bias:
            nn.init.normal_(conv.bias, 0.0, 0.3)
        modules.append(conv)
        if layer.norm:
            norm: Any = nn.BatchNorm2d(layer.channels, layer.eps, layer.momentum)
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
            if layer.affine not in ("both", "gamma"):
                norm.weight = None
            if layer.affine not in ("both", "beta"):
                norm.bias = None
            modules.append(norm)
        if layer.act != "none":
            modules.append(acts[layer.act]())
        c_in = layer.channels
    return Eager(*modules)


def reference_network(kind: str, channels: int = 3, features: int = 2) -> Eager:
    """Return the layers of a thin Generator (``kind`` G) or Discriminator (D) for images of 32×32 pixels."""
    return Eager(*networks.reference(kind, channels, dtype=torch.float32, features=features).main)


def reference_input(kind: str, batch: int, channels: int = 3) -> Tensor:
    return torch.randn(batch, 6, 1, 1) if kind == "G" else torch.randn(batch, channels, 32, 32)


def chain_of(network: Eager, channels_last: bool = True) -> Chain:
    """Return a copy of the network that runs as one operator."""
    chain = Chain(*copy.deepcopy(network))
    chain.groups, chain.channels_last = network.groups, channels_last
    return chain


def assert_matches_eager(
    network: Eager, x: Tensor, engine: Engine = REFERENCE, channels_last: bool = True, steps: int = 1
) -> None:
    """Compare y, all gradients and the running statistics with those of PyTorch's modules in float64.

    A forced engine that does not cover the network must say so.
    """
    eager = copy.deepcopy(network).double()
    chain = chain_of(network, channels_last).to(engine.dtype)
    if not covered(chain.call(x.to(engine.dtype)), engine):
        with pytest.raises(ops.EngineError, match=f"engine '{engine.name}' is forced"):
            chain(x.to(engine.dtype))
        return
    for _ in range(steps):
        expected = networks.results(eager, x.double())
        actual = networks.results(chain, x.to(engine.dtype))
        assert_close(actual, expected, engine)


def covered(call: TrainCall, engine: Engine) -> bool:
    return engine.name == "reference" or all(cpu.why_not(spec) is None for spec in specs(call))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], engine: Engine) -> None:
    """Compare each tensor relative to its norm, as :func:`.networks.results` names them.

    Where a value is 0 but for rounding, its error is relative to that of what it is computed from: to 1% of
    the norm of all gradients for a gradient, and to maps of order one for a mean.
    """
    assert actual.keys() == expected.keys()
    squares = [float(t.square().sum()) for name, t in expected.items() if name.startswith("gradient")]
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        if not want.is_floating_point():
            assert torch.equal(got, want), name
            continue
        assert got.dtype == engine.dtype, name
        floor = 1e-2 * sum(squares) ** 0.5 if name.startswith("gradient") else 0.0
        floor = 1.0 if name.startswith("buffer") else floor
        error, norm = float((got.double() - want).norm()), max(float(want.norm()), floor)
        assert error <= engine.tolerance * norm, f"{name}: error {error:.2e} of {norm:.2e}"


def tensors_of(call: TrainCall) -> dict[str, Tensor]:
    """Return the differentiable tensors of a call, by name."""
    found = {"x": call.x}
    for i, stage in enumerate(call.stages):
        for name in ("weight", "gamma", "beta"):
            if (t := getattr(stage, name)) is not None:
                found[f"{name} {i}"] = t
    return found


def with_tensors(call: TrainCall, tensors: dict[str, Tensor]) -> TrainCall:
    """Return the call with other tensors, named as :func:`tensors_of` names them."""
    changed = [
        stage._replace(
            **{n: tensors[f"{n} {i}"] for n in ("weight", "gamma", "beta") if f"{n} {i}" in tensors}
        )
        for i, stage in enumerate(call.stages)
    ]
    return call._replace(x=tensors.get("x", call.x), stages=changed)


def arguments(call: TrainCall) -> tuple[Any, ...]:
    """Return the arguments in the order of the operator's schema."""
    return (call.x, *_Columns.of(call))
