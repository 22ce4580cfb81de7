"""TrainStep around networks that are compiled, parametrized or wrapped, against the seed's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from seed_loop import seed_step
from steps import Pair, Pretended, Wrapper, adams, assert_states_close, batch_of, pair, sgds
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from dcgan.training import TrainStep
from dcgan.training.graph import WARM_UP

pytestmark = pytest.mark.usefixtures("one_thread")


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def parametrized(network: Any) -> nn.Module:
    """Every second convolution: its weight is then computed, and moves a buffer in training."""
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
    """Parameters and buffers in their order, whatever a wrapper calls them."""
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
def test_a_wrapped_pair_trains_as_the_bare_one(kind: str, change: str, captured: bool) -> None:
    bare = bare_pair(kind, change)
    seeds = copy.deepcopy(bare)
    networks = bare if change == "parametrized" else tuple(map(WRAPS[change], bare))
    ema = copy.deepcopy(seeds[0])
    ours, theirs = adams(networks), adams(seeds)
    step = TrainStep(*networks, *ours, ema=ema, ema_decay=0.5)
    backend = Pretended(step)
    if captured:
        step._graphs = step._on(backend, insist=True)
    for count in [4] * (WARM_UP + 2) + [3]:
        real, noise = batch_of(bare, count, torch.float64)
        result = step(real, noise)
        wanted = seed_step(*seeds, *theirs, real, noise[:, :, None, None])
        for got, want in zip(result, wanted, strict=True):
            assert abs(got - want) <= 1e-9
        assert_states_close(tensors_of(networks), tensors_of(seeds), 1e-8)
    if captured:
        assert backend.new() == ["run"] * WARM_UP + ["capture"] + ["replay"] * 2 + ["run"]
        networks[1].train(False)  # seen through whatever is around it
        step(*batch_of(bare, 4, torch.float64))
        assert backend.new() == ["run"]


@pytest.mark.usefixtures("_process_group")
def test_averaged_networks_are_not_captured_nor_averaged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = pair()
    networks = tuple(map(DistributedDataParallel, bare))
    with pytest.raises(
        ValueError, match="takes bare networks, but generator is in a DistributedDataParallel"
    ):
        TrainStep(*networks, *sgds(networks), distributed=True)
    step = TrainStep(*networks, *sgds(networks))
    monkeypatch.setattr(step, "_device", torch.device("cuda", 0))
    assert step._why_not_captured() == "the generator is in a DistributedDataParallel"
