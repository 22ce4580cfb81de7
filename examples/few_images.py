"""Train on 500 images with and without DiffAugment, and score both against images that they never saw.

    python examples/few_images.py --results bench/results

Both runs are those of ``dcgan train --dataset mnist --limit 500 --ema 0.999`` with the same RNG seed and
number of steps, each in a separate folder; an existing run is resumed, and what has been scored is not scored
again.

Every ``--every`` epochs both are scored twice: by ``dcgan train --eval-every`` against the training images,
and here against as many images of the test split. By the first score a generator that copies its training
images would be perfect; the second shows how well it has learned the distribution, and the difference how
much it has memorized. The floor is the score of other real images against those of the test split.

Prints a table; ``--results`` also writes the rows, and draws the curves and the last samples of both runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import output
from bench.options import positive
from bench.plot import BASELINES, CEILING, OURS, figure, plain
from dcgan import evaluation, pretrained
from dcgan.choices import TEST_SPLITS
from dcgan.training.report import read_metrics
from examples.mnist import dcgan

IMAGE_SIZE = 32
SCORES = ("frechet", "kernel", "precision", "recall", "density", "coverage")
CURVES = {"frechet": "Fréchet distance", "coverage": "coverage of the real images"}
HELD_OUT = "held-out.jsonl"
"""The file of scores against unseen images in a run's folder."""

Row = dict[str, Any]


class Run(NamedTuple):
    """The title in tables and plots, the options of ``dcgan train`` and the color."""

    title: str
    options: tuple[str, ...]
    color: str


RUNS = {
    "plain": Run("no augmentation", (), BASELINES[3]),
    "diffaugment": Run("DiffAugment", ("--diffaugment=color,translation,cutout",), OURS[0]),
}


def train(run: Run, folder: Path, epoch: int, args: argparse.Namespace) -> None:
    """Train or resume a run up to the end of an epoch, whose checkpoint is then the last one."""
    print(f"{run.title}: up to epoch {epoch} in {folder}", file=sys.stderr)
    resume = ("--resume",) if (folder / "config.yaml").exists() else ()
    dcgan(
        *("train", *resume, f"--out={folder}", f"--dataset={args.dataset}", f"--dataroot={args.dataroot}"),
        *(f"--limit={args.limit}", f"--image-size={IMAGE_SIZE}", "--ema=0.999", *run.options),
        *(f"--eval-every={args.every}", f"--eval-num={args.num}", f"--epochs={epoch}"),
        *("--keep=1", "--checkpoint-interval=0", "--no-tensorboard", *args.options),
    )


def held_out(args: argparse.Namespace, device: torch.device) -> evaluation.Evaluator:
    """Return what scores images against ``--limit`` images of the test split.

    Their number is that of the training images, on which scores depend.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    seen, unseen = evaluation.parts(
        args.dataset, args.dataroot, image_size=IMAGE_SIZE, channels=args.channels, say=say
    )
    features = evaluation.choose("auto", seen, unseen, device, say)
    return evaluation.Evaluator(features, unseen.choose(args.limit, seed=0), seen, args.num)


def scores(
    name: str, folder: Path, args: argparse.Namespace, evaluator: evaluation.Evaluator, device: torch.device
) -> list[Row]:
    """Train a run to its end, scoring on the way, and return one row per scored epoch."""
    known, file = {}, folder / HELD_OUT
    if file.exists():
        found = [json.loads(line) for line in file.read_text().splitlines()]
        known = {row["epoch"]: row for row in found if row["images"] == args.num}
    for epoch in range(args.every, args.epochs + 1, args.every):
        if epoch in known and epoch < args.epochs:  # at the last epoch the command checks the options
            continue
        train(RUNS[name], folder, epoch, args)
        if epoch not in known:
            generator = pretrained.read(folder / "checkpoints" / "last.pt", "generator").sampler(
                "auto", device
            )
            known[epoch] = {"epoch": epoch} | evaluator.row(evaluator.of(generator))
            output.append(file, [known[epoch]])
    rows = []
    for row in read_metrics(folder / "metrics.jsonl"):
        if "frechet" in row and row["epoch"] in known:
            position = {"run": name, "epoch": row["epoch"], "step": row["step"]}
            pair = {"training": row, "held_out": known[row["epoch"]]}
            common = {key: row[key] for key in ("features", "images")}
            picked = {part: {key: values[key] for key in SCORES} for part, values in pair.items()}
            rows.append(position | common | picked)
    return rows


def print_table(rows: Sequence[Row], floor: Row, limit: int) -> None:
    """Print one row per run and epoch, with all scores against unseen images, and the floor."""
    print(
        f"{rows[0]['images']:,} images against {limit:,} unseen ones; Fréchet*: against the training images"
    )
    columns = ("epoch", "Fréchet*", "Fréchet", *SCORES[1:])
    print(f"{'':<16}", *(f"{column:>9}" for column in columns))
    for row in rows:
        figures = (row["training"]["frechet"], *row["held_out"].values())
        print_row(RUNS[row["run"]].title, str(row["epoch"]), *(f"{value:,.4g}" for value in figures))
    print_row("real images", "", "", *(f"{floor[key]:,.4g}" for key in SCORES))


def print_row(title: str, *cells: str) -> None:
    print(f"{title:<16}", *(f"{cell:>9}" for cell in cells))


def draw(rows: Sequence[Row], floor: Row, folders: dict[str, Path], out: Path) -> None:
    """Draw two scores by epoch above the first five rows of each run's last sample grid."""
    with figure(out, 2, 3.6, columns=2) as axes:
        for ax, (key, title) in zip(axes[0], CURVES.items(), strict=True):
            for name, run in RUNS.items():
                own = [row for row in rows if row["run"] == name]
                epochs = [row["epoch"] for row in own]
                for part, style in (("held_out", "o-"), ("training", "o:")):
                    label = f"{run.title}, {part.replace('_', '-')} images"
                    values = [row[part][key] for row in own]
                    ax.plot(epochs, values, style, color=run.color, ms=3, label=label)
            ax.axhline(floor[key], color=CEILING, ls="--", lw=1.2, label="floor: other real images")
            ax.set_title(title, loc="left", fontsize=10)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_xlabel("epoch")
            plain(ax, grid="y")
        axes[0, 0].set_yscale("log")
        axes[0, 1].legend(frameon=False, fontsize=8)
        for ax, (name, folder) in zip(axes[1], folders.items(), strict=True):
            with Image.open(max((folder / "samples").glob("*.png"))) as grid:
                shown = np.asarray(grid.convert("RGB"))
            ax.imshow(shown[: 5 * ((shown.shape[1] - 2) // 8) + 2])
            last = max(row["epoch"] for row in rows)
            ax.set_title(f"{RUNS[name].title}, epoch {last}", fontsize=9)
            ax.axis("off")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train on few images with and without DiffAugment, and score both against unseen images."
    )
    add = parser.add_argument
    add("--dataset", choices=TEST_SPLITS, default="mnist", help="dataset with a test split (default: mnist)")
    add("--dataroot", type=Path, default="data", metavar="FOLDER", help="dataset folder (default: data)")
    add("--limit", type=positive, default=500, help="training images (default: 500)")
    add("--epochs", type=positive, default=1000, help="epochs of each run (default: 1000)")
    add("--every", type=positive, default=100, help="epochs between scores (default: 100)")
    add("--num", type=positive, default=10_000, help="generated images per score (default: 10000)")
    add(
        "--out",
        type=Path,
        default="runs/few-images",
        metavar="FOLDER",
        help="of the runs (default: runs/few-images)",
    )
    add("--results", type=Path, metavar="FOLDER", help="to write few-images.jsonl and few-images.png to")
    add(
        "--options",
        nargs=argparse.REMAINDER,
        default=[],
        help="further options of dcgan train; must come last",
    )
    args = parser.parse_args(arguments)
    if args.epochs % args.every:
        parser.error(f"--epochs must be a multiple of --every, got {args.epochs} and {args.every}")
    args.channels = 1 if args.dataset in ("mnist", "fashion-mnist") else 3

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = held_out(args, device)
    floor = evaluator.row(evaluator.floor())
    folders = {name: args.out / name for name in RUNS}
    rows = [row for name, folder in folders.items() for row in scores(name, folder, args, evaluator, device)]
    print_table(rows, floor, args.limit)
    if args.results is not None:
        file = args.results / "few-images.jsonl"
        file.unlink(missing_ok=True)
        header = output.common("few-images") | {"limit": args.limit, "floor": floor}
        body = [{"schema": output.SCHEMA, "kind": "few-images"} | row for row in rows]
        output.append(file, [header, *body])
        draw(rows, floor, folders, args.results / "few-images.png")
        print(f"{file}, with few-images.png in the same folder")


if __name__ == "__main__":
    main()
