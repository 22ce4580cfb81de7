"""The trials that launches pass to tuning: a tile's results, prefilled with NaN, and the expected results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcgan.kernels import gpu, ops
from dcgan.kernels.gpu import aten, cost_model, launcher, tiles, tuning
from tests.interpreter.cases import SHAPES, backward_of, cotangents, training_call

CASES = {  # geometry, prologue, tail
    "up": ("up", "affine_relu", "statistics"),
    "up_odd": ("down_odd_wide", "affine_leaky_relu", "statistics"),
    "up_block": ("up_block", "affine_relu", "statistics"),
    "up_block_odd": ("down_odd", "affine_leaky_relu", "statistics"),
    "up_narrow": ("up_narrow_3", "affine_relu", "scale_shift_tanh"),
    "down": ("down", "affine_leaky_relu", "statistics"),
    "down_narrow": ("down_narrow_3", "affine", "statistics"),
    "dense": ("dense_up", "affine_tanh", "statistics"),
    "dense_outer": ("dense_outer_4", "affine_tanh", "statistics"),
    "dense_narrow": ("dense_narrow_3", "affine_leaky_relu", "shift_sigmoid"),
    "plain": ("down", "plain", "statistics"),
}


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tiles.Problem, tuning.Trial]]:
    """Return the (problem, trial) of every launch planned from now on."""
    found: list[tuple[tiles.Problem, tuning.Trial]] = []

    def choose(problem: tiles.Problem, device: torch.device, spills: Any, trial: tuning.Trial) -> tiles.Tile:
        found.append((problem, trial))
        return tuning.estimate(problem.without_prologue(), cost_model.SM_COUNT)

    monkeypatch.setattr(launcher, "_plans", {})
    monkeypatch.setattr(tuning, "choose", choose)
    return found


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_a_trial_compares_results_with_the_reference(
    trials: list[tuple[tiles.Problem, tuning.Trial]], case: str, dtype: torch.dtype
) -> None:
    """For forward, dgrad and wgrad, with fused and with standalone prologues."""
    name, before, after = CASES[case]
    transposed = SHAPES[name].transposed
    call = training_call(SHAPES[name], before, after, dtype)
    back = backward_of(call, transposed, cotangents(call, transposed))
    gpu.forward(ops.check(call, transposed), call)
    gpu.backward(back, transposed)
    assert len(trials) == 3
    for problem, trial in trials:
        expected = trial.expected()
        allowed = tuning.TOLERANCE[problem.precision]
        fused, standalone = (
            next((tile for tile in tuning.variants(problem) if tile.fused == choice), None)
            for choice in (True, False)
        )
        assert (standalone is None) == (not problem.has_prologue)
        for tile in (fused, standalone):
            if tile is not None:
                got = trial.results(tile)
                assert [t.shape for t in got] == [t.shape for t in expected]
                assert aten.error(got, expected) <= allowed / 2, (problem, tile)
        assert fused is not None
        *others, last = trial.results(fused)
        assert aten.error([*others, 1.02 * last], expected) > allowed
