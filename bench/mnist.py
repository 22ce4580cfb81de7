"""``python -m bench mnist``: real training runs on MNIST, scored by epoch; the seed's comparison, measured.

DCGAN on the fastest engine, the fully connected GAN of 2014, and DCGAN on the reference engine from the same
seed, each by ``dcgan train`` in a folder of its own; a run that is there goes on where it stopped. Every
epoch's checkpoint is scored by ``dcgan eval``. Prints a table; ``--results`` writes the rows, the last grids
side by side and the losses.
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

from bench import results, table
from bench.plot_style import OURS, RIVALS, figure, plain
from bench.usage import positive
from dcgan import checkpoint
from dcgan.training.report import read_metrics

HELP = "train on MNIST for a few epochs and score every one"


class Kind(NamedTuple):
    """A run: what it is called in pictures, its own options, its epochs."""

    title: str
    options: tuple[str, ...]
    epochs: int
    colour: str


KINDS = {
    "dcgan": Kind("DCGAN", (), 3, OURS[0]),
    "mlp": Kind("fully connected GAN", ("--model=mlp",), 3, RIVALS[3]),
    "reference": Kind("DCGAN, reference engine", ("--engine=reference",), 1, RIVALS[6]),
}
WINDOW = 50
"""Steps that the drawn losses are running means of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", default="mnist", help="as dcgan train has them (mnist)")
    add("--dataroot", type=Path, default=Path("data"), metavar="FOLDER", help="(data)")
    add("--out", type=Path, default=Path("runs/mnist"), metavar="FOLDER", help="of the runs (runs/mnist)")
    add("--results", type=Path, metavar="FOLDER", help="write mnist.jsonl, mnist.png, mnist-losses.png there")
    add("--runs", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="(all)")
    add("--num", type=positive, default=10_000, help="images a score is of (10000)")
    add("--options", nargs=argparse.REMAINDER, default=[], help="more options of dcgan train, last of all")


def run(args: argparse.Namespace) -> int:
    out, progress = table.console(), table.console(stderr=True)

    def log(line: str) -> None:
        progress.print(f"  {line}", style="dim", markup=False)

    rows: list[dict[str, Any]] = []
    for name in args.runs:
        folder = args.out / name
        train(folder, KINDS[name], args, log)
        rows += scores(name, folder, args, log)
    out.print(scores_table(rows))
    if args.results is not None:
        file = args.results / "mnist.jsonl"
        file.unlink(missing_ok=True)
        results.append(file, [results.common("mnist") | row for row in rows])
        draw_grids({name: args.out / name for name in args.runs}, args.results / "mnist.png")
        draw_losses({name: args.out / name for name in args.runs}, args.results / "mnist-losses.png")
        out.print(f"{file}, mnist.png and mnist-losses.png beside it", soft_wrap=True)
    return 0


def dcgan(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dcgan", *arguments], check=True)


def train(folder: Path, kind: Kind, args: argparse.Namespace, log: Callable[[str], None]) -> None:
    """The run to its end, from where it is. Only epochs' checkpoints are kept, all of them."""
    log(f"{kind.title}: {kind.epochs} epochs in {folder}")
    if (folder / "config.yaml").exists():
        dcgan("train", "--resume", f"--out={folder}", f"--dataroot={args.dataroot}")
        return
    dcgan(
        *("train", f"--dataset={args.dataset}", f"--dataroot={args.dataroot}", f"--epochs={kind.epochs}"),
        *(
            "--checkpoint-interval=0",
            f"--keep={kind.epochs}",
            *kind.options,
            f"--out={folder}",
            *args.options,
        ),
    )


def scores(
    name: str, folder: Path, args: argparse.Namespace, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row an epoch, from its checkpoint."""
    metrics = read_metrics(folder / "metrics.jsonl")
    rows = []
    for path in sorted((folder / "checkpoints").glob("step-*.pt")):
        saved = checkpoint.read(path)
        log(f"{KINDS[name].title}: scoring epoch {saved.epoch}")
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
    """An epoch a line; the floor is what real digits are from real digits."""
    shown = table.start(
        f"{rows[0]['frechet']}; kernel: {rows[0]['kernel']}",
        ["run"],
        ["epoch", "Fréchet", "floor", "kernel", "loss D", "loss G", "D(x)", "D(G(z))"],
    )
    for row in rows:
        generated, floor = row["scores"]["generated"], row["scores"]["floor"]
        shown.add_row(
            KINDS[row["run"]].title,
            str(row["epoch"]),
            table.rate(generated["frechet"]),
            table.rate(floor["frechet"]),
            f"{generated['kernel']:.3g}",
            *(f"{value:.2f}" for value in row["means"].values()),
        )
    return shown


def draw_grids(folders: dict[str, Path], out: Path) -> None:
    """Each run's last samples from one fixed noise, 5 rows of them."""
    with figure(out, 1, 3.0, columns=len(folders)) as axes:
        for ax, (name, folder) in zip(axes[0], folders.items(), strict=True):
            last = sorted((folder / "samples").glob("*.png"))[-1]
            with Image.open(last) as grid:
                shown = np.asarray(grid.convert("L"))
            side = (shown.shape[0] - 2) // 8
            ax.imshow(shown[: 5 * side + 2, : 5 * side + 2], cmap="gray", vmin=0, vmax=255)
            kind = KINDS[name]
            ax.set_title(f"{kind.title}, epoch {kind.epochs}", fontsize=9)
            ax.axis("off")


def draw_losses(folders: dict[str, Path], out: Path) -> None:
    """Both losses by step, running means."""
    with figure(out, 1, 2.6, columns=2) as axes:
        for ax, (key, label) in zip(
            axes[0], {"loss_d": "D's loss", "loss_g": "G's loss"}.items(), strict=True
        ):
            for name, folder in folders.items():
                lines = [line for line in read_metrics(folder / "metrics.jsonl") if key in line]
                width = min(WINDOW, len(lines))
                means = np.convolve([line[key] for line in lines], np.full(width, 1 / width), "valid")
                steps = np.arange(len(means)) + (width + 1) / 2
                ax.plot(steps, means, color=KINDS[name].colour, lw=1.2, label=KINDS[name].title)
            ax.set_title(f"{label}, running mean of {WINDOW} steps", loc="left", fontsize=9)
            plain(ax, grid="y")
        axes[0, 1].legend(frameon=False, fontsize=8)
