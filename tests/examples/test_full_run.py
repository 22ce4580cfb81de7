"""``examples/full_run.py`` on synthetic run folders: rows, tables, pictures and partial data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from bench import output
from dcgan.settings import Settings, write_file
from examples import full_run

STEPS = 4  # per epoch
IMAGES = 3750  # per epoch: three batches of 1000 and one of 750
FLOOR = {"frechet": 2.5, "kernel": 0.1, "kernel_std": 0.5} | dict.fromkeys(full_run.SCORES[3:], 0.97)


def scores(epoch: int, **changed: Any) -> dict[str, Any]:
    """The row of an evaluation; every figure tells the epoch."""
    shares = {key: (epoch + i) / 20 for i, key in enumerate(full_run.SCORES[3:])}
    distances = {"frechet": 100 / epoch, "kernel": 3.0 / epoch - 1, "kernel_std": 0.25}
    place = {"step": epoch * STEPS, "epoch": epoch, "features": "digits", "images": 10_000}
    return place | distances | shares | changed


def times(epoch: int, **changed: float) -> dict[str, Any]:
    seconds = 60.0 + epoch
    place = {"step": epoch * STEPS, "epoch": epoch}
    return place | {"seconds": seconds, "images_per_second": IMAGES / seconds} | changed


def losses(step: int) -> dict[str, Any]:
    epoch, batch = divmod(step - 1, STEPS)
    images = epoch * IMAGES + min(1000 * (batch + 1), IMAGES)
    place = {"step": step, "epoch": epoch + 1, "batch": batch + 1, "images": images}
    return place | dict.fromkeys(("loss_d", "loss_g", "d_x", "d_g_z"), 0.5)


def grid(path: Path, brightness: int, size: int = 16) -> None:
    """Write 64 samples: the first row is ``brightness``, the others are 255 minus that."""
    pixels = np.full((8 * (size + 2) + 2, 8 * (size + 2) + 2, 3), 255 - brightness, np.uint8)
    pixels[: size + 4] = brightness
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def run(folder: Path, steps: int, *rows: dict[str, Any], **changed: Any) -> Path:
    """Write the folder of a run of so many steps with further rows and a grid of every finished epoch."""
    folder.mkdir()
    write_file(Settings(**{"epochs": 9, "batch_size": 1000, **changed}), folder / "config.yaml")
    finished = [{"step": e * STEPS, "epoch": e, "pixel_frechet_distance": 1.0} for e in epochs_of(steps)]
    metrics = sorted([*map(losses, range(1, steps + 1)), *finished, *rows], key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 9')
    for epoch in (0, *epochs_of(steps)):
        grid(folder / f"samples/step-{epoch * STEPS:09d}.png", brightness=10 * epoch)
    return folder


def epochs_of(steps: int) -> range:
    return range(1, steps // STEPS + 1)


def results(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header, *rows = output.read(out / "full-run.jsonl")
    return header, rows


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_run_and_its_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of the metrics is in the rows and in the table, and the pictures can be read."""
    ours = run(tmp_path / "ours", 13, *(make(e) for e in (1, 2, 3) for make in (scores, times)))
    reference = run(tmp_path / "reference", 4, scores(1, frechet=123.4), times(1), engine="reference")
    out = tmp_path / "results"
    for _ in range(2):  # the second replaces the results of the first
        full_run.main([str(ours), "--reference", str(reference), "--out", str(out)])
    header, rows = results(out)
    assert header["hardware"]["cores"] >= 1
    assert header["floor"] is None
    assert {name: settings["engine"] for name, settings in header["runs"].items()} == {
        "dcgan": "auto",
        "reference": "reference",
    }
    expected = [{"run": "dcgan", **scores(e), **times(e)} for e in (1, 2, 3)]
    expected.append({"run": "reference", **scores(1, frechet=123.4), **times(1)})
    assert [{key: row[key] for key in row if key not in ("schema", "kind")} for row in rows] == expected

    printed = capsys.readouterr().out
    assert (
        "dcgan-kernels: 3 of 9 epochs, 3 minutes of training at 60 images/s; reference engine: 1" in printed
    )
    lines = squeezed(printed)
    assert "dcgan-kernels 2 62 60 50 0.5 ± 0.25 0.100 0.150 0.200 0.250" in lines
    assert "reference engine 1 61 61 123 2 ± 0.25 0.050 0.100 0.150 0.200" in lines
    for name in ("full-run.png", "full-run-grids.png"):
        assert (out / name).stat().st_size < full_run.LARGEST
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
            assert len(np.unique(np.asarray(picture.convert("L")))) > 2


def test_an_epoch_without_scores_or_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown figures are None in the rows and empty in the table; the step after epoch 2 is no epoch."""
    out = tmp_path / "results"
    full_run.main([str(run(tmp_path / "run", 9, scores(2), times(1))), "--out", str(out)])
    _, rows = results(out)
    assert [(row["epoch"], row["seconds"], row["frechet"]) for row in rows] == [
        (1, 61.0, None),
        (2, None, 50),
    ]
    printed = capsys.readouterr().out
    assert "2 of 9 epochs, 61 seconds of training for 1 of them at 61 images/s" in printed
    lines = squeezed(printed)
    assert "dcgan-kernels 1 61 61" in lines
    assert "dcgan-kernels 2 50 0.5 ± 0.25 0.100 0.150 0.200 0.250" in lines
    assert (out / "full-run.png").exists()


def test_a_run_without_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    full_run.main([str(run(tmp_path / "run", 4)), "--out", str(out)])
    assert "No epoch has scores, so full-run.png is not drawn" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["full-run-grids.png", "full-run.jsonl"]


def evaluated(path: Path, floor: dict[str, float] | None, *rows: dict[str, Any]) -> str:
    """Write what ``dcgan eval --all --json`` writes."""
    checkpoints = []
    for row in rows:
        own = {key: row[key] for key in full_run.SCORES} | {"images": [9_000, row["images"]]}
        checkpoints.append({"generator": "step.pt", "step": row["step"], "scores": own})
    results = {"features": "digits", "checkpoints": checkpoints, "floor": "test split"}
    path.write_text(json.dumps(results | ({"scores": {"floor": floor}} if floor else {})))
    return str(path)


@pytest.mark.parametrize("floor", [None, FLOOR])
def test_scores_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], floor: dict[str, float] | None
) -> None:
    """They complete and replace those of the metrics; those of checkpoints within an epoch are left out."""
    within = [scores(2, step=step, frechet=6.0) for step in (2 * STEPS + 1, 3 * STEPS + 1)]
    ours = run(tmp_path / "run", 3 * STEPS + 1, scores(3), times(3))
    first = evaluated(tmp_path / "first.json", floor, scores(1), scores(3, frechet=7.0))
    second = evaluated(tmp_path / "second.json", None, scores(2, frechet=9.0), *within)
    other = evaluated(tmp_path / "other.json", None, scores(1, frechet=8.0))
    given = [str(ours), "--scores", first, second, "--reference", str(run(tmp_path / "reference", 4))]
    full_run.main([*given, "--reference-scores", other, "--out", str(tmp_path)])
    header, rows = results(tmp_path)
    assert header["floor"] == floor
    assert [(row["run"], row["epoch"], row["frechet"]) for row in rows] == [
        ("dcgan", 1, 100.0),
        ("dcgan", 2, 9.0),
        ("dcgan", 3, 7.0),
        ("reference", 1, 8.0),
    ]
    assert rows[2]["seconds"] == 63.0
    lines = squeezed(capsys.readouterr().out)
    assert ("real images 2.5 0.1 ± 0.5 0.970 0.970 0.970 0.970" in lines) == (floor is not None)


def test_times_of_tensorboard(tmp_path: Path) -> None:
    """Evaluations between epochs, and interruptions, are not training; rates in the metrics come first."""
    folder = run(tmp_path / "run", 3 * STEPS + 1, times(2, images_per_second=10.0, seconds=1.0))
    clock, pauses = 1e9, {STEPS + 1: 100.0, 2 * STEPS + 1: 100.0, 2 * STEPS + 3: 5000.0}
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step in range(1, 3 * STEPS + 2):
            clock += losses(step)["images"] / 5 - losses(step - 1)["images"] / 5 + pauses.get(step, 0.0)
            writer.add_scalar("images per second", 1.0, step, walltime=clock)
    metrics = full_run.read_metrics(folder / "metrics.jsonl")
    assert full_run.event_rates(folder / "tensorboard", metrics) == pytest.approx({1: 5.0, 2: 5.0, 3: 5.0})
    rows, _ = full_run.epochs("dcgan", folder, [])
    assert [row["images_per_second"] for row in rows] == pytest.approx([5.0, 10.0, 5.0])
    assert [row["seconds"] for row in rows] == pytest.approx([IMAGES / 5, IMAGES / 10, IMAGES / 5])


def test_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is dashed, real images are dotted, distances logarithmic if they are positive."""
    panels: list[Any] = []

    @contextmanager
    def captured(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with original(*args, **kwargs) as axes:
            yield axes
            panels.extend(axes.flat)

    original = full_run.figure
    monkeypatch.setattr(full_run, "figure", captured)
    empty = dict.fromkeys(full_run.SCORES)
    rows = [{"run": "dcgan", **scores(e)} for e in (1, 3)] + [{"run": "reference", **scores(1)}]
    rows.append({"run": "dcgan", "epoch": 4, **empty})
    full_run.draw_scores({"floor": FLOOR}, rows, tmp_path / "curves.png")
    drawn = [{line.get_label(): line for line in ax.get_lines()} for ax in panels]
    assert list(drawn[0]) == ["dcgan-kernels", "reference engine", "real images"]
    assert [line.get_linestyle() for line in drawn[0].values()] == ["-", "--", ":"]
    assert drawn[0]["dcgan-kernels"].get_xydata().tolist() == [[1, 100], [3, 100 / 3]]
    assert drawn[0]["real images"].get_ydata()[0] == 2.5
    assert drawn[1]["dcgan-kernels"].get_xydata().tolist() == [[1, 2], [3, 0]]
    assert {"precision, dcgan-kernels", "recall, reference engine", "recall, real images"} <= drawn[2].keys()
    assert {"density, dcgan-kernels", "coverage, reference engine"} <= drawn[3].keys()
    assert [ax.get_yscale() for ax in panels] == ["log", "linear", "linear", "linear"], (
        "a kernel distance is 0"
    )


def rows_of(path: Path, height: int) -> list[float]:
    """The brightness of each row of a picture of grids, without the labels and the colors' quantization."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))[:, full_run.LABEL_WIDTH :]
    assert len(pixels) % height == 0
    return [float(pixels[i : i + height].mean()) for i in range(0, len(pixels), height)]


def test_grids_by_epoch(tmp_path: Path) -> None:
    """A row has the first eight samples of an epoch; epochs 4, 6 and 7 are not shown, 2 has no grid."""
    folder = run(tmp_path / "run", 9 * STEPS + 2)
    (folder / f"samples/step-{2 * STEPS:09d}.png").unlink()
    grid(folder / f"samples/step-{9 * STEPS + 2:09d}.png", 200)  # of an unfinished epoch
    rows, _ = full_run.epochs("dcgan", folder, [])
    full_run.draw_grids(folder, rows, tmp_path / "grids.png")
    assert rows_of(tmp_path / "grids.png", 20) == pytest.approx([0, 10, 30, 50, 80, 90], abs=2)


def test_large_grids_are_reduced(tmp_path: Path) -> None:
    grid(tmp_path / "grid.png", 77, size=128)
    strip = full_run.first_row(tmp_path / "grid.png")
    assert strip.size == (521, 66)
    assert strip.getpixel((0, 0)) == strip.getpixel((520, 64)) == (77, 77, 77)


def test_pictures_are_small(tmp_path: Path) -> None:
    """Noise, which hardly compresses, loses colors until it fits."""
    noise = np.random.default_rng(0).integers(0, 256, (500, 700, 3), np.uint8)
    full_run.save(Image.fromarray(noise), tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size < full_run.LARGEST


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "RUN must be the folder of a run, with config.yaml and metrics.jsonl, got nowhere"),
        (["run", "--reference", "nowhere"], "--reference must be the folder of a run"),
        (["started"], "started has no finished epoch"),
        (["run", "--reference-scores", "others.json"], "--reference-scores requires --reference"),
        (
            ["run", "--scores", "nowhere.json"],
            "nowhere.json is not a file that dcgan eval --all --json wrote",
        ),
        (["run", "--scores", "object.json"], "object.json is not a file that dcgan eval --all --json wrote"),
        (["run", "--scores", "others.json"], "others.json has no scores of the epochs in run"),
        (
            ["run", "--scores", "fewer.json"],
            "all scores must be of the same features and number of images, "
            "got digits of 10000 and digits of 500",
        ),
    ],
)
def test_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("run"), 9, scores(1))
    run(Path("started"), 2)
    Path("object.json").write_text('{"frechet": 2}')
    evaluated(Path("others.json"), FLOOR, scores(5))
    evaluated(Path("fewer.json"), FLOOR, scores(2, images=500))
    with pytest.raises(SystemExit) as stop:
        full_run.main([*arguments, "--out", "results"])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("results").exists()
