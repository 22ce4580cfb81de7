"""Fast networks whose modules do more when called than their class's forward, in every position.

The matrix: change × changed module × network × train or eval × order of change and conversion × method.
A fast network either returns what the changed reference network returns, with its hooks called as often, or
raises the same error.
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules import module as nn_module
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import set_checkpoint_early_stop

from dcgan import fast
from dcgan.kernels import ops
from dcgan.models import LEAKY_SLOPE
from tests.support.native import NEEDED
from tests.support.networks import reference, sample
from tests.support.tolerance import relative

pytestmark = [NEEDED, pytest.mark.usefixtures("one_thread")]

FLOAT32 = 2e-5  # tolerance through all layers, forward and backward, relative to the largest norm


@pytest.fixture(autouse=True)
def _no_global_hooks() -> Iterator[None]:
    yield
    for hooks in (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    ):
        hooks.clear()
    nn_module._global_is_full_backward_hook = None


Calls = list[str]
Change = Callable[[Any, str, Calls], None]
"""Changes a network at a named position, and lists the calls of whatever it adds there."""


def module_at(model: Any, where: str) -> nn.Module:
    """Return the first convolution, norm or activation, the head, or main."""
    if where == "main":
        return model.main  # type: ignore[no-any-return]
    kinds = {
        "convolution": nn.Conv2d | nn.ConvTranspose2d,
        "norm": nn.BatchNorm2d,
        "activation": nn.ReLU | nn.LeakyReLU,
    }
    if where == "head":
        return model.main[-1]  # type: ignore[no-any-return]
    return next(m for m in model.main if isinstance(m, kinds[where]))


def replace_at(model: Any, where: str, make: Callable[[nn.Module], nn.Module]) -> None:
    old = module_at(model, where)
    if where == "main":
        model.main = make(old)
    else:
        model.main[next(i for i, m in enumerate(model.main) if m is old)] = make(old)


# --- hooks -------------------------------------------------------------------------------------------------


def forward_hook(model: Any, where: str, calls: Calls) -> None:
    module_at(model, where).register_forward_hook(lambda m, args, y: calls.append(f"{float(y.norm()):.3e}"))


def changing_forward_hook(model: Any, where: str, calls: Calls) -> None:
    module_at(model, where).register_forward_hook(lambda m, args, y: 0.5 * y)


def forward_pre_hook(model: Any, where: str, calls: Calls) -> None:
    module_at(model, where).register_forward_pre_hook(lambda m, args: (args[0] * 0.75,))


def full_backward_hook(model: Any, where: str, calls: Calls) -> None:
    not_in_place(model)
    module_at(model, where).register_full_backward_hook(lambda m, g_in, g_out: calls.append("backward"))


def changing_backward_hook(model: Any, where: str, calls: Calls) -> None:
    not_in_place(model)
    module_at(model, where).register_full_backward_hook(
        lambda m, g_in, g_out: (2 * g_in[0],) if g_in[0] is not None else None
    )


def backward_pre_hook(model: Any, where: str, calls: Calls) -> None:
    not_in_place(model)
    module_at(model, where).register_full_backward_pre_hook(lambda m, g_out: (3 * g_out[0],))


def not_in_place(model: Any) -> None:
    """Full backward hooks do not support in-place modules."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False


# --- replaced forward --------------------------------------------------------------------------------------


def forward_on_the_instance(model: Any, where: str, calls: Calls) -> None:
    module = module_at(model, where)
    original = type(module).forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        calls.append("forward")
        return original(self, x) * 0.5  # type: ignore[operator, no-any-return]

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def subclass(model: Any, where: str, calls: Calls) -> None:
    def make(old: nn.Module) -> nn.Module:
        class Own(type(old)):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Any:
                calls.append("forward")
                return super().forward(x) * 0.5

        old.__class__ = Own
        return old

    replace_at(model, where, make)


def compiled_in_place(model: Any, where: str, calls: Calls) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append("compiled")
            return graph(*args)

        return run

    module_at(model, where).compile(backend=backend)


def compiled(model: Any, where: str, calls: Calls) -> None:
    replace_at(model, where, lambda old: torch.compile(old, backend="eager"))  # type: ignore[arg-type, return-value]


def checkpointed(model: Any, where: str, calls: Calls) -> None:
    not_in_place(model)  # an input that is computed again must be there still
    replace_at(model, where, checkpoint_wrapper)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, calls: Calls) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append("wrapped")
        return self.inner(x)  # type: ignore[no-any-return]


def wrapped(model: Any, where: str, calls: Calls) -> None:
    replace_at(model, where, lambda old: Wrapped(old, calls))


def nested(model: Any, where: str, calls: Calls) -> None:
    replace_at(model, where, nn.Sequential)


# --- tensors -----------------------------------------------------------------------------------------------


def one_activation_for_all(model: Any, where: str, calls: Calls) -> None:
    """Use one instance in several positions, which ``named_children()`` yields only once."""
    old = module_at(model, where)
    shared = nn.LeakyReLU(0.3) if where != "head" else old
    for i, module in enumerate(model.main):
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            model.main[i] = shared


def one_norm_twice(model: Any, where: str, calls: Calls) -> None:
    norm = module_at(model, "norm")
    i = next(i for i, m in enumerate(model.main) if m is norm)
    model.main.insert(i + 1, nn.ReLU())
    model.main.insert(i + 2, norm)


def plain_attribute(model: Any, where: str, calls: Calls) -> None:
    """Replace a parameter by a plain tensor."""
    module: Any = module_at(model, where)
    weight = module.weight.detach() * 1.25
    del module.weight
    module.weight = weight


def data_edited(model: Any, where: str, calls: Calls) -> None:
    """Edit ``.data``, which does not advance the version counter."""
    module: Any = module_at(model, where)
    module.weight.data.mul_(-1.25)


def bias(model: Any, where: str, calls: Calls) -> None:
    def make(old: Any) -> nn.Module:
        torch.manual_seed(1)
        new = type(old)(old.in_channels, old.out_channels, 4, old.stride, old.padding)
        nn.init.normal_(new.bias)
        return new

    replace_at(model, where, make)


LAYERS = ["convolution", "norm", "activation", "head"]
ANYWHERE = [*LAYERS, "main"]
CHANGES: dict[str, tuple[Change, list[str]]] = {
    "forward hook": (forward_hook, ANYWHERE),
    "forward hook that changes": (changing_forward_hook, ANYWHERE),
    "forward pre-hook": (forward_pre_hook, ANYWHERE),
    "full backward hook": (full_backward_hook, ANYWHERE),
    "full backward hook that changes": (changing_backward_hook, ANYWHERE),
    "full backward pre-hook": (backward_pre_hook, ANYWHERE),
    "forward on the instance": (forward_on_the_instance, ANYWHERE),
    "subclass with a forward": (subclass, ANYWHERE),
    "compile()": (compiled_in_place, ANYWHERE),
    "torch.compile": (compiled, ANYWHERE),
    "activation checkpointing": (checkpointed, ANYWHERE),
    "wrapped": (wrapped, ANYWHERE),
    "nested": (nested, ANYWHERE),
    "one activation for all": (one_activation_for_all, ["activation"]),
    "one norm twice": (one_norm_twice, ["norm"]),
    "plain attribute": (plain_attribute, ["convolution", "norm"]),
    "data edited": (data_edited, ["convolution", "norm"]),
    "bias": (bias, ["convolution"]),
}
EVERY = [(name, where) for name, (_, places) in CHANGES.items() for where in places]


def outcome(network: Any, x: Tensor, method: str) -> dict[str, Any]:
    """Return output, gradients and buffers, or the error, under the same names for both kinds of network."""
    torch.compiler.reset()  # a class's forward is compiled only so many times
    x = x.clone().requires_grad_()
    network.zero_grad()
    try:
        y = network(x) if method == "forward" else network.logits(x)
    except TypeError as error:
        return {"error": str(error)}
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    found: dict[str, Any] = {"output": y.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in network.named_parameters()}
    return found | {name: b.clone() for name, b in network.named_buffers() if b.is_floating_point()}


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    if "error" in expected:
        assert actual == expected
        return
    gradients = [float(t.norm()) for n, t in expected.items() if t is not None and n != "output"]
    for name, want in expected.items():
        got = actual[name]
        if want is None:
            assert got is None, name
            continue
        error = float((got.double() - want.double()).norm())
        # The gradient of a bias before a BatchNorm is zero up to rounding.
        assert error <= FLOAT32 * max(float(want.norm()), 1e-2 * max(gradients, default=0.0)), name


def pair(kind: str, name: str, where: str, order: str, training: bool) -> tuple[Any, Any, Calls, Calls]:
    """Return the changed reference network, the fast one made in ``order``, and the calls of each."""
    torch.manual_seed(0)
    change, _ = CHANGES[name]
    model = reference(kind, dtype=torch.float32).train(training)
    calls: Calls = []
    plain = copy.deepcopy(model)
    fast_calls: Calls = []
    if order == "converted, changed, called before":
        other, x = fast.fuse(model), sample(model)
        with torch.no_grad():
            for network in (other, plain):  # so that running statistics agree
                network(x)
        for network, log in ((plain, calls), (other, fast_calls)):
            torch.manual_seed(2)
            change(network, where, log)
    else:
        for network, log in ((plain, calls), (model, fast_calls)):
            torch.manual_seed(2)
            change(network, where, log)
        with (
            pytest.warns(UserWarning, match="module is compiled, but the fused Sequential is not")
            if (drops_compiled(name, where, order))
            else contextlib.nullcontext()
        ):
            other = fast.fuse(model)
    return plain, other, calls, fast_calls


def drops_compiled(name: str, where: str, order: str) -> bool:
    """Return whether fusing drops a compiled call, which would run the plain container."""
    return (name, where, order) == ("compile()", "main", "changed, converted")


@pytest.mark.parametrize("kind", ["G", "D"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("order", ["changed, converted", "converted, changed, called before"])
@pytest.mark.parametrize(("name", "where"), EVERY)
def test_a_change(kind: str, training: bool, order: str, name: str, where: str) -> None:
    plain, other, calls, fast_calls = pair(kind, name, where, order, training)
    calls.clear(), fast_calls.clear()
    # A recomputed forward otherwise stops once all is there that the backward needs: an operator's statistics
    # are updated after that, those of PyTorch's modules before the next layer.
    with set_checkpoint_early_stop(False):
        assert_outcomes_agree(plain, other, kind)
    assert len(fast_calls) == (0 if drops_compiled(name, where, order) else len(calls))


def assert_outcomes_agree(plain: Any, other: Any, kind: str) -> None:
    methods = ["forward"] if kind == "G" else ["forward", "logits"]
    for method in methods:
        torch.manual_seed(3)
        x = sample(plain)
        expected, actual = outcome(plain, x, method), outcome(other, x, method)
        assert_same(actual, expected)
        with torch.no_grad():  # takes another path
            expected, actual = (result_only(network, x, method) for network in (plain, other))
        assert_same(actual, expected)


def result_only(network: Any, x: Tensor, method: str) -> dict[str, Any]:
    torch.compiler.reset()
    try:
        return {"output": network(x) if method == "forward" else network.logits(x)}
    except TypeError as error:
        return {"error": str(error)}


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        pytest.param("G", True, id="train-G"),
        pytest.param("D", False, id="eval-D"),
        pytest.param("G", False, id="eval-G", marks=pytest.mark.slow),
        pytest.param("D", True, id="train-D", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("name", "where"),
    [
        *[
            pytest.param(name, where, marks=() if where in ("convolution", "main") else pytest.mark.slow)
            for name in (
                *("forward hook that changes", "forward on the instance"),
                *("subclass with a forward", "wrapped"),
            )
            for where in ANYWHERE
        ],
        ("one activation for all", "activation"),
        ("one norm twice", "norm"),
        ("plain attribute", "convolution"),
        ("data edited", "convolution"),
        ("bias", "convolution"),
    ],
)
def test_a_change_under_torch_compile(kind: str, training: bool, name: str, where: str) -> None:
    """The same checks are traced, and a change after the first compiled call is not missed."""
    torch.compiler.reset()
    for order in ("changed, converted", "converted, changed, called before"):
        plain, other, _, _ = pair(kind, name, where, order, training)
        whole: Any = torch.compile(other, backend="aot_eager")
        for _ in range(2):
            x = sample(plain)
            with torch.no_grad():
                assert relative(whole(x), plain(x)) < FLOAT32
        if name == "data edited":
            for network in (plain, other):
                data_edited(network, where, [])
            with torch.no_grad():
                assert relative(whole(x), plain(x)) < FLOAT32


# --- global changes ----------------------------------------------------------------------------------------

GLOBAL: dict[str, Callable[[Calls], Any]] = {
    "forward hook": lambda calls: nn_module.register_module_forward_hook(
        lambda m, x, y: calls.append(type(m).__name__)
    ),
    "forward pre-hook": lambda calls: nn_module.register_module_forward_pre_hook(
        lambda m, x: calls.append(type(m).__name__)
    ),
    "full backward hook": lambda calls: nn_module.register_module_full_backward_hook(
        lambda m, g_in, g_out: calls.append(type(m).__name__)
    ),
    "full backward pre-hook": lambda calls: nn_module.register_module_full_backward_pre_hook(
        lambda m, g_out: calls.append(type(m).__name__)
    ),
}


@pytest.mark.parametrize("kind", ["G", "D"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", GLOBAL)
def test_hooks_on_all_modules(kind: str, training: bool, name: str) -> None:
    model = reference(kind, dtype=torch.float32).train(training)
    not_in_place(model)
    other = fast.fuse(copy.deepcopy(model))
    x = sample(model)
    calls: Calls = []
    handle = GLOBAL[name](calls)
    expected = outcome(model, x, "forward")
    wanted = list(calls)
    calls.clear()
    actual = outcome(other, x, "forward")
    handle.remove()
    assert_same(actual, expected)
    assert calls == wanted
    assert len(calls) > len(model.main)
    with torch.no_grad():
        before = other.eval()(x)
        assert relative(before, model.eval()(x)) < FLOAT32
    assert fast.explain(other, x)[0].engine == "native"


@pytest.mark.parametrize("kind", ["G", "D"])
@pytest.mark.parametrize("owner", [nn.Module, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Sequential])
def test_a_patched_class(kind: str, owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracers and profilers patch classes like this."""
    model = reference(kind, dtype=torch.float32).eval()
    other = fast.fuse(copy.deepcopy(model))
    calls: Calls = []
    method = "__call__" if owner is nn.Module else "forward"
    original = getattr(owner, method)

    def patched(self: nn.Module, *args: Any) -> Any:
        calls.append(type(self).__name__)
        return original(self, *args)

    monkeypatch.setattr(owner, method, patched)
    x = sample(model)
    expected = model(x)
    wanted = calls[1:] if owner is nn.Module else calls[:]
    calls.clear()
    assert torch.equal(other(x), expected) or relative(other(x), expected) < FLOAT32
    assert set(wanted) <= set(calls)


# --- conversion --------------------------------------------------------------------------------------------


def test_fusing_a_compiled_network_warns() -> None:
    """The compiled call is bound to the plain network and is dropped."""
    model = reference("G", dtype=torch.float32).eval()
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="module is compiled, but the fused Generator is not: call compile"):
        other = fast.fuse(model)
    z = sample(model)
    with torch.no_grad():
        assert relative(other(z), model(z)) < FLOAT32
    assert [row.engine for row in fast.explain(other, z)] == ["native"] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.fuse(reference("D"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["G", "D"])
def test_a_forward_replaced_on_the_network(kind: str, inplace: bool) -> None:
    """It runs, before and after the network is fused."""
    model = reference(kind, dtype=torch.float32).eval()
    x = sample(model)
    x = x.view(*x.shape, 1, 1) if kind == "G" else x
    with torch.no_grad():
        expected = 2 * model.main(x)
    model.forward = types.MethodType(lambda self, x: 2 * self.main(x), model)
    other = fast.fuse(model, inplace=inplace)
    with torch.no_grad():
        assert relative(other(x), expected) < FLOAT32
    other.forward = types.MethodType(lambda self, x: x + 1, other)
    assert torch.equal(other(x), x + 1)


class Foreign(nn.Module):
    """A user's own network with the same layers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.main = copy.deepcopy(model.main)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.main(x[..., None, None] if x.ndim == 2 else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["G", "D"])
def test_a_foreign_network_is_fused(kind: str, training: bool) -> None:
    model = Foreign(reference(kind, dtype=torch.float32)).train(training)
    other = fast.fuse(copy.deepcopy(model))
    assert isinstance(other, Foreign)
    assert list(other.state_dict()) == list(model.state_dict())
    x = sample(reference(kind, dtype=torch.float32))
    with ops.use_engine("native"):
        assert [row.engine for row in fast.explain(other, x)] == ["native"] * 4
        assert_same(outcome(other, x, "forward"), outcome(model, x, "forward"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear, r"module must be a torch\.nn\.Module, got type"),
        (lambda: "netG.pth", r"module must be a torch\.nn\.Module, got str"),
        (
            lambda: torch.compile(reference("G")),
            r"module must be the network that was compiled: fuse module\._orig_mod, and compile it",
        ),
        (
            lambda: DataParallel(reference("G")),
            r"module must be the network in the DataParallel: fuse module\.module, and wrap the result",
        ),
    ],
)
def test_fuse_rejects_wrappers_and_what_is_not_a_module(make: Callable[[], Any], words: str) -> None:
    for inplace in (False, True):
        with pytest.raises(TypeError, match=words):
            fast.fuse(make(), inplace=inplace)


def test_fuse_rejects_distributed_data_parallel(tmp_path: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(
            TypeError, match=r"the network in the DistributedDataParallel: fuse module\.module"
        ):
            fast.fuse(DistributedDataParallel(reference("G")))
    finally:
        distributed.destroy_process_group()


def test_the_shared_activation_is_not_the_default() -> None:
    """one_activation_for_all must change the network."""
    assert LEAKY_SLOPE != 0.3
