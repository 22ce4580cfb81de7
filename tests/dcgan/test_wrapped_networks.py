"""TrainStep with compiled, parametrized or wrapped networks, compared with the reference loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from dcgan.training import TrainStep
from dcgan.training.captured_step import WARM_UP
from tests.support.reference_loop import reference_step
from tests.support.steps import (
    Pair,
    SimulatedGraphBackend,
    Wrapper,
    adams,
    assert_states_close,
    batch_of,
    pair,
    sgds,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def parametrized(network: Any) -> nn.Module:
    """Parametrize every second convolution: its weight is computed and updates a buffer in training."""
    for module in [m for m in network.main if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)][::2]:
        parametrizations.spectral_norm(module)
    return network


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "torch.compile": lambda network: torch.compile(network, backend="eager"),
    "compiled in place": compiled_in_place,
    "parametrized": parametrized,
    "wrapper": Wrapper,
    "DistributedDataParallel": DistributedDataParallel,
    "compiled DistributedDataParallel": lambda n: torch.compile(DistributedDataParallel(n), backend="eager"),
}


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    torch._dynamo.reset()


def tensors_of(networks: Any) -> dict[str, Tensor]:
    """Return parameters and buffers by position, independently of a wrapper's prefixes."""
    each = [[*network.parameters(), *network.buffers()] for network in networks]
    return {
        f"{which}{i}": t.detach()
        for which, found in zip("GD", each, strict=True)
        for i, t in enumerate(found)
    }


def bare_pair(kind: str, change: str) -> Pair:
    networks = pair(kind, torch.float64)
    return tuple(map(parametrized, networks)) if change == "parametrized" else networks  # type: ignore[return-value]


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("change", WRAPS)
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_wrapped_pair_trains_like_the_bare_one(kind: str, change: str, captured: bool) -> None:
    bare = bare_pair(kind, change)
    expected = copy.deepcopy(bare)
    networks = bare if change == "parametrized" else tuple(map(WRAPS[change], bare))
    ema = copy.deepcopy(expected[0])
    optimizers, reference_optimizers = adams(networks), adams(expected)
    step = TrainStep(*networks, *optimizers, ema=ema, ema_decay=0.5)
    backend = SimulatedGraphBackend(step)
    if captured:
        step._graphs = step._on(backend, raise_on_failure=True)
    for count in [4] * (WARM_UP + 2) + [3]:
        real, noise = batch_of(bare, count, torch.float64)
        result = step(real, noise)
        wanted = reference_step(*expected, *reference_optimizers, real, noise[:, :, None, None])
        for got, want in zip(result, wanted, strict=True):
            assert abs(got - want) <= 1e-9
        assert_states_close(tensors_of(networks), tensors_of(expected), 1e-8)
    if captured:
        assert backend.new() == ["run"] * WARM_UP + ["capture"] + ["replay"] * 2 + ["run"]
        networks[1].train(False)  # noticed through any wrapper
        step(*batch_of(bare, 4, torch.float64))
        assert backend.new() == ["run"]


@pytest.mark.usefixtures("_process_group")
def test_distributed_networks_are_neither_captured_nor_averaged_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = pair()
    networks = tuple(map(DistributedDataParallel, bare))
    with pytest.raises(
        ValueError, match="takes bare networks, but generator is in a DistributedDataParallel"
    ):
        TrainStep(*networks, *sgds(networks), distributed=True)
    step = TrainStep(*networks, *sgds(networks))
    monkeypatch.setattr(step, "_device", torch.device("cuda", 0))
    assert step._why_not_captured() == "the generator is in a DistributedDataParallel"
