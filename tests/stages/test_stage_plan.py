"""Stages: order, seconds and deadlines of their steps, and the exit status; all processes are stubs."""

from __future__ import annotations

import argparse
import json
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench_main
from dcgan.kernels.gpu.tools import tune
from tests.gpu.__main__ import main, parser
from tests.gpu.stages import jobs, plan, suite
from tests.gpu.stages.jobs import Done
from tests.gpu.stages.plan import Step
from tests.gpu.stages.summary import LINES, Summary


def arguments(stage: str, out: Path) -> argparse.Namespace:
    return parser().parse_args([stage, "--out", str(out)])


@pytest.mark.parametrize(
    ("stage", "names", "seconds"),
    [
        ("check", ["smoke", "tests", "bench", "loop", "tune", "kernels"], 180),
        ("test", ["tests"], 150),
        ("tune", ["tune"], 75),
        ("bench", ["bench"], 120),
        ("kernels", ["kernels"], 45),
        ("all", ["smoke", "tests", "tune", "bench", "loop", "kernels"], 420),
        ("autotune", ["bench", "kernels"], 540),
        ("sanitize", ["sanitize"], 540),
        ("native", ["native"], 540),
    ],
)
def test_order_and_seconds(stage: str, names: list[str], seconds: float, tmp_path: Path) -> None:
    steps = plan.STAGES[stage](arguments(stage, tmp_path))
    assert [step.name for step in steps] == names
    assert sum(step.seconds for step in steps) <= seconds


class Ran:
    """Replaces the processes: records their arguments and returns a chosen status."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **ending: int | None) -> None:
        self.commands: dict[str, list[str]] = {}
        self.at_most: dict[str, float] = {}
        self.text: dict[str, str] = {}
        self.tested = suite.Tested([{"test": "a", "outcome": "passed", "seconds": 1.0, "reason": ""}])
        self.chosen: list[str] = []
        self._ending = ending
        monkeypatch.setattr(jobs, "run", self._run)
        monkeypatch.setattr(suite, "run", self._tests)

    def _run(self, arguments: Sequence[str], seconds: float, log: Path) -> Done:
        self.commands[log.stem], self.at_most[log.stem] = list(arguments), seconds
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(self.text.get(log.stem, "fine\n"))
        return Done(self._ending.get(log.stem, 0), 1.0, log)

    def _tests(self, folder: Path, end: float, processes: int, options: Sequence[str]) -> suite.Tested:
        self.at_most["tests"] = end - time.monotonic()
        self.chosen += options
        return self.tested

    def option(self, name: str, option: str) -> list[str]:
        command = self.commands[name]
        values = command[command.index(option) + 1 :]
        end = next((i for i, value in enumerate(values) if value.startswith("--")), len(values))
        return values[:end]


def perform(stage: str, out: Path) -> int:
    return plan.perform(stage, plan.STAGES[stage](arguments(stage, out)), out)


def test_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every test runs once; each piece stops beginning new work some time before it would be killed."""
    ran = Ran(monkeypatch)
    assert perform("all", tmp_path) == 0
    assert ran.chosen == ["-m", "gpu"]
    for name, seconds in (("tune", 70), ("bench", 118), ("kernels", 43)):
        minutes = float(ran.option(name, "--minutes")[0])
        assert 60 * minutes <= ran.at_most[name] - plan.RESERVED + 0.1
        assert ran.at_most[name] >= seconds - 1, "the step also gets the time left over"
        assert ran.option(name, "--out") == [str(tmp_path)]
    assert 60 * float(ran.option("tune", "--minutes")[0]) <= 70 - plan.RESERVED + 0.1, (
        "an endless piece gets only its own time"
    )
    assert 60 * float(ran.option("bench", "--minutes")[0]) > 118, "the time left over by the tests"
    assert ran.option("bench", "--batch") == ran.option("tune", "--batch") == ["64", "1024"]
    assert ran.option("bench", "--dtype") == ["bfloat16"]
    assert "--providers" not in ran.commands["bench"]
    out = capsys.readouterr()
    assert [line.split()[2] for line in out.err.splitlines()] == ["=="] * 6
    assert out.out.splitlines()[-1].startswith(f"archive: {tmp_path / 'gpu.tar.gz'} (0.0 MiB)")
    with tarfile.open(tmp_path / "gpu.tar.gz") as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert inside == {"all.txt", "tests.jsonl", *(f"logs/{name}.txt" for name in ran.commands)}


def test_check_has_one_row_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(monkeypatch)
    assert perform("check", tmp_path) == 0
    assert ran.chosen == ["-m", "gpu and check"]
    assert [ran.option(name, "--batch") for name in ("bench", "tune", "kernels")] == 3 * [["64"]]
    assert ran.option("bench", "--variants") == ["train-step", "cudnn-graph"], "providers that do not compile"
    assert ran.option("kernels", "--layer") == ["3"]
    assert ran.option("loop", "--batch") == ["64"]
    assert ran.option("kernels", "--out") == [str(tmp_path / "check")]
    assert perform("test", tmp_path) == 0
    assert ran.chosen[-1] == "gpu and not check", "no test runs twice"


def test_options_reach_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = ["--batch", "256", "--dtype", "tf32", "--providers", "eager", "--variants"]
    assert main(["bench", "--out", str(tmp_path), *options]) == 0
    assert ran.option("bench", "--batch") == ["256"]
    assert ran.option("bench", "--dtype") == ["tf32"]
    assert ran.option("bench", "--providers") == ["eager"]
    assert ran.option("bench", "--variants") == []


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "no GPU here" in capsys.readouterr().err


def test_a_failed_test_sets_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remaining steps still run."""
    ran = Ran(monkeypatch)
    failed = {"test": "tests/gpu/test_gpu.py::test_x", "outcome": "failed", "seconds": 1.0, "reason": "off"}
    ran.tested.outcomes.append(failed)
    ran.tested.missed.append("tests/gpu/test_gpu.py::test_y")
    assert perform("all", tmp_path) == 1
    assert list(ran.commands) == ["smoke", "tune", "bench", "loop", "kernels"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED tests: tests/gpu/test_gpu.py::test_x: off"
    assert any("1 passed, 1 failed, 0 skipped; 1 FAILED; not reached in time: tests/gpu" in x for x in lines)
    rows = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert rows[-1] == failed


def test_a_skipped_test_is_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ran(monkeypatch).tested.missed.append("tests/gpu/test_gpu.py::test_y")
    assert perform("test", tmp_path) == 0


@pytest.mark.parametrize(
    ("status", "output", "failure"),
    [
        (None, "compiling\n", "killed after 1 s: compiling"),
        (1, "Traceback\nRuntimeError: no\n", "exited with status 1: RuntimeError: no"),
        (2, "usage: \nerror: what\n", "exited with status 2: error: what"),
        (-11, "", "killed by signal 11: no output"),
    ],
)
def test_a_process_that_fails(
    status: int | None,
    output: str,
    failure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = Ran(monkeypatch, bench=status)
    ran.text["bench"] = output
    assert perform("bench", tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"FAILED bench: {failure}"


def test_results_are_read_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of a killed process; its status 1 is explained by the wrong result."""
    case = {"command": "generate", "batch": 64, "dtype": "bfloat16"}
    wrong = {"case": case, "provider": "fast-graph", "ours": True, "status": "wrong", "reason": "error 1 > 0"}
    row = json.dumps(wrong | {"images_per_s": None})
    (tmp_path / "generate.jsonl").write_text(f"{row}\n{row[:40]}")
    ran = Ran(monkeypatch, bench=1)
    ran.text["bench"] = "x\nnot reached in time: generate 1024\n"
    assert perform("bench", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED bench: generate 64 bfloat16 fast-graph: wrong: error 1 > 0"
    assert lines[1] == "== bench: 1 s; 1 FAILED; not reached in time: generate 1024"
    assert any(line.split() == ["fast-graph", "WRONG"] for line in lines)


def test_a_broken_machine_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(monkeypatch, smoke=plan.MACHINE_BROKEN)
    ran.text["smoke"] = "the machine does not work: no driver\n"
    assert perform("all", tmp_path) == 1
    assert list(ran.commands) == ["smoke"]
    assert "FAILED smoke: exited with status 3: the machine does not work" in capsys.readouterr().out


def test_a_step_without_time_left_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step gets its own time plus the time left over, or less if earlier steps took too long."""
    now = 0.0
    monkeypatch.setattr(plan.time, "monotonic", lambda: now)
    given: list[tuple[str, float, float]] = []

    def step(name: str, seconds: float, takes: float) -> Step:
        def go(own: float, at_most: float) -> Summary:
            nonlocal now
            given.append((name, own, at_most))
            now += takes
            return Summary(name)

        return Step(name, seconds, go)

    steps = [step("a", 10, 4), step("b", 10, 25), step("c", 7, 1), step("d", 20, 1)]
    assert plan.perform("x", steps, tmp_path) == 0
    assert given == [("a", 10, 10), ("b", 10, 16), ("d", 20, 18)]
    assert "== c: not reached in time: all of it" in capsys.readouterr().out


def test_a_step_that_raises_is_a_failure_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(own: float, at_most: float) -> Summary:
        raise ValueError("what")

    steps = [
        Step("a", 10, raises),
        Step("b", 10, lambda own, at_most: Summary("b", "1 s", shown=["row"] * 99)),
    ]
    assert plan.perform("x", steps, tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED a: ValueError: what"
    assert len(lines) == LINES
    assert (tmp_path / "x.txt").read_text().count("row\n") == 99


def test_tuning_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(monkeypatch)
    ran.text["tune"] = (
        "up … 3 µs\nup/16bit … WRONG: error 0.5\n40 problems in x; not reached in time: wgrad\n"
    )
    assert perform("tune", tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[:3] == [
        "FAILED tune: up/16bit … WRONG: error 0.5",
        "== tune: 1 s; 1 FAILED; not reached in time: wgrad",
        "40 problems in x",
    ]


def test_the_training_loop_is_left_out_without_the_packages_of_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(monkeypatch)
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    assert perform("check", tmp_path) == 0
    assert "loop" not in ran.commands
    assert "pydantic is not installed" in capsys.readouterr().out


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parsers accept the command line of every benchmark."""
    taken: list[str] = []
    for name in ("compare.Races.run", "kernels.run", "loop.run"):
        monkeypatch.setattr(f"bench.{name}", lambda *given, name=name: taken.append(name) or 0)
    monkeypatch.setattr(tune, "tune", lambda *given: taken.append("tune") or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsers = {
        "bench": bench_main.main,
        "dcgan.kernels.gpu.tools.tune": tune.main,
    }
    others = {"tests.gpu.stages.smoke", "tests.gpu.stages.sanitize"}
    for stage in ("check", "all", "autotune", "sanitize"):
        ran = Ran(monkeypatch)
        perform(stage, tmp_path)
        for module_name, *given in ran.commands.values():
            assert module_name in others or parsers[module_name](given) == 0
    assert taken[:4] == ["compare.Races.run", "loop.run", "tune", "kernels.run"]
    assert taken[4:8] == ["tune", "compare.Races.run", "loop.run", "kernels.run"]
    assert taken[8:] == ["compare.Races.run", "kernels.run"]
