"""Tests of ``python -m bench kernels`` without a GPU: checks against float64, results file, budget, table."""

from __future__ import annotations

import json
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench import kernels
from bench.__main__ import main
from bench.kernels import Entry, Stage
from bench.machine import Ceiling
from bench.timing import Budget, Spread, summarise
from dcgan.kernels.gpu import aten, executor, tiles, tuning
from dcgan.kernels.gpu.launcher import Product
from dcgan.kernels.gpu.tools import layers
from dcgan.kernels.gpu.tools.layers import Layer, Shape, discriminator, generator, training
from dcgan.kernels.spec import Backward, Call, specify
from tests.support.float64_reference import Problem, expected_outputs, gradients, leaves

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


def operations(problem: Problem) -> tuple[list[Product], list[tuple[Tensor, ...]]]:
    """Return the forward, dgrad and wgrad products of a call, and their expected results."""
    call = problem.call(requires_grad=True)
    outputs = expected_outputs(call, problem.transposed)
    given = problem.cotangents(call)
    expected = gradients(outputs, given, leaves(call))
    y, mean, var = (t.detach() for t in outputs)
    call = detached(call)
    back = Backward(
        *given, call.x, call.weight, call.center, call.scale, call.shift, call.in_act, None, call.out_act, y,
        mean if call.stats else None, call.stats, call.slope, call.stride, call.padding,
        (True, True, True, False, False),
    )  # fmt: skip
    transposed = problem.transposed
    forward = executor.fprop(specify(call, transposed), call, torch.empty_like(y))
    adjoint = executor.dgrad(back, transposed, torch.empty_like(call.x))
    sums = (expected["shift"], expected["scale"]) if problem.prologue else ()
    return (
        [forward, adjoint, executor.wgrad(back, transposed)],
        [(y, mean, var) if call.stats else (y,), (expected["x"], *sums), (expected["weight"],)],
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_aten_compute_matches_autograd(problem: Problem) -> None:
    """The function that Inductor compiles, and that checks the kernels, matches autograd in float64."""
    for it, wanted in zip(*operations(problem), strict=True):
        for got, want in zip(aten.compute(it), wanted, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("problem", PROBLEMS[1:2], ids=str)
def test_aten_compute_compiles_as_one_graph(problem: Problem) -> None:
    torch._dynamo.reset()
    for it, wanted in zip(*operations(problem), strict=True):
        torch._dynamo.reset()
        got = torch.compile(aten.compute, fullgraph=True, dynamic=False, backend="aot_eager")(it)
        for one, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, want)
    torch._dynamo.reset()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_convolution_only_matches_eager(problem: Problem) -> None:
    """The convolution that cuDNN is timed with matches PyTorch and autograd."""
    forward, adjoint, gradient = operations(problem)[0]
    call = detached(problem.call())
    convolve = torch.conv_transpose2d if problem.transposed else torch.conv2d
    (x,) = kernels.operands(forward)
    y = aten.convolve(kernels.channels_last_weight(forward), x)
    torch.testing.assert_close(y, convolve(x, call.weight, None, call.stride, call.padding))
    du = aten.apply_prologue(adjoint.spec.x, adjoint.x, adjoint.spec.slope)
    leaf, weight = x.clone().requires_grad_(), call.weight.clone().requires_grad_()
    dx, dw = torch.autograd.grad(convolve(leaf, weight, None, call.stride, call.padding), (leaf, weight), du)
    it = kernels.channels_last_weight(adjoint)
    torch.testing.assert_close(aten.convolve(it, *kernels.operands(it)), dx)
    torch.testing.assert_close(aten.convolve(gradient, *kernels.operands(gradient)), dw)


def test_error_of_nonfinite_results_is_infinite() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert aten.error([one * 1.5], [one]) == pytest.approx(0.5)
    assert aten.error([one, torch.full((3,), float("nan"))], [one, one]) == float("inf")


def dgrad_after_batchnorm(batch: int, dtype: str, groups: int = 1) -> Product:
    """Return the dgrad of a layer of D, whose epilogue is BatchNorm's backward on 16 maps of 8×8."""
    torch.manual_seed(0)
    steps = training(discriminator(1, 8, 32), batch, dtype, groups=groups)
    layer = next(layer for layer in steps if (layer.name, layer.phase) == ("16→32 @8→4", "dgrad"))
    return layer.product("cpu")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
def test_gradient_through_batchnorm(dtype: str, groups: int) -> None:
    """One rounding of du is right. Two, of which the second adds the smallest terms, are wrong."""
    it = dgrad_after_batchnorm(64, dtype, groups)
    expected = kernels._expected(it)
    found = kernels.computed(it)
    assert aten.error(found, expected) <= kernels.TOLERANCE[dtype]
    if dtype == "tf32":
        return
    g, _, _, factor, offset, du, _ = found
    assert kernels.misrounded(it, g, factor, offset, du) < 1e-4
    zero = torch.zeros_like(factor)
    scaled = kernels.applied(it, g, zero, zero)[0].to(g.dtype)
    terms = kernels.applied(it, torch.zeros_like(g), factor, offset)[0]
    twice = (scaled + terms).to(g.dtype)
    assert aten.error([twice], [expected[5]]) < kernels.TOLERANCE[dtype], "this does not detect it"
    for wrong in (twice, scaled):
        assert kernels.misrounded(it, g, factor, offset, wrong) > 0.1 > kernels.TOLERANCE[dtype]


def test_results_of_a_gradient_through_batchnorm_match_autograd() -> None:
    """For two groups, whose data have exactly the statistics that are assumed."""
    it = aten.cast(dgrad_after_batchnorm(4, "tf32", 2), torch.float64)
    mean, _, scale, shift = layers.stats_of(it)
    images = len(it.y.other) // 2
    halves = it.y.other.chunk(2)
    own = [torch.var_mean(half, (0, 2, 3), correction=0, keepdim=True) for half in halves]
    y = torch.cat([(half - mean) / var.sqrt() for half, (var, mean) in zip(halves, own, strict=True)])
    y = (y + mean.repeat_interleave(images, 0)[:, :, None, None]).requires_grad_()
    gamma = scale * (1 + layers.EPS) ** 0.5
    x_hat = [
        F.leaky_relu(F.batch_norm(half, None, None, gamma[i], shift[i], training=True, eps=layers.EPS), 0.2)
        for i, half in enumerate(y.chunk(2))
    ]
    out = F.conv2d(torch.cat(x_hat), it.weight, None, it.spec.stride, it.spec.padding)
    (want,) = torch.autograd.grad(out, y, it.x.ptr)
    *_, du, found = kernels.computed(it._replace(y=it.y._replace(other=y.detach())))
    torch.testing.assert_close(du, want)
    torch.testing.assert_close(found, torch.cat(x_hat).detach())


# --- the stage ---------------------------------------------------------------------------------------------


NETWORKS: dict[str, list[Shape]] = {"G": generator(1, 6, 4, 32), "D": discriminator(1, 4, 32)}


def run_once(calls: Sequence[Callable[[], Any]]) -> Spread:
    """Run every call and report a time of one microsecond."""
    for call in calls:
        call()
    return summarise([1e-6])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.measure", lambda device, dtype: RATE)


def stage(out: Path, budget: Budget | None = None) -> Stage:
    return Stage(out, budget or Budget(10), "cpu", run_once, NETWORKS, sets=2)


def test_existing_results_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage(tmp_path).run([2], ["bfloat16"], ["cudnn", "eager"]) == 0
    assert "not reached in time: nothing" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / kernels.FILE).read_text().splitlines()]
    assert all(row["status"] == "ok" for row in rows)
    phases = {(row["network"], row["phase"], row["contestant"]) for row in rows}
    assert {p for n, p, provider in phases if (n, provider) == ("D", "cudnn")} == {
        "forward",
        "dgrad",
        "wgrad",
    }
    assert {p for n, p, provider in phases if (n, provider) == ("G", "eager")} == {"forward", "sum"}
    first = next(row for row in rows if row["network"] == "G")["layer"]
    assert not [row for row in rows if (row["layer"], row["phase"]) == (first, "dgrad")], "z has no gradient"
    assert all(row[f"{row['contestant']}_us"] == pytest.approx(1.0) for row in rows)

    def never(calls: Sequence[Callable[[], Any]]) -> Spread:
        raise AssertionError("measured again")

    second = Stage(tmp_path, Budget(10), "cpu", never, NETWORKS, sets=2)
    assert second.run([2], ["bfloat16"], ["cudnn", "eager"]) == 0
    assert len((tmp_path / kernels.FILE).read_text().splitlines()) == len(rows)


def test_exhausted_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a clock that advances a minute per reading, the rest is reported and measured by the next run."""
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


def test_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convolve = aten.convolve

    def wrong(it: Product, *operands: Tensor) -> Tensor:
        return convolve(it, *operands) * (1.1 if operands[0].dtype != torch.double else 1)

    monkeypatch.setattr(aten, "convolve", wrong)
    stage(tmp_path).run([2], ["bfloat16"], ["cudnn"])
    rows = [json.loads(line) for line in (tmp_path / kernels.FILE).read_text().splitlines()]
    assert {row["status"] for row in rows} == {"wrong"}
    assert all(row["error"] == pytest.approx(0.1, abs=0.01) and "us" not in row for row in rows)


def test_results_of_another_version_are_measured_again(tmp_path: Path) -> None:
    stage(tmp_path).run([2], ["bfloat16"], ["eager"])
    path = tmp_path / kernels.FILE
    rows = path.read_text().splitlines()
    path.write_text("\n".join(line.replace('"torch": "', '"torch": "0.') for line in rows) + "\n")
    stage(tmp_path).run([2], ["bfloat16"], ["eager"])
    assert len(path.read_text().splitlines()) == 2 * len(rows)


def test_precompilation(tmp_path: Path) -> None:
    """Each problem of the requested layers is compiled once, with the tile predicted to be selected."""
    submitted: list[tuple[Layer, tiles.Tile]] = []

    class Compilers:
        def submit(self, layer: Layer, tile: tiles.Tile, sms: int) -> Any:
            submitted.append((layer, tile))
            return types.SimpleNamespace(exception=lambda: None)

    compilers: Any = Compilers()
    steps = [x for x in training(discriminator(), 64, "bfloat16") if x.name == "64→128 @32→16"]
    stage(tmp_path)._precompile(compilers, steps)
    compiled = [layer for layer, _ in submitted]
    assert [layer.phase for layer in compiled] == ["forward", "wgrad", "dgrad"]
    assert len({layer.problem.key() for layer in compiled}) == len(compiled)
    assert [tile for _, tile in submitted] == [tuning.estimate(layer.problem, 132) for layer in compiled]


def result(us: float, **more: Any) -> dict[str, Any]:
    return {"status": "ok", "us": us} | more


def test_table(tmp_path: Path) -> None:
    made = stage(tmp_path)
    base = Entry("G", "64→32 @4→8", "forward", 64, "bfloat16")
    for phase in kernels.PHASES:
        made._record(
            base._replace(phase=phase), "ours", result(20.0, predicted_us=15.0, flops=10**7, bytes=10**5)
        )
        made._record(base._replace(phase=phase), "cudnn", result(30.0))
    made._record(base._replace(phase="pack"), "ours", result(5.0))
    made._record(base, "eager", result(50.0))
    made._record(base._replace(phase="sum"), "eager", result(170.0))
    made._record(base, "inductor", {"status": "failed", "reason": "no such template"})
    console = Console(width=140, record=True)
    console.print(made.table("G", 64, "bfloat16", RATE))
    lines = [line.split() for line in console.export_text().splitlines() if "@4→8" in line]
    # 10⁷ FLOP at 10¹² FLOP/s are 10 µs
    assert lines[0][2:] == ["forward", "20.0", "50%", "15.0", "30.0", "50.0", "FAILED"]
    assert lines[1][2:] == ["dgrad", "20.0", "50%", "15.0", "30.0", "–", "–"]
    assert lines[3][2:] == ["pack", "5.0", "–", "–", "–", "–", "–"]
    assert lines[4][2:] == ["sum", "65.0", "46%", "45.0", "90.0", "170.0", "–"]


def test_invalid_results_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / kernels.FILE).write_text("not JSON\n")
    with pytest.raises(kernels.UsageError, match=r"kernels\.jsonl:1 is not JSON"):
        stage(tmp_path)


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["kernels"], ["gpu", "tune"], ["gpu", "bench"], ["gpu", "sanitize"]])
def test_commands_need_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]) -> None:
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
        (["--out", "x", "--providers", "jax"], "invalid choice: 'jax'"),
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
