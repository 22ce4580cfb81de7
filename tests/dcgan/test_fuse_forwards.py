"""Forwards that a tracer could get wrong: a fused module does what the plain one does, at every call.

Each class is a network whose forward has one such property. It is called several times, with different inputs
where it matters, in train and eval mode, with and without gradients, next to a plain module with the same
values: results, gradients, buffers, attributes, what is printed, errors and the state of the random number
generators have to agree.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import itertools
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dcgan import fast
from dcgan.kernels import coverage, ops
from tests.support.native import NEEDED

pytestmark = [
    NEEDED,
    pytest.mark.usefixtures("one_thread", "_single_layers_too"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
FLOAT32 = 2e-5  # relative, between two float32 networks, forward and backward


@pytest.fixture
def _single_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels train single layers as well, whatever their size."""
    monkeypatch.setattr(coverage, "MIN_LAYER_MACS", 0.0)


# --- comparing ---------------------------------------------------------------------------------------------

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Case(NamedTuple):
    """A network, the calls that are compared, and whether its forward is traced: kernels run all layers."""

    make: Callable[[], nn.Module]
    calls: Callable[[], list[Call]]
    traced: bool


CASES: dict[str, Case] = {}


def image(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 3, 16, 16), generator=generator)


def images() -> list[Call]:
    return [((image(seed=seed),), {}) for seed in range(3)]


def case(
    calls: Callable[[], list[Call]] = images, traced: bool = True
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Add a network to the cases."""

    def add(kind: type[nn.Module]) -> type[nn.Module]:
        CASES[kind.__name__] = Case(kind, calls, traced)
        return kind

    return add


def leaves(value: Any) -> list[Any]:
    """Return the types and values in a result, in order."""
    if isinstance(value, dict):
        return [type(value), list(value), *(leaf for item in value.values() for leaf in leaves(item))]
    if isinstance(value, list | tuple):
        return [type(value), *(leaf for item in value for leaf in leaves(item))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value), *leaves(vars(value))]
    return [value]


def outcome(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool) -> list[Any]:
    """Return what a call leads to: the result or the error, gradients, and the generators' states."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone(memory_format=torch.preserve_format)
        return value.requires_grad_(grad and value.is_floating_point())

    args, kwargs = tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}
    model.zero_grad()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    try:
        with torch.set_grad_enabled(grad):
            result = model(*args, **kwargs)
    except Exception as error:
        return [type(error), str(error).partition("\n")[0]]
    found = leaves(result)
    outputs = [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = sum(((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs), torch.zeros(()))
    if outputs:
        loss.backward()
    found += [(leaf.stride(), leaf.requires_grad) for leaf in found if isinstance(leaf, Tensor)]
    found += [value.grad for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    found += [value.detach() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    found += [parameter.grad for parameter in model.parameters()]
    found += [buffer.clone() for buffer in model.buffers()]
    return [*found, random.random(), float(np.random.rand()), torch.rand(1)]


def assert_same(actual: list[Any], expected: list[Any], tolerance: float = FLOAT32) -> None:
    assert len(actual) == len(expected), (actual, expected)
    gradients = [
        float(leaf.norm()) for leaf in expected if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    floor = 1e-1 * max(gradients, default=1.0)
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert type(got) is type(want), f"leaf {i}: {got} instead of {want}"
        if not isinstance(want, Tensor):
            assert got == want, f"leaf {i}: {got} instead of {want}"
            continue
        assert (got.shape, got.dtype) == (want.shape, want.dtype), f"leaf {i}"
        got, want = got.detach().double(), want.detach().double()
        error, norm = float((got - want).norm()), max(float(want.norm()), floor)
        assert error <= tolerance * norm, f"leaf {i}: {error:.2e} of {norm:.2e}"


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return a plain network and a fused one with the same values."""
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(make())
    return models[0], fast.fuse(models[1])


def attributes(model: nn.Module) -> list[Any]:
    """Return the attributes of all modules that users set, other than modules and parameters."""
    found: list[Any] = []
    for module in model.modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "call_super_init"}
        found += leaves({k: v for k, v in own.items() if not callable(v)})
    return found


# --- the networks ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers that the kernels run, for the forwards below; the first also where that is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.2)
        self.second = nn.Conv2d(4, 5, 4, 2, 1)
        self.begin = nn.Sequential(self.first, self.norm, self.act)

    def start(self, x: Tensor) -> Tensor:
        return self.begin(x)  # type: ignore[no-any-return]

    def both(self, x: Tensor) -> Tensor:
        return self.second(self.start(x))  # type: ignore[no-any-return]


@case()
class Helpers(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.both(x))


# Branches.


@case(traced=False)
class BranchOnData(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return torch.relu(y) if y.mean() > 0 else -y


def batches() -> list[Call]:
    shapes = [(2, 3, 16, 16), (3, 3, 16, 16), (2, 3, 8, 12), (1, 3, 16, 16), (4, 3, 16, 16)]
    return [((image(*shape),), {}) for shape in shapes]


@case(batches, traced=False)
class BranchOnShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            x = 2 * x
        y = self.both(x)
        return y.flatten(1) if x.size(-1) == 16 else y


@case(batches, traced=False)
class ShapesInTheResult(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, int, list[int]]:
        y = self.both(x).view(x.shape[0], -1)
        return y / x.size(0), x.size(0), [*x.shape]


@case(batches, traced=False)
class Length(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * len(x) + x.dim() + x.numel()


def dtypes() -> list[Call]:
    return [((image(),), {}), ((image().double(),), {}), ((image().bfloat16(),), {}), ((image(),), {})]


@case(dtypes)
class BranchOnDtype(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            x = 2 * x.to(self.first.weight.dtype)
        return self.both(x)


@case(lambda: [*images(), *[((None,), {}), ((3.0,), {})]], traced=False)
class BranchOnType(Net):
    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return self.both(x)


@case(traced=False)
class BranchOnModuleType(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.begin, self.second):
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                x = x + 1
        return x


def flags() -> list[Call]:
    x = image()
    found: list[Call] = [((x,), {}), ((x, True), {}), ((x,), {"twice": True}), ((x, False), {"gain": 2.0})]
    return [*found, ((x, 1), {}), ((), {"x": x}), ((), {"gain": 3.0, "x": x}), ((x, None), {}), ((x,), {})]


@case(flags)
class Flags(Net):
    def forward(self, x: Tensor, twice: bool | None = False, gain: float = 1.0) -> Any:
        y = self.both(x)
        return (y, y) if twice else None if twice is None else gain * y


def optional() -> list[Call]:
    x, y = image(), image(2, 4, 8, 8, seed=1)
    return [((x,), {}), ((x, y), {}), ((x,), {"skip": y}), ((x, None), {}), ((), {"skip": y, "x": x})]


@case(optional)
class OptionalTensor(Net):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.start(x)
        return self.second(h if skip is None else h + skip)  # type: ignore[no-any-return]


@case(optional)
class KeywordOnly(Net):
    def forward(self, x: Tensor, *more: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.start(x)
        for other in more:
            h = h - other if other is not None else h
        return self.second(h if skip is None else h + skip)  # type: ignore[no-any-return]


@case(optional, traced=False)
class Anything(Net):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["x"]
        return {"y": self.both(x), "given": len(args), **kwargs}


@case(
    lambda: [
        ((image(), image(2, 4, 8, 8, seed=1)), {}),
        ((image(), 2.0), {}),
        ((image(),), {"other": 3}),
        ((image(),), {"other": True}),
    ]
)
class NumberOrTensor(Net):
    def forward(self, x: Tensor, other: Any) -> Tensor:
        return self.second(self.start(x) * other)  # type: ignore[no-any-return]


@case(lambda: [(([image(), image(seed=1)],), {}), (({"a": image()},), {}), (([image()],), {})], traced=False)
class InAContainer(Net):
    def forward(self, given: Any) -> Any:
        items = list(given.values()) if isinstance(given, dict) else given
        return [self.both(x) for x in items]


@case(lambda: [((image(), mode), {}) for mode in ("tanh", "relu", "none", "tanh")])
class StringArgument(Net):
    def forward(self, x: Tensor, mode: str) -> Tensor:
        functions = {"tanh": torch.tanh, "relu": torch.relu}
        y = self.both(x)
        return functions[mode](y) if mode in functions else y


@case(lambda: [((image(), n), {}) for n in (1, True, 1.0, 0, False, 0.0, -0.0)])
class EqualArguments(Net):
    """Arguments that are equal but of other types are not the same."""

    def forward(self, x: Tensor, n: Any) -> Any:
        return self.both(x), n, str(n)


@case()
class BranchOnMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return torch.tanh(y) if self.training else y


@case(traced=False)
class BranchOnGradMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return 2 * y if torch.is_grad_enabled() else y


@case(traced=False)
class GlobalModes(Net):
    """What torch's own settings are, at each call."""

    def forward(self, x: Tensor) -> Tensor:
        with_autocast = torch.is_autocast_enabled("cpu")
        y = self.both(x) if torch.get_default_dtype() == torch.float32 else x
        return y * (1 + torch.is_inference_mode_enabled() + with_autocast + torch.get_num_threads())


@case(traced=False)
class BranchOnRequiresGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return 2 * y if x.requires_grad else y


# Loops and other control flow.


@case()
class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, c + 1, 4, 2, 1) for c in (3, 4))
        self.acts = nn.ModuleDict({"a": nn.ReLU(), "b": nn.Tanh()})
        self.order = ["a", "b"]

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, name) in enumerate(zip(self.convs, self.order, strict=True)):
            x = self.acts[name](conv(x)) + i
        return x


@case()
class Recursion(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.repeat(self.both(x), 3)

    def repeat(self, x: Tensor, n: int) -> Tensor:
        return x if n == 0 else self.repeat(torch.sin(x), n - 1)


@case(traced=False)
class Generators(Net):
    def values(self, x: Tensor) -> Iterator[Tensor]:
        yield self.both(x)
        yield self.both(x + 1)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.values(x), torch.zeros(())) + max(i for i in range(3))


@case()
class Comprehensions(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.both(k * x) for k in (1, 2)], dim=1)


@case(traced=False)
class TryExcept(Net):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.both(x).view(7, 11)
        except RuntimeError:
            return self.both(x)


@case(traced=False)
class NoGradInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.start(x)
        return self.second(h)  # type: ignore[no-any-return]


@case(traced=False)
class EnableGradInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.both(x)


@case(traced=False)
class AutocastInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return self.both(x)


@case(traced=False)
class Decorated(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


def doubling(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def doubled(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * forward(*args, **kwargs)

    return doubled


@case()
class DecoratedByTheUser(Net):
    @doubling
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


# Random numbers.


@case(traced=False)
class RandomNumber(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) + torch.randn(1)


@case(traced=False)
class RandomLike(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        h = self.start(x)
        return self.second(h + 0.1 * torch.randn_like(h)) + torch.rand(y.shape)  # type: ignore[no-any-return]


@case(traced=False)
class RandomOfPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * random.random()


@case(traced=False)
class RandomOfNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * float(np.random.rand())


@case()
class FunctionalDropout(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.start(x), 0.5, self.training)
        return F.dropout2d(self.second(h), 0.5, training=self.training)


@case(traced=False)
class NewTensors(Net):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], 1, 1, 1)
        mask[0] = torch.arange(3)[-1] + x.new_zeros(1) + torch.zeros_like(x[0, 0, 0, 0])
        return self.both(x) * mask


# State of the module.


@case(traced=False)
class Counter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.both(x) * self.count


@case(traced=False)
class CountingBuffer(Net):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.both(x) * self.count


@case(traced=False)
class BufferInPlace(Net):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3))[:, None, None])
        return y - self.mean


@case(traced=False)
class Cache(Net):
    cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = x.detach().mean()
        return self.both(x) * self.cached


@case(traced=False)
class CacheByName(Net):
    calls: int

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cached"):
            object.__setattr__(self, "cached", 2.0)
        setattr(self, "calls", getattr(self, "calls", 0) + 1)  # noqa: B010
        return self.both(x) * self.calls


@case(traced=False)
class List(Net):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[tuple[int, ...]] = []
        self.seen: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        self.features.append(tuple(h.shape))
        self.seen["calls"] = len(self.features)
        return self.second(h) * len(self.features)  # type: ignore[no-any-return]


@case(traced=False)
class ListOfAHelper(Net):
    """A helper function changes the list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        extend(self.features)
        return self.both(x) * len(self.features)


def extend(features: list[int]) -> None:
    features += [1]


@case(traced=False)
class AttributeOfALayer(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.act.negative_slope += 0.1
        return self.both(x)


CALLS: dict[str, dict[int, int]] = {"n": {}}


def count(of: nn.Module) -> int:
    """Count the calls of each module."""
    calls = CALLS["n"]
    calls[id(of)] = calls.get(id(of), 0) + 1
    return calls[id(of)]


@case(traced=False)
class GlobalDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * count(self)


def flagged() -> list[Call]:
    return [((image(),), {}), ((image(),), {"flag": True}), ((image(), 2), {}), ((image(),), {})]


@case(flagged)
class EffectsInABranch(Net):
    """The trace for another flag must not have the effects of a call."""

    def forward(self, x: Tensor, flag: int = False) -> Tensor:
        y = torch.tanh(self.both(x))
        return effects(y) if flag else y


def effects(x: Tensor) -> Tensor:
    print("flag")
    return x * random.random() * float(np.random.rand()) + torch.rand(1)


@case(traced=False)
class SwitchesMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        y = self.both(x)
        self.norm.train(self.training)
        return y


@case(traced=False)
class Prints(Net):
    def forward(self, x: Tensor) -> Tensor:
        print("called with", tuple(x.shape))
        return self.both(x)


# Results.


@dataclasses.dataclass
class Output:
    image: Tensor
    label: str


class Pair(NamedTuple):
    image: Tensor
    feature: Tensor


@case()
class ReturnsTuple(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.start(x)
        return self.second(h), h


@case()
class ReturnsDict(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.start(x)
        return {"image": self.second(h), "features": [h, {"input": x}], "constant": 3, "none": None}


@case(traced=False)
class ReturnsDataclass(Net):
    def forward(self, x: Tensor) -> Output:
        return Output(self.both(x), "image")


@case()
class ReturnsNamedTuple(Net):
    def forward(self, x: Tensor) -> Pair:
        h = self.start(x)
        return Pair(self.second(h), feature=h)


@case()
class ReturnsNone(Net):
    def forward(self, x: Tensor) -> None:
        self.both(x)


@case()
class ReturnsItsInput(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.both(x)


@case(traced=False)
class ReturnsANumber(Net):
    def forward(self, x: Tensor) -> tuple[float, Tensor]:
        y = self.both(x)
        return round(y.sum().item(), 3), y


@case()
class Results(Net):
    """Lists that are returned are new at every call."""

    def forward(self, x: Tensor) -> list[Any]:
        constants: list[int] = []
        constants.append(1)
        return [self.both(x), constants]


# Attributes that forward reads.


@case()
class Properties(Net):
    @property
    def gain(self) -> float:
        return 2.0 * self.act.negative_slope

    @staticmethod
    def shifted(x: Tensor) -> Tensor:
        return x + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.shifted(self.both(x))


@case(traced=False)
class ClassMethod(Net):
    @classmethod
    def scaled(cls, x: Tensor) -> Tensor:
        return 3 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.both(x))


@case()
class LambdaAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        k = 2.0
        self.act2 = lambda x: k * torch.sin(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.both(x))


@case(traced=False)
class FunctionAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act2 = functools.partial(F.leaky_relu, negative_slope=0.3)
        self.pool = F.avg_pool2d

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act2(self.both(x)), 2)


@case(traced=False)
class TensorAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.full((1,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) + self.shift


@case()
class ParameterUsedDirectly(Net):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 5, 1, 1), 0.5))
        self.weights = nn.ParameterList([torch.ones(()), torch.ones(())])
        self.register_buffer("shift", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.both(x) + self.shift + self.weights[1]
        return y


@case()
class WeightUsedDirectly(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.first.weight, None, 2, 1)
        return self.second(self.start(x) + torch.tanh(y)) + self.first.weight.norm()  # type: ignore[no-any-return]


@case(traced=False)
class ParametersCounted(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) + sum(p.square().sum() for p in self.parameters())


# In-place writes and aliases.


@case(traced=False)
class WritesToItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0
        return self.both(x)


@case(traced=False)
class WritesToAFeature(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        kept = h[:, :1]
        h = h.clone()
        h[:, 1] += 2
        h[:, 0].zero_()
        return self.second(h) + kept.mean()  # type: ignore[no-any-return]


@case()
class AddsInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        other = h
        h += 1
        return self.second(h + other)  # type: ignore[no-any-return]


@case()
class ReluInPlaceOnAUsedValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = F.relu(h, inplace=True)
        return self.second(y - 0.5 * h)  # type: ignore[no-any-return]


@case()
class LayerInPlaceOnAUsedValue(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        kept = h.detach()
        return self.second(self.act(h)), kept


@case(traced=False)
class DiscardedInPlace(Net):
    """The result of an in-place call is not used: the value that it changes is."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(x)
        F.leaky_relu_(h, 0.3)
        h = self.norm(h)
        torch.relu_(h)
        return self.second(h)  # type: ignore[no-any-return]


@case()
class DiscardedLayers(Net):
    """A BatchNorm whose result is not used still updates its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.norm(h)
        return self.second(self.act(h))  # type: ignore[no-any-return]


@case()
class Views(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        view = h.view(h.size(0), -1)
        h = h + 1
        view = view * 2
        return self.second(view.view_as(h) + h.transpose(2, 3)[..., None, :].squeeze(3))  # type: ignore


@case()
class DetachAndData(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x.detach())
        return self.second(h.data) + h.mean()  # type: ignore[no-any-return]


@case(traced=False)
class OutArgument(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.start(x)
            y = torch.empty_like(h)
            torch.add(h, 1, out=y)
        return self.second(y)  # type: ignore[no-any-return]


# PyTorch's and the user's machinery inside.


@case(traced=False)
class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.both, x, use_reentrant=False)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx: Tensor = 3 * x**2 * dy + 1
        return dx


@case(traced=False)
class CustomFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.both(Cube.apply(x)))  # type: ignore[no-any-return]


@case(traced=False)
class TensorHook(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: 2 * gradient)
        return self.second(h)  # type: ignore[no-any-return]


@case(traced=False)
class GradientInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.both(given).sum(), given)
        return gradient


@case()
class CallsAModuleTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) + self.second(self.start(2 * x))  # type: ignore[no-any-return]


@case(traced=False)
class CallsForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(self.first.forward(x), None, None, training=True)
        return self.second(nn.LeakyReLU(0.3)(h) + self.begin(x))  # type: ignore[no-any-return]


@case()
class Scripted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.inner(self.start(x)))  # type: ignore[no-any-return]


@case(traced=False)
class HasAGraphModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.inner(self.start(x)))  # type: ignore[no-any-return]


@case()
class Nested(Net):
    """A fused module within another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fast.fuse(nn.Sequential(nn.Conv2d(5, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()))
        self.helper = fast.fuse(Helpers())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.both(x)).mean() + self.helper(x)  # type: ignore[no-any-return]


@case()
class Subclass(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        y = y + self[0](x).mean()
        return y


@case()
class SubclassWithoutForward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 4, 2, 1))


@case()
class ConvolutionOfTheUser(Net):
    """A subclass of a convolution, with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Equalized(3, 4, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


class Equalized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.5 * x)


@case()
class OverridesCall(Net):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x) + 1  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


@case(traced=False)
class OverridesGetattr(Net):
    gain: float

    def __getattr__(self, name: str) -> Any:
        if name == "gain":
            return 2.0 * len(self._modules)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * self.gain


@case()
class Closure(Net):
    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor, k: float = 2.0) -> Tensor:
            return k * self.both(y) + x.mean()

        return inner(x) + (lambda y: y * y)(x).mean()


@case(traced=False)
class Strings(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"{type(self).__name__}{len(self._modules)}": self.both(x)}


@case(traced=False)
class ClassNames(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, str, bool]:
        return self.both(x), self.__class__.__name__, isinstance(self, ClassNames)


@case(traced=False)
class Asserts(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4, "4-D"
        assert x.shape[1] == 3, f"{x.shape[1]} channels"
        return self.both(x)


@case(
    lambda: [
        ((image(),), {}),
        ((image(2, 4, 16, 16),), {}),
        ((image(2, 3, 1, 1),), {}),
        ((), {}),
        ((image(), 1), {}),
        ((3,), {}),
        ((image(),), {"y": 1}),
        ((image().long(),), {}),
        ((image()[0, 0],), {}),
    ]
)
class Errors(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


@case(
    lambda: [
        ((image(),), {}),
        ((image(3, 16, 16),), {}),
        ((image(0, 3, 16, 16),), {}),
        ((image(2, 3, 16, 16).transpose(2, 3),), {}),
        ((image(4, 3, 16, 32)[::2, :, :, ::2],), {}),
        ((image(1, 3, 16, 16).expand(3, -1, -1, -1),), {}),
        ((image().to(memory_format=torch.channels_last),), {}),
    ]
)
class Inputs(nn.Module):
    """Unbatched, empty, strided and channels_last inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 5, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


@case(lambda: [((), {}), ((), {"n": 3})], traced=False)
class WithoutInputs(Net):
    def forward(self, n: int = 2) -> Tensor:
        return self.both(torch.ones(n, 3, 16, 16))


@case(lambda: [(tuple(image(seed=i) for i in range(10)), {})], traced=False)
class TenInputs(Net):
    def forward(self, *images: Tensor) -> Tensor:
        return self.both(torch.stack(images).mean(0))


@case(lambda: [((image(), torch.tensor([1, 0])), {}), ((image(seed=1), torch.tensor([2, 2])), {})])
class Embedding(Net):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.second(self.start(x) + self.embed(label)[:, :, None, None])  # type: ignore[no-any-return]


# --- comparing the networks --------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("name", CASES)
def test_forwards(name: str, training: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """At each of several calls, a fused network does what the plain one does."""
    case = CASES[name]
    CALLS["n"].clear()
    plain, fused = pair(case.make)
    for model in (plain, fused):
        model.train(training)
    calls = case.calls()
    with ops.recording() as choices:
        for (args, kwargs), grad in itertools.product(calls, (True, False, True)):
            capsys.readouterr()
            expected, printed = outcome(plain, args, kwargs, grad), capsys.readouterr()
            actual = outcome(fused, args, kwargs, grad)
            assert capsys.readouterr() == printed
            assert_same(actual, expected)
            assert_same(attributes(fused), attributes(plain))
    assert choices
    rows = fast.explain(fused, *calls[0][0], **calls[0][1])
    assert case.traced == (not any("Conv2d" in row.op for row in rows)), str(rows)


# --- more than calls ---------------------------------------------------------------------------------------

SOME = pytest.mark.parametrize(
    "name",
    ["Flags", "ReturnsDict", "ParameterUsedDirectly", "Loops", "NoGradInside", "SubclassWithoutForward"],
)


def test_torchs_settings_are_followed() -> None:
    """Inference mode and autocast, which a forward can ask for, are not constants of its trace."""
    plain, fused = pair(GlobalModes)
    for model in (plain, fused):
        model.eval()
    contexts: list[Callable[[], Any]] = [
        torch.no_grad,
        torch.inference_mode,
        functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    ]
    for context in [*contexts, *contexts]:
        with context():
            assert_same([fused(image()).float()], [plain(image()).float()], 1e-2)


@pytest.mark.parametrize("name", CASES)
def test_fuse_has_no_effects(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of the network, of the generators or of the forward's globals changes until it is called."""
    torch.manual_seed(5)
    plain = CASES[name].make()
    before = copy.deepcopy(plain)
    CALLS["n"].clear()
    capsys.readouterr()

    def generators() -> list[Any]:
        return [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]

    states = generators()
    fused = fast.fuse(plain)
    assert capsys.readouterr().out == ""
    assert not CALLS["n"]
    assert_same(generators(), states, 0.0)
    for model in (plain, fused):
        assert_same(attributes(model), attributes(before))
        assert_same([*model.state_dict()], [*before.state_dict()])
        assert_same([*model.state_dict().values()], [*before.state_dict().values()], 0.0)


@SOME
def test_the_original_stays_plain(name: str) -> None:
    """Without ``inplace``, the module itself is unchanged, and shares its parameters with the fused one."""
    model = CASES[name].make().eval()
    types = [type(module) for module in model.modules()]
    before = outcome(model, *CASES[name].calls()[0], grad=True)
    fused = fast.fuse(model)
    assert [type(module) for module in model.modules()] == types
    assert fused is not model
    assert isinstance(fused, type(model))
    assert all(p is q for p, q in zip(model.parameters(), fused.parameters(), strict=True))
    outcome(fused, *CASES[name].calls()[0], grad=True)
    with ops.recording() as choices:
        assert_same(outcome(model, *CASES[name].calls()[0], grad=True), before, 0.0)
    assert not choices


@SOME
@pytest.mark.parametrize("inplace", [False, True])
def test_fuse_applied_twice(name: str, inplace: bool) -> None:
    plain, fused = pair(CASES[name].make)
    again = fast.fuse(fused, inplace=inplace)
    assert type(again) is type(fused)
    assert again is fused or not inplace
    for args, kwargs in CASES[name].calls():
        assert_same(outcome(again, args, kwargs, True), outcome(plain, args, kwargs, True))
    plain, own = CASES[name].make(), CASES[name].make()
    own.load_state_dict(plain.state_dict())
    assert fast.fuse(own, inplace=True) is own
    args, kwargs = CASES[name].calls()[0]
    assert_same(outcome(own, args, kwargs, True), outcome(plain, args, kwargs, True))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@SOME
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies(name: str, called: bool, how: str) -> None:
    """A copy is fused, gives the same results, and is independent of the network that it was made from."""
    plain, fused = pair(CASES[name].make)
    calls = CASES[name].calls()
    for model in (plain, fused):
        if called:
            outcome(model, *calls[0], grad=True)
    made = COPIES[how](fused)
    assert type(made) is type(fused)
    expected = COPIES[how](plain)
    if how != "copy":
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.fill_(torch.nan)
    with ops.recording() as choices:
        for args, kwargs in calls:
            assert_same(outcome(made, args, kwargs, True), outcome(expected, args, kwargs, True))
    assert choices


@SOME
def test_average_of_the_weights(name: str) -> None:
    """A deep copy whose parameters follow in place, as for an exponential moving average."""
    plain, fused = pair(CASES[name].make)
    averages = [copy.deepcopy(model).eval() for model in (plain, fused)]
    args, kwargs = CASES[name].calls()[0]
    for _ in range(3):
        for model, average in zip((plain, fused), averages, strict=True):
            with torch.no_grad():
                for p, q in zip(average.parameters(), model.parameters(), strict=True):
                    q.add_(0.1 * torch.ones_like(q))
                    p.lerp_(q, 0.5)
        assert_same(outcome(averages[1], args, kwargs, False), outcome(averages[0], args, kwargs, False))


@SOME
def test_freed_without_the_garbage_collector(name: str) -> None:
    args, kwargs = CASES[name].calls()[0]
    model = CASES[name].make()
    fused = fast.fuse(model)
    outcome(fused, args, kwargs, True)
    outcome(fused.eval(), args, kwargs, False)
    refs: list[Any] = [weakref.ref(module) for module in (*fused.modules(), *model.modules())]
    refs += map(weakref.ref, fused.parameters())
    gc.collect()
    gc.disable()
    try:
        del model, fused
        assert [ref() for ref in refs if ref() is not None] == []
    finally:
        gc.enable()


@SOME
def test_two_threads(name: str) -> None:
    """Networks that are traced and called by several threads at once give one thread's results."""
    calls = CASES[name].calls()
    plain, fused = pair(CASES[name].make)
    for model in (plain, fused):
        model.eval()
    expected = [
        [leaf for leaf in leaves(plain(*args, **kwargs)) if isinstance(leaf, Tensor)]
        for args, kwargs in calls
    ]
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work() -> None:
        try:
            barrier.wait()
            for grad in (True, False):
                for (args, kwargs), want in zip(calls, expected, strict=True):
                    with torch.set_grad_enabled(grad):
                        got = fused(*args, **kwargs)
                    assert_same([leaf for leaf in leaves(got) if isinstance(leaf, Tensor)], want)
                fast.fuse(CASES[name].make())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("name", ["Helpers", "SubclassWithoutForward", "Loops"])
def test_double_backward(name: str) -> None:
    """The penalty on the gradient's norm and its own gradients."""
    results = []
    for model in pair(CASES[name].make):
        model.eval()
        x = image().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        results.append([penalty, *torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)])
    assert_same(results[1], results[0], 1e-4)


@pytest.mark.parametrize(
    "name", ["Helpers", "ParameterUsedDirectly", "SubclassWithoutForward", "BranchOnShape"]
)
def test_function_transforms(name: str) -> None:
    """functional_call, grad and vmap of a fused network."""
    plain, fused = pair(CASES[name].make)
    x = image()
    other = {k: 2 * p.detach() for k, p in plain.named_parameters()}
    results: list[list[Any]] = []
    for model in (plain, fused):
        model.eval()

        def loss(parameters: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()  # type: ignore

        found: list[Any] = [
            torch.func.functional_call(model, other, (x,)),
            *torch.func.grad(loss)(other, x).values(),
        ]
        if name != "BranchOnShape":
            found.append(torch.func.vmap(model)(x[None]))
            found += torch.func.vmap(torch.func.grad(loss), (None, 0))(other, torch.stack([x, -x])).values()
        results.append([*found, model(x)])
    assert_same(results[1], results[0], 1e-4)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", ["Helpers", "SubclassWithoutForward", "ReturnsTuple"])
def test_compiled(name: str, called: bool) -> None:
    """A fused network compiles as one graph where the plain one does."""
    plain, fused = pair(CASES[name].make)
    args, kwargs = CASES[name].calls()[0]
    torch._dynamo.reset()
    for model in (plain, fused):
        model.eval()
    if called:
        fused(*args, **kwargs)
    compiled = [torch.compile(model, fullgraph=True, backend="aot_eager") for model in (plain, fused)]
    with torch.no_grad():
        expected, actual = [leaves(model(*args, **kwargs)) for model in compiled]
    assert_same(actual, expected)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", ["Helpers", "SubclassWithoutForward", "Loops", "ParameterUsedDirectly"])
def test_recorded_by_the_user(name: str, called: bool) -> None:
    """torch.jit.trace, torch.export and torch.fx record PyTorch's operators, and give the same results."""
    plain, fused = pair(CASES[name].make)
    x = image()
    for model in (plain, fused):
        model.eval()
    with torch.no_grad():
        expected = leaves(plain(x))
        if called:
            fused(x)
        traced = torch.jit.trace(fused, (x,))
        assert "dcgan::" not in str(traced.inlined_graph)
        program = torch.export.export(fused, (x,))
        assert "dcgan" not in str(program.graph)
        found = [traced, program.module()]
        if name == "Loops":
            graph = fx.symbolic_trace(fused)
            assert [n.op for n in graph.graph.nodes] == [n.op for n in fx.symbolic_trace(plain).graph.nodes]
            found.append(graph)
        for recorded in found:
            assert_same(leaves(recorded(x)), expected)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: None, "module must be a torch.nn.Module, got NoneType"),
        (lambda: Helpers, "module must be a torch.nn.Module, got type"),
        (lambda: Helpers().state_dict(), "module must be a torch.nn.Module, got OrderedDict"),
        (
            lambda: nn.DataParallel(Helpers()),
            "module must be the network in the DataParallel: fuse module.module",
        ),
        (
            lambda: torch.compile(Helpers()),
            "module must be the network that was compiled: fuse module._orig_mod",
        ),
    ],
)
def test_what_cannot_be_fused(module: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        fast.fuse(module())
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "make", [nn.Identity, lambda: nn.Linear(3, 2), nn.Sequential, nn.Module, nn.ModuleList]
)
def test_networks_without_convolutions(make: Callable[[], nn.Module]) -> None:
    """Any module is accepted."""
    torch.manual_seed(0)
    plain = make()
    fused = fast.fuse(plain)
    assert_same(outcome(fused, (image(2, 3),), {}, True), outcome(plain, (image(2, 3),), {}, True), 0.0)


def test_single_convolution() -> None:
    """A convolution alone has no forward to replace: it runs as it is, or by its kernel."""
    plain = nn.Conv2d(3, 4, 4, 2, 1)
    assert_same(outcome(fast.fuse(plain), (image(),), {}, True), outcome(plain, (image(),), {}, True))
