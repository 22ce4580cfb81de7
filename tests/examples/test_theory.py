"""``examples/theory.py``: closed forms, inequalities for any discriminator, training, and usage errors."""

from __future__ import annotations

import itertools
import json
import math
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from scipy.integrate import quad
from typer.testing import CliRunner

from dcgan.cli import app as dcgan
from dcgan.errors import RunError
from examples import theory
from examples.theory import Pair, parse

SPECS = [
    "normal:0,1",
    "normal:-1,0.5",
    "normal:3,0.01",
    "uniform:-1,2",
    "uniform:1.5,1.6",
    "laplace:0.5,0.7",
    "mixture:1,-2,0.3/3,1,1",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: nothing here is large enough for two, and waiting for a busy core takes long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(p: str, q: str) -> Pair:
    return Pair(parse(p), parse(q))


@st.composite
def specs(draw: st.DrawFn) -> str:
    location = st.floats(-5, 5).map(lambda v: round(v, 3))
    scale = st.floats(0.01, 5).map(lambda v: round(v, 3))
    family = draw(st.sampled_from(sorted(theory.SPECS)))
    if family == "uniform":
        low = draw(location)
        return f"uniform:{low},{low + draw(scale)}"
    if family == "mixture":
        parts = draw(st.lists(st.tuples(scale, location, scale), min_size=1, max_size=3))
        return "mixture:" + "/".join(f"{w},{m},{s}" for w, m, s in parts)
    return f"{family}:{draw(location)},{draw(scale)}"


@pytest.mark.parametrize(
    ("spec", "reference"),
    [
        ("normal:-1,0.5", stats.norm(-1, 0.5)),
        ("uniform:-1,2", stats.uniform(-1, 3)),
        ("laplace:0.5,0.7", stats.laplace(0.5, 0.7)),
    ],
)
def test_densities_match_scipy(spec: str, reference: stats.rv_continuous) -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    density = parse(spec)
    np.testing.assert_allclose(density.log(x), reference.logpdf(x.numpy()), rtol=1e-12)
    assert density.distribution.mean == pytest.approx(reference.mean())
    assert density.distribution.stddev == pytest.approx(reference.std())
    assert reference.cdf(density.breaks[0]) < 1e-15
    assert reference.sf(density.breaks[-1]) < 1e-15
    torch.manual_seed(0)
    assert stats.kstest(density.distribution.sample((5000,)).numpy(), reference.cdf).pvalue > 1e-3


def test_a_mixture_is_the_weighted_sum_of_its_normals() -> None:
    x = np.linspace(-5, 5, 101)
    expected = 0.25 * stats.norm(-2, 0.3).pdf(x) + 0.75 * stats.norm(1, 1).pdf(x)
    np.testing.assert_allclose(
        parse("mixture:1,-2,0.3/3,1,1").log(torch.from_numpy(x)).exp(), expected, rtol=1e-12
    )


@pytest.mark.parametrize("spec", SPECS)
def test_equal_densities(spec: str) -> None:
    same = pair(spec, spec)
    assert torch.equal(torch.sigmoid(same.optimal_logit(same.x)), torch.full_like(same.x, 0.5))
    assert same.jsd() == pytest.approx(0, abs=1e-12)
    assert same.optimal_value() == pytest.approx(-2 * math.log(2), abs=1e-10)
    assert same.mean_under(same.density_p, torch.ones_like(same.x)) == pytest.approx(1, abs=1e-12)


def test_disjoint_uniforms() -> None:
    disjoint = pair("uniform:0,1", "uniform:2,5")
    assert disjoint.jsd() == pytest.approx(math.log(2), abs=1e-12)
    assert disjoint.optimal_value() == pytest.approx(0, abs=1e-12)
    x = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    assert torch.sigmoid(disjoint.optimal_logit(x)).tolist() == [1, 0.5, 0]


def test_overlapping_uniforms_by_hand() -> None:
    """p on [0, 2], q on [1, 3]: half of each lies where D* = ½, half where D* is certain."""
    half = pair("uniform:0,2", "uniform:1,3")
    assert half.jsd() == pytest.approx(math.log(2) / 2, abs=1e-12)
    assert half.optimal_value() == pytest.approx(-math.log(2), abs=1e-12)


@pytest.mark.parametrize("p", SPECS)
@pytest.mark.parametrize("q", SPECS)
def test_identity(p: str, q: str) -> None:
    both = pair(p, q)
    assert both.optimal_value() == pytest.approx(2 * both.jsd() - 2 * math.log(2), abs=1e-9)


def test_jsd_matches_quadpack() -> None:
    p, q = stats.norm(-1, 0.5), stats.laplace(0.5, 0.7)

    def kl(a: stats.rv_continuous, b: stats.rv_continuous) -> float:
        def integrand(x: float) -> float:
            log_m = np.logaddexp(a.logpdf(x), b.logpdf(x)) - np.log(2)
            return float(a.pdf(x) * (a.logpdf(x) - log_m))

        return float(quad(integrand, -20, 20, points=[-3, -1, 0.5, 2], epsabs=1e-10)[0])

    expected = (kl(p, q) + kl(q, p)) / 2
    assert pair("normal:-1,0.5", "laplace:0.5,0.7").jsd() == pytest.approx(expected, abs=1e-9)


@given(specs(), specs())
@settings(max_examples=25)
def test_jsd_is_between_0_and_log_2_and_symmetric(p: str, q: str) -> None:
    jsd = pair(p, q).jsd()
    assert -1e-12 <= jsd <= math.log(2) + 1e-12
    assert jsd == pytest.approx(pair(q, p).jsd(), abs=1e-9)
    assert pair(p, q).optimal_value() == pytest.approx(2 * jsd - 2 * math.log(2), abs=1e-6)


@given(specs(), specs(), st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 30), st.floats(-3, 3))
@settings(max_examples=25)
def test_no_discriminator_beats_the_optimal_one(
    p: str, q: str, a: float, b: float, c: float, d: float
) -> None:
    both = pair(p, q)
    best = both.optimal_value()
    optimal = both.optimal_logit(both.x)
    arbitrary = a + b * both.x + c * torch.sin(both.x * 7)
    near = optimal.clamp(-30, 30) + d * torch.cos(both.x * 3)
    for logit in (arbitrary, near):
        assert both.value(logit) <= best + 1e-12


def test_a_perturbed_optimum_is_strictly_worse() -> None:
    both = pair("normal:0,1", "normal:1,1")
    optimal = both.optimal_logit(both.x)
    assert all(both.value(optimal + s) < both.optimal_value() - 1e-5 for s in (-0.01, 0.01))


@pytest.mark.parametrize("distance", [0.0, 0.5, 2.0, 6.0])
def test_generator_gradients(distance: float) -> None:
    """The minimax gradient is the derivative of 2·JSD, and the two gradients sum to the distance."""
    minimax, other = pair("normal:0,1", f"normal:{distance},1").generator_gradients()
    h = 1e-3
    up, down = (pair("normal:0,1", f"normal:{distance + s},1").jsd() for s in (h, -h))
    assert minimax == pytest.approx(abs(2 * (up - down) / (2 * h)), abs=1e-6)
    # log p − log q has the slope −distance, and E_q[D*] + E_q[1 − D*] = 1.
    assert minimax + other == pytest.approx(distance, abs=1e-9)


def test_sweep_saturates() -> None:
    swept = theory.sweep(distances=11)
    assert swept["distances"] == list(range(11))
    assert swept["jsd"][0] == pytest.approx(0, abs=1e-12)
    assert all(a < b for a, b in itertools.pairwise(swept["jsd"]))
    assert math.log(2) - swept["jsd"][-1] < 1e-5
    assert swept["minimax"][-1] < 1e-4 < swept["minimax"][4]
    assert swept["non_saturating"][-1] == pytest.approx(10, rel=1e-4)


def test_training_is_reproducible_and_preserves_the_global_generator() -> None:
    both = pair("normal:0,1", "normal:1,1")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (theory.train(both, 5, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first["values"] == again["values"]
    assert first["values"] != other["values"]
    assert first["steps"] == list(range(6))


def test_a_nan_discriminator_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory.Discriminator, "forward", lambda self, x: x.float() * math.nan)
    with pytest.raises(RunError, match="nan after 0 steps"):
        theory.train(pair("normal:0,1", "normal:1,1"), 5, seed=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "a density must be one of normal:MEAN,STD; uniform:LOW,HIGH.*got ''"),
        ("cauchy:0,1", "a density must be one of .*got 'cauchy:0,1'"),
        ("normal", "a density of family normal must be normal:MEAN,STD with numeric values, got 'normal'"),
        ("normal:1", "must be normal:MEAN,STD with numeric values, got 'normal:1'"),
        ("normal:1,2,3", "must be normal:MEAN,STD with numeric values"),
        ("normal:a,b", "must be normal:MEAN,STD with numeric values, got 'normal:a,b'"),
        ("normal:0,0", "STD must be from 0.001 to 1000, got 0 in"),
        ("normal:0,-1", "STD must be from 0.001 to 1000, got -1 in"),
        ("normal:nan,1", "MEAN must be from -1000 to 1000, got nan in"),
        ("normal:0,inf", "STD must be from 0.001 to 1000, got inf in"),
        ("normal:1e9,1", r"MEAN must be from -1000 to 1000, got 1e\+09 in"),
        ("laplace:0,0", "SCALE must be from 0.001 to 1000, got 0 in"),
        ("laplace:nan,1", "MEAN must be from -1000 to 1000, got nan in"),
        ("uniform:1,1", "HIGH must exceed LOW by at least 0.001, got 'uniform:1,1'"),
        ("uniform:2,1", "HIGH must exceed LOW"),
        ("uniform:0,inf", "HIGH must be from -1000 to 1000, got inf"),
        ("uniform:-inf,0", "LOW must be from -1000 to 1000, got -inf"),
        ("mixture:", "family mixture must be mixture:WEIGHT,MEAN,STD"),
        ("mixture:1,0", "family mixture must be mixture:WEIGHT,MEAN,STD"),
        ("mixture:1,0,1/", "family mixture must be mixture:WEIGHT,MEAN,STD"),
        ("mixture:0,0,1", "WEIGHT must be from 0.001 to 1000, got 0 in"),
        ("mixture:1,0,1/1,0,0", "STD must be from 0.001 to 1000, got 0 in"),
    ],
)
def test_invalid_densities(spec: str, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        parse(spec)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command line that fails; return its exit status and its error message of one line."""
    with pytest.raises(SystemExit) as stop:
        theory.main(arguments)
    (message,) = capsys.readouterr().err.splitlines()
    return stop.value.code, message


def test_the_script_with_defaults_approaches_the_optimum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    theory.main(["--out", str(out), "--steps", "300", "--sweep"])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["sweep.png", "theory.json", "theory.png"]
    found = json.loads((out / "theory.json").read_text())
    assert found["p"] == "normal:-1,0.5"
    assert found["optimal_value"] == pytest.approx(2 * found["jsd"] - 2 * math.log(2), abs=1e-9)
    assert found["values"][0] < found["value"] <= found["optimal_value"]
    assert found["optimal_value"] - found["value"] < 0.01
    assert (found["error_p"] + found["error_q"]) / 2 < 0.04
    assert len(found["steps"]) == len(found["values"]) == 101
    assert len(found["sweep"]["distances"]) == 41
    assert f"{found['jsd']:.9f}" in printed
    assert "non-saturating" in printed
    for name in ("theory.png", "sweep.png"):
        assert Image.open(out / name).size[0] == 960


def test_a_failed_identity_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jsd = Pair.jsd
    monkeypatch.setattr(Pair, "jsd", lambda self: jsd(self) + 1e-5)
    status, message = failure(capsys, "--out", str(tmp_path), "--steps", "5")
    assert status == 1
    assert "is not 2·JSD − 2·log 2" in message
    assert "they differ by 2.0e-05, 1e-06 is allowed" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--p", "cauchy:0,1", "must be one of normal:MEAN,STD; uniform:LOW,HIGH"),
        ("--q", "normal:0,0", "STD must be from 0.001 to 1000"),
        ("--steps", "0", "integer of at least 1"),
        ("--steps", "many", "integer of at least 1"),
        ("--seed", "-1", "integer of at least 0"),
        ("--out", __file__, "cannot make the folder"),
        ("--out", f"{__file__}/below", "cannot make the folder"),
    ],
)
def test_usage_errors(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = failure(capsys, "--out", str(tmp_path / "out"), f"{option}={value}")
    assert status == 2
    for words in (option, value, allowed):
        assert words in message
    assert not (tmp_path / "out").exists()


def test_dcgan_theory_runs_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deprecated alias, which passes options and the exit status on."""
    arguments = ["theory", f"--out={tmp_path / 'out'}", "--steps", "1", "--q=normal:0,1"]
    monkeypatch.setattr("sys.argv", ["dcgan", *arguments])
    result = CliRunner().invoke(dcgan.app, arguments)
    assert result.exit_code == 0, result.output
    assert "deprecated" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["theory.json", "theory.png"]
    assert CliRunner().invoke(dcgan.app, ["theory", "--steps=0"]).exit_code == 2

    monkeypatch.setattr(dcgan, "THEORY", tmp_path / "theory.py")
    result = CliRunner().invoke(dcgan.app, ["theory"])
    assert result.exit_code == 2
    assert "dcgan theory is now examples/theory.py" in result.output
