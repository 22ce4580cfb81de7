"""Edits after :func:`dcgan.fast.fuse`: an edited fused network does what an equally edited plain one does.

Each edit is made on two equal networks, one of them fused and called before, so that traces, pipelines and
packed weights of the unedited network exist. Results, gradients, buffers and the calls of hooks are compared
after it, in train and eval mode; edits that can be undone are undone, and compared again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize

from dcgan import fast
from dcgan.kernels import coverage, ops
from tests.support.native import NEEDED
from tests.support.networks import randomise

pytestmark = [
    NEEDED,
    pytest.mark.usefixtures("one_thread", "_single_layers_too", "_globals_restored"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

FLOAT32 = 2e-5  # relative, between two float32 networks, forward and backward


@pytest.fixture
def _single_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels train single layers as well, whatever their size."""
    monkeypatch.setattr(coverage, "MIN_LAYER_MACS", 0.0)


# --- the networks ------------------------------------------------------------------------------------------

SCALE = 1.0
NAMES = ["tanh"]
TABLE = {"shift": 0.0}


def helper(x: Tensor) -> Tensor:
    return x + 0.5


@pytest.fixture
def _globals_restored() -> Iterator[None]:
    """Undo what an edit has done to this file's variables and classes, and remove global hooks."""
    own = globals()
    before = {name: own[name] for name in ("SCALE", "helper")}
    methods = dict(vars(Written)), dict(vars(Block))
    yield
    own.update(before)
    NAMES[:] = ["tanh"]
    TABLE.clear()
    TABLE["shift"] = 0.0
    for kind, members in zip((Written, Block), methods, strict=True):
        for name in ("forward", "finish", "gain"):
            if name in members:
                setattr(kind, name, members[name])
    for hooks in (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    ):
        hooks.clear()
    nn_module._global_is_full_backward_hook = None


class Block(nn.Module):
    """Convolution, BatchNorm and an activation, with attributes that forward reads."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 4, 2, 1)
        self.norm: nn.Module | None = nn.BatchNorm2d(c_out)
        self.act = nn.LeakyReLU(0.2)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.norm is not None:
            y = self.norm(y)
        y = self.act(y)
        return y + 0.1 * F.avg_pool2d(x, 2)[:, :1] if self.skips else y


def closure() -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    """Return a function and one that changes the variable it reads."""
    k = 1.0

    def scaled(x: Tensor) -> Tensor:
        return k * x

    def change(value: float) -> None:
        nonlocal k
        k = value

    return scaled, change


class Written(nn.Module):
    """A hand-written forward over blocks, lists and dicts of modules, and every kind of value."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = Block(3, 4)
        self.blocks = nn.ModuleList([Block(4, 5), Block(5, 6)])
        self.heads = nn.ModuleDict({"a": nn.Conv2d(6, 3, 4, 1, 0), "b": nn.Conv2d(6, 3, 4, 1, 0)})
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("shift", torch.zeros(3, 1, 1))
        self.factor = 1.0
        self.slope = 0.2
        self.enabled = True
        self.order = [0, 1]
        self.options = {"head": "a"}
        self.size = (1, 1)
        self.name: str | None = None
        self.scaled, self.change = closure()

    @property
    def gain(self) -> float:
        return self.factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        for i in self.order:
            y = self.blocks[i](y)
        for block in self.blocks[2:]:
            y = block(y)
        y = F.leaky_relu(self.heads[self.options["head"]](y), self.slope)
        return self.finish(y)

    def finish(self, y: Tensor) -> Tensor:
        y = self.scaled(helper(SCALE * self.gain * y)) if self.enabled else y
        y = y * self.scale + self.shift + TABLE["shift"]
        y = y.expand(-1, -1, *self.size)
        return torch.tanh(y) if "tanh" in NAMES else y


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Sequential(nn.Conv2d(4, 5, 4, 2, 1, bias=False), nn.BatchNorm2d(5), nn.LeakyReLU(0.2)),
        nn.Conv2d(5, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 3, 4, 1, 0),
        nn.Tanh(),
    )


def of_blocks() -> nn.Sequential:
    return nn.Sequential(Block(3, 4), Block(4, 5), nn.Sequential(Block(5, 6), nn.Conv2d(6, 3, 4, 1, 0)))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "Written": Written,
    "Sequential": sequential,
    "blocks": of_blocks,
}


# --- edits -------------------------------------------------------------------------------------------------

Log = list[Any]


class Edit(NamedTuple):
    """A change of a network, with a list for what hooks record; it returns what undoes it, if it can."""

    change: Callable[[Any, Log], Callable[[], Any] | None]
    on: tuple[str, ...] = tuple(MAKERS)


EDITS: dict[str, Edit] = {}


def edit(*on: str) -> Callable[[Any], Any]:
    """Add a function to the edits of these networks, by default of all."""

    def add(change: Any) -> Any:
        EDITS[change.__name__.replace("_", " ")] = Edit(change, on or tuple(MAKERS))
        return change

    return add


def sets(name: str, value: Any, undo: Any) -> None:
    """Add an edit that sets an attribute of the hand-written network."""

    def change(model: Any, log: Log) -> Callable[[], None]:
        setattr(model, name, value)
        return lambda: setattr(model, name, undo)

    EDITS[f"{name} = {getattr(value, '__name__', value)}"] = Edit(change, ("Written",))


sets("factor", 2.0, 1.0)
sets("factor", 0, 1.0)
sets("factor", -0.0, 1.0)
sets("factor", True, 1.0)
sets("enabled", False, True)
sets("slope", -0.5, 0.2)
sets("order", [0], [0, 1])
sets("order", (0, 1), [0, 1])
sets("options", {"head": "b"}, {"head": "a"})
sets("size", (2, 1), (1, 1))
sets("scaled", torch.sin, torch.cos)
sets("scaled", nn.Softplus(), nn.ReLU())
sets("finish", lambda y: 2 * y, lambda y: 3 * y)


def last_of(model: Any, kind: type[nn.Module]) -> Any:
    return [module for module in model.modules() if isinstance(module, kind)][-1]


def first_of(model: Any, kind: type[nn.Module]) -> Any:
    return next(module for module in model.modules() if isinstance(module, kind))


def inner(model: Any) -> Any:
    """Return a block in the middle."""
    return (
        model.blocks[0]
        if isinstance(model, Written)
        else model[-1]
        if isinstance(model[0], Block)
        else model[2]
    )


# Values that forward reads.


@edit("Written")
def list_changed_in_place(model: Any, log: Log) -> Any:
    model.order.append(1)
    model.blocks[1].conv = nn.Conv2d(5, 5, 4, 2, 1)
    model.order[:] = [0]
    return lambda: model.order.insert(1, 0) or model.order.pop()


@edit("Written")
def dict_entry(model: Any, log: Log) -> Any:
    model.options["head"] = "b"
    return lambda: model.options.update(head="a")


@edit("Written")
def closure_variable(model: Any, log: Log) -> Any:
    model.change(3.0)
    return lambda: model.change(1.0)


@edit("Written")
def attribute_of_a_block(model: Any, log: Log) -> Any:
    model.first.skips = True
    return lambda: setattr(model.first, "skips", False)


@edit("Written", "blocks")
def layer_set_to_none(model: Any, log: Log) -> None:
    first_of(model, Block).norm = None


@edit("Written")
def attribute_deleted(model: Any, log: Log) -> None:
    del model.slope
    type(model).slope = 0.3


@edit("Written")
def buffer_replaced(model: Any, log: Log) -> None:
    model.shift = torch.full((3, 1, 1), 0.7)


@edit("Written")
def parameter_replaced(model: Any, log: Log) -> None:
    model.scale = nn.Parameter(torch.full((3, 1, 1), 0.7))


@edit("Written")
def parameter_replaced_by_a_tensor(model: Any, log: Log) -> None:
    del model.scale
    model.scale = torch.full((3, 1, 1), 0.7)


@edit("Written")
def method_replaced_on_the_instance(model: Any, log: Log) -> Any:
    model.finish = types.MethodType(lambda self, y: y - self.factor, model)
    return lambda: delattr(model, "finish")


@edit("Written", "blocks")
def forward_replaced_on_the_instance(model: Any, log: Log) -> Any:
    block = first_of(model, Block)
    block.forward = lambda x: -type(block).forward(block, x)
    return lambda: delattr(block, "forward")


@edit()
def forward_of_the_root_replaced(model: Any, log: Log) -> Any:
    before = type(model).forward
    model.forward = lambda x: -before(model, x)
    return lambda: delattr(model, "forward")


# Layers.


@edit()
def slope_of_a_layer(model: Any, log: Log) -> Any:
    act = first_of(model, nn.LeakyReLU)
    act.negative_slope = 0.5
    return lambda: setattr(act, "negative_slope", 0.2)


@edit()
def negative_slope_of_a_layer(model: Any, log: Log) -> Any:
    act = last_of(model, nn.LeakyReLU)
    act.negative_slope = -0.5
    return lambda: setattr(act, "negative_slope", 0.2)


@edit()
def inplace_of_a_layer(model: Any, log: Log) -> None:
    for act in model.modules():
        if isinstance(act, nn.LeakyReLU):
            act.inplace = True


@edit()
def eps_and_momentum(model: Any, log: Log) -> None:
    norm = first_of(model, nn.BatchNorm2d)
    norm.eps, norm.momentum = 0.1, None


@edit()
def stride_and_padding(model: Any, log: Log) -> Any:
    conv = first_of(model, nn.Conv2d)
    conv.stride, conv.padding = (1, 1), (0, 0)
    inner(model).register_forward_pre_hook(lambda m, args: (args[0][:, :, :16, :16],))
    first_of(model, nn.LeakyReLU).register_forward_hook(lambda m, args, y: y[:, :, :16, :16])
    return None


@edit()
def dilation(model: Any, log: Log) -> None:
    conv = first_of(model, nn.Conv2d)
    conv.dilation, conv.padding = (3, 3), (4, 4)


@edit()
def padding_mode(model: Any, log: Log) -> None:
    conv = first_of(model, nn.Conv2d)
    conv.padding_mode = "reflect"


@edit()
def track_running_stats(model: Any, log: Log) -> None:
    norm = last_of(model, nn.BatchNorm2d)
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


@edit("Sequential")
def layer_replaced(model: Any, log: Log) -> None:
    model[1] = nn.ELU()
    model[3] = nn.Conv2d(5, 6, 3, 2, 1)
    nn.init.constant_(model[3].weight, 0.1)
    nn.init.zeros_(model[3].bias)


@edit("Sequential", "blocks")
def appended(model: Any, log: Log) -> None:
    model.append(nn.Softplus())
    model.insert(0, nn.ZeroPad2d(0))
    model.extend([nn.Tanh()])


@edit("Sequential")
def deleted(model: Any, log: Log) -> None:
    del model[4]
    del model[-1]
    model.pop(1)


@edit("Sequential")
def inner_sequential_replaced(model: Any, log: Log) -> None:
    model[2] = nn.Sequential(nn.Conv2d(4, 5, 4, 2, 1), nn.Tanh())
    nn.init.constant_(model[2][0].weight, 0.1)
    nn.init.zeros_(model[2][0].bias)


@edit("Sequential")
def repeated_layer(model: Any, log: Log) -> None:
    model.append(model[1])
    model[5] = model[1]


@edit("Written")
def module_list(model: Any, log: Log) -> None:
    model.blocks.append(nn.Softplus())
    model.blocks[0] = nn.Sequential(nn.Conv2d(4, 5, 4, 2, 1), nn.Tanh())
    nn.init.constant_(model.blocks[0][0].weight, 0.1)
    nn.init.zeros_(model.blocks[0][0].bias)


@edit("Written")
def module_dict(model: Any, log: Log) -> None:
    model.heads["c"] = nn.Flatten(2)
    model.heads["a"] = model.heads["b"]
    model.heads.pop("b")


@edit("Written")
def block_replaced(model: Any, log: Log) -> None:
    torch.manual_seed(1)
    model.first = Block(3, 4)
    model.add_module("first", model.first)


@edit("Written", "blocks")
def layer_of_a_block_replaced(model: Any, log: Log) -> None:
    block = first_of(model, Block)
    block.act = nn.Tanh()
    block.norm = nn.GroupNorm(2, 4)


@edit()
def shared_weight(model: Any, log: Log) -> None:
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    twin = nn.Conv2d(4, 5, 4, 2, 1)
    convs[1].weight = twin.weight
    with torch.no_grad():
        twin.weight.fill_(0.05)


@edit("Sequential", "blocks")
def fused_part_replaced_by_a_plain_one(model: Any, log: Log) -> None:
    torch.manual_seed(2)
    model[0] = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4))
    if isinstance(model[1], nn.LeakyReLU):
        model[1] = Written().first.act


# Hooks.


def records(log: Log, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, *values: Any) -> None:
        log.append(name)
        log.extend(
            t.detach().clone() for value in values for t in (value if isinstance(value, tuple) else (value,))
        )

    return hook


def on_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """Return a convolution, an activation, an inner block and the root."""
    return [
        ("conv", first_of(model, nn.Conv2d)),
        ("act", last_of(model, nn.LeakyReLU)),
        ("inner", inner(model)),
        ("root", model),
    ]


def hooked(where: str, register: str, hook: Callable[[Log, str], Callable[..., Any]], label: str) -> None:
    def change(model: Any, log: Log) -> Any:
        handle = getattr(dict(on_layers(model))[where], register)(hook(log, where))
        return handle.remove

    EDITS[f"{label} on {where}"] = Edit(change)


for where in ("conv", "act", "inner", "root"):
    hooked(where, "register_forward_hook", records, "forward hook")
    hooked(where, "register_forward_pre_hook", records, "forward pre-hook")
    hooked(
        where,
        "register_full_backward_hook",
        lambda log, name: lambda m, g, gy: log.append(name),
        "backward hook",
    )
    hooked(
        where,
        "register_full_backward_pre_hook",
        lambda log, name: lambda m, gy: log.append(name),
        "backward pre-hook",
    )
    hooked(
        where, "register_forward_hook", lambda log, name: lambda m, args, y: 0.5 * y, "changing forward hook"
    )
    hooked(
        where,
        "register_forward_pre_hook",
        lambda log, name: lambda m, args: (2 * args[0],),
        "changing pre-hook",
    )


@edit()
def hooks_with_keywords(model: Any, log: Log) -> Any:
    found = [
        inner(model).register_forward_hook(
            lambda m, args, kwargs, y: log.append(sorted(kwargs)), with_kwargs=True
        ),
        model.register_forward_pre_hook(lambda m, args, kwargs: log.append(sorted(kwargs)), with_kwargs=True),
        first_of(model, nn.Conv2d).register_forward_hook(
            lambda m, args, y: log.append("always"), always_call=True
        ),
        inner(model).register_forward_hook(lambda m, args, y: 2 * y, prepend=True),
    ]
    return lambda: [handle.remove() for handle in found]


@edit()
def global_forward_hook(model: Any, log: Log) -> Any:
    def hook(module: nn.Module, args: Any, y: Any) -> None:
        if module in of:
            log.append(type(module).__name__)

    of = set(model.modules())
    handle = nn_module.register_module_forward_hook(hook)
    return handle.remove


@edit()
def tensor_hook_on_a_weight(model: Any, log: Log) -> Any:
    handle = first_of(model, nn.Conv2d).weight.register_hook(lambda g: log.append(tuple(g.shape)))
    return handle.remove


# Parameters.


@edit()
def requires_grad(model: Any, log: Log) -> Any:
    first_of(model, nn.Conv2d).requires_grad_(False)
    return lambda: first_of(model, nn.Conv2d).requires_grad_(True)


@edit()
def half_and_float(model: Any, log: Log) -> None:
    model.half().float()


@edit()
def bfloat16_and_float(model: Any, log: Log) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@edit()
def double(model: Any, log: Log) -> Any:
    model.double()
    return model.float


@edit()
def channels_last(model: Any, log: Log) -> Any:
    model.to(memory_format=torch.channels_last)
    return lambda: model.to(memory_format=torch.contiguous_format)


@edit()
def state_dict_loaded(model: Any, log: Log) -> None:
    model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


@edit()
def state_dict_assigned(model: Any, log: Log) -> None:
    state = {k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@edit()
def part_of_a_state_dict_loaded(model: Any, log: Log) -> None:
    conv = first_of(model, nn.Conv2d)
    conv.load_state_dict({"weight": conv.weight * 2, "bias": conv.bias + 1})


@edit()
def optimizer_step(model: Any, log: Log) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@edit()
def copied_in_place(model: Any, log: Log) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * parameter)


@edit()
def data_written(model: Any, log: Log) -> None:
    """Through ``.data`` no version counter changes; the weights' samples reveal it."""
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


@edit()
def data_replaced(model: Any, log: Log) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


@edit()
def buffers_written(model: Any, log: Log) -> None:
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.3)


@edit()
def spectral_norm(model: Any, log: Log) -> Any:
    torch.manual_seed(4)
    conv = last_of(model, nn.Conv2d)
    parametrizations.spectral_norm(conv)
    return lambda: parametrize.remove_parametrizations(conv, "weight")


@edit()
def old_weight_norm(model: Any, log: Log) -> Any:
    conv = first_of(model, nn.Conv2d)
    nn.utils.weight_norm(conv)
    return lambda: nn.utils.remove_weight_norm(conv)


@edit()
def weight_replaced_by_a_tensor(model: Any, log: Log) -> None:
    conv = first_of(model, nn.Conv2d)
    weight = conv.weight.detach() * 0.5
    del conv.weight
    conv.weight = weight


@edit()
def bias_removed(model: Any, log: Log) -> None:
    first_of(model, nn.Conv2d).bias = None


# Modes.


@edit()
def inner_block_in_the_other_mode(model: Any, log: Log) -> Any:
    inner(model).train(not model.training)
    return lambda: model.train(model.training)


@edit()
def norm_in_the_other_mode(model: Any, log: Log) -> None:
    norm = last_of(model, nn.BatchNorm2d)
    norm.training = not norm.training


@edit()
def other_mode(model: Any, log: Log) -> Any:
    training = model.training
    model.train(not training)
    return lambda: model.train(training)


@edit("Written", "Sequential")
def compiled_inside(model: Any, log: Log) -> None:
    torch._dynamo.reset()
    inner(model).compile(backend="eager")


# --- tests -------------------------------------------------------------------------------------------------


def results(model: nn.Module, log: Log, grad: bool) -> list[Any]:
    """Return the output, all gradients and buffers of a call, or its error, and what hooks have recorded."""
    del log[:]
    model.zero_grad()
    dtype = next(p.dtype for p in model.parameters())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_(grad)
    try:
        with torch.set_grad_enabled(grad):
            y = model(x)
    except Exception as error:
        return [type(error), str(error).partition("\n")[0]]
    found = [y.detach(), y.requires_grad]
    if grad:
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum().backward()
        found += [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [*found, *(buffer.clone() for buffer in model.buffers()), *log]


def assert_same(actual: list[Any], expected: list[Any], when: str) -> None:
    assert len(actual) == len(expected), f"{when}: {actual} instead of {expected}"
    floor = 1e-1 * max(
        (float(t.norm()) for t in expected if isinstance(t, Tensor) and t.is_floating_point()), default=1
    )
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert type(got) is type(want), f"{when}, value {i}: {got} instead of {want}"
        if not isinstance(want, Tensor):
            assert got == want, f"{when}, value {i}: {got} instead of {want}"
            continue
        assert (got.shape, got.dtype) == (want.shape, want.dtype), f"{when}, value {i}"
        error, norm = float((got.double() - want.double()).norm()), float(want.double().norm())
        assert error <= FLOAT32 * max(norm, floor), f"{when}, value {i}: {error:.2e} of {norm:.2e}"


def cases() -> Iterator[Any]:
    """Yield each edit of each network in each mode; of these, one mode of two networks is not slow."""
    for i, (name, found) in enumerate(EDITS.items()):
        for j, network in enumerate(found.on):
            for training in (True, False):
                is_fast = network != "blocks" and training == bool((i + j) % 2)
                mode = "train" if training else "eval"
                marks = [] if is_fast else [pytest.mark.slow]
                yield pytest.param(name, network, training, marks=marks, id=f"{name}-{network}-{mode}")


@pytest.mark.parametrize(("name", "network", "training"), list(cases()))
def test_edits(name: str, network: str, training: bool) -> None:
    """After an edit, and after it is undone, a fused network does what an equally edited plain one does."""
    models, undo = networks(network, training), []
    logs: tuple[Log, Log] = ([], [])
    before = [
        [results(model, log, grad) for model, log in zip(models, logs, strict=True)] for grad in (True, False)
    ]
    for expected, actual in before:
        assert_same(actual, expected, "before")
    for model, log in zip(models, logs, strict=True):
        undo.append(EDITS[name].change(model, log))
    for grad in (False, True, False):
        expected, actual = [results(model, log, grad) for model, log in zip(models, logs, strict=True)]
        assert_same(actual, expected, f"after the edit, with gradients: {grad}")
    for back in undo:
        if back is not None:
            back()
    for grad in (False, True):
        expected, actual = [results(model, log, grad) for model, log in zip(models, logs, strict=True)]
        assert_same(actual, expected, f"after it is undone, with gradients: {grad}")


def networks(name: str, training: bool) -> tuple[nn.Module, nn.Module]:
    """Return a plain and a fused network with the same values."""
    made = []
    for _ in range(2):
        torch.manual_seed(6)
        made.append(MAKERS[name]())
        randomise(made[-1])
        made[-1].train(training)
    fused = fast.fuse(made[1])
    with ops.recording() as choices:
        fused(torch.randn(2, 3, 32, 32))
        made[0](torch.randn(2, 3, 32, 32))
    assert choices
    made[0].load_state_dict(fused.state_dict())
    return made[0], fused


class GlobalEdit(NamedTuple):
    """A change of this file's variables or classes, which both networks read."""

    change: Callable[[], Any]


def other_helper(x: Tensor) -> Tensor:
    return x - 0.5


def other_forward(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(self.conv(x))


GLOBALS: dict[str, Callable[[], Any]] = {
    "global number": lambda: globals().update(SCALE=3.0),
    "global function": lambda: globals().update(helper=other_helper),
    "global list": NAMES.clear,
    "global dict": lambda: TABLE.update(shift=0.5),
    "method of the class": lambda: setattr(Written, "finish", lambda self, y: 0.3 * y),
    "property of the class": lambda: setattr(Written, "gain", property(lambda self: 0.3)),
    "forward of a block's class": lambda: setattr(Block, "forward", other_forward),
    "forward of the class": lambda: setattr(Written, "forward", lambda self, x: self.first(x)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GLOBALS)
def test_global_edits(name: str, training: bool) -> None:
    """What forward reads from its module and its classes is followed too."""
    models = networks("Written", training)
    for when in ("before", "after the edit"):
        for grad in (True, False, True):
            expected, actual = [results(model, [], grad) for model in models]
            assert_same(actual, expected, when)
        GLOBALS[name]()


@pytest.mark.parametrize("network", MAKERS)
def test_training_between_edits(network: str) -> None:
    """Steps of an optimizer, evaluations and edits in turn, as in a training run."""
    models = networks(network, True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
    for step in range(6):
        found = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train(step % 3 != 2)
            first_of(model, nn.LeakyReLU).negative_slope = 0.1 * (step % 2)
            if step == 3:
                first_of(model, nn.Conv2d).requires_grad_(False)
            found.append(results(model, [], True))
            optimizer.step()
        assert_same(found[1], found[0], f"step {step}")
        evaluated = [results(model.eval(), [], False) for model in models]
        assert_same(evaluated[1], evaluated[0], f"evaluation after step {step}")


@pytest.mark.parametrize("network", MAKERS)
def test_shared_parameters(network: str) -> None:
    """The original and the fused network share their parameters: an edit of either one is an edit of both."""
    plain = MAKERS[network]().eval()
    fused = fast.fuse(plain)
    for _ in range(3):
        expected, actual = results(plain, [], False), results(fused, [], False)
        assert_same(actual, expected, "shared")
        with torch.no_grad():
            first_of(plain, nn.Conv2d).weight.mul_(1.5)
        expected, actual = results(plain, [], False), results(fused, [], False)
        assert_same(actual, expected, "after an edit of the original")
        with torch.no_grad():
            last_of(fused, nn.Conv2d).bias.add_(0.5)
        plain.load_state_dict(
            {k: 0.9 * v if v.is_floating_point() else v for k, v in plain.state_dict().items()}
        )
