"""Train on MNIST for a few epochs and score every epoch.

    python examples/mnist.py --results bench/results

Compares DCGAN on the fastest engine, the fully connected GAN of 2014, and DCGAN on the reference engine from
the same RNG seed. Each is trained by ``dcgan train`` in a separate folder; an existing run is resumed. Every
epoch's checkpoint is scored by ``dcgan eval``. Prints a table; ``--results`` also writes the rows, the final
sample grids side by side and the losses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import output
from bench.options import positive
from bench.plot import BASELINES, OURS, figure, plain
from dcgan import checkpoint
from dcgan.training.report import read_metrics

WINDOW = 50  # steps of the running mean of the plotted losses


class Run(NamedTuple):
    """The title in tables and plots, the options of ``dcgan train``, the epochs and the color."""

    title: str
    options: tuple[str, ...]
    epochs: int
    color: str


RUNS = {
    "dcgan": Run("DCGAN", (), 3, OURS[0]),
    "mlp": Run("fully connected GAN", ("--model=mlp",), 3, BASELINES[3]),
    "reference": Run("DCGAN, reference engine", ("--engine=reference",), 1, BASELINES[6]),
}


def dcgan(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dcgan", *arguments], check=True)


def train(run: Run, folder: Path, args: argparse.Namespace) -> None:
    """Train or resume a run until its last epoch, keeping the checkpoint of every epoch and no others."""
    print(f"{run.title}: {run.epochs} epochs in {folder}", file=sys.stderr)
    shared = (f"--out={folder}", f"--dataroot={args.dataroot}")
    if (folder / "config.yaml").exists():
        dcgan("train", "--resume", *shared)
        return
    epochs = (f"--epochs={run.epochs}", f"--keep={run.epochs}", "--checkpoint-interval=0")
    dcgan("train", *shared, f"--dataset={args.dataset}", *epochs, *run.options, *args.options)


def scores(name: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Score every epoch's checkpoint and return one row per epoch."""
    metrics = read_metrics(folder / "metrics.jsonl")
    rows = []
    for path in sorted((folder / "checkpoints").glob("step-*.pt")):
        saved = checkpoint.read(path)
        print(f"{RUNS[name].title}: scoring epoch {saved.epoch}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as temporary:
            found = Path(temporary) / "scores.json"
            data = (f"--dataset={args.dataset}", f"--dataroot={args.dataroot}", f"--num={args.num}")
            dcgan("eval", str(path), *data, f"--json={found}")
            scored = json.loads(found.read_text())
        steps = [m for m in metrics if m.get("epoch") == saved.epoch and "loss_d" in m]
        means = {k: float(np.mean([m[k] for m in steps])) for k in ("loss_d", "loss_g", "d_x", "d_g_z")}
        row = {"run": name, "epoch": saved.epoch, "step": saved.step, "means": means}
        row["pixel_frechet_distance"] = saved.score
        rows.append(row | {key: scored[key] for key in ("features", "frechet", "kernel", "scores")})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one row per epoch; the floor is the distance between two sets of real digits."""
    print(f"{rows[0]['frechet']}; kernel: {rows[0]['kernel']}")
    columns = ("epoch", "Fréchet", "floor", "kernel", "loss D", "loss G", "D(x)", "D(G(z))")
    print(f"{'run':<24}", *(f"{column:>8}" for column in columns))
    for row in rows:
        generated, floor = row["scores"]["generated"], row["scores"]["floor"]
        distances = (generated["frechet"], floor["frechet"], generated["kernel"])
        figures = [f"{value:,.4g}" for value in distances] + [
            f"{value:.2f}" for value in row["means"].values()
        ]
        print(f"{RUNS[row['run']].title:<24}", *(f"{cell:>8}" for cell in (row["epoch"], *figures)))


def draw_grids(folders: dict[str, Path], out: Path) -> None:
    """Draw the first five rows of each run's last sample grid; all runs use the same fixed noise."""
    with figure(out, 1, 3.0, columns=len(folders)) as axes:
        for ax, (name, folder) in zip(axes[0], folders.items(), strict=True):
            with Image.open(max((folder / "samples").glob("*.png"))) as grid:
                shown = np.asarray(grid.convert("L"))
            size = 5 * ((shown.shape[0] - 2) // 8) + 2
            ax.imshow(shown[:size, :size], cmap="gray", vmin=0, vmax=255)
            ax.set_title(f"{RUNS[name].title}, epoch {RUNS[name].epochs}", fontsize=9)
            ax.axis("off")


def draw_losses(folders: dict[str, Path], out: Path) -> None:
    """Plot the running means of both losses over the steps."""
    with figure(out, 1, 2.6, columns=2) as axes:
        for ax, (key, label) in zip(axes[0], {"loss_d": "D loss", "loss_g": "G loss"}.items(), strict=True):
            for name, folder in folders.items():
                losses = [m[key] for m in read_metrics(folder / "metrics.jsonl") if key in m]
                width = min(WINDOW, len(losses))
                means = np.convolve(losses, np.full(width, 1 / width), "valid")
                steps = np.arange(len(means)) + (width + 1) / 2
                ax.plot(steps, means, color=RUNS[name].color, lw=1.2, label=RUNS[name].title)
            ax.set_title(f"{label}, running mean of {WINDOW} steps", loc="left", fontsize=9)
            plain(ax, grid="y")
        axes[0, 1].legend(frameon=False, fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train on MNIST for a few epochs and score every epoch.")
    add = parser.add_argument
    add("--dataset", default="mnist", help="dataset, as for dcgan train (default: mnist)")
    add("--dataroot", type=Path, default="data", metavar="FOLDER", help="dataset folder (default: data)")
    add("--out", type=Path, default="runs/mnist", metavar="FOLDER", help="of the runs (default: runs/mnist)")
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="to write mnist.jsonl, mnist.png and mnist-losses.png to",
    )
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="runs (default: all)")
    add("--num", type=positive, default=10_000, help="generated images per score (default: 10000)")
    add(
        "--options",
        nargs=argparse.REMAINDER,
        default=[],
        help="further options of dcgan train; must come last",
    )
    args = parser.parse_args(arguments)

    rows = []
    folders = {name: args.out / name for name in args.runs}
    for name, folder in folders.items():
        train(RUNS[name], folder, args)
        rows += scores(name, folder, args)
    print_table(rows)
    if args.results is not None:
        file = args.results / "mnist.jsonl"
        file.unlink(missing_ok=True)
        output.append(file, [output.common("mnist") | row for row in rows])
        draw_grids(folders, args.results / "mnist.png")
        draw_losses(folders, args.results / "mnist-losses.png")
        print(f"{file}, with mnist.png and mnist-losses.png in the same folder")


if __name__ == "__main__":
    main()
