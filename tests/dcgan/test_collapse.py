"""Collapsed training is reported once and only when it has collapsed; healthy training is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcgan import data
from dcgan.checkpoint import Folder
from dcgan.settings import Settings
from dcgan.training.collapse import CollapseDetector
from dcgan.training.loss_readback import Position, Row
from dcgan.training.run import Run, Values, follow
from dcgan.training.stop import Stop

SHAPE = 64, 3, 8, 8


def real_images(n: int = 40) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, *SHAPE[1:]), dtype=torch.uint8, generator=random)


def rows(d_x: Tensor, d_g_z: Tensor) -> list[Row]:
    values = zip(d_x.tolist(), d_g_z.tolist(), strict=True)
    return [Row(i + 1, 1, i + 1, 8 * (i + 1), 1.0, 1.0, *both) for i, both in enumerate(values)]


def constant(n: int, d_x: float, d_g_z: float) -> list[Row]:
    return rows(torch.full((n,), d_x), torch.full((n,), d_g_z))


@pytest.mark.parametrize("real_label", [1.0, 0.9, 0.7])
@pytest.mark.parametrize("calls", [1, 7, 1000])
def test_d_wins_hundreds_of_steps(real_label: float, calls: int) -> None:
    detector = CollapseDetector(real_images(), real_label)
    everything = constant(1000, 0.98 * real_label, 1e-4)
    said = []
    for i in range(0, 1000, calls):
        message = detector.steps(everything[i : i + calls])
        if message is not None:
            said.append((i, message))
    ((first, message),) = said
    assert first <= 298 < first + calls
    assert "collapsed by step 299: D wins every step" in message
    assert f"D(x) {0.98 * real_label:.2f}, D(G(z)) 0.0001" in message
    for option in ("--lr", "--ndf", "--seed", "--label-smoothing", "--diffaugment", "--flip", "--ema"):
        assert option in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(("steps", "reported"), [(290, False), (310, True)])
def test_d_may_win_the_first_steps(steps: int, reported: bool) -> None:
    detector = CollapseDetector(real_images(), 0.9)
    assert (detector.steps(constant(steps, 0.9, 0.0)) is not None) is reported


def test_small_batches_and_bursts_do_not_hide_a_collapse() -> None:
    random = torch.Generator().manual_seed(0)
    d_x = 0.9 + 0.1 * torch.randn(600, generator=random)
    d_g_z = torch.where(torch.rand(600, generator=random) < 0.01, 1.0, 1e-6)
    assert CollapseDetector(real_images(), 0.9).steps(rows(d_x, d_g_z)) is not None


@pytest.mark.parametrize(
    ("d_x", "d_g_z"),
    [(0.9, 0.006), (0.8, 0.0), (0.5, 0.5), (0.0, 0.0), (0.9, 0.9)],
    ids=["D-sometimes-errs", "D-is-unsure", "balance", "D-rejects-all", "D-accepts-all"],
)
def test_what_is_not_called_a_collapse(d_x: float, d_g_z: float) -> None:
    assert CollapseDetector(real_images(), 0.9).steps(constant(3000, d_x, d_g_z)) is None


def test_d_may_win_nine_steps_of_ten() -> None:
    d_g_z = torch.zeros(3000)
    d_g_z[::10] = 0.2
    assert CollapseDetector(real_images(), 0.9).steps(rows(torch.full((3000,), 0.9), d_g_z)) is None


@pytest.mark.parametrize(("spread", "reported"), [(0.0, True), (0.008, True), (0.012, False), (1.0, False)])
@pytest.mark.parametrize(("step", "judged"), [(0, False), (299, False), (300, True), (5000, True)])
def test_samples_without_variety(spread: float, reported: bool, step: int, judged: bool) -> None:
    """The spread is over images, not within one: each image has full contrast."""
    real = real_images()
    random = torch.Generator().manual_seed(1)
    one = torch.rand(SHAPE[1:], generator=random) * 2 - 1
    values = torch.randn(SHAPE, generator=random)
    values = (values - values.mean(0)) / values.std(0, correction=0)
    real_spread = (real.double() / 127.5).std(0, correction=0).mean()
    message = CollapseDetector(real, 0.9).samples(one + spread * real_spread * values, step)
    assert (message is not None) is (reported and judged)
    if message is not None:
        assert f"collapsed by step {step}: G makes nearly the same image" in message
        assert f"({spread:.1%} of the variation of real images)" in message


def test_it_is_said_once_whatever_is_found_first() -> None:
    same = torch.zeros(SHAPE)
    detector = CollapseDetector(real_images(), 0.9)
    assert detector.samples(same, 400) is not None
    assert detector.samples(same, 800) is None
    assert detector.steps(constant(1000, 0.9, 0.0)) is None
    detector = CollapseDetector(real_images(), 0.9)
    assert detector.steps(constant(1000, 0.9, 0.0)) is not None
    assert detector.samples(same, 1000) is None


@pytest.mark.parametrize("n", [1, 3])
def test_equal_real_images_are_never_compared_with(n: int) -> None:
    detector = CollapseDetector(real_images(1).expand(n, -1, -1, -1), 0.9)
    assert detector.samples(torch.zeros(SHAPE), 400) is None


class Watched:
    """A watcher that records what a detector says about a run."""

    def __init__(self, run: Run) -> None:
        self.detector = CollapseDetector(run.images.pixels, 1 - run.settings.label_smoothing)
        self.said: list[str] = []
        self.last = 0

    def steps(self, rows: list[Row]) -> None:
        self._note(self.detector.steps(rows))
        self.last = rows[-1].step

    def samples(self, images: Tensor, position: Position) -> None:
        self._note(self.detector.samples(images, position.step))

    def scores(self, values: Values, position: Position) -> None: ...

    def saved(self) -> None: ...

    def _note(self, message: str | None) -> None:
        if message is not None:
            self.said.append(message)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Such small networks are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(
    ("given", "collapses"),
    [({"model": "mlp", "lr": 0.05}, True), ({"model": "dcgan"}, False)],
    ids=["high-lr", "default"],
)
def test_real_runs_on_digits(given: dict[str, object], collapses: bool, tmp_path: Path) -> None:
    settings = Settings.of(
        {"dataset": "digits", "image_size": 32, "batch_size": 8, "ngf": 4, "ndf": 4, "nz": 8, "epochs": 9}
        | {"sample_interval": 70, "checkpoint_interval": 0, **given}
    )
    images = data.load("digits", tmp_path, image_size=32, say=lambda _: None)
    run = Run(settings, images, torch.device("cpu"))
    watched = Watched(run)
    follow(run, Folder(tmp_path / "checkpoints"), watched, Stop(), limit=360)
    assert watched.last == 360
    assert bool(watched.said) is collapses, watched.said
