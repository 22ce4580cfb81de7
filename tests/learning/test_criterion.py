"""TrainStep learns like the reference recipe by :mod:`tests.learning.criterion`, which is tested too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import output
from dcgan.data import digits
from dcgan.training import Result
from tests.learning import __main__ as command
from tests.learning import criterion
from tests.learning.criterion import (
    EVERY,
    LOSSES,
    SAMPLES,
    START,
    TOLERANCE,
    WINDOW,
    Run,
    Settings,
    compare,
    statistics,
)

STEPS = 300
TINY = Settings(features=4, image_size=32, batch=8, lr=4e-3)


@pytest.mark.slow
def test_fast_learns_like_the_reference() -> None:
    """Run 300 steps on real digits from three RNG seeds; takes at most twelve minutes on two idle cores."""
    outcome = command.race(Settings())
    out = output.console()
    out.print(command.ends_table(outcome))
    out.print(command.findings_table(outcome))
    failed = [finding for finding in outcome.findings["fast"] if not finding.ok]
    assert not failed
    for run in outcome.runs["reference"]:  # the test must not pass because neither learns
        last = run.ends()
        assert last["std"] == pytest.approx(float(outcome.real["std"]), rel=0.5)
        assert last["diversity"] == pytest.approx(float(outcome.real["diversity"]), rel=0.5)


# --- the criterion, on synthetic curves ---------------------------------------------------------------------


def synthetic_run(seed: int, rounding: int = 0, **changes: float) -> Run:
    """Return a run whose curves and statistics fluctuate around constant levels, plus ``changes``.

    Different values of ``rounding`` give independent fluctuations, as after complete chaotic divergence. The
    first steps, ``start``, have independent values too.
    """
    random = torch.Generator().manual_seed(1000 * rounding + seed)
    moments = STEPS // EVERY
    walks = {name: 0.1 * torch.randn(STEPS // WINDOW, generator=random).double() for name in Result._fields}
    curves = torch.stack([1 + walks[name] + changes.get(name, 0) for name in Result._fields], 1)
    found: dict[str, Tensor] = {
        "std": 0.6 + 0.05 * torch.randn(moments, generator=random).double() + changes.get("std", 0),
        "mean image": 0.05 * torch.randn(moments, 9, generator=random).double()
        + changes.get("mean image", 0),
    }
    start = 1 + 1e-3 * torch.rand(START, 4, generator=random).double()
    start[-1] += changes.get("start", 0)
    return Run("synthetic", seed, start, curves.repeat_interleave(WINDOW, 0), found, torch.zeros(1), 0.0)


def failures(rounding: int = 1, **changes: float) -> list[str]:
    found = compare(
        [synthetic_run(seed) for seed in range(3)], [synthetic_run(s, rounding, **changes) for s in range(3)]
    )
    names = [*(f"{name}, start" for name in LOSSES), *Result._fields, "std", "mean image"]
    assert [finding.quantity for finding in found] == names
    return [finding.quantity for finding in found if not finding.ok]


def test_identical_runs_have_distance_zero() -> None:
    runs = [synthetic_run(seed) for seed in range(3)]
    assert all(finding.ok and finding.distance == 0 for finding in compare(runs, runs))


def test_chaotic_divergence_passes() -> None:
    """A run passes if it shares only the levels with the reference run of the same RNG seed."""
    assert [rounding for rounding in range(1, 201) if failures(rounding)] == []


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"d_x": 0.25}, ["d_x"]),
        ({"d_g_z": -0.25, "std": 0.2}, ["d_g_z", "std"]),
        ({"loss_g": 0.25}, ["loss_g"]),
        ({"start": 0.02}, ["loss_d, start", "loss_g, start"]),
        ({"mean image": -0.2}, ["mean image"]),
        ({"d_x": float("nan"), "std": float("nan")}, ["d_x", "std"]),
        ({"start": float("nan")}, ["loss_d, start", "loss_g, start"]),
    ],
)
def test_a_shifted_quantity_fails(changes: dict[str, float], wrong: list[str]) -> None:
    assert failures(1, **changes) == wrong


def test_one_deviating_seed_fails() -> None:
    references = [synthetic_run(seed) for seed in range(3)]
    found = compare(references, [*references[:2], synthetic_run(2, loss_d=1.0, start=0.1)])
    failed = {finding.quantity: finding.seeds for finding in found if not finding.ok}
    assert list(failed) == ["loss_d, start", "loss_g, start", "loss_d"]
    assert failed["loss_d"] == pytest.approx((0, 0, 1))


@pytest.mark.parametrize("seeds", [(0, 2), (0,), (1, 0), (0, 1, 2)])
def test_mismatched_seeds_are_rejected(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of the same two seeds or more, got"):
        compare([synthetic_run(0), synthetic_run(1)][: len(seeds)], [synthetic_run(seed) for seed in seeds])


# --- the criterion, on short runs ---------------------------------------------------------------------------


def start_distance(variant: str, settings: Settings, references: list[Tensor]) -> Tensor:
    """Return the maximum relative distance of each loss over the first steps and two RNG seeds."""
    starts = [criterion.start(variant, seed, settings) for seed in range(len(references))]
    distances = [(ours / theirs - 1)[:, :2].abs() for ours, theirs in zip(starts, references, strict=True)]
    return torch.cat(distances).amax(0)


@pytest.fixture(scope="module")
def references() -> Iterator[list[Tensor]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield [criterion.start("reference", seed, TINY) for seed in (0, 1)]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", ["fast", "channels_last"])
def test_variants_start_alike(one_thread: None, references: list[Tensor], variant: str) -> None:
    assert (start_distance(variant, TINY, references) < TOLERANCE / 5).all()


@pytest.mark.parametrize("variant", ["fast", "reference"])
@pytest.mark.parametrize("changes", [{"lr": 2 * TINY.lr}, {"real_label": 1.0}, {"batch": 9}])
def test_different_training_fails(
    one_thread: None, references: list[Tensor], variant: str, changes: dict[str, Any]
) -> None:
    """Twice the learning rate, no label smoothing, and other batches are detected."""
    assert (start_distance(variant, replace(TINY, **changes), references) > 2 * TOLERANCE).all()


def test_a_run_is_reproducible(one_thread: None, references: list[Tensor]) -> None:
    assert torch.equal(criterion.start("reference", 1, TINY), references[1])
    assert not torch.allclose(references[0][0], references[1][0], rtol=1e-3)


def test_statistics_are_taken_at_intervals_and_after_the_last_step(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criterion, "EVERY", 2)
    run = criterion.learn("fast", 0, replace(TINY, steps=3, features=2, batch=2))
    assert (run.curves.shape, run.start.shape) == ((3, 4), (START, 4))
    assert {len(value) for value in run.statistics.values()} == {2}
    assert run.statistics["mean image"].shape == (2, 32 * 32)
    assert run.samples.shape == (criterion.SHOWN, 1, 32, 32)


def test_statistics_of_a_hand_computed_example() -> None:
    images = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, -1.0]])
    found = statistics(images)
    assert found["mean image"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert found["std image"].tolist() == pytest.approx([(1 / 3) ** 0.5, (4 / 3) ** 0.5])
    assert found["mean"].item() == pytest.approx(1 / 3)
    assert found["quantiles"][2].item() == pytest.approx(0.5)
    assert found["diversity"].item() == pytest.approx((1 + 2 + 5**0.5) / 3 / 2**0.5)


def test_mode_collapse_has_no_diversity() -> None:
    real = digits(32)[:SAMPLES]
    assert statistics(real[:1].expand_as(real))["diversity"] == 0
    assert statistics(real)["diversity"] > 0.5
