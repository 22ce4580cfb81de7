"""What could make a fused network differ from the plain one, in the code around a forward.

A forward depends on more than the attributes of its network: on classes, functions and their defaults, on
PyTorch's own functions, on what else lists its modules. Each of these is read or changed here, on a plain and
on a fused network; results, gradients and buffers have to agree before and after. What ``fuse`` itself makes,
such as classes and names, must not be seen by the user's code, and must not outlive it.
"""

from __future__ import annotations

import collections
import cProfile
import functools
import gc
import itertools
import pstats
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcgan import fast, tracing
from dcgan.kernels import coverage, ops
from tests.dcgan.test_fuse_forwards import MODES, Net, assert_same, image, outcome, pair
from tests.support.native import NEEDED

pytestmark = [
    NEEDED,
    pytest.mark.usefixtures("one_thread", "_single_layers_too"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture
def _single_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels train single layers as well, whatever their size."""
    monkeypatch.setattr(coverage, "MIN_LAYER_MACS", 0.0)


def calls_agree(plain: nn.Module, fused: nn.Module, x: Tensor | None = None) -> Any:
    """Compare calls with and without gradients; return the plain network's result in eval mode."""
    given = image() if x is None else x
    for grad in (False, True, False):
        expected = outcome(plain, (given,), {}, grad)
        assert_same(outcome(fused, (given,), {}, grad), expected)
    return expected[0]


def fused_and_called(plain: nn.Module) -> nn.Module:
    """Return a fused copy that shares the network's layers, after a call in eval mode."""
    fused = fast.fuse(plain).eval()
    with torch.no_grad():
        fused(image())
    return fused


# --- what a forward reads, and changes of it ---------------------------------------------------------------

Hazard = tuple[Callable[[], nn.Module], list[Callable[[Any], object]]]
"""What makes the network, and changes that are made to each of two of them, one after the other."""

HAZARDS: dict[str, Callable[[], Hazard]] = {}


def hazard(make: Callable[[], Hazard]) -> Callable[[], Hazard]:
    """Add a network and its changes to the cases; its classes and functions are made for one test."""
    HAZARDS[make.__name__.replace("_", " ")] = make
    return make


class Tail(Net):
    """A network that ends with ``self.last``."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.both(x))  # type: ignore[no-any-return]


def sets(name: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute of the last module."""
    return lambda model: setattr(model.last, name, value)


@hazard
def subclass_of_dropout() -> Hazard:
    class Own(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    return lambda: Tail(Own(0.5)), [sets("p", 0.25), sets("p", 1.0)]


@hazard
def subclass_of_dropout_without_forward() -> Hazard:
    class Own(nn.Dropout):
        pass

    return lambda: Tail(Own(0.5)), [sets("p", 1.0)]


@hazard
def subclass_of_a_convolution() -> Hazard:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1), "reflect"))

    def dilate(model: Any) -> None:
        model.last.dilation, model.last.padding = (2, 2), (1, 1)

    return lambda: Tail(Own(5, 3, 3)), [sets("stride", (2, 2)), dilate]


@hazard
def subclass_of_a_convolution_with_a_kernel() -> Hazard:
    class Own(nn.Conv2d):
        gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * super().forward(x)

    def make() -> nn.Module:
        net = Tail(nn.Tanh())
        net.first = Own(3, 4, 4, 2, 1)
        net.begin[0] = net.first
        return net

    def change(model: Any) -> None:
        model.first.gain = 3.0

    def dilate(model: Any) -> None:
        model.first.dilation, model.first.padding = (2, 2), (3, 3)

    return make, [change, dilate]


@hazard
def subclass_of_batch_norm() -> Hazard:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(1.5 * x)

    return lambda: Tail(Own(5)), [sets("eps", 1.0), sets("momentum", 0.7), sets("track_running_stats", False)]


@hazard
def subclass_of_batch_norm_without_forward() -> Hazard:
    class Own(nn.BatchNorm2d):
        pass

    return lambda: Tail(Own(5)), [sets("eps", 1.0), sets("momentum", None)]


@hazard
def subclass_of_linear() -> Hazard:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    def other_weight(model: Any) -> None:
        model.last.weight = nn.Parameter(torch.linspace(-1, 1, 8).view(2, 4))
        model.last.bias = None

    return lambda: Tail(Own(4, 3)), [other_weight]


@hazard
def subclass_of_leaky_relu() -> Hazard:
    class Own(nn.LeakyReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.negative_slope

    return lambda: Tail(Own(0.2)), [sets("negative_slope", 0.9), sets("inplace", True)]


@hazard
def forward_found_by_super() -> Hazard:
    class Base(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.both(x))

    class Between(Base):
        pass

    class Own(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    def patch(model: Any) -> None:
        Base.forward = lambda self, x: 5 * self.both(x)  # type: ignore[method-assign]

    def override(model: Any) -> None:
        Between.forward = lambda self, x: 7 * self.both(x)  # type: ignore[method-assign]

    return Own, [patch, override]


@hazard
def method_found_by_super() -> Hazard:
    class Base(Net):
        def finish(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    class Between(Base):
        pass

    class Own(Between):
        def finish(self, x: Tensor) -> Tensor:
            return super().finish(x) + 1

        def forward(self, x: Tensor) -> Tensor:
            return self.finish(self.both(x))

    def patch(model: Any) -> None:
        Base.finish = lambda self, x: 2 * x  # type: ignore[method-assign]

    def override(model: Any) -> None:
        Between.finish = lambda self, x: 3 * x  # type: ignore[method-assign]

    return Own, [patch, override]


@hazard
def inherited_forward_overridden() -> Hazard:
    class Base(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.both(x))

    class Own(Base):
        pass

    def override(model: Any) -> None:
        Own.forward = lambda self, x: 5 * self.both(x)  # type: ignore[method-assign]

    return Own, [override]


@hazard
def attribute_of_a_class() -> Hazard:
    class Options:
        slope = 0.2

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.both(x), Options.slope)

    return Own, [lambda model: setattr(Options, "slope", 0.9)]


@hazard
def attribute_of_its_own_class() -> Hazard:
    class Own(Net):
        slope = 0.2

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.both(x), self.__class__.slope)

    return Own, [lambda model: setattr(Own, "slope", 0.9)]


@hazard
def attribute_of_its_own_class_by_name() -> Hazard:
    class Own(Net):
        slope = 0.2

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.both(x), Own.slope)

    return Own, [lambda model: setattr(Own, "slope", 0.9)]


@hazard
def attribute_of_a_function() -> Hazard:
    def activation(x: Tensor) -> Tensor:
        return F.leaky_relu(x, activation.slope)  # type: ignore[attr-defined]

    activation.slope = 0.2  # type: ignore[attr-defined]

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return activation(self.both(x))

    return Own, [lambda model: setattr(activation, "slope", 0.9)]


def shaped(x: Tensor) -> Tensor:
    return F.leaky_relu(x, shaped.slope)  # type: ignore[attr-defined]


class Shape:
    slope = 0.2


@hazard
def attributes_of_globals() -> Hazard:
    Shape.slope = shaped.slope = 0.2  # type: ignore[attr-defined]

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return shaped(self.both(x)) + Shape.slope

    return Own, [
        lambda model: setattr(shaped, "slope", 0.9),
        lambda model: setattr(Shape, "slope", 0.7),
    ]


@hazard
def attribute_of_a_class_in_a_local_variable() -> Hazard:
    Shape.slope = 0.2

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            shape = Shape
            return F.leaky_relu(self.both(x), shape.slope)

    return Own, [lambda model: setattr(Shape, "slope", 0.9)]


@hazard
def attribute_of_a_class_by_getattr() -> Hazard:
    Shape.slope = 0.2

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.both(x), getattr(Shape, "slope"))  # noqa: B009

    return Own, [lambda model: setattr(Shape, "slope", 0.9)]


@hazard
def attribute_of_a_class_inside() -> Hazard:
    class Own(Net):
        class Options:
            slope = 0.2

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.both(x), self.Options.slope)

    return Own, [lambda model: setattr(Own.Options, "slope", 0.9)]


def by_slope(x: Tensor, options: Any) -> Tensor:
    return F.leaky_relu(x, options.slope)


@hazard
def attribute_of_a_class_that_is_passed() -> Hazard:
    Shape.slope = 0.2

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return by_slope(self.both(x), Shape)

    return Own, [lambda model: setattr(Shape, "slope", 0.9)]


@hazard
def attribute_of_a_function_of_the_network() -> Hazard:
    def activation(x: Tensor) -> Tensor:
        return torch.tanh(x)

    activation.slope = 0.2  # type: ignore[attr-defined]

    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.both(x), self.activation.slope)  # type: ignore[attr-defined]

    return Own, [lambda model: setattr(activation, "slope", 0.9)]


@hazard
def attribute_of_a_parameter() -> Hazard:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first.weight.slope = 0.2  # type: ignore[attr-defined]

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.both(x), self.first.weight.slope)  # type: ignore[attr-defined]

    return Own, [lambda model: setattr(model.first.weight, "slope", 0.9)]


@hazard
def attribute_in_a_class_method() -> Hazard:
    class Own(Net):
        slope = 0.2

        @classmethod
        def finish(cls, x: Tensor) -> Tensor:
            return F.leaky_relu(x, cls.slope)

        def forward(self, x: Tensor) -> Tensor:
            return self.finish(self.both(x))

    return Own, [lambda model: setattr(Own, "slope", 0.9)]


@hazard
def function_in_a_class_method() -> Hazard:
    class Own(Net):
        @staticmethod
        def activation(x: Tensor) -> Tensor:
            return torch.tanh(x)

        @classmethod
        def finish(cls, x: Tensor) -> Tensor:
            return cls.activation(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.finish(self.both(x))

    return Own, [lambda model: setattr(Own, "activation", staticmethod(torch.sin))]


@hazard
def attribute_of_a_wrapped_function() -> Hazard:
    def doubling(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def doubled(*args: Any, **kwargs: Any) -> Tensor:
            return doubled.by * forward(*args, **kwargs)  # type: ignore[attr-defined, no-any-return]

        doubled.by = 2.0  # type: ignore[attr-defined]
        return doubled

    class Own(Net):
        @doubling
        def forward(self, x: Tensor) -> Tensor:
            return self.both(x)

    return Own, [lambda model: setattr(Own.forward, "by", 3.0)]


@hazard
def decorator_of_a_method() -> Hazard:
    def repeated(times: int) -> Callable[[Any], Any]:
        def decorate(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
            @functools.wraps(method)
            def repeating(self: nn.Module, x: Tensor) -> Tensor:
                for _ in range(times):
                    x = method(self, x)
                return x

            return repeating

        return decorate

    class Own(Net):
        @repeated(2)
        def finish(self, x: Tensor) -> Tensor:
            return torch.sin(2 * x)

        @repeated(3)
        def more(self, x: Tensor) -> Tensor:
            return torch.cos(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.more(self.finish(self.both(x)))  # type: ignore[no-any-return]

    return Own, [
        lambda model: setattr(Own, "finish", repeated(1)(lambda self, x: torch.sin(2 * x))),
        lambda model: setattr(Own, "more", Own.finish),
    ]


@hazard
def default_of_the_forward() -> Hazard:
    class Own(Net):
        def forward(self, x: Tensor, slope: float = 0.2) -> Tensor:
            return F.leaky_relu(self.both(x), slope)

    return Own, [lambda model: setattr(Own.forward, "__defaults__", (0.9,))]


@hazard
def keyword_default_of_the_forward() -> Hazard:
    class Own(Net):
        def forward(self, x: Tensor, *, slope: float = 0.2) -> Tensor:
            return F.leaky_relu(self.both(x), slope)

    def change(model: Any) -> None:
        Own.forward.__kwdefaults__["slope"] = 0.9  # type: ignore[index]

    return Own, [change, lambda model: setattr(Own.forward, "__kwdefaults__", {"slope": 0.5})]


def scaled(x: Tensor, by: float = 2.0, *, shift: float = 0.0) -> Tensor:
    return by * x + shift


@hazard
def defaults_of_a_function() -> Hazard:
    scaled.__defaults__, scaled.__kwdefaults__ = (2.0,), {"shift": 0.0}

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return scaled(self.both(x))

    def shift(model: Any) -> None:
        scaled.__kwdefaults__["shift"] = 1.0  # type: ignore[index]

    return Own, [lambda model: setattr(scaled, "__defaults__", (3.0,)), shift]


@hazard
def defaults_of_a_method() -> Hazard:
    class Own(Net):
        def finish(self, x: Tensor, weights: list[float] = [1.0, 2.0]) -> Tensor:  # noqa: B006
            return weights[0] * x + weights[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.finish(self.both(x))

    (weights,) = Own.finish.__defaults__ or ()

    def change(model: Any) -> None:
        weights[1] = 5.0

    return Own, [change, lambda model: setattr(Own.finish, "__defaults__", ([3.0, 4.0],))]


def leaky(slope: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    """Return an activation, and a function that changes its slope."""

    def activation(x: Tensor) -> Tensor:
        return F.leaky_relu(x, slope)

    def change(value: float) -> None:
        nonlocal slope
        slope = value

    return activation, change


@hazard
def same_code_with_other_variables() -> Hazard:
    (first, change_first), (second, change_second) = leaky(0.1), leaky(0.6)

    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = first, second

        def forward(self, x: Tensor) -> Tensor:
            return self.g(self.second(self.f(self.start(x))) - 0.1)

    def swap(model: Any) -> None:
        model.f, model.g = model.g, model.f

    return Own, [lambda model: change_second(0.9), lambda model: change_first(0.3), swap]


first_activation, change_first = leaky(0.1)
second_activation, change_second = leaky(0.6)


@hazard
def same_code_in_global_variables() -> Hazard:
    change_first(0.1)
    change_second(0.6)

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return second_activation(self.second(first_activation(self.start(x))) - 0.1)

    return Own, [lambda model: change_second(0.9), lambda model: change_first(0.3)]


@hazard
def methods_from_one_factory() -> Hazard:
    def method(slope: float) -> Callable[[Any, Tensor], Tensor]:
        return lambda self, x: F.leaky_relu(x, slope)

    class Own(Net):
        f, g = method(0.1), method(0.6)

        def forward(self, x: Tensor) -> Tensor:
            return self.g(self.second(self.f(self.start(x))) - 0.1)

    return Own, [lambda model: setattr(Own, "g", method(0.9)), lambda model: setattr(Own, "f", Own.g)]


@hazard
def function_of_pytorch_patched() -> Hazard:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.second(F.relu(self.start(x))))

    def patch(model: Any) -> None:
        F.relu = lambda input, inplace=False: 0.5 * input  # undone by the fixture

    return Own, [patch]


@pytest.fixture
def _relu_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "relu", F.relu)


@hazard
def gradients_of_a_buffer() -> Hazard:
    class Own(Net):
        noise: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("noise", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.both(x)
            return 2 * y if self.noise.requires_grad else y

    return Own, [lambda model: model.noise.requires_grad_(), lambda model: model.noise.requires_grad_(False)]


@hazard
def strides_of_a_buffer() -> Hazard:
    class Own(Net):
        grid: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("grid", torch.linspace(-1, 1, 16).view(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.both(x)
            return y * self.grid if self.grid.is_contiguous() else y

    return Own, [lambda model: setattr(model, "grid", model.grid.t())]


@pytest.mark.usefixtures("_relu_restored")
@pytest.mark.parametrize("name", HAZARDS)
def test_changes_are_followed(name: str) -> None:
    """Traced in eval mode, then trained; then again after each change of what the forward reads."""
    make, changes = HAZARDS[name]()
    plain, fused = pair(make)
    found = []
    with ops.recording() as choices:
        for change in (None, *changes):
            if change is not None:
                change(plain)
                change(fused)
            for training in (False, True, False):
                for model in (plain, fused):
                    model.train(training)
                found.append(calls_agree(plain, fused))
    assert choices
    results = [found[i : i + 3] for i in range(0, len(found), 3)]
    for before, after in itertools.pairwise(results):
        assert any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))


# --- forwards that change what they read -------------------------------------------------------------------

EFFECTS: dict[str, Callable[[], nn.Module]] = {}


def effect(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Add a network that counts its calls in something of its own; each call makes another class."""
    EFFECTS[make.__name__.replace("_", " ")] = make
    return make


@effect
def class_counts() -> nn.Module:
    class Own(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Own.calls += 1
            return self.both(x) * Own.calls

    return Own()


@effect
def list_of_its_class() -> nn.Module:
    class Own(Net):
        calls: ClassVar[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.__class__.calls.append(1)
            return self.both(x) * len(Own.calls)

    return Own()


@effect
def list_of_a_class() -> nn.Module:
    class Log:
        calls: ClassVar[list[int]] = []

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            Log.calls.append(1)
            return self.both(x) * len(Log.calls)

    return Own()


@effect
def list_of_a_class_inside() -> nn.Module:
    class Own(Net):
        class Log:
            calls: ClassVar[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.Log.calls.append(1)
            return self.both(x) * len(self.Log.calls)

    return Own()


@effect
def list_of_a_class_in_a_local_variable() -> nn.Module:
    class Log:
        calls: ClassVar[list[int]] = []

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            log = Log
            log.calls.append(1)
            return self.both(x) * len(log.calls)

    return Own()


@effect
def list_in_a_class_method() -> nn.Module:
    class Own(Net):
        calls: ClassVar[list[int]] = []

        @classmethod
        def count(cls) -> int:
            cls.calls.append(1)
            return len(cls.calls)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x) * self.count()

    return Own()


@effect
def list_of_a_function_of_the_network() -> nn.Module:
    def gain() -> int:
        return 1

    gain.calls = []  # type: ignore[attr-defined]

    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = gain

        def forward(self, x: Tensor) -> Tensor:
            self.gain.calls.append(1)  # type: ignore[attr-defined]
            return self.both(x) * len(self.gain.calls)  # type: ignore[attr-defined, no-any-return]

    return Own()


@effect
def function_counts() -> nn.Module:
    def gain() -> int:
        gain.calls += 1  # type: ignore[attr-defined]
        return gain.calls  # type: ignore[attr-defined, no-any-return]

    gain.calls = 0  # type: ignore[attr-defined]

    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.both(x) * gain()

    return Own()


@effect
def mutable_default() -> nn.Module:
    class Own(Net):
        def forward(self, x: Tensor, log: list[int] = []) -> Tensor:  # noqa: B006
            log.append(1)
            return self.both(x) * len(log)

    return Own()


@effect
def mutable_keyword_default() -> nn.Module:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.both(x) * self.count()

        def count(self, *, log: dict[str, int] = {"n": 0}) -> int:  # noqa: B006
            log.update(n=log["n"] + 1)
            return log["n"]

    return Own()


@effect
def set_without_nn_module() -> nn.Module:
    class Own(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            object.__setattr__(self, "calls", self.calls + 1)
            return self.both(x) * self.calls

    return Own()


@effect
def list_changed_through_its_class() -> nn.Module:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.log: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            list.append(self.log, 1)
            return self.both(x) * len(self.log)

    return Own()


@MODES
@pytest.mark.parametrize("name", EFFECTS)
def test_effects_of_every_call(name: str, training: bool) -> None:
    """What a forward counts is counted at each call and never by ``fuse``."""
    plain, fused = pair(EFFECTS[name])
    for model in (plain, fused):
        model.train(training)
    found = [calls_agree(plain, fused) for _ in range(2)]
    assert not torch.equal(*found)


# --- copies ------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A block that gives zero while it is trained."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.conv(x)), 1.0, self.training)


class Listed(nn.Module):
    """A network that registers its blocks, and calls them from another attribute."""

    def __init__(self, kind: Callable[[list[nn.Module]], Any]) -> None:
        super().__init__()
        self.a, self.b = Noisy(3, 4), Noisy(4, 5)
        self.listed = kind([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.listed
        for block in blocks.values() if isinstance(blocks, dict) else blocks:
            for one in block if isinstance(block, list) else [block]:
                x = one(x)
        return x


class Bound(nn.Module):
    """A network whose forward is a method that was bound to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Noisy(3, 4), Noisy(4, 5)
        self.forward = types.MethodType(Bound.through, self)

    def through(self, x: Tensor) -> Tensor:
        return F.dropout(self.b(self.a(x)), 1.0, self.training)


LISTED: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Listed(list),
    "tuple": lambda: Listed(tuple),
    "dict": lambda: Listed(lambda blocks: dict(zip("ab", blocks, strict=True))),
    "OrderedDict": lambda: Listed(lambda blocks: collections.OrderedDict(zip("ab", blocks, strict=True))),
    "nested": lambda: Listed(lambda blocks: [[blocks[0]], [blocks[1]]]),
    "bound": Bound,
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", LISTED)
def test_copy_of_a_network_that_lists_its_blocks(name: str, called: bool) -> None:
    """The copy calls its own blocks: their mode, hooks and replacement matter, the original's do not."""
    torch.manual_seed(5)
    plain = LISTED[name]()
    fused = fast.fuse(plain)
    if called:
        fused(image())
    fused.eval()
    assert plain.training
    assert plain.a.training  # type: ignore[union-attr]
    assert not plain(image()).any()
    got = fused(image())
    assert got.any()
    plain.eval()
    assert_same([got], [plain(image())])

    seen: list[nn.Module] = []
    handle: Any = fused.a.register_forward_hook(lambda module, args, y: seen.append(module))  # type: ignore
    assert_same([fused(image())], [got])
    assert seen == [fused.a]
    plain(image())
    assert seen == [fused.a]
    handle.remove()

    other = nn.Conv2d(3, 4, 4, 2, 1)
    before = plain(image())
    fused.a.conv = other  # type: ignore[union-attr]
    assert_same([plain(image())], [before], 0.0)
    plain.a.conv = other  # type: ignore[union-attr]
    assert not torch.equal(plain(image()), before)
    assert_same([fused(image())], [plain(image())])


# --- names -------------------------------------------------------------------------------------------------


class Names(Net):
    """Methods and attributes with names that a wrapper could use itself."""

    def __init__(self) -> None:
        super().__init__()
        self._fused, self._plain, self._programs = "fused", 2.0, ["programs"]
        self.module, self.state, self.freeze = 1, {"a": 1}, False

    def _freeze(self) -> str:
        for parameter in self.first.parameters():
            parameter.requires_grad = False
        return "frozen"

    def refresh(self, value: int) -> int:
        return 2 * value

    def _state(self) -> list[str]:
        return ["state"]

    def run(self, x: Tensor, *, gain: float) -> Tensor:
        return gain * x

    def pipeline(self, x: Tensor) -> Tensor:
        return self.both(x)

    def program(self) -> str:
        return "program"

    def discard(self) -> str:
        return "discard"

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.pipeline(x), gain=self._plain)


@MODES
def test_names_of_the_user(training: bool) -> None:
    """Methods and attributes are the user's, whatever their names, and also after moves and loads."""
    plain, fused = pair(Names)
    for _ in range(2):
        for model in (plain, fused):
            model.train(training)
        calls_agree(plain, fused)
        for model in (plain, fused):
            net: Any = model
            assert (net.refresh(3), net._state(), net.program()) == (6, ["state"], "program")
            assert (net._fused, net._plain, net._programs) == ("fused", 2.0, ["programs"])
            assert (net.module, net.state, net.freeze, net.discard()) == (1, {"a": 1}, False, "discard")
            assert net._freeze() == "frozen"
            assert not net.first.weight.requires_grad
            net.load_state_dict(net.state_dict())
            net.double().float()


@MODES
def test_names_of_the_users_tensors(training: bool) -> None:
    """A buffer, a parameter and a layer with such names."""

    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("_state", torch.ones(5, 1, 1))
            self._fused = nn.Parameter(torch.ones(5, 1, 1))
            self.run = nn.LeakyReLU(0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(self.both(x)) * self._fused + self._state  # type: ignore[no-any-return]

    plain, fused = pair(Own)
    for model in (plain, fused):
        model.train(training)
    calls_agree(plain, fused)
    assert list(fused.state_dict()) == list(plain.state_dict())


@MODES
def test_names_of_children(training: bool) -> None:
    """Layers of a Sequential, found by the name that the user gave them, run by the kernels."""

    def make() -> nn.Module:
        names = ["run", "norm", "freeze", "pipeline", "refresh", "program"]
        modules = [nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 4, 2, 1)]
        return nn.Sequential(
            collections.OrderedDict(zip(names, [*modules, nn.ReLU(), nn.Tanh()], strict=True))
        )

    plain, fused = pair(make)
    for model in (plain, fused):
        model.train(training)
    calls_agree(plain, fused)
    assert [type(module) for module in fused.children()] == [type(module) for module in plain.children()]
    assert isinstance(fused.run, nn.Conv2d)
    assert isinstance(fused.pipeline, nn.Conv2d)
    assert not any("Conv2d" in row.op for row in fast.explain(fused, image()))


# --- classes -----------------------------------------------------------------------------------------------


def with_static_forward() -> nn.Module:
    class Own(nn.Module):
        forward = staticmethod(torch.tanh)

    return nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), Own(), nn.Conv2d(4, 5, 4, 2, 1))


def of_static_forward() -> nn.Module:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4, 2, 1)

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return torch.tanh(x)

    return Own()


def with_class_forward() -> nn.Module:
    class Own(nn.Module):
        @classmethod
        def forward(cls, x: Tensor) -> Tensor:
            return torch.tanh(x)

    return nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), Own())


def with_no_forward() -> nn.Module:
    class Own(Net):
        forward = None  # type: ignore[assignment]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()

        def forward(self, x: Tensor) -> Tensor:
            return self.own.both(x)

    return Outer()


def with_a_module_of_python() -> nn.Module:
    class Tools:
        def copy(self, deep: bool) -> None:
            raise AssertionError

    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self._tools, self._others = sys.modules["copy"], Tools()

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x)

    return Own()


def with_a_metaclass() -> nn.Module:
    class Meta(type):
        def __init__(cls, name: str, bases: Any, members: Any) -> None:
            super().__init__(name, bases, members)
            cls.tag = 3.0

    class Own(Net, metaclass=Meta):
        def forward(self, x: Tensor) -> Tensor:
            return self.both(x) * type(self).tag

    return Own()


def with_slots() -> nn.Module:
    class Own(Net):
        __slots__ = ("gain",)

        def __init__(self) -> None:
            super().__init__()
            self.gain = 3.0

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x) * self.gain

    return Own()


def with_required_argument() -> nn.Module:
    class Base(Net):
        tag: str

        def __init_subclass__(cls, *, tag: str) -> None:
            super().__init_subclass__()
            cls.tag = tag

    class Own(Base, tag="own"):
        def forward(self, x: Tensor) -> Tensor:
            return self.both(x)

    assert Own.tag == "own"
    return Own()


@MODES
@pytest.mark.parametrize(
    "make",
    [
        with_static_forward,
        of_static_forward,
        with_class_forward,
        with_no_forward,
        with_a_module_of_python,
        with_a_metaclass,
        with_slots,
        with_required_argument,
    ],
)
def test_unusual_classes(make: Callable[[], nn.Module], training: bool) -> None:
    """Networks whose classes, forwards or attributes are of unusual kinds are accepted."""
    plain, fused = pair(make)
    for model in (plain, fused):
        model.train(training)
    calls_agree(plain, fused)
    if make is with_required_argument:
        assert not any("Conv2d" in row.op for row in fast.explain(fused, image()))


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_registries_of_classes(inplace: bool, once: bool) -> None:
    """A class that registers those derived from it sees only the user's, fused or traced."""
    registered: list[type] = []

    class Base(Net):
        def __init_subclass__(cls, **arguments: Any) -> None:
            super().__init_subclass__(**arguments)
            if once and cls.__name__ in (known.__name__ for known in registered):
                raise ValueError("registered twice")
            registered.append(cls)

    class Block(Base):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.both(x))

    class Outer(Base):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.both(x)  # type: ignore[no-any-return]

    plain = Outer()
    expected = plain.eval()(image())
    fused = fast.fuse(plain, inplace=inplace)
    assert_same([fused(image())], [expected])
    assert not any("Conv2d" in row.op for row in fast.explain(fused, image()))
    assert registered == [Block, Outer]

    class Derived(type(fused)):  # type: ignore[misc]
        pass

    assert registered == [Block, Outer, Derived]


# --- gradients ---------------------------------------------------------------------------------------------


class BiasBeforeNorm(Net):
    """Layers with a bias that a BatchNorm removes again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.norm(self.start(x))))  # type: ignore[no-any-return]


def bias_before_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 5, 4, 2, 1)
    )


def penalty(gradient: Tensor) -> Tensor:
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()  # type: ignore[no-any-return]


@MODES
@pytest.mark.parametrize("make", [BiasBeforeNorm, bias_before_norm])
def test_gradient_penalty_alone(make: Callable[[], nn.Module], training: bool) -> None:
    """A loss of the input's gradient gives the same parameters a gradient, and leaves the same without."""
    for loss in (penalty, lambda gradient: gradient.square().sum()):
        gradients = []
        for model in pair(make):
            x = image().requires_grad_()
            (gradient,) = torch.autograd.grad(model.train(training)(x).sum(), x, create_graph=True)
            loss(gradient).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert any(isinstance(gradient, Tensor) for gradient in gradients[0])
        assert_same(gradients[1], gradients[0], 1e-4)


# --- what is freed -----------------------------------------------------------------------------------------


class Deep(Net):
    """A network with a block inside, both of which are traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Noisy(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.block(self.both(x)))


def test_replaced_layers_are_freed() -> None:
    """Neither traces nor packed weights keep layers that the network does not have any more."""
    fused: Any = fast.fuse(Deep().eval())
    replaced: list[Any] = []
    with torch.no_grad():
        for _ in range(12):
            replaced += [
                weakref.ref(fused.second),
                weakref.ref(fused.second.weight),
                weakref.ref(fused.block),
            ]
            fused.second, fused.block = nn.Conv2d(4, 5, 4, 2, 1), Noisy(5, 4).eval()
            fused(image())
    gc.collect()
    assert [ref() for ref in replaced if ref() is not None] == []


def test_classes_are_freed() -> None:
    """A class that was made in a function goes away with the networks, and so does the fused one."""
    classes: list[Any] = []
    for _ in range(3):

        class Own(Deep):
            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(super().forward(x))

        plain = Own()
        fused = fast.fuse(plain)
        fused(image()).sum().backward()
        fused.eval()(image())
        classes += [weakref.ref(Own), weakref.ref(type(fused))]
        assert classes[-1]() is not Own
    del Own, plain, fused
    gc.collect()
    assert [ref() for ref in classes if ref() is not None] == []


def test_tracing_leaves_no_classes() -> None:
    """What is derived from the user's class to trace it is gone afterwards."""

    class Own(Deep):
        pass

    fused: Any = fast.fuse(Own().eval())
    for i in range(5):
        fused.act.negative_slope = 0.1 * i
        fused.block = Noisy(5, 4).eval()
        fused(image())
    gc.collect()
    assert Own.__subclasses__() == [type(fused)]


@pytest.mark.parametrize("make", [Deep, bias_before_norm])
def test_deleted_network_is_freed_at_once(make: Callable[[], nn.Module]) -> None:
    """A network that has been trained, called and edited holds no reference to itself."""
    gc.collect()
    gc.disable()
    try:
        fused: Any = fast.fuse(make())
        fused(image()).sum().backward()
        with torch.no_grad():
            fused.eval()(image())
            fused.other = nn.Tanh()
            fused(image())
        refs: list[Any] = [weakref.ref(module) for module in fused.modules()]
        refs += map(weakref.ref, fused.parameters())
        del fused
        assert [ref() for ref in refs if ref() is not None] == []
    finally:
        gc.enable()


# --- what changes at every call ----------------------------------------------------------------------------


class Faded(Net):
    """A factor that is given, and one that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = 1.0

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return torch.tanh(self.both(x) * factor) * self.alpha


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an item at each trace."""
    found: list[int] = []
    original = tracing.trace

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr("dcgan.tracing.trace", counted)
    return found


@pytest.mark.parametrize("what", ["argument", "keyword", "attribute", "both", "layer"])
def test_constants_that_change_at_every_call(what: str, traces: list[int]) -> None:
    """Results follow the constant, and a network that keeps changing is not traced for ever."""
    plain, fused = pair(Faded)
    assert traces
    traces.clear()
    calls = 100
    for model in (plain, fused):
        model.eval()
    with torch.no_grad():
        for i in range(calls):
            value = 0.5 + 0.01 * i
            args = (value,) if what in ("argument", "both") else ()
            kwargs = {"factor": value} if what == "keyword" else {}
            for model in (plain, fused):
                net: Any = model
                if what in ("attribute", "both"):
                    net.alpha = value
                if what == "layer":
                    net.second.stride = (2, 2) if i % 2 else (1, 1)
            assert_same([fused(image(), *args, **kwargs)], [plain(image(), *args, **kwargs)])
        assert len(traces) < calls / 2
        traces.clear()
        for _ in range(10):
            assert_same([fused(image())], [plain(image())])
        assert len(traces) < 10


# --- size, profilers and threads ---------------------------------------------------------------------------


class Many(nn.Module):
    """Layers that halve and double the map in turns."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            (nn.ConvTranspose2d if i % 2 else nn.Conv2d)(4, 4, 4, 2, 1) for i in range(layers)
        )
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.orthogonal_(parameter)
                parameter.data *= 2.0  # keeps the values from vanishing
        self.last = nn.Conv2d(4, 2, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.9)
        return self.last(x)  # type: ignore[no-any-return]


def as_sequential(layers: int) -> nn.Module:
    many = Many(layers)
    modules = [module for layer in many.layers for module in (layer, nn.LeakyReLU(0.9))]
    return nn.Sequential(*modules, many.last)


@pytest.mark.parametrize("make", [Many, as_sequential])
def test_many_layers(make: Callable[[int], nn.Module]) -> None:
    """More layers than one call of the engine takes, compared with a float64 network."""
    x = image(2, 4, 8, 10)
    plain, fused = pair(lambda: make(66))
    expected = outcome(plain.double(), (x.double(),), {}, True)
    reference = [leaf.float() if isinstance(leaf, Tensor) else leaf for leaf in expected]
    with ops.recording() as choices:
        assert_same(outcome(fused, (x,), {}, True), reference, 1e-3)
        with torch.no_grad():
            assert_same([fused.eval()(x)], reference[:1], 1e-3)
    assert choices
    assert not any("Conv" in row.op for row in fast.explain(fused, x))


class Profiler:
    """Counts the functions that Python calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += event == "call"


@pytest.fixture
def _profile_restored() -> Iterator[None]:
    before = sys.getprofile()
    yield
    sys.setprofile(before)


def seen_by_the_profiler() -> None: ...


@pytest.mark.usefixtures("_profile_restored")
@pytest.mark.parametrize("profiler", ["cProfile", "Python"])
def test_active_profiler(profiler: str) -> None:
    """A profiler of the user's does not disturb tracing, and goes on afterwards."""
    torch.manual_seed(5)
    plain = Deep().eval()
    expected = [plain(image()), torch.cat([plain(2 * image())])]
    own, profile = Profiler(), cProfile.Profile()
    if profiler == "cProfile":
        profile.enable()
    else:
        sys.setprofile(own)
    fused = fast.fuse(plain)
    got = [fused(image()), fused(2 * image())]
    active = sys.getprofile()
    before = own.calls
    seen_by_the_profiler()
    after = own.calls
    profile.disable()
    sys.setprofile(None)
    assert_same(got, expected)
    assert not any("Conv2d" in row.op for row in fast.explain(fused, image()))
    if profiler == "cProfile":
        stats: Any = pstats.Stats(profile)
        assert seen_by_the_profiler.__name__ in {name for _, _, name in stats.stats}
    else:
        assert active is own
        assert after > before


def test_calls_of_another_thread() -> None:
    """While one thread fuses and traces, others get their results from plain and fused modules."""
    torch.manual_seed(5)
    plain, other = Deep().eval(), bias_before_norm().eval()
    models = [plain, other, fused_and_called(plain), fused_and_called(other)]
    with torch.no_grad():
        expected = [plain(image()), other(image())] * 2
    failures: list[BaseException] = []
    done, started = threading.Event(), threading.Barrier(3)

    def work() -> None:
        try:
            started.wait(60)
            with torch.no_grad():
                while not done.is_set():
                    for model, want in zip(models, expected, strict=True):
                        assert_same([model(image())], [want])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait(60)
    try:
        with torch.no_grad():
            for _ in range(8):
                for model, want in zip((plain, other), expected, strict=False):
                    assert_same([fast.fuse(model)(image())], [want])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
