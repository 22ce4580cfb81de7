"""TrainStep on the Triton kernels, with D's two halves in one pass and apart, against the reference step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import coverage, ops, train_chain
from dcgan.training import Result, TrainStep
from tests.interpreter.memory import guarded
from tests.support.reference_loop import reference_step
from tests.support.steps import Pair, assert_states_close, batch_of, half, pair, reference_of, sgds, state_of


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with guarded(), ops.use_engine("triton"):
        yield


@pytest.fixture
def passes(together: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let a step run the halves together or apart; list (images, groups) of each network's passes."""
    if not together:
        monkeypatch.setattr(coverage, "MAX_IMAGES_TOGETHER", 0)
    found: list[tuple[int, int]] = []
    original = train_chain.train_chain

    def record(call: Any) -> Any:
        found.append((len(call.x), call.groups))
        return original(call)

    monkeypatch.setattr(train_chain, "train_chain", record)
    return found


def expected_passes(together: bool, batch: int) -> list[tuple[int, int]]:
    """Return the passes of one step: D's halves around or after G's, and D's in G's phase."""
    g = d = batch, 1
    return [g, (2 * batch, 2), d] if together else [d, g, d, d]


def gradients_of(networks: Sequence[Any]) -> dict[str, Tensor]:
    return {
        f"{type(network).__name__[0]}.{name}": p.grad
        for network in networks
        for name, p in network.named_parameters()
        if p.grad is not None
    }


def assert_gradients_close(found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    """Compare each gradient relative to its norm, or to 1% of that of all gradients of its network."""
    ours, theirs = gradients_of(found), gradients_of(expected)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        every = sum(float(t.double().square().sum()) for n, t in theirs.items() if n[0] == name[0]) ** 0.5
        error = float((ours[name].double() - want.double()).norm())
        assert error <= tolerance * max(float(want.double().norm()), 1e-2 * every), f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("together", "loss", "size", "channels_last"),
    [
        (True, "non-saturating", 32, False),
        (False, "minimax", 32, True),
        pytest.param(True, "minimax", 32, True, marks=pytest.mark.slow),
        pytest.param(True, "non-saturating", 64, False, marks=pytest.mark.slow),
        pytest.param(False, "non-saturating", 64, False, marks=pytest.mark.slow),
    ],
)
def test_float32_matches_the_reference_step_in_float64(
    loss: str, size: int, channels_last: bool, together: bool, passes: list[tuple[int, int]]
) -> None:
    """Losses, D(x), D(G(z)), gradients of G, weights, running statistics and counts after several steps.

    Every pass reads the weights of the last update: packed ones of the phase before would show.
    """
    networks = pair(features=4, image_size=size)
    if channels_last:
        for network in networks:
            network.to(memory_format=torch.channels_last)
    reference = tuple(network.double() for network in reference_of(networks))
    ours, theirs = sgds(networks, 0.02), sgds(reference, 0.02)
    step = TrainStep(*networks, *ours, loss=loss)
    for batch in (3, 2):
        real, noise = batch_of(networks, batch)
        passes.clear()
        result = step(real, noise)
        assert passes == expected_passes(together, batch)
        expected = reference_step(
            *reference, *theirs, real.double(), noise.double()[:, :, None, None], minimax=loss == "minimax"
        )
        for name, got, want in zip(Result._fields, result, expected, strict=True):
            assert abs(got - want) <= 1e-5, name
        assert_gradients_close(networks[:1], reference[:1], 1e-4)
        assert_states_close(state_of(networks, ours), state_of(reference, theirs), 1e-5)


IN_EVERY_RUN = {("bfloat16", True), ("scaler, clip", False), ("frozen", True)}
OPTIONS = ("bfloat16", "scaler", "scaler, clip", "frozen", "no statistics", "G frozen", "D frozen")


@pytest.mark.parametrize(
    ("name", "together"),
    [
        pytest.param(*row, marks=() if row in IN_EVERY_RUN else pytest.mark.slow)
        for row in itertools.product(OPTIONS, (True, False))
    ],
)
def test_options(name: str, together: bool, passes: list[tuple[int, int]]) -> None:
    """One step agrees with that of the reference engine, which the default tests cover."""
    networks = pair(features=4)
    if name == "frozen":
        for network in networks:
            network.main[2].requires_grad_(False)
            network.main[3].requires_grad_(False)
    if name == "no statistics":
        for network in networks:
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.track_running_stats = False
    if name in ("G frozen", "D frozen"):
        networks[name[0] == "D"].requires_grad_(False)
    copies = copy.deepcopy(networks)

    def step_of(which: Pair) -> TrainStep:
        options: dict[str, Any] = half() if "scaler" in name else {}
        if name == "bfloat16":
            options = {"autocast": torch.bfloat16}
        if "clip" in name:
            options |= {"clip": (0.05, 0.1)}
        return TrainStep(*which, *sgds(which), **options)

    real, noise = batch_of(networks, 2)
    result = step_of(networks)(real, noise)
    assert passes == expected_passes(together, 2)
    with ops.use_engine("reference"):
        expected = step_of(copies)(real, noise)
    # Roundings to 16 bits differ where float32 sums do, and BatchNorms of two images amplify this.
    narrow = name == "bfloat16" or "scaler" in name
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == torch.float32
        assert abs(got - want) <= (2e-2 if narrow else 1e-5)
    assert_gradients_close(networks, copies, 0.2 if narrow else 1e-4)
    for network, other in zip(networks, copies, strict=True):
        assert_states_close(network.state_dict(), other.state_dict(), 1e-2 if narrow else 1e-5)
