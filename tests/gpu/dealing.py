"""A pytest plugin that deals tests to processes beside each other: ``pytest -p dealing --deal DIR``.

Compiling takes longest, a second or two of one core a kernel, and Triton keeps on disk what any process has
compiled. So tests that compile the same kernels are one group, run by one process after the other, and every
process takes the next group that none has taken: what matters most first, of equals the longest. A group is
taken by creating its file in DIR, which only one process can.

Each outcome is appended to a file of DIR as it is known, so that a process that is killed or dies leaves what
it has found. A process that can no longer use its GPU after a failure (a capture that failed, an illegal
access) puts the rest of its group back and ends; whoever has started it starts another.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.stages.deal import UNUSABLE, Deal

COSTS = {
    "test_gpu.py::test_every_tile": 10.0,
    "test_compiled": 25.0,
    "compiled": 8.0,
    "test_a_run_goes_on": 10.0,
}
"""Seconds of a test's own, roughly, by a part of its name, the first that it has."""
OTHERS = 3.0
TILES = {
    **{"G1": 30.0, "G2": 55.0, "G5": 15.0, "D1": 12.0, "D2": 42.0, "D3": 55.0, "D5": 30.0},
    **{"G2-act": 45.0, "D3-act": 45.0},
}
"""Likewise of those of test_gpu_tiles.py in 16 bits, by their layer: a second a kernel that they compile."""
FEWER_TILES = {"float32": 0.5, "tf32": 0.8}
LONGEST = 40.0  # seconds of a group, beyond which it is better that two processes compile the same
SHARED = ("layer", "which", "dtype", "mode", "keeper", "precision")
"""Parameters that decide what is compiled; others do not, or hardly."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dealing")
    group.addoption("--deal", type=Path, metavar="DIR", help="share the tests with other processes")
    group.addoption("--end", type=float, default=float("inf"), help="begin no test that would end later")
    group.addoption("--grace", type=float, default=0.0, help="seconds before the end in which no test begins")


@pytest.hookimpl(trylast=True)  # after the conftest that sets PyTorch's threads
def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--deal")
    if folder is not None:
        torch.set_num_threads(1)  # each process has one core
        config.pluginmanager.register(Dealt(folder, *map(config.getoption, ("--end", "--grace"))))


def is_checked(item: pytest.Item) -> bool:
    """Whether it belongs to the tests that matter most."""
    return item.get_closest_marker("check") is not None


def group(item: pytest.Item) -> tuple[object, ...]:
    """What is equal for tests that compile the same kernels."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = "" if "layer" in parameters else item.name.partition("[")[0]
    own = (is_checked(item), is_exhaustive(item), item.path.name, name)
    return (*own, *(str(parameters.get(shared)) for shared in SHARED))


def is_exhaustive(item: pytest.Item) -> bool:
    """Whether it tries every tile of a kernel: much work for a fault that few have."""
    return "tile" in item.nodeid


def cost(item: pytest.Item) -> float:
    if item.path.name == "test_gpu_tiles.py":
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        of = TILES.get(str(parameters.get("layer")), OTHERS)
        return of * FEWER_TILES.get(str(parameters.get("precision")), 1.0)
    return next((seconds for part, seconds in COSTS.items() if part in item.nodeid), OTHERS)


def groups(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """In the order in which they are to be taken; the same in every process."""
    found: dict[tuple[object, ...], list[pytest.Item]] = {}
    for item in items:
        found.setdefault(group(item), []).append(item)
    pieces = [piece for tests in found.values() for piece in divided(tests)]

    def rank(tests: list[pytest.Item]) -> tuple[bool, bool, float]:
        later = not is_checked(tests[0])
        return later, later and is_exhaustive(tests[0]), -sum(map(cost, tests))

    return sorted(pieces, key=rank)


def divided(tests: list[pytest.Item]) -> list[list[pytest.Item]]:
    """A group that takes too long, as several."""
    pieces: list[list[pytest.Item]] = [[]]
    for item in tests:
        if pieces[-1] and sum(map(cost, [*pieces[-1], item])) > LONGEST:
            pieces.append([])
        pieces[-1].append(item)
    return pieces


def usable() -> bool:
    """Whether this process can still run anything on its GPU."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.randn(1, device="cuda").item()
    except RuntimeError:
        return False
    return not torch.cuda.is_current_stream_capturing()


def reason(report: pytest.TestReport) -> str:
    """Why it failed or was skipped, in one line."""
    told: Any = report.longrepr
    if isinstance(told, tuple):
        text = str(told[2])
    elif hasattr(told, "reprcrash") and told.reprcrash is not None:
        text = told.reprcrash.message
    else:
        text = str(told)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


class Dealt:
    """The plugin's part in a process."""

    def __init__(self, folder: Path, end: float, grace: float) -> None:
        self._deal, self._end, self._grace = Deal(folder), end, grace
        self._reports: list[pytest.TestReport] = []
        self._usable = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest's own says what was not collected, or lists what was
        dealt = groups(session.items)
        self._deal.publish([item.nodeid for tests in dealt for item in tests])
        for number, tests in enumerate(dealt):
            if self._deal.claim(number) and not self._run(tests):
                self._deal.release(number)
                self._usable = False
                break
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._usable:  # set here, as pytest prints no tracebacks before a status that is not its own
            session.exitstatus = UNUSABLE

    def _run(self, tests: list[pytest.Item]) -> bool:
        """The tests of a group that are not done; False where this process cannot go on."""
        done = self._deal.outcomes()
        for item in tests:
            late = time.monotonic() + max(cost(item), self._grace) > self._end
            if not late and item.nodeid not in done and self._failed(item) and not usable():
                return False
        return True

    def _failed(self, item: pytest.Item) -> bool:
        """Runs a test and writes its outcome; no fixture is kept for the next, which may be any."""
        process = os.getpid()
        self._reports.clear()
        begun = time.monotonic()
        self._deal.write(process, test=item.nodeid, outcome="started", begun=begun)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        bad = next((report for report in self._reports if report.failed), None)
        skipped = next((report for report in self._reports if report.skipped), None)
        worst = bad or skipped
        self._deal.write(
            process,
            test=item.nodeid,
            outcome="failed" if bad else "skipped" if skipped else "passed",
            seconds=round(time.monotonic() - begun, 3),
            reason="" if worst is None else reason(worst),
        )
        return bad is not None
