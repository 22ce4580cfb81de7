"""How GPU tests are grouped, and which are in the three-minute check; runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.gpu.stages import jobs
from tests.gpu.stages.suite import TESTS

PLUGIN = """
import json, os, pytest, torch
from tests.gpu import dealing

torch.cuda.is_available = lambda: True  # otherwise the tests are not collected

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    dealt = dealing.groups(items)
    rows = [[(i.nodeid.rpartition("tests/gpu/")[2], dealing.is_checked(i), dealing.cost(i)) for i in tests]
            for tests in dealt]
    with open(os.environ["ROWS"], "w") as file:
        json.dump(rows, file)
"""

# Parts of the names of tests that the three-minute check must include.
POINTS = [
    *("test_gpu_run.py::test_resume[", "test_gpu_run.py::test_inputs_are_the_same_on_every_device"),
    *("test_a_new_learning_rate", "test_weights_cached_by_others_are_not_stale"),
    *("test_captured_is_eager[", "test_failed_capture_warns", "test_wrapped_networks_are"),
    *(f"test_gpu_tiles.py::test_every_tile[{layer}-bfloat16]" for layer in ("G2", "D3", "D5", "G2-act")),
    *("test_gpu.py::test_layer[tf32-G5-64]", "test_gpu.py::test_compiled[", "::test_compiled_training["),
    *(f"{file}::test_layer[bfloat16-{layer}-64]" for file in ("test_gpu.py", "test_gpu_training.py")
      for layer in ("G1", "G2", "G5", "D1", "D2", "D5")),
]  # fmt: skip


class Dealt(NamedTuple):
    name: str
    checked: bool
    cost: float


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> list[list[Dealt]]:
    folder = tmp_path_factory.mktemp("dealing")
    (folder / "simulated_gpu_plugin.py").write_text(PLUGIN)
    paths = [str(folder), str(jobs.ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "ROWS": str(folder / "rows")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "simulated_gpu_plugin",
        "-p",
        "no:cacheprovider",
        "--collect-only",
    ]
    done = subprocess.run(
        [*command, "-m", "gpu", str(TESTS)],
        cwd=jobs.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(Path(folder / "rows").read_text())
    return [[Dealt(*row) for row in group] for group in rows]


@pytest.mark.parametrize("point", POINTS)
def test_the_check_includes_the_most_important_tests(dealt: list[list[Dealt]], point: str) -> None:
    assert [test for group in dealt for test in group if test.checked and point in test.name]


def test_groups(dealt: list[list[Dealt]]) -> None:
    """Checked tests first, then quick ones, then exhaustive tile tests; the longest first within a kind."""
    kinds = []
    for group in dealt:
        later = not group[0].checked
        kinds.append((later, later and "tile" in group[0].name, -sum(test.cost for test in group)))
    assert kinds == sorted(kinds)
    for group in dealt:
        assert len({(test.checked, "tile" in test.name, test.name.partition("::")[0]) for test in group}) == 1
        assert len(group) == 1 or sum(test.cost for test in group) <= 40
    layers = [group for group in dealt if "::test_layer[bfloat16-G3-1]" in group[0].name]
    names = [[test.name.partition("::")[2] for test in group] for group in layers]
    ragged = ["test_layer[bfloat16-G3-1]", "test_layer[bfloat16-G3-7]"]
    assert ragged in names
    assert [*ragged, "test_the_same_bits_twice[G3-bfloat16]"] in names


def test_layer_coverage(dealt: list[list[Dealt]]) -> None:
    """Every layer in every precision at one batch size, ragged batch sizes in one precision."""
    names = [test.name for group in dealt for test in group]
    assert len(names) == len(set(names))
    for file in ("test_gpu.py", "test_gpu_training.py"):
        cases = {
            tuple(name.partition("[")[2].rstrip("]").rsplit("-", 1))
            for name in names
            if name.startswith(f"{file}::test_layer[")
        }
        assert {batch for _, batch in cases} == {"1", "7", "64"}
        full = {case for case, batch in cases if batch == "64"}
        assert len(full) == 4 * 12
        for batch in ("1", "7"):
            assert {case for case, size in cases if size == batch} == {
                case for case in full if case.startswith("bfloat16-")
            }
