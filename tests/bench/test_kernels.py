"""``python -m bench kernels``: contestants against float64, the file, the time, the table; without a GPU."""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from statement import Problem, gradients, leaves, state
from torch import Tensor

from bench import kernels, warm
from bench.__main__ import main
from bench.budget import Budget
from bench.ceiling import Ceiling
from bench.kernels import Entry, Stage
from bench.layers import of_gradient, of_product
from bench.stats import Spread, summarise
from dcgan import models
from dcgan.kernels import gpu
from dcgan.kernels.call import Backward, Call
from dcgan.kernels.gpu import aten, products, tiles

RATE = Ceiling(1e12, 1e11, "a stand-in")

PROBLEMS = [
    Problem(True, 3, 6, 4, (4, 4), prologue=True, in_act="relu", stats=True),
    Problem(True, 3, 5, 2, (4, 4), prologue=True, in_act="relu", out_act="tanh"),
    Problem(True, 3, 6, 4, (1, 1), stride=1, padding=0, stats=True),
    Problem(False, 3, 2, 5, (8, 6), out_act="leaky_relu"),
    Problem(False, 3, 4, 6, (8, 8), prologue=True, in_act="leaky_relu", stats=True),
    Problem(False, 3, 6, 1, (4, 4), stride=1, padding=0, prologue=True, out_act="sigmoid"),
]


def detached(call: Call) -> Call:
    return Call(*[v.detach() if isinstance(v, Tensor) else v for v in call])


def operations(problem: Problem) -> tuple[list[Any], list[tuple[Tensor, ...]]]:
    """The forward, the adjoint and the weight gradient of a call, and what they are to give."""
    call = problem.call(requires_grad=True)
    outputs = state(call, problem.transposed)
    given = problem.cotangents(call)
    wanted = gradients(outputs, given, leaves(call))
    y, mean, var = (t.detach() for t in outputs)
    call = detached(call)
    back = Backward(
        *given, call.x, call.weight, call.center, call.scale, call.shift, call.in_act, None, call.out_act, y,
        mean if call.stats else None, call.stats, call.slope, call.stride, call.padding,
        (True, True, True, False, False),
    )  # fmt: skip
    transposed = problem.transposed
    forward = products.forward(call, transposed, gpu.output(call, transposed))
    adjoint = products.adjoint(back, transposed, torch.empty_like(call.x))
    sums = (wanted["shift"], wanted["scale"]) if problem.prologue else ()
    return (
        [forward, adjoint, products.weight_gradient(back, transposed)],
        [(y, mean, var) if call.stats else (y,), (wanted["x"], *sums), (wanted["weight"],)],
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_plain_pytorch_computes_what_a_launch_does(problem: Problem) -> None:
    """The function that Inductor gets, and that checks the kernels, against autograd in float64."""
    for it, wanted in zip(*operations(problem), strict=True):
        for got, want in zip(aten.compute(it), wanted, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("problem", PROBLEMS[1:2], ids=str)
def test_it_compiles_whole(problem: Problem) -> None:
    torch._dynamo.reset()
    for it, wanted in zip(*operations(problem), strict=True):
        torch._dynamo.reset()
        got = torch.compile(aten.compute, fullgraph=True, dynamic=False, backend="aot_eager")(it)
        for one, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, want)
    torch._dynamo.reset()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_convolution_alone_is_that_of_eager(problem: Problem) -> None:
    """What cuDNN is timed with: from its result and the epilogue follows the launch's."""
    forward, adjoint, gradient = operations(problem)[0]
    call = detached(problem.call())
    convolve = torch.conv_transpose2d if problem.transposed else torch.conv2d
    it, (x,) = kernels.prepared(of_product("", "forward", forward))
    y = kernels.bare(it, (x,))
    torch.testing.assert_close(y, convolve(x, call.weight, None, call.stride, call.padding))
    du = aten.prepared(adjoint.x, adjoint.prologue, adjoint.slope)
    leaf, weight = x.clone().requires_grad_(), call.weight.clone().requires_grad_()
    dx, dw = torch.autograd.grad(convolve(leaf, weight, None, call.stride, call.padding), (leaf, weight), du)
    it, (operand,) = kernels.prepared(of_product("", "dgrad", adjoint))
    torch.testing.assert_close(kernels.bare(it, (operand,)), dx)
    it, both = kernels.prepared(of_gradient("", gradient, call.weight))
    torch.testing.assert_close(kernels.bare(it, both), dw)


def test_error_sees_what_is_not_finite() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert aten.error([one * 1.5], [one]) == pytest.approx(0.5)
    assert aten.error([one, torch.full((3,), float("nan"))], [one, one]) == float("inf")


# --- the stage ---------------------------------------------------------------------------------------------


def networks() -> dict[str, Any]:
    return {"G": models.Generator(6, 1, 4, 32), "D": models.Discriminator(1, 4, 32)}


def once(calls: Sequence[Callable[[], Any]]) -> Spread:
    """Runs every call, and says that it took a microsecond."""
    for call in calls:
        call()
    return summarise([1e-6])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.ceiling.measure", lambda device, dtype: RATE)


def stage(out: Path, budget: Budget | None = None) -> Stage:
    return Stage(out, budget or Budget(10), "cpu", once, networks, sets=2)


def test_what_is_measured_is_written_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage(tmp_path).run([2], ["bfloat16"], ["cudnn", "eager"]) == 0
    assert "not reached in time: nothing" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / kernels.FILE).read_text().splitlines()]
    assert all(row["status"] == "ok" for row in rows)
    phases = {(row["network"], row["phase"], row["contestant"]) for row in rows}
    assert {p for n, p, who in phases if (n, who) == ("D", "cudnn")} == {"forward", "dgrad", "wgrad"}
    assert {p for n, p, who in phases if (n, who) == ("G", "eager")} == {"forward", "sum"}
    first = next(row for row in rows if row["network"] == "G")["layer"]
    assert not [row for row in rows if (row["layer"], row["phase"]) == (first, "dgrad")], "z has no gradient"
    assert all(row[f"{row['contestant']}_us"] == pytest.approx(1.0) for row in rows)

    def never(calls: Sequence[Callable[[], Any]]) -> Spread:
        raise AssertionError("measured again")

    again = Stage(tmp_path, Budget(10), "cpu", never, networks, sets=2)
    assert again.run([2], ["bfloat16"], ["cudnn", "eager"]) == 0
    assert len((tmp_path / kernels.FILE).read_text().splitlines()) == len(rows)


def test_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The clock passes a minute a look: some is measured, the rest is named, and the next run does it."""
    now = iter(range(0, 10**6, 60))
    budget = Budget(8, clock=lambda: float(next(now)))
    stage(tmp_path, budget).run([2], ["bfloat16"], ["cudnn"])
    out = capsys.readouterr().out
    rows = (tmp_path / kernels.FILE).read_text().splitlines()
    assert 0 < len(rows) < 22
    assert "not reached in time: " in out
    assert "D batch 2 bfloat16 cudnn" in out.splitlines()[-1]
    stage(tmp_path).run([2], ["bfloat16"], ["cudnn"])
    assert len((tmp_path / kernels.FILE).read_text().splitlines()) == 4 * 3 + 3 * 3 + 2


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = kernels.bare
    monkeypatch.setattr(
        kernels,
        "bare",
        lambda it, operands: bare(it, operands) * (1.1 if operands[0].dtype != torch.double else 1),
    )
    stage(tmp_path).run([2], ["bfloat16"], ["cudnn"])
    rows = [json.loads(line) for line in (tmp_path / kernels.FILE).read_text().splitlines()]
    assert {row["status"] for row in rows} == {"wrong"}
    assert all(row["error"] == pytest.approx(0.1, abs=0.01) and "us" not in row for row in rows)


def test_another_gpu_or_version_is_measured_for_itself(tmp_path: Path) -> None:
    stage(tmp_path).run([2], ["bfloat16"], ["eager"])
    path = tmp_path / kernels.FILE
    rows = path.read_text().splitlines()
    path.write_text("\n".join(line.replace('"torch": "', '"torch": "0.') for line in rows) + "\n")
    stage(tmp_path).run([2], ["bfloat16"], ["eager"])
    assert len(path.read_text().splitlines()) == 2 * len(rows)


def test_what_is_timed_is_compiled_before_it_is_chosen(tmp_path: Path) -> None:
    """By other processes, each problem once, with the tile that should be chosen; of the layers wanted."""
    asked: list[tuple[warm.Where, tiles.Tile]] = []

    class Compilers:
        def submit(self, where: warm.Where, tile: tiles.Tile, processors: int) -> Any:
            asked.append((where, tile))
            return types.SimpleNamespace(exception=lambda: None)

    compilers: Any = Compilers()
    stage(tmp_path)._precompile(compilers, "D", 64, "bfloat16", ["64→128 @32→16"])
    listed = warm.listed("D", 1, 64, "bfloat16", "meta")
    of = [listed[where.position] for where, _ in asked]
    assert [(layer.name, layer.phase) for layer in of] == [
        ("64→128 @32→16", phase) for phase in ("forward", "dgrad", "wgrad", "wgrad")
    ]
    assert len({layer.problem.key() for layer in of}) == len(of)
    assert [tile for _, tile in asked] == [tiles.estimate(layer.problem, 132) for layer in of]


def figures(us: float, **more: Any) -> dict[str, Any]:
    return {"status": "ok", "us": us} | more


def test_the_table(tmp_path: Path) -> None:
    made = stage(tmp_path)
    of = Entry("G", "64→32 @4→8", "forward", 64, "bfloat16")
    for phase in kernels.PHASES:
        made._keep(
            of._replace(phase=phase), "ours", figures(20.0, predicted_us=15.0, flops=10**7, bytes=10**5)
        )
        made._keep(of._replace(phase=phase), "cudnn", figures(30.0))
    made._keep(of._replace(phase="pack"), "ours", figures(5.0))
    made._keep(of, "eager", figures(50.0))
    made._keep(of._replace(phase="sum"), "eager", figures(170.0))
    made._keep(of, "inductor", {"status": "failed", "reason": "no such template"})
    console = Console(width=140, record=True)
    console.print(made.table("G", 64, "bfloat16", RATE))
    lines = [line.split() for line in console.export_text().splitlines() if "@4→8" in line]
    # 10⁷ FLOP at 10¹² FLOP/s are 10 µs
    assert lines[0][2:] == ["forward", "20.0", "50%", "15.0", "30.0", "50.0", "FAILED"]
    assert lines[1][2:] == ["dgrad", "20.0", "50%", "15.0", "30.0", "–", "–"]
    assert lines[3][2:] == ["pack", "5.0", "–", "–", "–", "–", "–"]
    assert lines[4][2:] == ["sum", "65.0", "46%", "45.0", "90.0", "170.0", "–"]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / kernels.FILE).write_text("not JSON\n")
    with pytest.raises(kernels.UsageError, match=r"kernels\.jsonl:1 is not JSON"):
        stage(tmp_path)


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["kernels"], ["gpu", "tune"], ["gpu", "bench"], ["gpu", "sanitize"]])
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--minutes", "0"], "must be a positive number of minutes, got '0'"),
        (["--out", "x", "--batch", "0"], "must be a whole number from 1"),
        (["--out", "x", "--dtype", "float32"], "invalid choice: 'float32'"),
        (["--out", "x", "--contestants", "jax"], "invalid choice: 'jax'"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_budget() -> None:
    now = 0.0
    budget = Budget(1, clock=lambda: now)
    assert budget.allows("first")
    assert budget.report() == "not reached in time: nothing"
    now = 60.0
    assert not budget.allows("second")
    assert not budget.allows("third")
    assert budget.report() == "not reached in time: second, third"
    assert Budget(1).allows("by the clock"), time.monotonic()
