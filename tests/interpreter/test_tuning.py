"""What tuning is given of a launch: results of a tile, over NaN, and what they are held against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SHAPES, backward_of, cotangents, training_call

from dcgan.kernels import gpu
from dcgan.kernels.gpu import aten, model, plans, tiles

CASES = {  # geometry, prologue, tail
    "up": ("up", "affine_relu", "statistics"),
    "up_odd": ("down_odd", "affine_leaky_relu", "statistics"),
    "up_narrow": ("up_narrow_3", "affine_relu", "scale_shift_tanh"),
    "down": ("down", "affine_leaky_relu", "statistics"),
    "down_narrow": ("down_narrow_3", "affine", "statistics"),
    "dense": ("dense_up", "affine_tanh", "statistics"),
    "dense_narrow": ("dense_narrow_3", "affine_leaky_relu", "shift_sigmoid"),
    "plain": ("down", "as_it_is", "statistics"),
}


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tiles.Problem, tiles.Trial]]:
    """Those of every launch that is planned from now on."""
    found: list[tuple[tiles.Problem, tiles.Trial]] = []

    def choose(problem: tiles.Problem, device: torch.device, spills: Any, trial: tiles.Trial) -> tiles.Tile:
        found.append((problem, trial))
        return tiles.estimate(model.plain(problem), model.PROCESSORS)

    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setattr(plans, "choose", choose)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_tiles_results_are_held_against_the_exact_ones(
    trials: list[tuple[tiles.Problem, tiles.Trial]], case: str, dtype: torch.dtype
) -> None:
    """Of the forward, the adjoint and the weight gradient, with the prologues inside and before."""
    name, before, after = CASES[case]
    transposed = SHAPES[name].transposed
    call = training_call(SHAPES[name], before, after, dtype)
    back = backward_of(call, transposed, cotangents(call, transposed))
    gpu.forward(call, transposed)
    gpu.backward(back, transposed)
    assert len(trials) == 3
    for problem, trial in trials:
        expected = trial.expected()
        allowed = tiles.TOLERANCE[problem.precision]
        fused, apart = (
            next((tile for tile in tiles.ways(problem) if tile.fused == way), None) for way in (True, False)
        )
        assert (apart is None) == (set(model.prologues(problem)) == {"none"})
        for tile in (fused, apart):
            if tile is not None:
                got = trial.results(tile)
                assert [t.shape for t in got] == [t.shape for t in expected]
                assert aten.error(got, expected) <= allowed / 2, (problem, tile)
        assert fused is not None
        *others, last = trial.results(fused)
        assert aten.error([*others, 1.02 * last], expected) > allowed
