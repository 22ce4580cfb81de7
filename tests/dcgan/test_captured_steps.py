"""Captured training steps, with a simulated CUDA graph on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel

from dcgan.kernels import ops, weight_cache
from dcgan.training import Result, TrainStep
from dcgan.training.captured_step import MAX_SHAPES, WARM_UP, reset_accumulation_streams
from tests.support.steps import (
    LOSSES,
    Pair,
    SimulatedGraphBackend,
    adams,
    assert_states_close,
    batch_of,
    half,
    pair,
    simulated_step,
    state_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("extras", ["", "clip, ema", "scaler"])
def test_captured_steps_match_eager_steps(loss: str, extras: str) -> None:
    """Results, states and gradients are bit-identical to eager steps, also with a short batch in between."""
    networks = pair()
    copies = copy.deepcopy(networks)
    ours, theirs = adams(networks, fused=True), adams(copies, fused=True)
    options: list[dict[str, Any]] = [{"loss": loss}, {"loss": loss}]
    emas = [copy.deepcopy(networks[0]) for _ in options]
    if extras == "clip, ema":
        for one, ema in zip(options, emas, strict=True):
            one |= {"clip": 0.1, "ema": ema, "ema_decay": 0.9}
    elif extras == "scaler":
        for one in options:
            one |= half(growth_interval=3)
    step, backend = simulated_step(*networks, *ours, **options[0])
    plain = TrainStep(*copies, *theirs, **options[1])
    results = []
    for i, count in enumerate([4] * 6 + [3] + [4] * 2):
        real, noise = batch_of(networks, count)
        random = torch.get_rng_state()
        result, wanted = step(real, noise), plain(real, noise)
        assert torch.equal(torch.get_rng_state(), random)
        assert result == wanted, f"step {i}"
        results.append((result, Result(*(v.clone() for v in result))))
        scalers = [one.get("scaler") for one in options]
        assert_states_close(state_of(networks, ours, scalers[0]), state_of(copies, theirs, scalers[1]), 0.0)
        for network, other in zip((*networks, emas[0]), (*copies, emas[1]), strict=True):
            assert_states_close(network.state_dict(), other.state_dict(), 0.0)
            for p, q in zip(network.parameters(), other.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or torch.equal(p.grad, q.grad)
    assert backend.new() == ["run"] * WARM_UP + ["capture"] + ["replay"] * 3 + ["run"] + ["replay"] * 2
    for result, copied in results:
        assert result == copied, "a later replay must not overwrite it"


def test_a_recurring_short_batch_gets_a_separate_graph() -> None:
    networks = pair()
    step, backend = simulated_step(*networks, *adams(networks))
    logs = []
    for _ in range(5):
        for count in (4, 2):
            step(*batch_of(networks, count))
            logs.append(backend.new())
    steps = [["run"]] * WARM_UP + [["capture", "replay"]] + [["replay"]]
    assert logs[::2] == steps
    assert logs[1::2] == steps


def test_the_number_of_kept_graphs_is_bounded() -> None:
    networks = pair()
    step, backend = simulated_step(*networks, *adams(networks))
    for count in range(1, MAX_SHAPES + 2):
        for _ in range(WARM_UP + 1):
            step(*batch_of(networks, count))
    backend.new()
    step(*batch_of(networks, 2))
    assert backend.new() == ["replay"]
    step(*batch_of(networks, 1))
    assert backend.new() == ["run"], "the least recently used graph was evicted"


def captured_step(**options: Any) -> tuple[Pair, list[optim.Adam], TrainStep, SimulatedGraphBackend]:
    """Return networks, optimizers, a step that has been captured, and its backend."""
    networks = pair()
    ours = adams(networks)
    step, backend = simulated_step(*networks, *ours, **options)
    for _ in range(WARM_UP + 1):
        step(*batch_of(networks, 4))
    backend.new()
    return networks, ours, step, backend


def set_lr(networks: Pair, ours: list[optim.Adam]) -> None:
    ours[0].param_groups[0]["lr"] = 1e-3


def set_betas(networks: Pair, ours: list[optim.Adam]) -> None:
    ours[1].param_groups[0]["betas"] = (0.9, 0.99)


def evaluate(networks: Pair, ours: list[optim.Adam]) -> None:
    networks[1].main[3].eval()


def freeze(networks: Pair, ours: list[optim.Adam]) -> None:
    networks[0].main[0].requires_grad_(False)


def replace_data(networks: Pair, ours: list[optim.Adam]) -> None:
    weight = networks[0].main[0].weight
    weight.data = weight.data.clone()


def reload_optimizer(networks: Pair, ours: list[optim.Adam]) -> None:
    ours[0].load_state_dict(copy.deepcopy(ours[0].state_dict()))


@pytest.mark.parametrize(
    "change", [set_lr, set_betas, evaluate, freeze, replace_data, reload_optimizer], ids=lambda f: f.__name__
)
def test_a_change_of_captured_state_causes_a_recapture(
    change: Callable[[Pair, list[optim.Adam]], None],
) -> None:
    networks, ours, step, backend = captured_step()
    change(networks, ours)
    for _ in range(WARM_UP + 2):
        step(*batch_of(networks, 4))
    assert backend.new() == ["run"] * WARM_UP + ["capture"] + ["replay"] * 2


def test_a_change_of_engine_or_outer_autocast_causes_a_recapture() -> None:
    networks, _, step, backend = captured_step()
    with torch.autocast("cpu", torch.bfloat16):
        step(*batch_of(networks, 4))
    assert backend.new() == ["run"]
    with ops.use_engine("reference"):
        step(*batch_of(networks, 4))
    assert backend.new() == ["run"]


def test_weights_loaded_in_place_need_no_new_graph() -> None:
    networks, _, step, backend = captured_step()
    other = pair()
    for network, source in zip(networks, other, strict=True):
        network.load_state_dict(source.state_dict())
    step(*batch_of(networks, 4))
    assert backend.new() == ["replay"]


def test_a_replay_increments_versions() -> None:
    """Autograd then detects that tensors saved for backward have been overwritten."""
    networks, _, step, _ = captured_step()
    tensors = step._tensors()[1]
    versions = [t._version for t in tensors]
    captured = next(iter(step._graphs._sizes.values())).captured
    captured.replay = lambda: None  # a real replay changes values without version bumps
    step(*batch_of(networks, 4))
    assert all(t._version > v for t, v in zip(tensors, versions, strict=True))


def sharing(network: Any) -> Any:
    """Return another network that shares the same Parameter objects."""
    other = copy.deepcopy(network)
    for name, parameter in network.named_parameters():
        module, _, attribute = name.rpartition(".")
        setattr(other.get_submodule(module), attribute, parameter)
    return other


def aliasing(network: Any) -> Any:
    """Return another network with separate Parameter objects and versions in the same memory."""
    other = copy.deepcopy(network)
    for parameter, source in zip(other.parameters(), network.parameters(), strict=True):
        parameter.data = source.data
    return other


@pytest.mark.parametrize("kind", ["ema", "sharing", "aliasing"])
def test_cached_weights_of_other_networks_follow_a_replay(kind: str) -> None:
    """A graph replay only changes values: it bumps no version and calls no optimizer hook."""
    networks = pair()
    ema = copy.deepcopy(networks[0])
    step, _ = simulated_step(*networks, *adams(networks), ema=ema)
    for _ in range(WARM_UP + 1):
        step(*batch_of(networks, 4))
    other_network = {"ema": lambda: ema, "sharing": lambda: sharing(networks[0])}.get(
        kind, lambda: aliasing(networks[0])
    )()
    other_network.eval()
    noise = torch.randn(2, other_network.latent_dim)

    def replay() -> None:
        for tensor in step._tensors()[1]:
            if tensor.is_floating_point():
                tensor.data.mul_(1.25)

    next(iter(step._graphs._sizes.values())).captured.replay = replay
    for _ in range(3):
        with torch.no_grad():
            before = other_network(noise)
        assert weight_cache.frozen(other_network.main[3].weight)
        step(*batch_of(networks, 4))
        with torch.no_grad():
            after = other_network(noise)
            other_network.refresh()
            assert torch.equal(after, other_network(noise))
        assert not torch.equal(before, after)


def test_averaged_model_with_captured_steps() -> None:
    networks = pair()
    ema = AveragedModel(networks[0])
    step, _ = simulated_step(*networks, *adams(networks), ema=ema)
    for _ in range(WARM_UP + 3):
        step(*batch_of(networks, 4))
    assert ema.n_averaged == WARM_UP + 3


# --- repeated and failed captures ---------------------------------------------------------------------------


def accumulation_node(parameter: Tensor) -> Any:
    """Return the autograd node that accumulates into ``parameter.grad``; it is bound to a stream."""
    grad_fn = parameter.view_as(parameter).grad_fn
    assert grad_fn is not None
    return grad_fn.next_functions[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resetting_a_parameter_gives_a_new_accumulation_node(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(3, 2, dtype=dtype))
    called: list[str] = []
    parameter.register_hook(lambda gradient: called.append("hook"))
    parameter.register_post_accumulate_grad_hook(lambda p: called.append("post"))
    value, address, version = parameter.detach().clone(), parameter.data_ptr(), parameter._version
    kept = parameter * 2
    old = accumulation_node(parameter)
    assert accumulation_node(parameter) is old, "the node lives as long as a graph that uses it"
    reset_accumulation_streams([parameter])
    assert accumulation_node(parameter) is not old
    assert (parameter.data_ptr(), parameter._version, parameter.dtype) == (address, version, dtype)
    assert torch.equal(parameter, value)
    (parameter * 3).sum().backward()
    kept.sum().backward()
    assert parameter.grad is not None
    assert bool((parameter.grad == 5).all()), "the earlier graph still accumulates"
    assert called == ["hook", "post"] * 2


class StreamCheckingBackend(SimulatedGraphBackend):
    """Rejects, like CUDA, a capture whose gradients are accumulated on a stream outside of it."""

    def __init__(self, step: TrainStep, scaler: Any = None) -> None:
        super().__init__(step, scaler)
        self.outside: set[Any] = set()

    def _check(self) -> None:
        if any(p.requires_grad and accumulation_node(p) in self.outside for p in self.step._tensors()[0]):
            raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")

    def run(self, step: Callable[[], Result]) -> Result:
        self._check()
        return super().run(step)

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._check()
        return super().capture(step)


def test_a_live_autograd_graph_does_not_prevent_capture() -> None:
    """The learning rate changes while clones of the parameters keep autograd graphs alive."""
    networks = pair()
    ours = adams(networks)
    step = TrainStep(*networks, *ours)
    backend = StreamCheckingBackend(step)
    step._graphs = step._on(backend, raise_on_failure=True)
    kept = []
    for rate in (2e-4, 1e-4, 5e-5):
        for optimizer in ours:
            optimizer.param_groups[0]["lr"] = rate
        parameters = [p for network in networks for p in network.parameters()]
        kept += [p.clone() for p in parameters]
        backend.outside |= {accumulation_node(p) for p in parameters}
        for _ in range(WARM_UP + 2):
            step(*batch_of(networks, 4))
        assert backend.new() == ["run"] * WARM_UP + ["capture"] + ["replay"] * 2
    torch.stack([value.sum() for value in kept]).sum().backward()  # the clones must remain usable


class FailingBackend(SimulatedGraphBackend):
    """Fails each capture in G's phase, as if the step did something that cannot be captured."""

    fails = True

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if not self.fails:
            return super().capture(step)
        self.log.append("failed capture")
        state = [*self.step._tensors()[1], *self._optimizer_state()]
        before = [t.detach().clone() for t in state]
        inner, self.step._loss_g = self.step._loss_g, self._fail  # type: ignore[method-assign]
        try:
            step()
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            self.step._loss_g = inner  # type: ignore[method-assign]
            with torch.no_grad():  # a capture executes nothing
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        raise AssertionError("the capture must fail")

    def _fail(self, output: Any) -> Tensor:
        raise RuntimeError(REASON)


REASON = "operation not permitted when stream is capturing"
MESSAGE = f"the training step cannot be captured in a CUDA graph: {REASON}"


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
def test_steps_continue_eagerly_with_the_same_results_after_a_failed_capture(scaled: bool) -> None:
    """A warning gives the reason; capture is tried again after the learning rate changes."""
    networks = pair()
    copies = copy.deepcopy(networks)
    ours, theirs = adams(networks, fused=True), adams(copies, fused=True)
    options, other = (half(growth_interval=3) if scaled else {} for _ in range(2))
    step, plain = TrainStep(*networks, *ours, **options), TrainStep(*copies, *theirs, **other)
    backend = FailingBackend(step, options.get("scaler"))
    step._graphs = step._on(backend, raise_on_failure=False)

    def compare(count: int) -> None:
        for _ in range(count):
            batch = batch_of(networks, 4)
            assert step(*batch) == plain(*batch)
            states = state_of(networks, ours, options.get("scaler"))
            assert_states_close(states, state_of(copies, theirs, other.get("scaler")), 0.0)

    compare(WARM_UP)
    with pytest.warns(RuntimeWarning, match=MESSAGE):
        compare(1)
    assert step.why_not_captured == REASON
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warn only once
        compare(2)
    assert backend.new() == ["run"] * WARM_UP + ["failed capture"] + ["run"] * 3
    for optimizer in (*ours, *theirs):
        optimizer.param_groups[0]["lr"] = 1e-3
    backend.fails = False
    compare(WARM_UP + 2)
    assert backend.new() == ["run"] * WARM_UP + ["capture"] + ["replay"] * 2
    assert step.why_not_captured == ""


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
def test_a_failed_capture_can_be_an_error(scaled: bool) -> None:
    networks = pair()
    networks[1].main[2].requires_grad_(False)
    required_grad = [p.requires_grad for p in networks[1].parameters()]
    options = half() if scaled else {}
    step = TrainStep(*networks, *adams(networks, fused=True), **options)
    backend = FailingBackend(step, options.get("scaler"))
    step._graphs = step._on(backend, raise_on_failure=True)
    for _ in range(WARM_UP):
        step(*batch_of(networks, 4))
    before = copy.deepcopy([network.state_dict() for network in networks])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{MESSAGE} \(capture=False runs it eagerly\)"):
            step(*batch_of(networks, 4))
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in networks[1].parameters()] == required_grad
    assert all(p.grad is None for network in networks for p in network.parameters())
    backend.fails = False
    assert all(value.isfinite() for value in step(*batch_of(networks, 4))), "a later capture may succeed"


def test_steps_are_not_captured_on_a_cpu() -> None:
    networks = pair()
    assert TrainStep(*networks, *adams(networks)).why_not_captured == "the networks are on cpu"
    assert TrainStep(*networks, *adams(networks), capture=False).why_not_captured == "capture=False"
    with pytest.raises(ValueError, match="capture=True is not possible: the networks are on cpu"):
        TrainStep(*networks, *adams(networks), capture=True)


@pytest.mark.parametrize(
    ("make", "scaled", "reason"),
    [
        (lambda p: optim.Adam(p), False, "optimizer_g, Adam, is not capturable=True"),
        (lambda p: optim.Adam(p, capturable=True), False, ""),
        (lambda p: optim.SGD(p, lr=0.1), False, ""),
        (lambda p: optim.Adagrad(p), False, "optimizer_g, Adagrad, is not capturable=True"),
        (lambda p: optim.Adam(p, capturable=True), True, "optimizer_g, Adam, is not fused=True, which a sca"),
        (lambda p: optim.Adam(p, capturable=True, fused=True), True, ""),
    ],
    ids=["Adam", "capturable", "SGD", "Adagrad", "scaled", "scaled and fused"],
)
def test_capture_requirements(
    make: Callable[[Any], optim.Optimizer], scaled: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = pair()
    step = TrainStep(*networks, *[make(list(n.parameters())) for n in networks], **half() if scaled else {})
    monkeypatch.setattr(step, "_device", torch.device("cuda", 0))
    assert step._why_not_captured().startswith(reason)
    assert bool(step._why_not_captured()) == bool(reason)
