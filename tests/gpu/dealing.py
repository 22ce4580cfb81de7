"""A pytest plugin that distributes tests over concurrent processes: ``pytest -p dealing --deal DIR``.

Compilation dominates the run time, at one or two seconds of one core per kernel, and Triton caches on disk
what any process has compiled. Tests that compile the same kernels therefore form a group, which one process
runs serially. Each process claims the next unclaimed group, the most important first and among equals the
longest, by creating its file in DIR, which only one process can do.

Each outcome is appended to a file in DIR as soon as it is known, so a process that is killed or crashes
leaves its results. A process that can no longer use its GPU after a failure (a failed capture, an illegal
access) exits; the parent process then returns the rest of its group and starts another.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.stages.suite import UNUSABLE, Deal

COSTS = {
    "test_gpu.py::test_every_tile": 10.0,
    "test_compiled": 25.0,
    "compiled": 8.0,
    "test_resume": 10.0,
}
"""Approximate seconds per test, by the first matching part of its name."""
DEFAULT_COST = 3.0
TILE_COSTS = {
    **{"G1": 30.0, "G2": 55.0, "G5": 15.0, "D1": 12.0, "D2": 42.0, "D3": 55.0, "D5": 30.0},
    **{"G2-act": 45.0, "D3-act": 45.0},
}
"""Approximate seconds of test_gpu_tiles.py in 16 bits, by layer: one second per kernel compiled."""
TILE_COST_FACTORS = {"float32": 0.5, "tf32": 0.8}
MAX_GROUP_SECONDS = 40.0  # beyond this it is faster if two processes compile the same kernels
SHARED = ("layer", "which", "dtype", "mode", "caller", "precision")
"""Parameters that determine which kernels are compiled; other parameters hardly matter."""


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("dealing").addoption
    add("--deal", type=Path, metavar="DIR", help="share the tests with other processes through DIR")
    end = "start no test expected to end after this time (time.monotonic() seconds)"
    add("--end", type=float, default=float("inf"), help=end)
    grace = "start no test in the last GRACE seconds before --end (default: 0)"
    add("--grace", type=float, default=0.0, help=grace)


@pytest.hookimpl(trylast=True)  # after the conftest that sets PyTorch's threads
def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--deal")
    if folder is not None:
        torch.set_num_threads(1)  # one core per process
        config.pluginmanager.register(Dealt(folder, *map(config.getoption, ("--end", "--grace"))))


def is_checked(item: pytest.Item) -> bool:
    """Return whether the test is marked as most important."""
    return item.get_closest_marker("check") is not None


def parameter(item: pytest.Item, name: str) -> str:
    """Return a parameter of the test as text; 'None' if it has none of this name."""
    return str(item.callspec.params.get(name) if hasattr(item, "callspec") else None)


def group(item: pytest.Item) -> tuple[object, ...]:
    """Return a key that is equal for tests that compile the same kernels."""
    name = "" if parameter(item, "layer") != "None" else item.name.partition("[")[0]
    prefix = (is_checked(item), is_exhaustive(item), item.path.name, name)
    return (*prefix, *(parameter(item, shared) for shared in SHARED))


def is_exhaustive(item: pytest.Item) -> bool:
    """Return whether the test tries every tile of a kernel: much work for rare faults."""
    return "tile" in item.nodeid


def cost(item: pytest.Item) -> float:
    """Return the approximate seconds that the test takes."""
    if item.path.name == "test_gpu_tiles.py":
        seconds = TILE_COSTS.get(parameter(item, "layer"), DEFAULT_COST)
        return seconds * TILE_COST_FACTORS.get(parameter(item, "precision"), 1.0)
    return next((seconds for part, seconds in COSTS.items() if part in item.nodeid), DEFAULT_COST)


def groups(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Group the tests, in the order to claim them; the same in every process."""
    found: dict[tuple[object, ...], list[list[pytest.Item]]] = {}
    for item in items:
        pieces = found.setdefault(group(item), [[]])
        if pieces[-1] and sum(map(cost, [*pieces[-1], item])) > MAX_GROUP_SECONDS:
            pieces.append([])
        pieces[-1].append(item)

    def rank(tests: list[pytest.Item]) -> tuple[bool, bool, float]:
        later = not is_checked(tests[0])
        return later, later and is_exhaustive(tests[0]), -sum(map(cost, tests))

    return sorted((piece for pieces in found.values() for piece in pieces), key=rank)


def usable() -> bool:
    """Return whether this process can still use its GPU."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.randn(1, device="cuda").item()
    except RuntimeError:
        return False
    return not torch.cuda.is_current_stream_capturing()


def reason(report: pytest.TestReport) -> str:
    """Return in one line why the test failed or was skipped."""
    longrepr: Any = report.longrepr
    if isinstance(longrepr, tuple):
        text = str(longrepr[2])
    elif hasattr(longrepr, "reprcrash") and longrepr.reprcrash is not None:
        text = longrepr.reprcrash.message
    else:
        text = str(longrepr)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


class Dealt:
    """The pytest hooks of one process."""

    def __init__(self, folder: Path, end: float, grace: float) -> None:
        self._deal, self._end, self._grace = Deal(folder), end, grace
        self._reports: list[pytest.TestReport] = []
        self._usable = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest's own loop reports collection errors or lists the tests
        dealt = groups(session.items)
        self._deal.publish([item.nodeid for tests in dealt for item in tests])
        for number, tests in enumerate(dealt):
            if self._deal.claim(number) and not self._run(tests):
                self._usable = False
                break
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._usable:  # set last: pytest prints no tracebacks for exit statuses it does not know
            session.exitstatus = UNUSABLE

    def _run(self, tests: list[pytest.Item]) -> bool:
        """Run the remaining tests of a group; return False if this process cannot continue."""
        done = self._deal.outcomes()
        for item in tests:
            late = time.monotonic() + max(cost(item), self._grace) > self._end
            if not late and item.nodeid not in done and self._failed(item) and not usable():
                return False
        return True

    def _failed(self, item: pytest.Item) -> bool:
        """Run a test and record its outcome, tearing down all fixtures; return whether it failed."""
        process = os.getpid()
        self._reports.clear()
        begun = time.monotonic()
        self._deal.write(process, test=item.nodeid, outcome="started", begun=begun)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        failed = next((report for report in self._reports if report.failed), None)
        skipped = next((report for report in self._reports if report.skipped), None)
        worst = failed or skipped
        self._deal.write(
            process,
            test=item.nodeid,
            outcome="failed" if failed else "skipped" if skipped else "passed",
            seconds=round(time.monotonic() - begun, 3),
            reason="" if worst is None else reason(worst),
        )
        return failed is not None
