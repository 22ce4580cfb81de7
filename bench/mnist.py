"""``python -m bench mnist``: training runs on MNIST, scored after every epoch.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table

from bench import records, table
from bench.plot_style import BASELINES, OURS, figure, plain
from bench.usage import positive
from dcgan import checkpoint
from dcgan.training.report import read_metrics

HELP = "train on MNIST for a few epochs and score each epoch"


class RunSpec(NamedTuple):
    """One run: its title in tables and plots, its options of ``dcgan train``, its epochs and its color."""

    title: str
    options: tuple[str, ...]
    epochs: int
    color: str


RUNS = {
    "dcgan": RunSpec("DCGAN", (), 3, OURS[0]),
    "mlp": RunSpec("fully connected GAN", ("--model=mlp",), 3, BASELINES[3]),
    "reference": RunSpec("DCGAN, reference engine", ("--engine=reference",), 1, BASELINES[6]),
}
WINDOW = 50
"""Steps of the running mean of the plotted losses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", default="mnist", help="dataset, as for dcgan train (default: mnist)")
    add(
        "--dataroot", type=Path, default=Path("data"), metavar="FOLDER", help="dataset folder (default: data)"
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/mnist"),
        metavar="FOLDER",
        help="folder of the runs (default: runs/mnist)",
    )
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="folder to write mnist.jsonl, mnist.png and mnist-losses.png to",
    )
    add("--runs", nargs="+", choices=tuple(RUNS), default=list(RUNS), help="runs (default: all)")
    add("--num", type=positive, default=10_000, help="generated images per score (default: 10000)")
    add(
        "--options",
        nargs=argparse.REMAINDER,
        default=[],
        help="further options of dcgan train; must come last",
    )


def run(args: argparse.Namespace) -> int:
    out, progress = table.console(), table.console(stderr=True)

    def log(line: str) -> None:
        progress.print(f"  {line}", style="dim", markup=False)

    rows: list[dict[str, Any]] = []
    for name in args.runs:
        folder = args.out / name
        train(folder, RUNS[name], args, log)
        rows += scores(name, folder, args, log)
    out.print(scores_table(rows))
    if args.results is not None:
        file = args.results / "mnist.jsonl"
        file.unlink(missing_ok=True)
        records.append(file, [records.common("mnist") | row for row in rows])
        draw_grids({name: args.out / name for name in args.runs}, args.results / "mnist.png")
        draw_losses({name: args.out / name for name in args.runs}, args.results / "mnist-losses.png")
        out.print(f"{file}, with mnist.png and mnist-losses.png in the same folder", soft_wrap=True)
    return 0


def dcgan(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dcgan", *arguments], check=True)


def train(folder: Path, spec: RunSpec, args: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Train or resume a run until its last epoch, keeping the checkpoint of every epoch and no others."""
    log(f"{spec.title}: {spec.epochs} epochs in {folder}")
    if (folder / "config.yaml").exists():
        dcgan("train", "--resume", f"--out={folder}", f"--dataroot={args.dataroot}")
        return
    dcgan(
        *("train", f"--dataset={args.dataset}", f"--dataroot={args.dataroot}", f"--epochs={spec.epochs}"),
        *(
            "--checkpoint-interval=0",
            f"--keep={spec.epochs}",
            *spec.options,
            f"--out={folder}",
            *args.options,
        ),
    )


def scores(
    name: str, folder: Path, args: argparse.Namespace, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Score every epoch's checkpoint and return one row per epoch."""
    metrics = read_metrics(folder / "metrics.jsonl")
    rows = []
    for path in sorted((folder / "checkpoints").glob("step-*.pt")):
        saved = checkpoint.read(path)
        log(f"{RUNS[name].title}: scoring epoch {saved.epoch}")
        with tempfile.TemporaryDirectory() as temporary:
            found = Path(temporary) / "scores.json"
            dcgan(
                *("eval", str(path), f"--dataset={args.dataset}", f"--dataroot={args.dataroot}"),
                *(f"--num={args.num}", f"--json={found}"),
            )
            scored = json.loads(found.read_text())
        steps = [m for m in metrics if m.get("epoch") == saved.epoch and "loss_d" in m]
        means = {k: float(np.mean([m[k] for m in steps])) for k in ("loss_d", "loss_g", "d_x", "d_g_z")}
        rows.append(
            {
                "run": name,
                "epoch": saved.epoch,
                "step": saved.step,
                "means": means,
                "pixel_frechet_distance": saved.score,
                **{key: scored[key] for key in ("features", "frechet", "kernel", "scores")},
            }
        )
    return rows


def scores_table(rows: list[dict[str, Any]]) -> Table:
    """Return one row per epoch; the floor is the distance between two sets of real digits."""
    shown = table.start(
        f"{rows[0]['frechet']}; kernel: {rows[0]['kernel']}",
        ["run"],
        ["epoch", "Fréchet", "floor", "kernel", "loss D", "loss G", "D(x)", "D(G(z))"],
    )
    for row in rows:
        generated, floor = row["scores"]["generated"], row["scores"]["floor"]
        shown.add_row(
            RUNS[row["run"]].title,
            str(row["epoch"]),
            table.rate(generated["frechet"]),
            table.rate(floor["frechet"]),
            f"{generated['kernel']:.3g}",
            *(f"{value:.2f}" for value in row["means"].values()),
        )
    return shown


def draw_grids(folders: dict[str, Path], out: Path) -> None:
    """Draw the first five rows of each run's last sample grid; all runs use the same fixed noise."""
    with figure(out, 1, 3.0, columns=len(folders)) as axes:
        for ax, (name, folder) in zip(axes[0], folders.items(), strict=True):
            last = sorted((folder / "samples").glob("*.png"))[-1]
            with Image.open(last) as grid:
                shown = np.asarray(grid.convert("L"))
            side = (shown.shape[0] - 2) // 8
            ax.imshow(shown[: 5 * side + 2, : 5 * side + 2], cmap="gray", vmin=0, vmax=255)
            ax.set_title(f"{RUNS[name].title}, epoch {RUNS[name].epochs}", fontsize=9)
            ax.axis("off")


def draw_losses(folders: dict[str, Path], out: Path) -> None:
    """Plot the running means of both losses over the steps."""
    with figure(out, 1, 2.6, columns=2) as axes:
        for ax, (key, label) in zip(axes[0], {"loss_d": "D loss", "loss_g": "G loss"}.items(), strict=True):
            for name, folder in folders.items():
                lines = [line for line in read_metrics(folder / "metrics.jsonl") if key in line]
                width = min(WINDOW, len(lines))
                means = np.convolve([line[key] for line in lines], np.full(width, 1 / width), "valid")
                steps = np.arange(len(means)) + (width + 1) / 2
                ax.plot(steps, means, color=RUNS[name].color, lw=1.2, label=RUNS[name].title)
            ax.set_title(f"{label}, running mean of {WINDOW} steps", loc="left", fontsize=9)
            plain(ax, grid="y")
        axes[0, 1].legend(frameon=False, fontsize=8)
