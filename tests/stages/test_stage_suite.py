"""Tests distributed over processes: every test runs once even if a process dies; uses a dummy test suite."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path

import pytest

from tests.gpu.stages import suite
from tests.gpu.stages.suite import Deal

MIXED = """
    import os, pytest, sys
    sys.path.insert(0, {folder!r})

    def ran(request):
        with open({folder!r} + "/ran", "a") as file:
            file.write(f"{{os.getpid()}} {{request.node.name}}\\n")

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("layer", ["G1", "G2"])
    def test_layer(layer, batch, request):
        ran(request)

    @pytest.mark.check
    def test_important(request):
        ran(request)

    @pytest.mark.parametrize("number", range(3))
    def test_dies(number, request):
        ran(request)
        if number == 1:
            os._exit(11)

    @pytest.mark.parametrize("number", range(3))
    def test_leaves_the_gpu_unusable(number, request, monkeypatch):
        ran(request)
        if number == 0:
            from tests.gpu import dealing
            dealing.usable = lambda: False
            assert "capture" == "failed", "it did\\nand this is a second line"

    def test_fails_plainly(request):
        ran(request)
        assert request is None

    def test_skipped():
        pytest.skip("no such GPU")

    @pytest.mark.slow
    def test_not_chosen():
        raise AssertionError
"""


def write(folder: Path, text: str) -> Path:
    tests = folder / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text(textwrap.dedent(text))
    (tests / "pytest.ini").write_text("[pytest]\nmarkers =\n    check:\n    slow:\n")
    return tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("suite")


@pytest.fixture(scope="module")
def tested(folder: Path) -> suite.Tested:
    tests = write(folder, MIXED.format(folder=str(folder)))
    return suite.run(folder / "deal", time.monotonic() + 120, 2, ["-m", "not slow"], tests)


def test_every_test_runs_once(tested: suite.Tested, folder: Path) -> None:
    ran = [line.split()[1] for line in (folder / "ran").read_text().splitlines()]
    assert len(ran) == len(set(ran)) == 12
    assert (tested.count("passed"), tested.count("failed"), tested.count("skipped")) == (9, 3, 1)
    assert not tested.missed
    assert not tested.problems


def test_failures_have_a_one_line_reason(tested: suite.Tested) -> None:
    failures = {failure.split("::")[1].partition(": ")[0]: failure for failure in tested.failures}
    assert failures["test_dies[1]"].endswith(": the process exited with status 11")
    assert failures["test_leaves_the_gpu_unusable[0]"].endswith(": AssertionError: it did")
    assert "test_fails_plainly: " in failures["test_fails_plainly"]
    assert not any("\n" in failure for failure in failures.values())
    skipped = next(record for record in tested.outcomes if record["outcome"] == "skipped")
    assert skipped["reason"] == "Skipped: no such GPU"


def test_a_traceback_is_kept(tested: suite.Tested, folder: Path) -> None:
    logs = "".join(path.read_text() for path in (folder / "deal").glob("pytest-*.txt"))
    assert "and this is a second line" in logs
    assert ">       assert request is None" in logs


def test_tests_that_share_kernels_share_a_process(tested: suite.Tested, folder: Path) -> None:
    ran = [line.split() for line in (folder / "ran").read_text().splitlines()]
    for layer in ("G1", "G2"):
        assert len({process for process, name in ran if name.startswith(f"test_layer[{layer}")}) == 1


def test_checked_tests_are_first(tested: suite.Tested, folder: Path) -> None:
    collected = json.loads((folder / "deal" / "collected.json").read_text())
    assert collected[0].endswith("::test_important")
    assert {test.partition("[")[0] for test in collected[-2:]} == {
        "test_it.py::test_fails_plainly",
        "test_it.py::test_skipped",
    }, "small groups are last"


def test_a_process_that_dies_or_cannot_continue_is_replaced(tested: suite.Tested, folder: Path) -> None:
    """The remaining tests of its group still run."""
    ran = [line.split() for line in (folder / "ran").read_text().splitlines()]
    by = {name: process for process, name in ran}
    assert by["test_dies[0]"] == by["test_dies[1]"] != by["test_dies[2]"]
    assert by["test_leaves_the_gpu_unusable[0]"] != by["test_leaves_the_gpu_unusable[1]"]
    assert len({process for process, _ in ran}) >= 3


def test_time_limit(tmp_path: Path) -> None:
    """A hanging test is killed, tests that were not started are listed, and the run ends in time."""
    tests = write(
        tmp_path,
        """
        import pytest, time

        @pytest.mark.check
        def test_quick():
            pass

        @pytest.mark.check
        @pytest.mark.parametrize("layer", ["x"])
        def test_hangs(layer):
            time.sleep(600)

        def test_later():
            pass
        """,
    )
    end = time.monotonic() + 16
    tested = suite.run(tmp_path / "deal", end, 1, [], tests, grace=2)
    assert time.monotonic() < end + 3
    assert [record["outcome"] for record in tested.outcomes] == ["passed", "failed"]
    assert tested.failures[0].endswith("test_hangs[x]: killed, as the time was up")
    assert [test.partition("::")[2] for test in tested.missed] == ["test_later"]


def test_a_collection_error_is_reported(tmp_path: Path) -> None:
    tests = write(tmp_path, "import no_such_module")
    tested = suite.run(tmp_path / "deal", time.monotonic() + 60, 1, [], tests)
    assert not tested.outcomes
    (problem,) = tested.failures
    assert problem.startswith("pytest-0.txt exited with status 2: ")


def test_an_incomplete_line_is_skipped(tmp_path: Path) -> None:
    """As a process that is killed while writing leaves it."""
    folder = Deal(tmp_path)
    folder.write(7, test="a", outcome="started", begun=0.0)
    with (tmp_path / "outcomes-7.jsonl").open("a") as file:
        file.write('{"test": "a", "outc')
    assert folder.outcomes() == {}
    with (tmp_path / "outcomes-7.jsonl").open("a") as file:
        file.write("\n")
    assert folder.fail(7, "it died")
    assert folder.outcomes()["a"]["reason"] == "it died"
    assert not folder.fail(8, "it ran nothing")
