"""Data-parallel training: two processes give the same result as one with the whole batch."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from dcgan import fast, models
from dcgan.batchnorm import SyncBatchNorm2d
from dcgan.errors import InputError
from dcgan.kernels import ops, train_chain
from dcgan.models import weights_init
from dcgan.training import TrainStep
from dcgan.training.feed import Feed, Share
from tests.support import train_runs

SIZES = {"features": 4, "image_size": 32}
LATENT, BATCH, STEPS = 6, 8, 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def networks(dtype: torch.dtype, batchnorm: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    kind = models if batchnorm in ("eval", "reference networks") else fast
    pair = [kind.Generator(LATENT, **SIZES), kind.Discriminator(**SIZES)]
    for network in pair:
        network.apply(weights_init).to(dtype)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.data *= 5  # so that gradients have similar magnitudes in all layers
            if batchnorm == "eval" and isinstance(module, nn.BatchNorm2d):
                module.eval()
    return pair[0], pair[1]


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 1, 32, 32, generator=random).mul(2).sub(1).to(dtype),
            torch.randn(BATCH, LATENT, 1, 1, generator=random).to(dtype),
        )
        for _ in range(STEPS)
    ]


def train(dtype: torch.dtype, batchnorm: str, share: tuple[int, int], options: dict[str, Any]) -> Any:
    """Return the gradients of every step, the final parameters and buffers, and the losses."""
    rank, world = share
    g, d = networks(dtype, batchnorm)
    if batchnorm in ("synchronised", "reference networks") and world > 1:
        g, d = (SyncBatchNorm2d.convert(network) for network in (g, d))
    options = dict(options)
    wrapped = options.pop("wrapped", False) and world > 1
    step = TrainStep(
        *((DistributedDataParallel(network) for network in (g, d)) if wrapped else (g, d)),
        SGD(g.parameters(), lr=1e-2),
        SGD(d.parameters(), lr=1e-2),
        distributed=world > 1 and not wrapped,
        **options,
    )
    gradients, losses = [], []
    for real, noise in batches(dtype):
        each = BATCH // world
        mine = slice(rank * each, (rank + 1) * each)
        losses.append(torch.stack(step(real[mine], noise[mine])))
        gradients += [p.grad.clone() for network in (g, d) for p in network.parameters()]
    return gradients, [t.clone() for n in (g, d) for t in n.state_dict().values()], torch.stack(losses)


def worker(
    rank: int, port: int, out: str, dtype: torch.dtype, batchnorm: str, options: dict[str, Any], engine: str
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with ops.use_engine(engine):
        result = train(dtype, batchnorm, (rank, 2), options)
    distributed.destroy_process_group()
    torch.save(result, f"{out}/{rank}.pt")


def run_two_processes(tmp_path: Path, *arguments: Any, target: Callable[..., None] = worker) -> list[Any]:
    port, context = free_port(), train_runs.forkserver_context()
    processes = [
        context.Process(target=target, args=(rank, port, str(tmp_path), *arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def max_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "engine", "batchnorm", "options", "allowed"),
    [
        # In eval mode BatchNorm does not depend on the batch: this tests DistributedDataParallel alone.
        (torch.float64, "reference", "eval", {}, 1e-12),
        (torch.float64, "reference", "synchronised", {}, 1e-11),
        (torch.float64, "reference", "reference networks", {}, 1e-11),
        (torch.float64, "reference", "synchronised", {"loss": "minimax", "clip": 0.1}, 1e-11),
        # Wrapped by the caller; the loss is then computed from probabilities, with other rounding.
        (torch.float64, "reference", "eval", {"wrapped": True}, 1e-11),
        (torch.float64, "reference", "synchronised", {"wrapped": True}, 1e-10),
        # Rounding alone: with this RNG seed no LeakyReLU input is close enough to 0 to change sign.
        (torch.float32, "auto", "synchronised", {}, 1e-4),
    ],
)
def test_gradients_match_those_of_the_whole_batch(
    dtype: torch.dtype, engine: str, batchnorm: str, options: dict[str, Any], allowed: float, tmp_path: Path
) -> None:
    first, second = run_two_processes(tmp_path, dtype, batchnorm, options, engine)
    with ops.use_engine("reference"):
        gradients, state, losses = train(torch.float64, batchnorm, (0, 1), options)
    for mine in (first, second):
        assert max_error(mine[0], gradients) <= allowed
        assert max_error(mine[1], state) <= allowed
    assert max_error([(first[2] + second[2]) / 2], [losses]) <= allowed
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_batchnorm_is_local_to_each_process(tmp_path: Path) -> None:
    """Like DistributedDataParallel: gradients are averaged, and each half uses its own batch statistics."""
    first, second = run_two_processes(tmp_path, torch.float64, "own", {}, "reference")
    halves = []
    for rank in range(2):
        g, d = networks(torch.float64, "own")
        real, noise = batches(torch.float64)[0]
        mine = slice(rank * 4, rank * 4 + 4)
        with ops.use_engine("reference"):
            TrainStep(g, d, SGD(g.parameters(), lr=1e-2), SGD(d.parameters(), lr=1e-2))(
                real[mine], noise[mine]
            )
        halves.append([p.grad for p in d.parameters()])
    expected = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    of_g = len(list(networks(torch.float64, "own")[0].parameters()))
    found = first[0][of_g : of_g + len(expected)]
    assert max_error(found, expected) <= 1e-12
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert any(not torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))  # running statistics


# --- networks that train as one operator --------------------------------------------------------------------

SMALL_BUCKETS = {"bucket_cap_mb": 0.001}  # smaller than the gradients of either network
DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "small buckets": SMALL_BUCKETS,
    "static graph": {"static_graph": True},
    "static graph, small buckets": {"static_graph": True, **SMALL_BUCKETS},
    "unused parameters": {"find_unused_parameters": True},
    "unused parameters, small buckets": {"find_unused_parameters": True, **SMALL_BUCKETS},
    "views": {"gradient_as_bucket_view": True},
    "accumulated": {},
    "accumulated, small buckets": SMALL_BUCKETS,
    "some frozen": {},
    "some frozen, small buckets": SMALL_BUCKETS,
    "one layer trained, small buckets": {"bucket_cap_mb": 0.02},
    "synchronised": {},
}


def operators() -> list[int]:
    """Return a list to which each network that runs as one operator from now on appends its batch size."""
    found: list[int] = []
    original = train_chain.train_chain

    def record(call: Any) -> Any:
        found.append(len(call.x))
        return original(call)

    train_chain.train_chain = record
    return found


def train_one(which: int, name: str, rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of every step, and the buffers; "accumulated" takes two batches a step."""
    network = networks(torch.float64, "own")[which]
    if name.startswith("some frozen"):
        network.main[3 - which].requires_grad_(False)  # the second convolution
    if name.startswith("one layer"):
        network.requires_grad_(False)
        network.main[0].requires_grad_(True)
    if name == "synchronised":
        SyncBatchNorm2d.convert(network)
    parallel = (
        DistributedDataParallel(network, broadcast_buffers=False, **DDP_OPTIONS[name])
        if world > 1
        else network
    )
    gradients = []
    each = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    for step in range(3):
        network.zero_grad()
        given = [batch[1 - which][each] for batch in batches(torch.float64)]
        for i, x in enumerate(given if name.startswith("accumulated") else given[step % 2 :][:1]):
            waits = name.startswith("accumulated") and i == 0
            with parallel.no_sync() if waits and world > 1 else contextlib.nullcontext():  # type: ignore[operator]
                parallel(x).square().sum().backward()
        gradients += [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return gradients, [b.clone() for b in network.buffers()]


def operator_worker(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found, calls = {}, operators()
    with ops.use_engine("reference"):
        for which in (0, 1):
            for name in DDP_OPTIONS:
                calls.clear()
                found[f"{which} {name}"] = (*train_one(which, name, rank, 2), len(calls))
        for name in ("own", "synchronised"):
            calls.clear()
            train(torch.float64, name, (rank, 2), {})
            found[f"TrainStep {name}"] = list(calls)
    distributed.destroy_process_group()
    torch.save(found, f"{out}/{rank}.pt")


def test_one_operator_unless_that_delays_communication(tmp_path: Path) -> None:
    """Gradients are the average of the processes' own, whether one node computes them or one a layer."""
    results = run_two_processes(tmp_path, target=operator_worker)
    for which in (0, 1):
        for name in DDP_OPTIONS:
            calls = {rank: results[rank][f"{which} {name}"][2] for rank in (0, 1)}
            if name == "synchronised":
                wanted = 0
            elif "small buckets" not in name or name.startswith("one layer"):
                wanted = 6 if name.startswith("accumulated") else 3
            else:  # the backward of a batch that is only accumulated sends nothing
                wanted = 3 if name.startswith("accumulated") else 0
            assert calls == {0: wanted, 1: wanted}, name
            if name == "synchronised":
                continue
            with ops.use_engine("reference"):
                alone = [train_one(which, name, rank, 1) for rank in (0, 1)]
            average = [(a + b) / 2 for a, b in zip(alone[0][0], alone[1][0], strict=True)]
            for rank in (0, 1):
                gradients, buffers, _ = results[rank][f"{which} {name}"]
                assert max_error(gradients, average) <= 1e-11, name
                assert max_error(buffers, alone[rank][1]) <= 1e-12, name
    for rank in (0, 1):
        # D on real images, G, D on generated ones, and D in G's phase, in every step.
        assert results[rank]["TrainStep own"] == [BATCH // 2] * 4 * STEPS
        assert results[rank]["TrainStep synchronised"] == []


def test_without_a_process_group() -> None:
    g, d = networks(torch.float32, "own")
    with pytest.raises(ValueError, match="init_process_group"):
        TrainStep(g, d, SGD(g.parameters(), lr=1e-2), SGD(d.parameters(), lr=1e-2), distributed=True)


def test_synchronised_batchnorm_in_one_process_is_batchnorm() -> None:
    """Without a process group, in training and eval mode, on a CPU."""
    torch.manual_seed(0)
    network = fast.Generator(LATENT, **SIZES)
    other = SyncBatchNorm2d.convert(copy.deepcopy(network))
    z = torch.randn(4, LATENT)
    for mode in (True, False):
        torch.testing.assert_close(other.train(mode)(z), network.train(mode)(z), rtol=0, atol=0)
    assert list(other.state_dict()) == list(network.state_dict())


TINY = train_runs.TINY | {"limit": 43, "sync_batchnorm": True, "epochs": 1}


def set_torchrun_environment(rank: int, world: int, port: int) -> None:
    """Set the environment variables that torchrun passes to a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def launch(world: int, out: Path, given: dict[str, Any], resume: bool = False) -> list[int]:
    """Run ``dcgan train`` in `world` processes and return their exit statuses."""
    port = free_port()
    processes = [
        train_runs.start(
            out,
            given,
            resume,
            functools.partial(set_torchrun_environment, rank, world, port) if world > 1 else None,
        )
        for rank in range(world)
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    """Data order, noise and synchronised BatchNorm do not depend on it: the runs agree up to rounding.

    Adam's first steps are about lr·sign(gradient), so weights agree to a few lr, and statistics to 5%.
    """
    out, alone = tmp_path / "run", tmp_path / "alone"
    given = TINY | {"limit": 40}
    assert launch(before, out, given) == [0] * before
    assert launch(after, out, {"epochs": 2}, resume=True) == [0] * after
    assert launch(1, alone, given | {"epochs": 2}) == [0]
    saved, expected = train_runs.final(out), train_runs.final(alone)
    assert (saved.epoch, saved.step, saved.images) == (2, 10, 80)
    for name, value in expected.generator.items():
        if "running" in name:
            assert max_error([saved.generator[name]], [value]) < 5e-2, name
        elif "tracked" not in name:
            assert float((saved.generator[name] - value).abs().max()) <= 2 * 10 * 2e-4, name
    assert (out / "samples.gif").exists()


def test_a_short_batch_is_cut_to_equal_shares(tmp_path: Path) -> None:
    assert launch(2, tmp_path / "run", TINY) == [0, 0]
    saved = train_runs.final(tmp_path / "run")
    assert (saved.step, saved.images) == (6, 42)  # of 43


def test_torchrun(tmp_path: Path) -> None:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if value is not True]
    given = [option for option in given if not option.endswith("=False")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *(f"--master-port={free_port()}", "-m", "dcgan", "train", *given, "--no-tensorboard"),
            *("--epochs=1", "--limit=8", f"--out={tmp_path / 'run'}"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training dcgan") == 1  # by rank 0 only
    assert "2 × cpu" in done.stdout
    assert train_runs.final(tmp_path / "run").step == 1


def test_a_batch_that_cannot_be_split_evenly() -> None:
    with pytest.raises(InputError, match="must be a multiple of the number of processes, 2, got 9"):
        Feed(torch.zeros(20, 1, 2, 2, dtype=torch.uint8), 9, 0, 6, torch.device("cpu"), Share(0, 2))
