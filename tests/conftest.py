"""Configuration of all tests: RNG seeds, two threads, no gpu tests without a GPU, and a summary line."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from dcgan.kernels import coverage, ops, weight_cache
from dcgan.kernels.cpu import library
from tests.support.native import THREADS

_deselected_gpu_tests = 0


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    settings.register_profile("dcgan", deadline=None)  # how long an example takes depends on the machine
    settings.load_profile("dcgan")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global _deselected_gpu_tests
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        _deselected_gpu_tests = len(gpu)
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def native_engine() -> str:
    """Report which instruction sets are tested on this machine; '' if there is no library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library.problem() is not None:
            return ""
    line = f"native engine: {', '.join(library.isas())}"
    elsewhere = [isa for isa in library.built_isas() if isa not in library.isas()]
    return f"{line}; built but not run here: {', '.join(elsewhere)}" if elsewhere else line


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [line] if (line := native_engine()) else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # In the summary, since -q prints no header.
    if not terminalreporter.showheader and (line := native_engine()):
        terminalreporter.write_line(line)
    if _deselected_gpu_tests:
        terminalreporter.write_line(f"no GPU here: {_deselected_gpu_tests} gpu tests deselected")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_networks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels train the tests' tiny networks, which PyTorch's modules would run otherwise."""
    monkeypatch.setattr(coverage, "MIN_TRAINING_MACS", 0.0)


@pytest.fixture
def reference_engine() -> Iterator[None]:
    """Force the reference, so that float64 runs through the ops; by default PyTorch's modules run it."""
    with ops.use_engine("reference"):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, for maps of a few pixels, which a second thread would only slow down."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Disable gradients, as inference does."""
    with torch.no_grad():
        yield


@pytest.fixture
def empty_weight_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with an empty weight cache, so that a test can count its entries."""
    monkeypatch.setattr(weight_cache, "_entries", {})
