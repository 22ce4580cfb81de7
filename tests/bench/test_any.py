"""``python -m bench any``: its networks, fused networks against float64, the check, rows and exit status."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F

from bench import any as bench_any
from bench.__main__ import main
from bench.any import LOOP, Entry
from bench.providers import PROVIDERS
from bench.race import Outcome, Process
from bench.timing import Spread
from dcgan import fast
from examples.networks import NETWORKS
from tests.support.native import NEEDED

pytestmark = [NEEDED, pytest.mark.usefixtures("one_thread", "_inductor_settings")]


@pytest.fixture
def _inductor_settings() -> Iterator[None]:
    """Restore what a baseline that compiles sets for its process."""
    with inductor.patch(freezing=inductor.freezing):
        yield


SIZES: dict[str, dict[str, int]] = {
    "DcganG": {"ngf": 5},
    "DcganD": {"ndf": 5},
    "SpectralD": {"features": 5},
    "ConditionalG": {"features": 5},
    "CriticWithInstanceNorm": {"features_d": 5},
    "UnetG": {"features": 5},
    "PaperG": {"features": 5},
    "PaperD": {"features": 5},
    "HandwrittenG": {"d": 5},
    "HandwrittenD": {"d": 5},
    "SuperResolution": {"blocks": 2, "features": 5},
}
BATCH = 3
CASES = [
    *((name, mode) for name in NETWORKS for mode in ("inference", "training")),
    ("CriticWithInstanceNorm", "gradient penalty"),
    (LOOP, "loop"),
]
QUICK = ["--batch", "2", "--seconds", "0.02", "--rounds", "1", "--threads", "1"]
MARGIN = 2e-5  # of a value from the kink of a ReLU, relative to the map's RMS; float32 errs by about 1e-6


def small(name: str, mode: str) -> tuple[Entry, nn.Module, tuple[Tensor, ...]]:
    """Return an entry, its network with few features, and inputs that keep all values away from kinks."""
    entry = Entry(name, mode, BATCH)
    network, inputs = bench_any.prepared(entry, SIZES)
    for seed in range(100):
        if margin(entry, network, inputs) > MARGIN:
            return entry, network, inputs
        torch.manual_seed(seed)
        inputs = tuple(x for part in entry.networks for x in NETWORKS[part].inputs(BATCH))
    raise AssertionError("no inputs keep all values away from the kinks")


def margin(entry: Entry, network: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Return the smallest distance of an activation's input from 0, relative to the RMS of its map."""
    found = [math.inf]

    def watched(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
        nonzero = x.detach()[x.detach() != 0]  # dropout's zeros are exact
        found.append(float(nonzero.abs().min() / nonzero.square().mean().sqrt()))
        return function(x, *args, **options)

    with contextlib.ExitStack() as stack:
        for name in ("relu", "leaky_relu", "prelu"):
            own = functools.partial(watched, getattr(F, name))
            stack.enter_context(mock.patch.object(F, name, own))
        bench_any.results(entry, copy.deepcopy(network).double(), widened(inputs))
    return min(found)


def widened(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run(name: str, dtype: torch.dtype) -> None:
    entry = NETWORKS[name]
    inputs = entry.inputs(BATCH, "cpu", dtype)
    assert all(x.dtype == dtype for x in inputs if x.is_floating_point())
    y = entry.make(**SIZES[name]).to(dtype)(*inputs)
    assert (y.dtype, y.shape[0]) == (dtype, BATCH)
    if entry.loss == "images":
        assert y.shape[2:] == (64, 64)
        assert y.abs().max() <= 1
    else:
        assert y.numel() == BATCH
        assert (y.min() >= 0 and y.max() <= 1) or entry.loss != "probabilities"
    assert torch.isfinite(bench_any.LOSSES[entry.loss](y))


def test_every_network_names_its_source() -> None:
    for network in NETWORKS.values():
        assert re.search(r"20\d\d|pytorch/examples|tutorials", network.make.__doc__ or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_fused_networks_match_float64(name: str, mode: str, dtype: torch.dtype) -> None:
    """The output, every gradient and every buffer match, each relative to its norm."""
    entry, network, inputs = small(name, mode)
    expected = bench_any.results(entry, copy.deepcopy(network).double(), widened(inputs))
    own = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    found = bench_any.results(entry, bench_any.fused(copy.deepcopy(network).to(dtype)), own)
    assert found.keys() == expected.keys()
    unit = 1e-4 if dtype == torch.float32 else 1e-9
    total = math.sqrt(sum(float(e.norm()) ** 2 for key, e in expected.items() if key.startswith("gradient")))
    for key, e in expected.items():
        noise = 1e-2 * total if key.startswith("gradient") else 0.0
        error = float((found[key].double() - e.double()).norm())
        assert error <= unit * (float(e.double().norm()) + noise), f"{key}: {error:.1e}"


# --- the check ----------------------------------------------------------------------------------------------


def scaled(network: nn.Module) -> nn.Module:
    """Scale the output, and with it every gradient."""
    network.register_forward_hook(lambda module, args, y: y * 1.001)
    return network


def half_a_gradient(network: nn.Module) -> nn.Module:
    next(network.parameters()).register_hook(lambda gradient: gradient / 2)
    return network


def no_gradient(network: nn.Module) -> nn.Module:
    next(network.parameters()).requires_grad_(False)
    return network


def old_statistics(network: nn.Module) -> nn.Module:
    """Leave the running statistics as they are."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    return network


def not_a_number(network: nn.Module) -> nn.Module:
    network.register_forward_hook(lambda module, args, y: y * math.nan)
    return network


@pytest.mark.parametrize(
    ("fuse", "mode", "where"),
    [
        (scaled, "inference", "output"),
        (not_a_number, "inference", "output"),
        (half_a_gradient, "training", "gradient of main.0.weight"),
        (no_gradient, "training", "gradient of main.0.weight"),
        (old_statistics, "training", "buffer main.1.running_mean"),
    ],
)
def test_the_check_finds_mismatches(
    fuse: Callable[[nn.Module], nn.Module], mode: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry("DcganG", mode, BATCH)
    made = bench_any.prepared(entry, SIZES)
    error, bound, _ = bench_any.check(entry, *made)
    assert error <= bound
    monkeypatch.setattr(fast, "fuse", fuse)
    error, bound, found = bench_any.check(entry, *made)
    assert not error <= bound
    assert found == where


def test_the_check_leaves_the_network_as_it_is() -> None:
    entry = Entry("DcganD", "training", BATCH)
    network, inputs = bench_any.prepared(entry, SIZES)
    before = copy.deepcopy(network.state_dict())
    bench_any.check(entry, network, inputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_of_the_check_depends_on_no_layout(dtype: torch.dtype) -> None:
    entry = Entry("UnetG", "training", BATCH)
    network, inputs = bench_any.prepared(entry, SIZES)
    plain = bench_any.results(entry, copy.deepcopy(network), inputs)["output"]
    changed = copy.deepcopy(network).to(dtype).to(memory_format=torch.channels_last)
    other = bench_any.results(entry, changed, tuple(x.to(dtype) for x in inputs))["output"]
    torch.testing.assert_close(other.to(plain), plain, rtol=1e-4, atol=1e-4)


# --- rows ---------------------------------------------------------------------------------------------------


def test_entries() -> None:
    listed = list(bench_any.entries([*NETWORKS, LOOP], None))
    assert len(listed) == len(set(listed))
    for name in NETWORKS:
        own = [entry for entry in listed if entry.network == name and entry.baseline == "eager"]
        assert [e.batch for e in own if e.mode == "inference"] == [1, 8, 64]
        assert [e.batch for e in own if e.mode == "training"] == [16, 64][: 1 + name.startswith("Dcgan")]
        penalty = [e.batch for e in own if e.mode == "gradient penalty"]
        assert penalty == [16] * (name == "CriticWithInstanceNorm")
    assert {e.baseline for e in listed if e.mode == "loop"} == {"eager", "channels_last", "compile"}
    others = [e for e in listed if e.mode != "loop" and e.baseline != "eager"]
    assert {e[:3] for e in others} == {("DcganG", "inference", 64)}
    assert {e.baseline for e in others} == PROVIDERS.keys() & {
        "channels_last",
        "compile",
        "onnxruntime",
        "openvino",
    }
    assert {e.batch for e in bench_any.entries(["PaperD"], [5, 5, 2])} == {5, 2}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with few features, and with the memory of processes that are not started."""

    class Started:
        def __init__(self, threads: int, worker: str) -> None:
            assert pkgutil.resolve_name(worker) is bench_any.PeakWorker

        def ask(self, timeout: float, method: str, entry: Entry, fuse: bool) -> int:
            return 3000 if fuse else 2000

        def close(self) -> None:
            pass

    prepared = functools.partial(bench_any.prepared, sizes=SIZES)
    monkeypatch.setattr(bench_any, "prepared", prepared)
    monkeypatch.setattr(bench_any, "Process", Started)


def run(path: Path, *names: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the command; return its exit status and rows."""
    status = main(["any", *QUICK, "--networks", *names, "--json", str(path)])
    return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.usefixtures("quick")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(tmp_path / "rows.jsonl", "SuperResolution")
    assert [row["mode"] for row in rows] == ["inference", "training"]
    for row in rows:
        assert (row["kind"], row["network"], row["batch"]) == ("any", "SuperResolution", 2)
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["fused_s"])
        assert row["error"] <= row["bound"]
        # A head, two convolutions in each of two blocks, and three more.
        assert sum(int(part.split()[-1]) for part in row["engines"].split(", ")) == 8
        assert row["memory_ratio"] == (1.5 if row["mode"] == "training" else None)
    assert status == int(any(row["ratio"] < 0.97 for row in rows))
    assert "SuperResolution" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("times", "status"), [((1.0, 1.02), 0), ((1.0, 1.05), 1)])
def test_slower_rows_make_the_exit_status_1(
    times: tuple[float, float], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_any, "medians", lambda *_: times)
    found, rows = run(tmp_path / "rows.jsonl", "HandwrittenD", LOOP)
    assert found == status
    assert [row["baseline"] for row in rows] == [*3 * ["eager"], "channels_last", "compile"]
    assert {row["verdict"] for row in rows} == {"slower" if status else ""}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fuse", [scaled, not_a_number])
def test_wrong_networks_make_the_exit_status_1(
    fuse: Callable[[nn.Module], nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_any, "medians", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(fast, "fuse", fuse)
    monkeypatch.setattr(fast, "explain", lambda *_: [])
    status, rows = run(tmp_path / "rows.jsonl", "PaperG")
    assert status == 1
    assert {row["verdict"] for row in rows} == {"wrong"}
    assert "wrong: output" in capsys.readouterr().out


def outcomes(theirs: str, ours: str, *seconds: float) -> list[Outcome]:
    """Return the outcomes of a race with these states and medians."""
    found = [Outcome(PROVIDERS["onnxruntime"], status, "why", 1e-6, 1e-5) for status in (theirs, ours)]
    for outcome, median in zip(found, seconds, strict=True):
        if outcome.status == "ok":
            outcome.reason, outcome.spreads = "", {"warm": Spread(median, median, median, 1)}
        elif outcome.status == "wrong":
            outcome.error = 1.0
    return found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("race", "status", "verdict"),
    [
        (outcomes("ok", "ok", 2.0, 1.0), 0, ""),
        (outcomes("ok", "ok", 1.0, 2.0), 1, "slower"),
        (outcomes("ok", "wrong", 2.0, 1.0), 1, "wrong"),
        (outcomes("skipped", "ok", 2.0, 1.0), 0, None),
    ],
)
def test_other_runtimes(
    race: list[Outcome], status: int, verdict: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = Entry("DcganG", "inference", 64, "onnxruntime")
    monkeypatch.setattr(bench_any, "entries", lambda *_: [only])
    monkeypatch.setattr(bench_any, "race", lambda *_: race)
    found, rows = run(tmp_path / "rows.jsonl", "DcganG")
    assert found == status
    assert [row["verdict"] for row in rows] == ([] if verdict is None else [verdict])
    if verdict == "wrong":
        assert rows[0]["ratio"] is None


def test_registered_cases_build_the_networks_of_the_registry() -> None:
    case = bench_any.Registered("DcganG", 2, "float32", "cpu", 1)
    assert case.input_shape == (100, 1, 1)
    materials = case.materials()
    network = NETWORKS["DcganG"].make()
    network.load_state_dict(materials.state)
    with torch.no_grad():
        y = network.eval()(materials.inputs[0])
    torch.testing.assert_close(y.double(), materials.expected[0], rtol=1e-4, atol=1e-4)


def test_peak_memory_grows_with_the_activations() -> None:
    with closing(Process(1, "bench.any:PeakWorker")) as worker:
        entry = Entry("SuperResolution", "training", 2)
        peaks = [worker.ask(60, "peak", entry._replace(batch=batch), False) for batch in (2, 32)]
    saved = 30 * 32 * 32 * 32 * 4 * 10  # bytes: at least ten maps of 32 features
    assert peaks[1] - peaks[0] > saved
