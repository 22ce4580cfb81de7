"""Show a training run epoch by epoch: scores, rates and samples.

    dcgan train --dataset mnist --eval-every 1 --out runs/mnist
    python examples/full_run.py runs/mnist --out bench/results

Reads the folder of a run, finished or not, and with ``--reference`` that of the same recipe on the reference
engine. Scores are those of ``dcgan train --eval-every``, or of ``dcgan eval RUN --all --json FILE`` for
epochs that were trained without it. Prints a table and writes ``full-run.jsonl`` (a header with the settings
and the machine, which must be the one that trained, then a row per run and epoch), ``full-run.png`` (the
scores by epoch) and ``full-run-grids.png`` (the same samples after more and more epochs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import docs, output
from bench.plot import BASELINES, CEILING, OURS, figure, plain
from dcgan.errors import InputError
from dcgan.settings import Settings, of_run
from dcgan.training.report import METRICS, SAMPLES, TENSORBOARD, read_metrics

SCORES = ("frechet", "kernel", "kernel_std", "precision", "recall", "density", "coverage")
CONDITIONS = ("features", "images")
TIMES = ("seconds", "images_per_second")
SHOWN = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50)
"""The epochs whose samples are drawn, in addition to the last one."""
COLUMNS, SEPARATOR = 8, 2
"""Images per row of a sample grid, and the pixels between them."""
LABEL_WIDTH, ROW_WIDTH = 84, 530
LARGEST = 300_000
"""Bytes of a picture."""
INTERRUPTED = 10
"""An interval that is this many times longer than the median is a pause, not training."""

Row = dict[str, Any]


def settings(folder: Path, option: str) -> Settings:
    """Return the settings of a run. Raises InputError if the folder is not one."""
    found = of_run(folder)
    if found is None or not (folder / METRICS).is_file():
        raise InputError(
            f"{option} must be the folder of a run, with config.yaml and {METRICS}, got {folder}"
        )
    return found


def epochs(name: str, folder: Path, files: Sequence[Path]) -> tuple[list[Row], Row | None]:
    """Return a row per finished epoch, with None for unknown figures, and the floor, None if unknown.

    Raises:
        InputError: a file is not one of scores, or has none of this run.
    """
    metrics = read_metrics(folder / METRICS)
    reported = [row for row in metrics if "loss_d" not in row]
    finished, floor = {row["step"]: row["epoch"] for row in reported}, None
    if not finished:
        raise InputError(f"{folder} has no finished epoch")
    for path in files:
        scored, known = read_scores(path)
        matching = [row | {"epoch": finished[row["step"]]} for row in scored if row["step"] in finished]
        if not matching:
            raise InputError(f"{path} has no scores of the epochs in {folder}")
        reported += matching
        floor = known or floor
    rows: dict[int, Row] = {}
    empty = dict.fromkeys((*TIMES, *CONDITIONS, *SCORES))
    for found in reported:
        row = rows.setdefault(
            found["epoch"], {"run": name, "epoch": found["epoch"], "step": found["step"], **empty}
        )
        row.update({key: found[key] for key in empty if key in found})
    images = epoch_images(metrics)
    rates = event_rates(folder / TENSORBOARD, metrics)
    for epoch, row in rows.items():
        row["images_per_second"] = row["images_per_second"] or rates.get(epoch)
        if row["images_per_second"] and epoch in images:
            # The metrics have the time since the last interruption only.
            row["seconds"] = images[epoch] / row["images_per_second"]
    return [row for _, row in sorted(rows.items())], floor


def read_scores(path: Path) -> tuple[list[Row], Row | None]:
    """Return a row per checkpoint that ``dcgan eval RUN --all --json`` scored, and the floor if known."""
    try:
        found = json.loads(path.read_text())
        rows = []
        for one in found["checkpoints"]:
            row = {"step": one["step"], "features": found.get("features"), **one, **one.get("scores", {})}
            if isinstance(row["images"], list):
                row["images"] = row["images"][1]  # of the real and the generated ones
            rows.append(row)
        return rows, found.get("scores", {}).get("floor")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a file that dcgan eval --all --json wrote") from error


def epoch_images(metrics: Sequence[Row]) -> dict[int, int]:
    """Return the number of images of each epoch."""
    last = {0: 0} | {row["epoch"]: row["images"] for row in metrics if "loss_d" in row}
    return {epoch: images - last[epoch - 1] for epoch, images in last.items() if epoch - 1 in last}


def event_rates(folder: Path, metrics: Sequence[Row]) -> dict[int, float]:
    """Return the images/s of each epoch from the times of TensorBoard's events, for metrics without times.

    Scoring and saving between epochs do not count, nor do interruptions.
    """
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tag = "images per second"
    if tag not in events.Tags()["scalars"]:
        return {}
    trained = {row["step"]: row for row in metrics if "loss_d" in row}
    spans: dict[int, list[tuple[int, float]]] = {}
    for first, second in pairwise(event for event in events.Scalars(tag) if event.step in trained):
        before, after = trained[first.step], trained[second.step]
        if before["epoch"] == after["epoch"]:
            span = after["images"] - before["images"], second.wall_time - first.wall_time
            spans.setdefault(after["epoch"], []).append(span)
    rates = {}
    for epoch, measured in spans.items():
        typical = statistics.median(seconds / images for images, seconds in measured)
        kept = [span for span in measured if span[1] / span[0] < INTERRUPTED * typical]
        rates[epoch] = sum(images for images, _ in kept) / sum(seconds for _, seconds in kept)
    return rates


def check_comparable(rows: Sequence[Row]) -> None:
    """Raise InputError if scores are of different features or numbers of images, on which they depend."""
    conditions = {tuple(row[key] for key in CONDITIONS) for row in rows if row["frechet"] is not None}
    if len(conditions) > 1:
        listed = " and ".join(f"{features} of {images}" for features, images in sorted(conditions, key=str))
        raise InputError(f"all scores must be of the same features and number of images, got {listed}")


# --- pictures -----------------------------------------------------------------------------------------------


def draw_scores(header: Row, rows: Sequence[Row], out: Path) -> None:
    """Draw the scores by epoch: the reference engine's dashed, those of real images as dotted lines."""
    panels = (("frechet",), ("kernel",), ("precision", "recall"), ("density", "coverage"))
    titles = {"frechet": "Fréchet distance", "kernel": "kernel distance"}
    scored = [row for row in rows if row["frechet"] is not None]
    floor = header["floor"] or {}
    with figure(out, 2, 2.7, columns=2) as axes:
        for ax, keys in zip(axes.flat, panels, strict=True):
            for key, color in zip(keys, (OURS[0], BASELINES[1]), strict=False):
                label = f"{key}, " if len(keys) > 1 else ""
                for name, title in docs.RUNS.items():
                    points = [(r["epoch"], r[key]) for r in scored if r["run"] == name and r[key] is not None]
                    style = {"ls": "--" if name == "reference" else "-", "marker": "o", "ms": 3}
                    if points:
                        ax.plot(*zip(*points, strict=True), color=color, label=label + title, **style)
                if floor.get(key) is not None:
                    shade = CEILING if len(keys) == 1 else color
                    ax.axhline(floor[key], color=shade, ls=":", lw=1.2, label=f"{label}real images")
            ax.set_title(" and ".join(titles.get(key, key) for key in keys), loc="left", fontsize=10)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_xlabel("epoch")
            plain(ax, grid="both")
            ax.legend(frameon=False, fontsize=8)
        # The kernel distance is unbiased, hence possibly negative.
        for ax, key in zip(axes[0], ("frechet", "kernel"), strict=True):
            values = [row[key] for row in [*scored, floor] if row.get(key) is not None]
            if min(values, default=0) > 0:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
    with Image.open(out) as drawn:
        save(drawn, out)


def draw_grids(folder: Path, rows: Sequence[Row], out: Path) -> None:
    """Draw the first row of the sample grids of some of the rows' epochs, one labelled row per epoch."""
    steps = {0: 0} | {row["epoch"]: row["step"] for row in rows}
    paths = {epoch: folder / SAMPLES / f"step-{step:09d}.png" for epoch, step in steps.items()}
    found = [epoch for epoch, path in paths.items() if path.is_file()]
    if not found:
        raise InputError(f"{folder / SAMPLES} has no grid of samples of a finished epoch")
    strips = {epoch: first_row(paths[epoch]) for epoch in found if epoch in SHOWN or epoch == max(found)}
    width, height = next(iter(strips.values())).size
    canvas = Image.new("RGB", (LABEL_WIDTH + width, height * len(strips)), "white")
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, (epoch, strip) in enumerate(strips.items()):
        canvas.paste(strip, (LABEL_WIDTH, i * height))
        text.text((LABEL_WIDTH - 8, (i + 0.5) * height), f"epoch {epoch}", "black", font, "rm")
    save(canvas, out)


def first_row(path: Path) -> Image.Image:
    """Return the first row of a sample grid, reduced to about ROW_WIDTH pixels."""
    with Image.open(path) as grid:
        height = (grid.width - SEPARATOR) // COLUMNS + SEPARATOR
        strip = grid.convert("RGB").crop((0, 0, grid.width, height))
    return strip.reduce(max(1, round(strip.width / ROW_WIDTH)))


def save(image: Image.Image, out: Path) -> None:
    """Write a PNG with as many colors, up to 256, as fit into LARGEST bytes; at least 8."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for colors in (256, 64, 32, 16, 8):
        image.convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(out, optimize=True)
        if out.stat().st_size < LARGEST:
            break


# --- command line -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Show a training run epoch by epoch: scores, rates and samples."
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of the run")
    add("--reference", type=Path, metavar="RUN", help="folder of the same run with --engine reference")
    text = "scores of {}, written by dcgan eval --all --json"
    add("--scores", type=Path, nargs="+", default=[], metavar="FILE", help=text.format("RUN"))
    add(
        "--reference-scores",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=text.format("--reference"),
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder to write the results to")
    args = parser.parse_args(arguments)
    if args.reference_scores and args.reference is None:
        parser.error("--reference-scores requires --reference")
    try:
        show(args)
    except InputError as error:
        parser.error(str(error))


def show(args: argparse.Namespace) -> None:
    runs = {"dcgan": settings(args.run, "RUN").to_dict()}
    rows, floor = epochs("dcgan", args.run, args.scores)
    if args.reference is not None:
        runs["reference"] = settings(args.reference, "--reference").to_dict()
        others, other_floor = epochs("reference", args.reference, args.reference_scores)
        rows, floor = rows + others, floor or other_floor
    check_comparable(rows)
    header = output.common("full") | {"runs": runs, "floor": floor}
    heading, lines = docs.epochs([header, *rows])
    table = output.table(docs.rates([header, *rows]), heading[:1], heading[1:])
    for line in lines:
        table.add_row(*line)
    output.console().print(table)

    file = args.out / "full-run.jsonl"
    file.unlink(missing_ok=True)
    output.append(file, [header, *({"schema": output.SCHEMA, "kind": "full"} | row for row in rows)])
    own = [row for row in rows if row["run"] == "dcgan"]
    draw_grids(args.run, own, args.out / "full-run-grids.png")
    pictures = ["full-run-grids.png"]
    if any(row["frechet"] is not None for row in rows):
        draw_scores(header, rows, args.out / "full-run.png")
        pictures.append("full-run.png")
    else:
        print(
            "No epoch has scores, so full-run.png is not drawn; give those of dcgan eval --all by --scores."
        )
    print(f"{file}, with {' and '.join(pictures)} in the same folder")


if __name__ == "__main__":
    main()
