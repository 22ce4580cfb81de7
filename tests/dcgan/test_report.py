"""The report of a run: pace, progress line, files, events, and what an interruption leaves on the screen."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from rich.console import Console

from dcgan.data import Images
from dcgan.settings import Settings
from dcgan.training import report as reports
from dcgan.training.loss_readback import Position, Row
from dcgan.training.report import Pace, Report, animate, plot, read_metrics
from dcgan.training.run import Run

BATCHES, BATCH = 6, 10
SCORES: dict[str, Any] = {
    "features": "digits",
    "frechet": 101.23,
    "precision": 0.714,
    "recall": 0.42,
    "images": 1000,
}


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reports, "time", clock)
    return clock


def row(step: int, batches: int = BATCHES, **values: Any) -> Row:
    epoch, batch = divmod(step - 1, batches)
    return Row(step, epoch + 1, batch + 1, BATCH * step, 0.5, 1.5, 0.75, 0.25)._replace(**values)


def position(step: int) -> Position:
    return Position(*divmod(step, BATCHES), step, BATCH * step)


def run_at(step: int = 0, batches: int = BATCHES, **given: Any) -> Run:
    """Return what a report needs of a run."""
    settings = Settings.of({"dataset": "fake", "epochs": 50, **given})
    run = SimpleNamespace(
        settings=settings,
        images=Images(torch.zeros(4, 1, 32, 32, dtype=torch.uint8), "fake"),
        feed=range(batches),
        position=Position(*divmod(step, batches), step, BATCH * step),
        steps=settings.epochs * batches,
        done=False,
    )
    return cast(Run, run)


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- pace ---------------------------------------------------------------------------------------------------


def train(pace: Pace, clock: Clock, steps: range, seconds: float) -> list[tuple[float, int]]:
    """Train on these steps, in this many seconds each; return the epochs that end."""
    ended = []
    for step in steps:
        clock.now += seconds
        if (epoch := pace.trained(row(step))) is not None:
            ended.append(epoch)
    return ended


def test_the_rate_is_that_of_the_last_30_seconds(clock: Clock) -> None:
    pace = Pace(Position(), BATCHES, 1000)
    train(pace, clock, range(1, 101), 1.0)
    assert pace.rate == pytest.approx(BATCH)
    train(pace, clock, range(101, 131), 0.5)  # 15 of 30 seconds
    assert pace.rate == pytest.approx(BATCH * 45 / 30)
    assert pace.remaining == pytest.approx((1000 - 130) * 30 / 45)
    train(pace, clock, range(131, 161), 0.5)
    assert pace.rate == pytest.approx(2 * BATCH)


@pytest.mark.parametrize("start", [0, 9])
def test_the_first_steps_count_until_there_are_others(start: int, clock: Clock) -> None:
    pace = Pace(position(start), BATCHES, 300)
    train(pace, clock, range(start + 1, start + 2), 20.0)
    assert pace.rate == pytest.approx(BATCH / 20)
    train(pace, clock, range(start + 2, start + 4), 1.0)
    assert pace.rate == pytest.approx(BATCH)


def test_pauses_count_for_the_remaining_time_only(clock: Clock) -> None:
    pace = Pace(Position(), BATCHES, 5 * BATCHES)
    clock.now += 1000
    pace.paused()  # the samples of step 0 do not return
    assert train(pace, clock, range(1, 7), 2.0) == [(pytest.approx(12.0), 60)]
    clock.now += 7
    pace.paused()
    clock.now += 3
    pace.paused()
    assert pace.rate == pytest.approx(BATCH / 2)
    assert pace.remaining == pytest.approx(4 * (12 + 10))
    assert train(pace, clock, range(7, 13), 2.0) == [(pytest.approx(12.0), 60)]
    assert pace.rate == pytest.approx(BATCH / 2)


def test_a_resumed_epoch_counts_from_where_it_was_resumed(clock: Clock) -> None:
    pace = Pace(position(4), BATCHES, 300)
    assert train(pace, clock, range(5, 13), 0.5) == [(pytest.approx(1.0), 20), (pytest.approx(3.0), 60)]


# --- screen -------------------------------------------------------------------------------------------------


class Screen:
    """A terminal of ``columns`` that knows the control sequences of a progress bar."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.x, self.y = columns, [""], 0, 0

    def write(self, text: str) -> Screen:
        for control, count, letter, character in re.findall(
            r"(\x1b\[\??(\d*)(?:;\d+)*([A-Za-z]))|(.)", text, re.DOTALL
        ):
            if control:
                self._control(letter, int(count or 1))
            elif character == "\r":
                self.x = 0
            elif character == "\n":
                self.x = 0
                self._down()
            else:
                self._put(character)
        return self

    def _control(self, letter: str, count: int) -> None:
        if letter == "K":
            assert count == 2, "the whole line is erased"
            self.lines[self.y] = ""
        elif letter == "A":
            self.y -= count
        else:
            assert letter in "mhl", letter

    def _down(self) -> None:
        self.y += 1
        if self.y == len(self.lines):
            self.lines.append("")

    def _put(self, character: str) -> None:
        if self.x == self.columns:
            self.x = 0
            self._down()
        line = self.lines[self.y].ljust(self.x)
        self.lines[self.y] = line[: self.x] + character + line[self.x + 1 :]
        self.x += 1

    @property
    def text(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


LONGEST = Row(50 * 469 - 1, 50, 468, BATCH * 469, 0.47, 12.86, 0.86, 0.11)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (120, " 1,234 img/s Loss_D 0.47 Loss_G 12.86 D(x) 0.86 D(G(z)) 0.11 ETA 12:34:56"),
        (80, " 1,234 img/s Loss_D 0.47 Loss_G 12.86 ETA 12:34:56"),
        (79, " 1,234 img/s Loss_D 0.47 Loss_G 12.86 ETA 12:34:56"),
        (78, " 1,234 img/s ETA 12:34:56"),
        (60, " 1,234 img/s ETA 12:34:56"),
        (45, " 1,234 img/s"),
        (27, ""),
    ],
)
@pytest.mark.parametrize("interrupted", [True, False])
def test_the_bar_is_one_line_and_survives_an_echoed_interrupt(
    width: int, shown: str, interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal echoes ^C after the bar. The bar disappears unless the run is done."""
    monkeypatch.setattr(Pace, "rate", 1234.4)
    monkeypatch.setattr(Pace, "remaining", 12 * 3600 + 34 * 60 + 56.2)
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    run: Any = run_at(batches=469)
    screen = Screen(width)
    with Report(tmp_path, run, console, tensorboard=False) as report:
        report.steps([LONGEST])
        report._progress.refresh()
        before = printed(console)
        (line,) = screen.write(before).text
        assert line[11:] == f"[50/50][468/469]{shown}"
        if interrupted and width > 27:
            screen.write("^C")
            assert len(screen.text) == 1, "^C begins no new line"
        run.done = not interrupted
    console.print("Done")
    screen.write(printed(console)[len(before) :])
    assert screen.text == (["Done"] if interrupted else [line, "Done"])


def test_an_exception_leaves_no_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)

    def interrupted() -> None:
        with Report(tmp_path, run_at(), console, tensorboard=False) as report:
            report.steps([row(1)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Screen(80).write(printed(console)).text == []


def test_lines_elsewhere(tmp_path: Path, clock: Clock) -> None:
    """Without a terminal: after the first steps, every 10 seconds, and at the end of each epoch."""
    console = plain_console()
    run = run_at(batches=40, epochs=2)
    with Report(tmp_path, run, console, tensorboard=False) as report:
        for step in range(1, 81):
            clock.now += 1
            report.steps([row(step, 40)])
    lines = printed(console).splitlines()
    assert [re.match(r"\[(\d)/2\]\[(\d+)/40\]", line).groups() for line in lines] == [  # type: ignore[union-attr]
        *(("1", str(batch)) for batch in (1, 11, 21, 31, 40)),
        *(("2", str(batch)) for batch in (10, 20, 30, 40)),
    ]
    assert lines[0].endswith("10 img/s Loss_D 0.50 Loss_G 1.50 D(x) 0.75 D(G(z)) 0.25 ETA 0:01:19")
    assert lines[-1].endswith("ETA 0:00:00")
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("slow", [False, True])
def test_no_line_elsewhere_is_longer_than_100(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "rate", 3.21 if slow else 123456.7)
    monkeypatch.setattr(Pace, "remaining", 99 * 3600)
    console = plain_console()
    with Report(tmp_path, run_at(batches=469), console, tensorboard=False) as report:
        report.steps([LONGEST._replace(loss_d=12.5, loss_g=123.25)])
        report.steps([LONGEST._replace(batch=469, loss_d=1e30, loss_g=1e30)])
    first, second = printed(console).splitlines()
    rate = "3.2" if slow else "123,457"
    assert first == (
        f"[50/50][468/469] {rate} img/s Loss_D 12.50 Loss_G 123.25 D(x) 0.86 D(G(z)) 0.11 ETA 99:00:00"
    )
    assert second == f"[50/50][469/469] {rate} img/s ETA 99:00:00"
    assert len(first) <= 100


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", ["samples", "scores", "saved"])
def test_each_epoch_has_a_row_with_its_training_time(pause: str, tmp_path: Path, clock: Clock) -> None:
    """Samples, scores and checkpoints do not count; a resumed run repeats neither rows nor epochs."""
    with Report(tmp_path, run_at(epochs=3), plain_console(), tensorboard=False) as report:
        for step in range(1, 15):
            clock.now += 2
            report.steps([row(step)])
            if step % 3 == 0:
                clock.now += 50
                if pause == "samples":
                    report.samples(torch.zeros(64, 1, 32, 32), position(step))
                elif pause == "scores":
                    report.scores({}, position(step))
                else:
                    report.saved()
    kept = [line for line in read_metrics(tmp_path / "metrics.jsonl") if len(line) > 2]
    assert [line["step"] for line in kept] == [*range(1, 7), 6, *range(7, 13), 12, 13, 14]
    with Report(tmp_path, run_at(8, epochs=3), plain_console(), tensorboard=False) as report:
        for step in range(9, 13):
            clock.now += 1
            report.steps([row(step)])
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if len(line) > 2]
    assert lines[:9] == kept[:9]
    assert [line["step"] for line in lines[9:]] == [9, 10, 11, 12, 12]
    assert [line for line in lines if "seconds" in line] == [
        {"step": 6, "epoch": 1, "seconds": 12.0, "images_per_second": 5.0},
        {"step": 12, "epoch": 2, "seconds": 4.0, "images_per_second": 10.0},
    ]


def test_the_plot_shows_the_rows_of_steps_only(tmp_path: Path) -> None:
    steps = [row(step, d_x=step / 20)._asdict() for step in range(1, 13)]
    others = [{"step": 6, "epoch": 1, "seconds": 1.0, "images_per_second": 2.0}, {"step": 6, **SCORES}]
    plot(steps, BATCHES, tmp_path / "a.png")
    plot([*steps[:6], *others, *steps[6:]], BATCHES, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plot(others, BATCHES, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("epochs", [1, 3, 120])
def test_the_grid_of_step_0_begins_the_animation(epochs: int, tmp_path: Path) -> None:
    """Each grid is brighter than the one before it, so that the frames show their order."""
    grids = []
    for i in range(epochs + 1):
        grids.append(tmp_path / f"step-{469 * i:09d}.png")
        Image.new("L", (4, 4), 2 * i).save(grids[-1])
    animate(sorted(tmp_path.glob("step-*.png")), tmp_path / "samples.gif")
    with Image.open(tmp_path / "samples.gif") as animation:
        frames = [frame.convert("L") for frame in ImageSequence.Iterator(animation)]
    shades = [int(np.asarray(frame)[0, 0]) for frame in frames]
    assert (shades[0], shades[-1]) == (0, 2 * epochs)
    assert shades == sorted(shades)
    assert len(shades) == min(epochs + 1, 100)


def test_the_grid_of_step_0_is_written(tmp_path: Path) -> None:
    with Report(tmp_path, run_at(), plain_console(), tensorboard=False) as report:
        report.samples(torch.zeros(64, 1, 32, 32), position(0))
        report.steps([row(1)])
        report.finish()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000000000.png"]
    assert (tmp_path / "samples.gif").exists()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (SCORES, "Epoch 3: Fréchet distance 101.2 (digits), precision 0.71, recall 0.42"),
        ({"pixel_frechet_distance": 1.5}, None),
    ],
)
def test_scores(values: dict[str, Any], line: str | None, tmp_path: Path) -> None:
    console = plain_console()
    with Report(tmp_path, run_at(), console, tensorboard=True) as report:
        report.scores(values, position(18))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 18, "epoch": 3, **values}]
    assert printed(console).splitlines() == ([] if line is None else [line])
    events = read_events(tmp_path)
    numbers = {f"score/{name}": value for name, value in values.items() if name != "features"}
    assert set(events.Tags()["scalars"]) == set(numbers)
    for tag, value in numbers.items():
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(18, pytest.approx(value))]


def test_a_collapse_is_said_once(tmp_path: Path) -> None:
    console = plain_console()
    with Report(tmp_path, run_at(), console, tensorboard=False) as report:
        report.samples(torch.zeros(64, 1, 32, 32), position(0))
        for first in (1, 1001):
            report.steps([row(step, d_x=0.9, d_g_z=0.0) for step in range(first, first + 1000)])
    assert printed(console).count("Training has collapsed by step 299") == 1
    assert printed(console).count("What people try") == 1


# --- TensorBoard --------------------------------------------------------------------------------------------


def read_events(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert all(path.is_file() for path in (out / "tensorboard").iterdir()), "one run, no runs below it"
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def hyperparameters(events: Any) -> dict[str, Any]:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = {}
    for tag, metadata in events.summary_metadata.items():
        if metadata.plugin_data.plugin_name == "hparams":
            found[tag.removeprefix("_hparams_/")] = HParamsPluginData.FromString(metadata.plugin_data.content)
    return found


@pytest.mark.parametrize("done", [True, False])
def test_the_settings_are_hyperparameters_of_the_run(done: bool, tmp_path: Path, clock: Clock) -> None:
    given: dict[str, Any] = {
        "classes": ["a", "b"],
        "lr": 3e-4,
        "diffaugment": ["color", "cutout"],
        "eval_every": 2,
    }
    run: Any = run_at(**given)
    with Report(tmp_path, run, plain_console(), tensorboard=True) as report:
        for step in (1, 2):
            clock.now += 2
            report.steps([row(step)])
        run.done = done
    events = read_events(tmp_path)
    assert [e.value for e in events.Scalars("images per second")] == [5.0, 5.0]
    found = hyperparameters(events)
    assert set(found) == {"experiment", "session_start_info", *(["session_end_info"] if done else [])}
    values = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in found["session_start_info"].session_start_info.hparams.items()
    }
    expected = {name: value for name, value in run.settings.to_dict().items() if value is not None}
    assert values == expected | {"classes": "a,b", "diffaugment": "color,cutout"}
    metrics = [info.name.tag for info in found["experiment"].experiment.metric_infos]
    assert metrics == ["score/frechet"]


# --- a whole run in a terminal ------------------------------------------------------------------------------


class Terminal:
    """``dcgan train`` in a terminal of 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self.screen, self.raw = Screen(80), ""
        self._master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dcgan", "train", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)

    def read(self, until: str | None = None) -> None:
        """Read until the text appears, or to the end."""
        while until is None or until not in self.raw:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the terminal is closed
                assert until is None, self.raw
                return
            if not data:
                return
            self.raw += data.decode(errors="replace")

    def press_interrupt(self) -> None:
        os.write(self._master, b"\x03")


@pytest.mark.parametrize("presses", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_one_clean_line(presses: int, tmp_path: Path) -> None:
    """A second interrupt ends the run at once, perhaps before that line."""
    terminal = Terminal(
        *("--dataset=fake", "--limit=4000", "--channels=1", "--batch-size=8", "--image-size=32", "--ngf=4"),
        *("--ndf=4", "--nz=6", "--epochs=50", "--device=cpu", "--no-tensorboard", f"--out={tmp_path}/run"),
    )
    terminal.read(until="img/s")
    for _ in range(presses):
        terminal.press_interrupt()
        time.sleep(0.4)  # signals that arrive together are one
    terminal.read()
    assert terminal.process.wait() == 130, terminal.raw
    text = terminal.screen.write(terminal.raw).text
    shown = "\n".join(text)
    for piece in ("Traceback", "img/s", "━", "^C"):
        assert piece not in shown
    stopped = sum("Stopped" in line for line in text)
    assert stopped == 1 if presses == 1 else stopped <= 1
