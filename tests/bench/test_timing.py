"""Tests of bursts: number and inputs of calls, and CUDA events with a simulated clock."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from bench import machine, timing

INPUTS = [torch.zeros(1), torch.ones(1)]


class Device:
    """A simulated GPU whose clock advances by 1 ms per call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                device.run(INPUTS[0], "replay", timing.GRAPH_CALLS * 0.25)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(timing, "capturing", lambda graph, stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(INPUTS[0], "wait", 5.0))
        monkeypatch.setattr(timing, "FLUSH_BYTES", 16)

    def run(self, x: Tensor, name: str = "call", milliseconds: float = 1.0) -> Tensor:
        self.now += milliseconds
        self.calls.append(name)
        return x


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_slow_calls_are_timed_at_least_three_times() -> None:
    seen: list[float] = []

    def run(x: Tensor) -> Tensor:
        seen.append(x.item())
        return x

    times = timing.CpuSampler(run, INPUTS).burst(1e-9)
    assert len(times["warm"]) == timing.MIN_CALLS
    assert all(t > 0 for t in times["warm"])
    assert seen == [0, 0, 1, 0], "one warm-up call, then cycle through the inputs"


def test_events_exclude_the_l2_flush(device: Device) -> None:
    sampler = timing.CudaSampler(device.run, INPUTS, capture=False)
    flushed: list[int] = []
    sampler._flush = type("Flush", (), {"zero_": lambda self: flushed.append(len(device.calls))})()  # type: ignore[assignment]
    times = sampler.burst(1e-9)
    assert times.keys() == {"warm", "cold", "graph"}
    assert times["warm"] == times["cold"] == [pytest.approx(1e-3)] * timing.MIN_CALLS
    assert len(flushed) == 1 + timing.MIN_CALLS
    assert flushed[1:] == list(range(flushed[1], flushed[1] + timing.MIN_CALLS)), "before each call"


def test_calls_that_replay_graphs_are_enqueued_ahead(device: Device) -> None:
    """The device waits once, for the host to enqueue all calls, and not within any of them."""
    times = timing.CudaSampler(device.run, INPUTS, capture=False).burst(1e-9)
    assert times["graph"] == [pytest.approx(1e-3)] * timing.AHEAD
    assert device.calls[-timing.AHEAD - 1 :] == ["wait", *["call"] * timing.AHEAD]
    large = [torch.zeros(timing.GRAPH_BATCH + 1)]
    assert "graph" not in timing.CudaSampler(device.run, large, capture=False).burst(1e-9)


def test_graph_times_are_per_call(device: Device) -> None:
    times = timing.CudaSampler(device.run, INPUTS, capture=True).burst(1e-9)
    assert times["graph"] == [pytest.approx(0.25e-3)] * timing.MIN_CALLS


def test_a_graph_of_several_calls_is_replayed(device: Device) -> None:
    spread = timing.replay(2 * [lambda: device.run(INPUTS[0])], cold=False)
    assert spread.median == pytest.approx(timing.GRAPH_CALLS * 0.25e-3 / 2)
    assert timing.MIN_REPLAYS <= spread.count <= timing.MAX_REPLAYS
    assert device.calls.index("replay") == 2 * timing.WARM_UP + 2, "warm-up and capture come first"


def test_large_batches_are_not_captured(device: Device) -> None:
    large = [torch.zeros(timing.GRAPH_BATCH + 1)]
    assert "graph" not in timing.CudaSampler(device.run, large, capture=True).burst(1e-9)


def test_capture_failure_omits_the_graph_column(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: object, stream: object) -> contextlib.AbstractContextManager[None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "capturing", refuse)
    times = timing.CudaSampler(device.run, INPUTS, capture=True).burst(1e-9)
    assert sorted(times) == ["cold", "warm"]


@pytest.mark.parametrize("dtype", ["float32", "tf32"])
def test_set_precision_sets_old_and_new_tf32_flags(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """torch.compile reads the older flags and kernels the newer ones; reading either must not raise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    try:
        machine.set_precision("cuda", dtype)
        on = dtype == "tf32"
        assert torch.backends.cuda.matmul.allow_tf32 == on
        assert torch.backends.cudnn.allow_tf32 == on
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == on
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == on
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
