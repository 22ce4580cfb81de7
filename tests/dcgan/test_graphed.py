"""Graphed: when it captures and what it rejects, with a simulated CUDA graph on the CPU."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast, graphed, models
from dcgan.graphed import Graphed
from dcgan.kernels import gpu, ops, weight_cache
from dcgan.kernels.gpu import inference, launcher
from tests.support import native
from tests.support.networks import EXACT, NETWORKS, fast_network, reference, sample
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "empty_weight_cache", "_simulated")


class SimulatedCuda:
    """A simulated CUDA graph on the CPU: a replay computes the step into the captured result."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.log: list[str] = []
        self.failing = False

    def device_context(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        self.log.append("run")
        return step()

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.log.append("capture")
        if self.failing:
            raise RuntimeError("no")
        result = step()
        result.fill_(torch.nan)

        def replay() -> None:
            self.log.append("replay")
            result.copy_(step())

        return replay, result

    def new(self) -> list[str]:
        """Return the events since the last call."""
        log, self.log = self.log, []
        return log


CAPTURED = ["run", "capture", "replay"]


@pytest.fixture
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "Cuda", SimulatedCuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.fixture
def _as_one_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the Triton engine cover CPU tensors; its launches do nothing, and compile nothing."""
    for module in (launcher, gpu):
        monkeypatch.setattr(module, "why_not_here", lambda device, dtype: None)
    monkeypatch.setattr(launcher.Launch, "__call__", lambda self: None)
    with ops.use_engine("triton"):
        yield


AS_ONE_OPERATOR = pytest.mark.usefixtures("_as_one_operator")


def graph_of(model: Any, batch: int = 3, example: Any = None) -> tuple[Graphed, SimulatedCuda]:
    """Construct a Graphed as for a network on a GPU."""
    first = next(model.parameters())
    on_cuda = types.SimpleNamespace(is_cuda=True, dtype=first.dtype, device=first.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.__dict__, "parameters", lambda: iter([on_cuda]))
        run = graphed.graphed(model, batch, example)
    backend = run._backend
    assert isinstance(backend, SimulatedCuda)
    assert backend.device == first.device
    return run, backend


# --- results ------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("size", [{}, {"channels": 1, "image_size": 64, "features": 3}], ids=["32", "64"])
def test_a_replay_equals_the_network(kind: str, size: dict[str, Any]) -> None:
    """On any number of rows up to the batch, in float64; each result is new memory."""
    model = reference(kind, **size).eval()
    run, backend = graph_of(model, 4)
    xs = [sample(model, rows) for rows in (4, 1, 3, 4, 2)]
    ys = [run(x) for x in xs]
    assert backend.new() == [*CAPTURED, *["replay"] * 4]
    assert len({y.data_ptr() for y in ys}) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert y.shape == model(x).shape
        assert relative(y, model(x)) <= EXACT
        assert not y.requires_grad


@native.NEEDED
@NETWORKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_of_a_fast_network(kind: str, dtype: torch.dtype) -> None:
    """In the network's dtype; the float64 reference has its weights."""
    model = fast_network(kind, dtype)
    exact = reference(kind).eval()
    exact.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    run, _ = graph_of(model, 3)
    for rows in (3, 2, 1):
        x = sample(model, rows)
        y = run(x)
        assert y.dtype == dtype
        assert relative(y, exact(x.double())) <= (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_noise_of_either_shape() -> None:
    model = reference("G").eval()
    run, backend = graph_of(model)
    z = sample(model, 2)
    assert torch.equal(run(z), run(z[:, :, None, None]))
    assert backend.new() == [*CAPTURED, "replay"]


def test_a_graph_of_a_reference_network_reads_the_present_values() -> None:
    """PyTorch's modules read parameters and buffers at every replay."""
    model = reference("G").eval()
    run, backend = graph_of(model)
    z = sample(model, 3)
    before = run(z)
    for t in (model.main[0].weight, model.main[4].bias, model.main[1].running_mean):
        t.add_(0.5)
        after = run(z)
        assert relative(after, before) > 1e-3
        assert relative(after, model(z)) <= EXACT
        before = after
    assert backend.new() == [*CAPTURED, *["replay"] * 3]


# --- when it is captured ------------------------------------------------------------------------------------

Change = Callable[[Any], Any]


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Enable autocast for CUDA, which ``torch.autocast`` does only where there is a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@contextlib.contextmanager
def other_precision() -> Iterator[None]:
    """Change the precision of float32 products on CUDA."""
    backends: Any = torch.backends
    before = launcher.precision(torch.float32)
    setting = backends.cudnn.conv.fp32_precision
    backends.cudnn.conv.fp32_precision = "ieee" if before == "tf32" else "tf32"
    try:
        assert launcher.precision(torch.float32) != before
        yield
    finally:
        backends.cudnn.conv.fp32_precision = setting


def move(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone(memory_format=torch.preserve_format)


def restride(tensor: Tensor) -> None:
    tensor.data = tensor.data.transpose(0, 1).contiguous().transpose(0, 1)


def replace_activation(model: Any) -> None:
    model.main[2] = nn.LeakyReLU(0.3)


def replace_parameter(model: Any) -> None:
    model.main[4].weight = nn.Parameter(model.main[4].weight.clone())


def add_hook(model: Any) -> None:
    model.main[3].register_forward_hook(lambda module, given, result: None)


def wrap_main(model: Any) -> None:
    class Main(nn.Sequential):
        pass

    model.main = Main(*model.main)


def set_eps(model: Any) -> None:
    model.main[1].eps = 0.5


CHANGES: dict[str, Change] = {
    "a weight is moved": lambda model: move(model.main[0].weight),
    "a BatchNorm's scale is moved": lambda model: move(model.main[1].weight),
    "a running mean is moved": lambda model: move(model.main[1].running_mean),
    "a weight has other strides": lambda model: restride(model.main[3].weight),
    "a parameter is replaced": replace_parameter,
    "a module is replaced": replace_activation,
    "a hook is added": add_hook,
    "an attribute is changed": set_eps,
    "main is replaced": wrap_main,
}


@AS_ONE_OPERATOR
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_network_is_captured(name: str) -> None:
    """Once; the graph before is freed first, so that only one occupies memory."""
    model = fast_network("G")
    run, backend = graph_of(model)
    z = sample(model, 2)
    run(z)
    run(z)
    assert backend.new() == [*CAPTURED, "replay"]
    graph = weakref.ref(run._replay)
    freed: list[bool] = []
    warm_up = backend.run

    def observed(step: Callable[[], Tensor]) -> Tensor:
        gc.collect()
        freed.append(graph() is None)
        return warm_up(step)

    backend.run = observed  # type: ignore[method-assign]
    CHANGES[name](model)
    run(z)
    run(z[:1])
    assert backend.new() == [*CAPTURED, "replay"]
    assert freed == [True]


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_reference_network_is_computed(name: str) -> None:
    model = reference("G").eval()
    run, backend = graph_of(model)
    z = sample(model, 3)
    run(z)
    CHANGES[name](model)
    assert relative(run(z), model(z)) <= EXACT
    assert backend.new() == 2 * CAPTURED


class Scaled(fast.Generator):
    """A Generator whose images are multiplied by a parameter of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * self.gain


@AS_ONE_OPERATOR
def test_a_moved_parameter_of_a_subclass_is_captured() -> None:
    """Although the network's layers run as one operator, which does not read it."""
    model = Scaled(6, 3, 4, 32).eval()
    run, backend = graph_of(model)
    z = sample(model, 2)
    run(z)
    assert run._networks
    move(model.gain)
    run(z)
    run(z)
    assert backend.new() == [*CAPTURED, *CAPTURED, "replay"]


@AS_ONE_OPERATOR
@pytest.mark.parametrize(
    "setting",
    [
        lambda: autocast(torch.bfloat16),
        lambda: autocast(torch.float16),
        other_precision,
        lambda: ops.use_engine("reference"),
    ],
    ids=["bfloat16 autocast", "float16 autocast", "precision", "engine"],
)
def test_a_change_of_a_setting_is_captured(
    setting: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    """And a change back: one graph is kept."""
    model = fast_network("D")
    run, backend = graph_of(model)
    x = sample(model, 3)
    for _ in range(2):
        run(x)
        with setting():
            run(x)
            run(x)
        assert backend.new() == [*CAPTURED, *CAPTURED, "replay"]


@AS_ONE_OPERATOR
def test_two_autocast_dtypes_have_different_graphs() -> None:
    model = fast_network("D")
    run, backend = graph_of(model)
    x = sample(model, 3)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast(dtype):
            run(x)
        assert backend.new() == CAPTURED


def test_a_failed_capture_is_tried_again() -> None:
    """It raises, and leaves no graph behind that a later call would replay."""
    model = reference("D").eval()
    run, backend = graph_of(model)
    x = sample(model, 3)
    y = run(x)
    backend.new()
    move(model.main[0].weight)
    backend.failing = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            run(x)
        assert backend.new() == ["run", "capture"]
        assert weight_cache.networks_of_graph() is None
    backend.failing = False
    assert torch.equal(run(x), y)
    assert backend.new() == CAPTURED


# --- changed values -----------------------------------------------------------------------------------------


@pytest.fixture
def expired(monkeypatch: pytest.MonkeyPatch) -> list[inference.Weights]:
    """Return a list that receives the packed weights whose change is reported to the device."""
    found: list[inference.Weights] = []
    original = inference.Weights.expire

    def expire(self: inference.Weights) -> None:
        found.append(self)
        original(self)

    monkeypatch.setattr(inference.Weights, "expire", expire)
    return found


def adam_step(model: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(model.parameters(), 0.1, fused=True).step()


def load(model: Any) -> None:
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})


VALUES: dict[str, tuple[Change, bool]] = {
    "a weight in place": (lambda model: model.main[0].weight.mul_(2), True),
    "load_state_dict": (load, True),
    "an optimizer's step": (adam_step, True),
    "refresh": (lambda model: model.refresh(), True),
    "train, eval": (lambda model: model.train().eval(), True),
    "a running mean in place": (lambda model: model.main[1].running_mean.add_(1), False),
    "a BatchNorm's scale in place": (lambda model: model.main[1].weight.add_(1), False),
    "a weight's data in place": (lambda model: model.main[0].weight.data.add_(1), False),
    "a call of the network": (lambda model: model(sample(model, 3)), False),
}
"""Changes of values, and whether the host sees that packed weights are out of date."""


@AS_ONE_OPERATOR
@pytest.mark.parametrize("name", VALUES)
def test_changed_values_are_reported_and_not_captured(name: str, expired: list[inference.Weights]) -> None:
    """To the graph's own packed weights, once; a replay compares the weights and reads the vectors."""
    model = fast_network("G")
    run, backend = graph_of(model)
    z = sample(model, 2)
    model(z)
    run(z)
    run(z)
    (network,) = run._networks.values()
    (weights,) = network._weights.values()
    assert weights.checked
    assert run._kept_alive == []
    change, reported = VALUES[name]
    backend.new()
    for _ in range(2):
        expired.clear()
        change(model)
        run(z)
        run(z)
        assert expired.count(weights) == reported
        assert backend.new() == ["replay"] * 2
        assert all(weight_cache.frozen(w) for w in weights._weights)


@AS_ONE_OPERATOR
def test_a_graph_has_packed_weights_of_its_own() -> None:
    """They are those of its warm-up, and are freed with it; the network's other calls have theirs."""
    model = fast_network("G")
    run, backend = graph_of(model)
    z = sample(model, 3)
    model(z)
    run(z)
    ((owner, network),) = run._networks.items()
    assert owner._network is not None
    assert owner._network is not network
    assert network._prepared
    assert {p.graph for p in network._prepared.values()} == {None}
    assert len(network._prepared) == 1
    before = weakref.ref(network)
    del owner, network
    move(model.main[0].weight)
    run(z)
    gc.collect()
    assert before() is None
    (network,) = run._networks.values()
    before = weakref.ref(network)
    del network, run
    gc.collect()
    assert before() is None
    assert backend.new() == 2 * CAPTURED


@AS_ONE_OPERATOR
def test_weights_that_are_no_longer_frozen_are_captured_again(expired: list[inference.Weights]) -> None:
    """A replay of the new graph packs them, and nothing has to be reported to it."""
    model = fast_network("G")
    run, backend = graph_of(model)
    z = sample(model, 3)
    run(z)
    (network,) = run._networks.values()
    assert [weights.checked for weights in network._weights.values()] == [True]
    model.main._fused_freeze = lambda: None
    model.refresh()
    backend.new()
    for _ in range(2):
        run(z)
    assert backend.new() == [*CAPTURED, "replay"]
    (network,) = run._networks.values()
    (weights,) = network._weights.values()
    assert not weights.checked
    expired.clear()
    model.main[0].weight.mul_(2)
    run(z)
    assert backend.new() == ["replay"]
    assert expired == []


@AS_ONE_OPERATOR
@pytest.mark.parametrize("name", ["a weight in place", "load_state_dict", "an optimizer's step", "refresh"])
def test_changed_values_are_followed_next_to_a_module_that_is_called(
    name: str, expired: list[inference.Weights]
) -> None:
    """A replay reads the module's tensors, and the operator's weights are reported to the device."""
    model = fast_network("G")
    model.main[-1] = nn.GroupNorm(1, 3)
    run, backend = graph_of(model)
    z = sample(model, 3)
    run(z)
    backend.new()
    (network,) = run._networks.values()
    (weights,) = network._weights.values()
    expired.clear()
    VALUES[name][0](model)
    run(z)
    assert backend.new() == ["replay"]
    assert weights in expired
    model.main[-1].weight.data = model.main[-1].weight + 1
    for _ in range(2):
        run(z)
    assert backend.new() == [*CAPTURED, "replay"]


# --- networks of any class ----------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A network with a Sequential, a written-out forward, and an attribute that this reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2))
        self.conv, self.norm = nn.Conv2d(4, 2, 4, 2, 1), nn.BatchNorm2d(2)
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.factor
        return torch.relu(self.norm(self.conv(x)))


def change_factor(model: Any) -> None:
    model.factor = 3.0


def change_slope(model: Any) -> None:
    model.first[1].negative_slope = 0.4


def append_layer(model: Any) -> None:
    model.first.append(nn.Tanh())


def add_hook(model: Any) -> None:
    model.conv.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("change", [None, change_factor, change_slope, append_layer, add_hook])
def test_a_network_of_any_class(fused: bool, change: Change | None) -> None:
    """It is captured again after a change of what a trace has read, of a layer, and of the layers' list."""
    torch.manual_seed(0)
    plain: Any = Foreign().double().eval()
    model = fast.fuse(plain, inplace=True) if fused else plain
    example = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    run, backend = graph_of(model, 3, example)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative(run(x), plain(x)) < EXACT
    run(x)
    assert backend.new() == [*CAPTURED, "replay"]
    if change is not None:
        change(model)
        assert relative(run(x), plain(x)) < EXACT
        assert backend.new() == (CAPTURED if fused or change is not change_factor else ["replay"])


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, -1, 2.0, "3", None])
def test_the_batch_must_be_a_positive_integer(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"batch must be a positive integer, got "):
        graphed.graphed(reference("G"), batch)


def test_the_model_must_be_a_network_on_a_gpu() -> None:
    function: Any = torch.relu
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got builtin_function_or_method"):
        graphed.graphed(function, 2)
    for model in (models.Generator(6, features=4, image_size=32), fast.Discriminator(features=4)):
        with pytest.raises(ValueError, match=r"on a CUDA device, its parameters are on cpu"):
            graphed.graphed(model, 2)


def test_the_example_must_be_a_tensor_that_the_network_takes() -> None:
    model = Foreign().eval()
    with pytest.raises(ValueError, match=r"example must be given for a Foreign: a tensor like those"):
        graph_of(model)
    with pytest.raises(TypeError, match=r"example must be a tensor of one or more rows, got list"):
        graph_of(model, 3, [1.0])


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "too many rows of G": ("G", lambda x: torch.cat([x, x]), ValueError, r"\[≤ 3, 6\], got \[6, 6\]"),
    "too many rows of D": ("D", lambda x: torch.cat([x, x]), ValueError, r"≤ 3, 3, 32, 32\], got \[6, 3"),
    "another latent_dim": ("G", lambda x: x[:, :5], ValueError, r"got \[3, 5\]"),
    "noise with a map": ("G", lambda x: x[:, :, None, None].expand(-1, -1, 2, 2), ValueError, r"2, 2\]"),
    "another image size": ("D", lambda x: x[:, :, :16], ValueError, r"got \[3, 3, 16, 32\]"),
    "no batch axis": ("D", lambda x: x[0], ValueError, r"got \[3, 32, 32\]"),
    "float32": ("G", lambda x: x.float(), TypeError, r"must be torch.float64 on cpu, got torch.float32"),
    "another device": ("D", lambda x: x.to("meta"), TypeError, r"got torch.float64 on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_rejected(name: str) -> None:
    """Before anything is captured or replayed, and later calls are not affected."""
    kind, change, error, message = BAD[name]
    model = reference(kind).eval()
    run, backend = graph_of(model)
    x = sample(model, 3)
    for expected in (CAPTURED, ["replay"]):
        with pytest.raises(error, match=message):
            run(change(x))
        assert backend.new() == []
        assert relative(run(x), model(x)) <= EXACT
        assert backend.new() == expected


def test_training_mode_is_rejected() -> None:
    """A replay would not update the running statistics. Back in eval mode, the graph serves again."""
    model = reference("D").eval()
    run, backend = graph_of(model)
    x = sample(model, 3)
    run(x)
    backend.new()
    model.train()
    with pytest.raises(ValueError, match="must be in eval mode"):
        run(x)
    assert backend.new() == []
    model.eval()
    assert relative(run(x), model(x)) <= EXACT
    assert backend.new() == ["replay"]
