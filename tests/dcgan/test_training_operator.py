"""Which networks train as one operator; and that all of them, run in whichever way, train as in PyTorch."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dcgan import fast, models, pipeline, training_layers
from dcgan.batchnorm import SyncBatchNorm2d
from dcgan.kernels import ops, train_chain
from tests.support import native
from tests.support.networks import (
    EXACT,
    MODES,
    NETWORKS,
    assert_agree,
    assert_equal_results,
    drop_in,
    norms,
    reference,
    replace,
    replace_norms,
    results,
    sample,
    set_on_norms,
    with_bias,
)
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("one_thread")
in_float64 = pytest.mark.usefixtures("reference_engine")

Change = Callable[[Any], Any]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List the calls of networks that run as one operator, each by its number of layers."""
    found: list[int] = []
    original = train_chain.train_chain

    def record(call: Any) -> Any:
        found.append(len(call.stages))
        return original(call)

    monkeypatch.setattr(train_chain, "train_chain", record)
    return found


def nodes(y: Tensor) -> list[str]:
    """Return the names of the autograd nodes that lead to y."""
    found, open_nodes = {}, [y.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            open_nodes += [following for following, _ in node.next_functions]
    return list(found.values())


def convolutions(model: Any) -> list[Any]:
    return [m for m in model.main if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def activations(model: Any) -> list[int]:
    """Return the positions of the hidden layers' activations."""
    return [i for i, m in enumerate(model.main) if isinstance(m, nn.ReLU | nn.LeakyReLU)]


def changed(kind: str, change: Change, **options: Any) -> tuple[Any, Any]:
    """Return a reference network in training mode and its drop-in, both changed."""
    model = reference(kind, **{"features": 2, **options})
    change(model)
    return model, drop_in(model)


# --- networks that run as one operator ----------------------------------------------------------------------


def unchanged(model: Any) -> None:
    pass


def replace_activations(*made: nn.Module) -> Change:
    """Replace the hidden layers' activations, cycling through ``made``."""

    def change(model: Any) -> None:
        for n, i in enumerate(activations(model)):
            model.main[i] = copy.deepcopy(made[n % len(made)])

    return change


def without(*kinds: type[nn.Module]) -> Change:
    """Remove the modules of these types."""

    def change(model: Any) -> None:
        model.main = nn.Sequential(*(m for m in model.main if not isinstance(m, kinds)))

    return change


def freeze(select: Callable[[str], bool]) -> Change:
    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not select(name))

    return change


def without_beta(model: Any) -> None:
    for _, norm in norms(model):
        norm.bias = None


def layers_that_occur_twice(model: Any) -> None:
    """Repeat a whole layer, with the same modules: its weight, BatchNorm and activation occur twice."""
    c = norms(model)[0][1].num_features
    i = norms(model)[0][0]
    layer = nn.Conv2d(c, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.LeakyReLU(0.2)
    up = nn.ConvTranspose2d(c, c, 4, 2, 1, bias=False)
    slope = next((m for m in model.main if isinstance(m, nn.LeakyReLU)), layer[2])
    modules = list(model.main)
    shared = [up, layer[1], slope, up, layer[1], slope, layer[0], layer[1], slope, layer[0], layer[1], slope]
    model.main = nn.Sequential(*modules[: i + 2], *shared, *modules[i + 2 :]).to(modules[0].weight.dtype)


def tied_weights(model: Any) -> None:
    """Two convolutions, and two BatchNorms, with one set of parameters."""
    i, norm = norms(model)[0]
    c, dtype = norm.num_features, norm.weight.dtype
    first, second = (nn.Conv2d(c, c, 4, 2, 1, bias=False).to(dtype) for _ in range(2))
    ups = [nn.ConvTranspose2d(c, c, 4, 2, 1, bias=False).to(dtype) for _ in range(2)]
    other = nn.BatchNorm2d(c).to(dtype)
    second.weight, ups[1].weight, other.weight, other.bias = (
        first.weight,
        ups[0].weight,
        norm.weight,
        norm.bias,
    )
    modules = list(model.main)
    inner = [ups[0], nn.ReLU(), ups[1], other, first, nn.ReLU(), second, nn.BatchNorm2d(c).to(dtype)]
    model.main = nn.Sequential(*modules[: i + 1], *inner, *modules[i + 1 :])


def shared_statistics(model: Any) -> None:
    """Two BatchNorms with one set of running statistics."""
    c = norms(model)[0][1].num_features
    i = norms(model)[0][0]
    first, second = (nn.BatchNorm2d(c).double() for _ in range(2))
    second.running_mean, second.running_var = first.running_mean, first.running_var
    down = nn.Conv2d(c, c, 4, 2, 1, bias=False).double()
    up = nn.ConvTranspose2d(c, c, 4, 2, 1, bias=False).double()
    modules = list(model.main)
    model.main = nn.Sequential(*modules[: i + 2], up, first, down, second, modules[i + 1], *modules[i + 2 :])


ONE_OPERATOR: dict[str, Change] = {
    "unchanged": unchanged,
    "SyncBatchNorm2d": SyncBatchNorm2d.convert,
    "nn.SyncBatchNorm": replace_norms(nn.SyncBatchNorm),
    "one norm without statistics": lambda m: replace(norms(m)[0][0], no_statistics)(m),
    "no statistics": replace_norms(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    "no statistics, in eval mode": lambda m: replace_norms(
        lambda c: nn.BatchNorm2d(c, track_running_stats=False).eval()
    )(m),
    "statistics turned off": set_on_norms(track_running_stats=False),
    "no count of batches": set_on_norms(num_batches_tracked=None),
    "momentum None": set_on_norms(momentum=None),
    "momentum None, no count of batches": set_on_norms(momentum=None, num_batches_tracked=None),
    "momentum 0": set_on_norms(momentum=0.0),
    "momentum 1": set_on_norms(momentum=1.0),
    "momentum -0.3": set_on_norms(momentum=-0.3),
    "momenta differ": lambda m: [setattr(n, "momentum", 0.1 + 0.2 * i) for i, n in norms(m)],
    "eps": set_on_norms(eps=0.1),
    "not affine": replace_norms(lambda c: nn.BatchNorm2d(c, affine=False)),
    "no beta": without_beta,
    "slope 0.05": replace_activations(nn.LeakyReLU(0.05)),
    "slope 0": replace_activations(nn.LeakyReLU(0.0)),
    "ReLU and LeakyReLU": replace_activations(nn.ReLU(), nn.LeakyReLU(0.1)),
    "not in place": replace_activations(nn.LeakyReLU(0.2, inplace=False)),
    "one activation for all": lambda m: one_module_for_all(m, nn.LeakyReLU(0.3)),
    "no activations": without(nn.ReLU, nn.LeakyReLU),
    "no BatchNorm": without(nn.BatchNorm2d),
    "no head": without(nn.Tanh, nn.Sigmoid),
    "another head": replace(-1, lambda _: nn.LeakyReLU(0.2)),
    "one layer": lambda m: setattr(m, "main", m.main[:1] if "T" in str(m.main[0]) else m.main[:2]),
    "layers that occur twice": layers_that_occur_twice,
    "shared statistics": shared_statistics,
    "tied weights": tied_weights,
    "a bias": replace(0, with_bias),
    "a bias in the last layer": lambda m: replace(-2, with_bias)(m),
    "biases": lambda m: [replace(i, with_bias)(m) for i, c in enumerate(m.main) if c in convolutions(m)],
    "spectral_norm": lambda m: parametrizations.spectral_norm(convolutions(m)[1]),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(convolutions(m)[1]),
    "weight_norm": lambda m: parametrizations.weight_norm(convolutions(m)[1]),
    "orthogonal": lambda m: parametrizations.orthogonal(convolutions(m)[1]),
    "identity": lambda m: m.main.insert(3, nn.Identity()),
    "dropout in eval mode": lambda m: m.main.insert(3, nn.Dropout(0.5).eval()),
    "all parameters frozen": freeze(lambda name: True),
    "first layers frozen": freeze(lambda name: int(name.split(".")[1]) < 4),
    "last layers frozen": freeze(lambda name: int(name.split(".")[1]) > 2),
    "weights of convolutions frozen": freeze(lambda name: int(name.split(".")[1]) % 3 != 1),
    "gammas and betas frozen": freeze(lambda name: name.endswith("bias") or int(name.split(".")[1]) % 3 == 1),
}


def no_statistics(norm: nn.BatchNorm2d) -> nn.Module:
    return nn.BatchNorm2d(norm.num_features, track_running_stats=False)


def one_module_for_all(model: Any, shared: nn.Module) -> None:
    for i in activations(model):
        model.main[i] = shared


@in_float64
@NETWORKS
@pytest.mark.parametrize("name", ONE_OPERATOR)
def test_one_operator(kind: str, name: str, operators: list[int]) -> None:
    """Output, gradients and running statistics are eager's over several steps, with one node in the graph."""
    model, other = changed(kind, ONE_OPERATOR[name])
    model.double(), other.double()
    x = sample(model)
    assert_agree(model, other, x, steps=3)
    assert operators == [len(convolutions(other))] * 3
    y = other(x)
    if y.requires_grad:
        assert nodes(y).count("_ChainBackward") == 1
        assert not any("dcgan" in node for node in nodes(y))


@in_float64
@NETWORKS
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_every_size(kind: str, channels: int, image_size: int, operators: list[int]) -> None:
    model = reference(kind, channels, image_size, features=1)
    assert_agree(model, drop_in(model), sample(model, 2))
    assert operators == [len(convolutions(model))] * 2


@native.NEEDED
@NETWORKS
@pytest.mark.parametrize(
    "name",
    ["unchanged", "momentum None", "not affine", "layers that occur twice", "no BatchNorm", "another head"],
)
def test_one_operator_in_float32(kind: str, name: str, operators: list[int]) -> None:
    """On the native engine, which is chosen by default."""
    model, other = changed(kind, ONE_OPERATOR[name])
    x = sample(model)
    other.float()
    for _ in range(2):
        expected = {
            n: t.float() if t.is_floating_point() else t for n, t in results(model.double(), x).items()
        }
        assert_equal_results(results(other, x.float()), expected, 2 * native.NETWORK)
    assert len(operators) == 2
    with ops.recording() as choices:
        other(x.float()).sum().backward()
    assert {choice.engine for choice in choices} == {"native"}
    assert len(choices) == 2 * len(convolutions(other))


@in_float64
@pytest.mark.parametrize("method", ["forward", "logits"])
def test_logits(method: str, operators: list[int]) -> None:
    model, other = changed("D", unchanged)
    for network in (model, other):
        network.forward_of = getattr(network, method)

    class Method(nn.Module):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network.forward_of(x)  # type: ignore[no-any-return]

    assert_agree(Method(model), Method(other), sample(model))
    assert operators == [len(convolutions(other))] * 2


# --- networks that run as several operators, layer by layer, or eagerly -------------------------------------


def with_hook(register: str, kind: str) -> Change:
    """Register a hook that changes nothing on an inner module."""

    def change(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # full backward hooks do not support in-place modules
        kinds = {"convolution": convolutions(model)[1], "norm": norms(model)[-1][1]}
        kinds["activation"] = model.main[activations(model)[-1]]
        getattr(kinds[kind], register)(lambda *_: None)

    return change


def one_norm_in_eval(model: Any) -> None:
    norms(model)[-1][1].eval()


def insert(make: Callable[[], nn.Module], index: int = 3) -> Change:
    return lambda model: model.main.insert(index, make())


def dilated(conv: Any) -> nn.Module:
    # Kernel 2 with dilation 3 has the extent of kernel 4.
    sizes = conv.in_channels, conv.out_channels, 2, conv.stride, conv.padding
    return type(conv)(*sizes, dilation=3, bias=False)  # type: ignore[no-any-return]


def norm_at_the_end(model: Any) -> None:
    model.main.insert(len(model.main) - 1, nn.BatchNorm2d(convolutions(model)[-1].out_channels))


def old_weight_norm(model: Any) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(convolutions(model)[1])


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
LAYER_BY_LAYER: dict[str, Change] = {
    "one norm in eval mode": one_norm_in_eval,
    "all norms in eval mode": lambda m: [norm.eval() for _, norm in norms(m)],
    "two slopes": replace_activations(nn.LeakyReLU(0.3), nn.LeakyReLU(0.05)),
    "tanh inside": replace_activations(nn.Tanh()),
    "sigmoid inside": replace_activations(nn.ReLU(), nn.Sigmoid()),
}
HOOKED = {f"{hook} of a {kind}": with_hook(hook, kind) for hook in HOOKS for kind in ("convolution", "norm")}
HOOKED |= {f"{hook} of an activation": with_hook(hook, "activation") for hook in HOOKS}
SEVERAL_OPERATORS: dict[str, tuple[Change, list[int], list[int]]] = {
    # The layers of each operator of G, and of D.
    **{name: (hook, [1, 2], [1, 2]) for name, hook in HOOKED.items() if name.endswith("convolution")},
    **{name: (hook, [3, 1], [3, 1]) for name, hook in HOOKED.items() if not name.endswith("convolution")},
    "negative slope": (replace_activations(nn.LeakyReLU(-0.5)), [1, 1, 1, 1], [1, 1, 1, 1]),
    "dropout": (insert(lambda: nn.Dropout(0.0)), [1, 3], [2, 2]),
    "GroupNorm": (replace_norms(lambda c: nn.GroupNorm(1, c)), [1, 1, 1, 1], [2, 1, 1]),
    "ELU": (replace_activations(nn.ELU()), [1, 1, 1, 1], [1, 1, 1, 1]),
    "dilated": (replace(0, dilated), [3], [3]),
    "dropout first": (insert(lambda: nn.Dropout(0.0), 0), [4], [4]),
    "norm at the end": (norm_at_the_end, [4], [4]),
}


@in_float64
@NETWORKS
@pytest.mark.parametrize("name", LAYER_BY_LAYER)
def test_layer_by_layer(kind: str, name: str, operators: list[int]) -> None:
    """Layers that the ops support still run by them, with the same results."""
    model, other = changed(kind, LAYER_BY_LAYER[name])
    model.double(), other.double()
    x = sample(model)
    assert_agree(model, other, x, steps=2)
    with ops.recording() as choices:
        other(x)
    assert not operators
    assert choices


@in_float64
@NETWORKS
@pytest.mark.parametrize("name", SEVERAL_OPERATORS)
def test_several_operators(kind: str, name: str, operators: list[int]) -> None:
    """Each run of covered layers is an operator, and everything else is called between them."""
    change, of_g, of_d = SEVERAL_OPERATORS[name]
    model, other = changed(kind, change)
    model.double(), other.double()
    assert_agree(model, other, sample(model), steps=2)
    assert operators == 2 * (of_g if kind == "G" else of_d)


@in_float64
@NETWORKS
def test_hooks_of_main(kind: str, operators: list[int]) -> None:
    """They run around the operator."""
    fired: list[str] = []
    model, other = changed(kind, unchanged)
    for network in (model, other):
        network.main.register_forward_pre_hook(lambda _, args: fired.append("pre") or (0.5 * args[0],))
        network.main.register_forward_hook(lambda _, args, y: fired.append("forward") or 3 * y)
        network.main.register_full_backward_hook(lambda *_: fired.append("backward"))
    assert_agree(model, other, sample(model), steps=1)
    assert fired == ["pre", "forward", "backward"] * 2
    assert len(operators) == 1


@in_float64
@NETWORKS
def test_hooks_of_the_network_itself(kind: str, operators: list[int]) -> None:
    """They run around the operator."""
    fired: list[str] = []
    model, other = changed(kind, unchanged)
    for network in (model, other):
        network.register_forward_pre_hook(lambda *_: fired.append("pre"))
        network.register_forward_hook(lambda *_: fired.append("forward"))
        network.register_full_backward_hook(lambda *_: fired.append("backward"))
    assert_agree(model, other, sample(model), steps=1)
    assert fired == ["pre", "forward", "backward"] * 2
    assert len(operators) == 1


@in_float64
@NETWORKS
def test_hooks_of_parameters(kind: str, operators: list[int]) -> None:
    """Hooks on gradients, and hooks that run after they are accumulated."""
    model, other = changed(kind, unchanged)
    fired: list[tuple[str, str]] = []
    for network in (model, other):
        for name, p in network.named_parameters():
            p.register_hook(lambda g: 2 * g)
            p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append((name, str(p.grad.shape))))
    assert_agree(model, other, sample(model), steps=1)
    assert len(operators) == 1
    half = len(fired) // 2
    assert sorted(fired[:half]) == sorted(fired[half:])


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@in_float64
@pytest.mark.usefixtures("process_group")
@NETWORKS
@pytest.mark.parametrize("which", ["all", "one", "PyTorch's"])
def test_synchronised_statistics(kind: str, which: str, operators: list[int]) -> None:
    """With a process group, statistics are merged between two layers; a BatchNorm of a network suffices.

    Of one process, they are those of a BatchNorm. PyTorch's own class computes them only on GPUs.
    """
    model, other = changed(kind, unchanged)
    if which == "PyTorch's":
        other.main = nn.SyncBatchNorm.convert_sync_batchnorm(other.main)
    else:
        SyncBatchNorm2d.convert(norms(other)[0][1] if which == "one" else other)
    assert_agree(model, other, sample(model), tolerance=10 * EXACT)
    assert not operators
    model, other = changed(kind, unchanged)
    assert_agree(model, other, sample(model))
    assert len(operators) == 2, "the group alone is no reason"


@in_float64
@NETWORKS
def test_the_group_is_seen_when_it_appears(kind: str, operators: list[int], tmp_path: Any) -> None:
    model, other = changed(kind, SyncBatchNorm2d.convert)
    x = sample(model)
    other(x)
    assert len(operators) == 1
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        other(x)
    finally:
        distributed.destroy_process_group()
    assert len(operators) == 1
    other(x)
    assert len(operators) == 2


@in_float64
@NETWORKS
def test_eval_mode_with_gradients(kind: str, operators: list[int]) -> None:
    model, other = changed(kind, unchanged)
    assert_agree(model.eval(), other.eval(), sample(model))
    assert not operators


@in_float64
@NETWORKS
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind: str, context: Any, operators: list[int]) -> None:
    """In training mode: statistics are updated, and nothing is kept for a backward."""
    model, other = changed(kind, unchanged)
    x = sample(model)
    with context():
        expected, actual = model(x), other(x)
    assert relative(actual, expected) < EXACT
    assert actual.stride() == expected.stride()
    assert not actual.requires_grad
    assert operators
    assert_equal_results(dict(other.named_buffers()), dict(model.named_buffers()))


@NETWORKS
def test_small_networks_run_eagerly_on_a_cpu(
    kind: str, operators: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcgan.kernels.coverage.MIN_TRAINING_MACS", 1e12)
    model, other = changed(kind, unchanged, dtype=torch.float32)
    assert_agree(model, other, sample(model), tolerance=0.0)
    assert not operators


@in_float64
@NETWORKS
def test_layer_by_layer_on_request(kind: str, operators: list[int]) -> None:
    model, other = changed(kind, unchanged)
    x = sample(model)
    for _ in range(2):
        with training_layers.layer_by_layer(), training_layers.layer_by_layer():
            assert_agree(model, other, x, steps=1)
    assert not operators
    with pytest.raises(KeyboardInterrupt), training_layers.layer_by_layer():
        raise KeyboardInterrupt
    other(x)
    assert len(operators) == 1


@native.NEEDED
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_of_different_engines(
    compiled: bool, operators: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch runs a layer that the native engine lacks, and one operator of that engine those after it."""
    monkeypatch.setattr("dcgan.kernels.coverage.MIN_LAYER_MACS", 0)
    model, other = changed("D", lambda m: m.main.__setitem__(0, nn.Conv2d(3, 2, 3, 1, 0, bias=False)))
    small = nn.Conv2d(4, 1, 4, 2, 1, bias=False), nn.Flatten(0), nn.Sigmoid()
    for network in (model, other):
        torch.manual_seed(1)
        network.main = nn.Sequential(*network.main[:5], *copy.deepcopy(small)).double()
    other.float()
    x = sample(model)
    if compiled:
        torch._dynamo.reset()
        actual = torch.compile(other.main, backend="aot_eager", fullgraph=True)(x.float())
        assert relative(actual, model.main(x)) < native.NETWORK
        return
    with ops.recording() as choices:
        actual = fast.fuse(other.main[:-2])(x.float())
    assert relative(actual.flatten(), model.main[:-2](x).flatten()) < native.NETWORK
    assert [choice.engine for choice in choices] == ["native", "native"]
    assert operators == [2]


@in_float64
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_layer_at_all(memory_format: torch.memory_format, operators: list[int]) -> None:
    """A discriminator of a Sigmoid alone, whose logits are its input."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    model = models.Discriminator(3, 1, 32)
    model.main = nn.Sequential(nn.Sigmoid())
    for main in (nn.Sequential(), fast.fuse(model).main):
        y = pipeline.Pipeline(list(main._modules.items())[:-1], lambda: None)(x)  # type: ignore[arg-type]
        assert torch.equal(y, x)
        assert y.stride() == x.stride()
    assert not operators


# --- memory formats, dtypes and devices ---------------------------------------------------------------------


@in_float64
@NETWORKS
@pytest.mark.parametrize("of", ["x", "network", "both"])
def test_channels_last(kind: str, of: str, operators: list[int]) -> None:
    """The output has eager's strides, and gradients of weights have the weights'."""
    model, other = changed(kind, unchanged)
    x = sample(model)
    if of != "network" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if of != "x":
        model.to(memory_format=torch.channels_last), other.to(memory_format=torch.channels_last)
    assert_agree(model, other, x)
    assert len(operators) == 2
    for a, b in zip(convolutions(model), convolutions(other), strict=True):
        assert b.weight.grad.stride() == b.weight.stride() == a.weight.stride()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@NETWORKS
def test_autocast(kind: str, parameters: torch.dtype, operators: list[int]) -> None:
    """Autocast casts x, and the weights unless they are float32; gradients have the parameters' dtype."""
    model, other = changed(kind, unchanged)
    model, other = model.to(parameters).double(), other.to(parameters)
    x = sample(model).to(parameters)
    with ops.use_engine("reference"), torch.autocast("cpu", torch.bfloat16):
        y = other(x)
    y.float().square().sum().backward()
    expected = model(x.double())
    expected.square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert relative(y.double(), expected) < 0.1
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert p.grad.dtype == parameters
        assert relative(p.grad.double(), q.grad) < 0.5
    assert len(operators) == (parameters != torch.float16)  # an op of its own casts each float16 weight


@pytest.mark.parametrize("engine", ["auto", "reference", "native"])
@NETWORKS
def test_an_input_of_another_dtype_is_an_error(kind: str, engine: str) -> None:
    """Only autocast converts; the operator itself would accept float32 weights beside a 16-bit input."""
    _, other = changed(kind, unchanged, dtype=torch.float32)
    before = copy.deepcopy(other.state_dict())
    for dtype in (torch.bfloat16, torch.float64):
        with (
            ops.use_engine(engine),
            pytest.raises(
                (TypeError, RuntimeError),
                match=r"weight must have x's dtype|should be the same|but found",
            ),
        ):
            other(sample(other).to(dtype))
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


@pytest.mark.parametrize("engine", ["auto", "reference"])
@NETWORKS
@MODES
def test_meta_tensors(kind: str, training: bool, engine: str) -> None:
    """Shapes can be inferred without memory."""
    model = reference(kind, dtype=torch.float32).train(training)
    x = sample(model)
    expected = model(x)
    other = drop_in(model).to("meta")
    with ops.use_engine(engine):
        y = other(x.to("meta"))
    y.sum().backward()
    assert (y.shape, y.stride(), y.device.type) == (expected.shape, expected.stride(), "meta")


class Wrapped(Tensor):
    """A tensor subclass that owns no memory: it computes with the tensor in it, and counts operators."""

    seen: ClassVar[set[str]] = set()

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.add(func.name())
        inner = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        out = func(*inner[0], **inner[1])
        wrapped = torch.utils._pytree.tree_map_only(Tensor, Wrapped, out)
        return return_and_correct_aliasing(func, args, kwargs or {}, wrapped)


@in_float64
@NETWORKS
def test_parameters_of_a_tensor_subclass(kind: str) -> None:
    """The operator goes through the dispatcher, which lets the subclass run it."""
    model, other = changed(kind, unchanged)
    for module in convolutions(other):
        module.weight = nn.Parameter(Wrapped(module.weight.detach()))
    Wrapped.seen.clear()
    x = sample(model)
    y, expected = other(x), model(x)
    assert relative(y.inner if isinstance(y, Wrapped) else y, expected) < EXACT
    y.sum().backward()
    expected.sum().backward()
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        gradient: Any = p.grad
        assert relative(gradient.inner if isinstance(gradient, Wrapped) else gradient, q.grad) < 10 * EXACT
    assert {name.split("::")[1] for name in Wrapped.seen if name.startswith("dcgan")} >= {
        "train_chain",
        "train_chain_backward",
    }


# --- autograd -----------------------------------------------------------------------------------------------


@in_float64
@NETWORKS
def test_the_gradient_of_the_input_alone(kind: str, operators: list[int]) -> None:
    model, other = changed(kind, unchanged)
    x = sample(model).requires_grad_()
    found = [torch.autograd.grad(network(x).square().sum(), x)[0] for network in (other, model)]
    assert relative(*found) < EXACT
    assert len(operators) == 1
    assert all(p.grad is None for p in other.parameters())


@in_float64
@NETWORKS
def test_create_graph(kind: str, operators: list[int]) -> None:
    """A gradient penalty, whose second derivatives are those of single ops; statistics are updated once."""
    model, other = changed(kind, unchanged)
    x = sample(model)
    outcomes = []
    for network in (other, model):
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(inputs).square().sum(), inputs, create_graph=True)
        ((gradient.flatten(1).norm(dim=1) - 1).square().mean() + network(x).mean()).backward()
        found = {f"gradient of {n}": p.grad for n, p in network.named_parameters()}
        outcomes.append(found | {n: b.clone() for n, b in network.named_buffers()})
    assert_equal_results(*outcomes, 10 * EXACT)  # type: ignore[misc]
    assert len(operators) == 2


@in_float64
@NETWORKS
def test_functional_call_and_grad(kind: str, operators: list[int]) -> None:
    """Other parameters than the network's run as one operator, and under torch.func.grad layer by layer."""
    model, other = changed(kind, set_on_norms(track_running_stats=False))
    wanted, _ = changed(kind, set_on_norms(track_running_stats=False))
    state = {n: p.detach().clone() for n, p in wanted.named_parameters()}
    x = sample(model)
    other(x)
    y = torch.func.functional_call(other, state, (x,))
    assert relative(y, wanted(x)) < EXACT
    assert relative(other(x), model(x)) < EXACT
    assert len(operators) == 3

    def loss(parameters: dict[str, Tensor], network: nn.Module) -> Tensor:
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    assert_equal_results(*(torch.func.grad(loss)(state, network) for network in (other, model)))
    assert len(operators) == 3


class Checkpointed(nn.Module):
    """A network whose forward is computed again in the backward."""

    def __init__(self, network: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.network, self.reentrant = network, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@in_float64
@NETWORKS
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind: str, reentrant: bool, operators: list[int]) -> None:
    """The second forward updates running statistics again, as that of PyTorch's modules does.

    By default it stops where the last tensor is saved, which here is before the statistics are updated.
    """
    model, other = changed(kind, unchanged)
    with set_checkpoint_early_stop(False):
        assert_agree(Checkpointed(model, reentrant), Checkpointed(other, reentrant), sample(model))
    assert len(operators) == 4
    found = results(Checkpointed(other, reentrant), sample(model))
    assert int(norms(other)[0][1].num_batches_tracked) == (6 if reentrant else 5)
    assert all(t.isfinite().all() for t in found.values())


@in_float64
@NETWORKS
def test_two_graphs_at_once(kind: str) -> None:
    """Forwards before backwards, retained graphs, and backwards in another order."""
    model, other = changed(kind, unchanged)
    inputs = [sample(model) for _ in range(2)]
    outcomes = []
    for network in (other, model):
        first, second = (network(x).square().sum() for x in inputs)
        second.backward(retain_graph=True)
        first.backward()
        second.backward()
        outcomes.append({f"gradient of {n}": p.grad for n, p in network.named_parameters()})
    assert_equal_results(*outcomes)


@pytest.mark.parametrize("engine", ["reference", pytest.param("native", marks=native.NEEDED)])
@pytest.mark.parametrize("channels", [1, 3])
@NETWORKS
def test_operations_in_place_on_the_result(kind: str, channels: int, engine: str) -> None:
    """They are differentiated, or refused where the backward needs the result, as in eager mode."""
    model, other = changed(kind, without(nn.Tanh, nn.Sigmoid), channels=channels, dtype=torch.float32)
    model.double()
    x = sample(model)
    for y in (model.main(x.view(*x.shape, 1, 1) if kind == "G" else x), run(other, x.float(), engine)):
        y.mul_(2).add_(1).square().sum().backward()
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert relative(p.grad.double(), q.grad) < 10 * native.NETWORK
    for network in changed(kind, unchanged, channels=channels, dtype=torch.float32):
        y = run(network, x.float(), engine)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def run(network: Any, x: Tensor, engine: str) -> Tensor:
    """Return the output of a network's main on an engine, which is not a view as the network's own may be."""
    with ops.use_engine(engine):
        y: Tensor = network.main(x.view(*x.shape, 1, 1) if x.ndim == 2 else x)
    return y


@in_float64
@NETWORKS
def test_a_weight_changed_before_the_backward_is_an_error(kind: str) -> None:
    """As in eager mode, instead of a wrong gradient."""
    _, other = changed(kind, unchanged)
    y = other(sample(other))
    with torch.no_grad():
        convolutions(other)[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@in_float64
@NETWORKS
def test_an_updated_running_statistic_is_no_error(kind: str) -> None:
    """The backward does not read running statistics: several forwards may precede it, and a load."""
    _, other = changed(kind, unchanged)
    y = other(sample(other))
    other(sample(other))
    for _, norm in norms(other):
        norm.reset_running_stats()
    y.sum().backward()


# --- changes between steps ----------------------------------------------------------------------------------


def replace_data(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def edit_data(model: Any) -> None:
    for p in model.parameters():
        p.data.mul_(-1.25)  # no version is counted


def load(model: Any) -> None:
    torch.manual_seed(7)
    model.load_state_dict({n: torch.rand_like(t.double()).to(t.dtype) for n, t in model.state_dict().items()})


def load_assigned(model: Any) -> None:
    torch.manual_seed(7)
    state = {n: torch.rand_like(t.double()).to(t.dtype) for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def new_parameters(model: Any) -> None:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(p.detach() + 0.1))


def plain_weights(model: Any) -> None:
    """Replace the parameters of convolutions by plain tensors."""
    for module in convolutions(model):
        weight = module.weight.detach() * 1.5
        del module.weight
        module.weight = weight


def new_norms(model: Any) -> None:
    for i, norm in norms(model):
        model.main[i] = nn.BatchNorm2d(norm.num_features, momentum=0.4).double()


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)  # counts no version
    for p in model.parameters():
        p.grad = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape)
    optimizer.step()


def hooked(model: Any) -> None:
    convolutions(model)[1].register_forward_hook(lambda *_: None)


BETWEEN: dict[str, Change] = {
    "data replaced": replace_data,
    "data edited": edit_data,
    "state dict loaded": load,
    "state dict assigned": load_assigned,
    "new parameters": new_parameters,
    "plain tensors": plain_weights,
    "new norms": new_norms,
    "fused optimizer": optimizer_step,
    "float32 and back": lambda m: m.float().double(),
    "momentum": set_on_norms(momentum=0.5),
    "momentum None": set_on_norms(momentum=None),
    "eps": set_on_norms(eps=0.2),
    "slope": lambda m: [setattr(m.main[i], "negative_slope", 0.4) for i in activations(m)],
    "not tracked": set_on_norms(track_running_stats=False),
    "frozen": lambda m: m.requires_grad_(False),
    "first norm frozen": lambda m: norms(m)[0][1].requires_grad_(False),
    "statistics reset": lambda m: [norm.reset_running_stats() for _, norm in norms(m)],
    "weights_init": lambda m: (torch.manual_seed(5), m.apply(fast.models.weights_init)),
    "eval and train": lambda m: m.eval().train(),
}
BETWEEN |= {
    "bias": lambda m: [replace(0, with_bias)(m), m.double(), nn.init.constant_(m.main[0].bias, 0.5)],
    "spectral_norm": lambda m: (torch.manual_seed(5), parametrizations.spectral_norm(convolutions(m)[1])),
    "old weight_norm": old_weight_norm,
    "an inserted module": insert(nn.Identity),
}
THEN_NOT_AS_ONE: dict[str, tuple[Change, list[int]]] = {
    "hook": (hooked, [1, 2]),
    "a norm in eval mode": (one_norm_in_eval, []),
}


@in_float64
@NETWORKS
@pytest.mark.parametrize("name", [*BETWEEN, *THEN_NOT_AS_ONE])
def test_a_change_between_steps(kind: str, name: str, operators: list[int]) -> None:
    """Nothing of an earlier step is reused."""
    model, other = changed(kind, unchanged)
    x = sample(model)
    assert_agree(model, other, x, steps=1)
    for network in (model, other):
        torch.manual_seed(3)
        (BETWEEN[name] if name in BETWEEN else THEN_NOT_AS_ONE[name][0])(network)
    if name in ("bias", "spectral_norm"):  # drawn at random: let both have the same
        other.load_state_dict(model.state_dict())
    assert_agree(model, other, x)
    assert operators == [4] + 2 * ([4] if name in BETWEEN else THEN_NOT_AS_ONE[name][1])


@in_float64
@NETWORKS
def test_removing_a_hook_restores_the_operator(kind: str, operators: list[int]) -> None:
    model, other = changed(kind, unchanged)
    handle = other.main[0].register_forward_hook(lambda *_: None)
    x = sample(model)
    assert_agree(model, other, x, steps=1)
    assert operators == [3]
    handle.remove()
    assert_agree(model, other, x, steps=1)
    assert operators == [3, 4]


@in_float64
@NETWORKS
def test_copies_and_pickles_after_training(kind: str) -> None:
    model, other = changed(kind, unchanged)
    x = sample(model)
    results(model, x), results(other, x)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert_agree(copy.deepcopy(model), copied, x)


@NETWORKS
@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize("cycle", ["none", "module", "hook of a module", "hook of a parameter"])
def test_freed_after_training(kind: str, engine: str, cycle: str) -> None:
    """Nothing that a step leaves behind refers to the network, or to a tensor of it."""
    _, other = changed(kind, unchanged, dtype=torch.float32)
    if cycle == "module":
        other.main[0].parents = [other]
    elif cycle == "hook of a module":
        other.main[0].register_forward_hook(lambda *_, network=other: None)
    elif cycle == "hook of a parameter":
        other.main[0].weight.register_hook(lambda gradient, network=other: None)
    with ops.use_engine(engine):
        results(other, sample(other))
    gone = [weakref.ref(other), weakref.ref(other.main[1]), weakref.ref(other.main[0].weight)]
    del other
    gc.collect()
    assert [seen() for seen in gone] == [None] * 3


@in_float64
@NETWORKS
def test_a_backward_frees_the_maps(kind: str) -> None:
    """Without a garbage collection: the node is not part of a cycle."""
    _, other = changed(kind, unchanged)
    gc.collect()
    gc.disable()
    try:
        x = sample(other).requires_grad_()
        y = other(x)
        node = y.grad_fn
        while node is not None and node.name() != "_ChainBackward":
            node = node.next_functions[0][0]
        tensors = [t for t in node.saved_tensors[1:] if t is not None]  # type: ignore[union-attr]
        maps = [weakref.ref(t) for t in tensors if t.ndim == 4 and not isinstance(t, nn.Parameter)]
        assert len(maps) >= len(convolutions(other)) - 1
        y.sum().backward()
        del node, tensors, y
        assert not any(seen() is not None for seen in maps)
    finally:
        gc.enable()


@in_float64
@NETWORKS
def test_threads(kind: str) -> None:
    """Networks that train in several threads at once do not disturb each other."""
    models = [changed(kind, unchanged) for _ in range(3)]
    inputs = [sample(model) for model, _ in models]
    outcomes: list[dict[str, Tensor] | None] = [None] * 3

    def train(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            outcomes[i] = results(models[i][1], inputs[i])

    threads = [threading.Thread(target=train, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (model, _) in enumerate(models):
        for _ in range(5):
            expected = results(model, inputs[i])
        found = outcomes[i]
        assert found is not None
        assert_equal_results(found, expected)


# --- sizes of a batch ---------------------------------------------------------------------------------------


@in_float64
@NETWORKS
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batch_sizes(kind: str, batch: int, operators: list[int]) -> None:
    model, other = changed(kind, unchanged)
    for n in (batch, batch + 1, batch):
        assert_agree(model, other, sample(model, n), steps=1)
    assert len(operators) == 3


@in_float64
@NETWORKS
@pytest.mark.parametrize("groups", [1, 2])
def test_an_empty_batch(kind: str, groups: int) -> None:
    """Eager raises for most layers; ours returns an empty result and counts the batch alone."""
    _, other = changed(kind, unchanged)
    before = {n: b.clone() for n, b in other.named_buffers()}
    x = sample(other, 0)
    y = other(x) if groups == 1 or kind == "G" else other.logits_of_groups(x, 2)
    y.sum().backward()
    assert y.shape[0] == 0
    counted = groups if kind == "D" else 1
    for name, b in other.named_buffers():
        expected = before[name] + counted if "tracked" in name else before[name]
        assert torch.equal(b, expected), name
    assert all(p.grad is not None and not p.grad.any() for p in other.parameters())


def one_pixel_maps(model: Any) -> None:
    """Give the second BatchNorm of G, or the last of D, a map of one pixel."""
    i = 3 if isinstance(model, fast.models.Generator) else -2
    old = model.main[i]
    if isinstance(model, fast.models.Generator):
        first, c = model.main[0], model.main[1].num_features
        model.main[0] = nn.ConvTranspose2d(first.in_channels, c, 1, bias=False)  # a 1×1 map
    else:
        model.main = nn.Sequential(
            *list(model.main)[:-2],
            nn.Conv2d(old.in_channels, 3, 4, 1, 0, bias=False),
            nn.BatchNorm2d(3),
            nn.LeakyReLU(0.2),
            nn.Conv2d(3, 1, 1, bias=False),
            nn.Sigmoid(),
        )
    model.double()


@in_float64
@NETWORKS
def test_one_value_per_channel(kind: str, operators: list[int]) -> None:
    """The error is eager's, and no state has changed when it is raised."""
    model, other = changed(kind, one_pixel_maps)
    assert_agree(model, other, sample(model, 3))
    assert len(operators) == 2
    before = copy.deepcopy(other.state_dict())
    messages = []
    for network in (model, other):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as raised:
            network(sample(model, 1))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert len(operators) == 2
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


@in_float64
def test_one_value_per_channel_in_a_group(operators: list[int]) -> None:
    model, other = changed("D", one_pixel_maps)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as raised:
        other.logits_of_groups(sample(model, 3), 3)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as wanted:
        model(sample(model, 1))
    assert str(raised.value) == str(wanted.value)


# --- groups -------------------------------------------------------------------------------------------------


class Groups(nn.Module):
    """A discriminator that is run on as many groups of images, at once or in order."""

    def __init__(self, network: Any, groups: int) -> None:
        super().__init__()
        self.network, self.groups = network, groups

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.network, fast.Discriminator):
            return self.network.logits_of_groups(x, self.groups)
        return torch.cat([self.network.logits(part) for part in x.chunk(self.groups)])


AT_ONCE = {
    name: ONE_OPERATOR[name]
    for name in (
        "unchanged",
        "momentum None",
        "no statistics",
        "momentum -0.3",
        "shared statistics",
        "a bias",
    )
}
NOT_AT_ONCE: dict[str, tuple[Change, list[int]]] = {
    # The layers of each operator, for each group.
    "one norm in eval mode": (one_norm_in_eval, []),
    "spectral_norm": (ONE_OPERATOR["spectral_norm"], [4]),  # each group's forward updates its vectors
    "register_forward_hook of a norm": (HOOKED["register_forward_hook of a norm"], [3, 1]),
}


@in_float64
@pytest.mark.parametrize("name", [*AT_ONCE, *NOT_AT_ONCE])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups(name: str, groups: int, operators: list[int]) -> None:
    model, other = changed("D", AT_ONCE[name] if name in AT_ONCE else NOT_AT_ONCE[name][0])
    model.double(), other.double()
    x = sample(model, 6)
    assert bool(other.engine_of_groups(x, groups)) == (name in AT_ONCE)
    assert_agree(Groups(model, groups), Groups(other, groups), x)
    count = len(convolutions(other))
    assert operators == 2 * ([count] if name in AT_ONCE else groups * NOT_AT_ONCE[name][1])


@native.NEEDED
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_in_float32(groups: int, operators: list[int]) -> None:
    """On the native engine."""
    model, other = changed("D", unchanged)
    x = sample(model, 6)
    model, other = Groups(model, groups), Groups(other.float(), groups)
    for _ in range(2):
        expected = {n: t.float() if t.is_floating_point() else t for n, t in results(model, x).items()}
        with ops.recording() as choices:
            assert_equal_results(results(other, x.float()), expected, 2 * native.NETWORK)
        assert {choice.engine for choice in choices} == {"native"}
    assert len(operators) == 2


@in_float64
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_in_eval_mode(groups: int, operators: list[int]) -> None:
    model, other = changed("D", unchanged)
    model.eval(), other.eval()
    x = sample(model, 4)
    assert not other.engine_of_groups(x, groups)
    assert_agree(Groups(model, groups), Groups(other, groups), x)
    with torch.no_grad():
        assert relative(other.logits_of_groups(x, groups), model.logits(x)) < EXACT
    assert not operators


@pytest.mark.parametrize("change", ["too small", "float64"])
def test_groups_of_networks_that_run_eagerly(
    change: str, operators: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's modules compute each group by itself."""
    model, other = changed("D", unchanged, dtype=torch.float64 if change == "float64" else torch.float32)
    if change == "too small":
        monkeypatch.setattr("dcgan.kernels.coverage.MIN_TRAINING_MACS", 1e12)
    x = sample(model, 4)
    assert not other.engine_of_groups(x, 2)
    assert_agree(Groups(model, 2), Groups(other, 2), x, tolerance=1e-6)
    assert not operators


@in_float64
@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_that_do_not_divide_the_batch(groups: int) -> None:
    _, other = changed("D", unchanged)
    with pytest.raises(ValueError, match=rf"groups must divide the batch of 4 images, got {groups}"):
        other.logits_of_groups(sample(other, 4), groups)
