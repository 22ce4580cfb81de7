"""``python -m tests.accuracy``: its findings, its marks and its exit status."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, output
from bench.blocks import Chain, blocks
from bench.cases import Case
from dcgan.models import Discriminator, Generator
from tests import accuracy
from tests.accuracy import main
from tests.support.native import NEEDED

pytestmark = NEEDED

TINY = ["--features", "8", "--image-size", "32", "--latent-dim", "8"]
QUICK = [*TINY, "--images", "2", "--batch", "4", "1", "--threads", "1"]


@pytest.fixture
def findings() -> list[accuracy.Finding]:
    return accuracy.examine("generate", {"features": 8, "image_size": 32}, None, 2, [4, 1], 1)


def test_findings_cover_every_layer_algorithm_and_scenario(findings: list[accuracy.Finding]) -> None:
    scenarios = {"init", "init, noise", "lognormal", "channels", "pixels", "cancelling"}
    layers = {f.layer for f in findings} - {accuracy.WHOLE}
    assert len(layers) == 4
    for layer in layers:
        for scenario in scenarios:
            found = [f.algorithm for f in findings if (f.layer, f.scenario) == (layer, scenario)]
            own = ["dense"] if "@1→" in layer else ["narrow"] if "→1 @" in layer else ["direct", "f2", "f4"]
            assert found == ["eager", "channels_last", *own]
    picks = [f.picked for f in findings if f.scenario == "init" and f.layer in layers and f.picked]
    assert sorted(n for picked in picks for n in picked) == [1, 1, 1, 1, 4, 4, 4, 4], (
        "one pick per layer and batch size"
    )
    whole = [(f.algorithm, f.scenario) for f in findings if f.layer == accuracy.WHOLE]
    algorithms = ["eager", "channels_last", "direct", "f2", "f4", "fast", "fast"]
    assert whole == [(algorithm, scenario) for scenario in ("init", "lognormal") for algorithm in algorithms]


def test_errors_are_plausible(findings: list[accuracy.Finding]) -> None:
    """Errors are in float32's range unless sums cancel; the largest element's error exceeds the norm's."""
    for f in findings:
        if f.scenario != "cancelling":
            assert 1e-9 < f.errors.norm < 1e-5
        assert f.errors.largest > f.errors.norm
        assert (f.errors.componentwise is None) == (f.layer == accuracy.WHOLE)
    cancelling = [f for f in findings if f.scenario == "cancelling"]
    assert min(f.errors.norm for f in cancelling) > 1e-6
    assert all(f.bound > accuracy.LAYER_BOUND for f in cancelling if f.bound is not None)


def test_componentwise_error_of_winograd_with_a_large_pixel(findings: list[accuracy.Finding]) -> None:
    """F(4×4) spreads the rounding error of a tile's largest pixel over the tile; the norms do not show it."""
    worst = {
        f.algorithm: f.errors.componentwise
        for f in findings
        if f.scenario == "pixels" and f.layer == "16→8 @8→16"
    }
    assert worst["direct"] is not None
    assert worst["f4"] is not None
    assert worst["direct"] < 1e-5 < worst["f4"]


def test_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "accuracy.jsonl"
    assert main([*QUICK, "--measure", *accuracy.MEASURES, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for heading in ("generate · latent_dim 8 · features 8", "discriminate · features 8"):
        assert out.count(heading) == len(accuracy.MEASURES)
    assert out.count("‖out − ref‖₂ / ‖ref‖₂") == 2
    assert out.count("Σ|x·w|") == 2
    assert "exceeds its bound" not in out
    assert max(map(len, out.splitlines())) <= 140
    rows = output.read(file)
    assert {row["command"] for row in rows} == {"generate", "discriminate"}
    assert {tuple(sorted(row)) for row in rows} == {tuple(sorted(rows[0]))}
    assert rows[0]["kind"] == "accuracy"
    assert set(rows[0]["errors"]) == set(accuracy.MEASURES)


def test_a_picked_algorithm_over_its_bound_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "LAYER_BOUND", 1e-9)
    monkeypatch.setattr(cases, "TIMES_EAGER", 1e-3)
    assert main(["--network", "generate", *QUICK]) == 1
    out = capsys.readouterr().out
    assert "exceeds its bound: generate, 32→16 @4→8, " in out
    assert "e-07!" in out


def test_nonfinite_errors_exceed_the_bound() -> None:
    errors = accuracy.Errors(float("inf"), float("nan"), None)
    finding = accuracy.Finding("a", "f2", "init", errors, 5e-6, (1,))
    assert finding.over
    (row,) = accuracy.rows([finding], {})
    assert row["errors"] == {"norm": None, "largest": None, "componentwise": None}


def test_a_wrong_engine_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Chain.__call__
    monkeypatch.setattr(Chain, "__call__", lambda self, x: original(self, x) * (1 + 1e-5))
    case = Case("generate", 2, "float32", "cpu", 1, {"features": 4, "image_size": 32})
    (block, *_) = blocks(case.network())
    with torch.no_grad():
        found = list(accuracy._layer(("init", block, torch.randn(2, 100, 1, 1)), [1], 1))
    assert [f.over for f in found] == [False, False, True]


# --- trained weights ----------------------------------------------------------------------------------------


def checkpoint(folder: Path, wrap: Any = lambda states: states) -> Path:
    networks = {
        "generator": Generator(latent_dim=8, features=2, image_size=32),
        "discriminator": Discriminator(features=4, image_size=32),
    }
    file = folder / "checkpoint.pt"
    torch.save(wrap({name: network.state_dict() for name, network in networks.items()}), file)
    return file


def scenarios(file: Path, *arguments: str) -> set[str]:
    rows = file.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    quick = ["--images", "2", "--batch", "1", "--threads", "1", "--json", str(rows)]
    assert main([*quick, *arguments]) == 0
    return {row["scenario"] for row in output.read(rows)}


def test_checkpoint_is_a_state_dict(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, lambda states: states["generator"])
    found = scenarios(file, "--network", "generate", "--checkpoint", str(file))
    assert {"init", "trained", "trained, noise"} <= found
    row = output.read(file.with_suffix(".jsonl"))[0]
    assert row["sizes"] == {"latent_dim": 8, "channels": 1, "features": 2, "image_size": 32}
    assert row["checkpoint"] == str(file)


def test_checkpoint_contains_both_networks(tmp_path: Path) -> None:
    adam = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    file = checkpoint(tmp_path, lambda states: {"epoch": 3, "models": states, "optimizer": adam})
    found = scenarios(file, "--checkpoint", str(file))
    assert "trained" in found
    rows = output.read(file.with_suffix(".jsonl"))
    assert {row["command"]: row["sizes"]["features"] for row in rows} == {"generate": 2, "discriminate": 4}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"epoch": 3}, [], "contains no state dict of either network"),
        (None, [], "is not a loadable checkpoint"),
        ("generator", ["--features", "5"], "has features 2, not 5"),
    ],
)
def test_invalid_checkpoints_are_rejected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: Any, arguments: list[str], message: str
) -> None:
    file = checkpoint(tmp_path, lambda states: states.get(content) if isinstance(content, str) else content)
    if content is None:
        file.write_text("no checkpoint")
    with pytest.raises(SystemExit) as stop:
        main(["--network", "generate", "--checkpoint", str(file), *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
