"""Plot of learn.jsonl: curves and sample statistics of every RNG seed, and samples."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from bench.plot import BASELINES, CEILING, OURS, figure, plain
from tests.learning.criterion import EVERY, WINDOW, Settings

Row = dict[str, Any]

CURVES = {"loss_d": "D loss", "loss_g": "G loss", "d_x": "D(x)", "d_g_z": "D(G(z))"}
STATISTICS = {"std": "samples: std of all pixels", "diversity": "samples: mean pairwise RMS distance"}
COLUMNS = 6


def last(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of the last comparison by variant, including that of the real digits."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if "way" in row and row["date"] == rows[-1]["date"]:
            runs.setdefault(row["way"], []).append(row)
    return runs


def draw(rows: list[Row], out: Path) -> None:
    """Draw the reference's seeds as a band, fast's as lines on it, and samples of the first seed below."""
    runs = last(rows)
    (real,) = runs.pop("real digits")
    settings = Settings(**real["settings"])
    with figure(out, 4, 2.5, columns=2) as axes:
        for ax, (name, label) in zip(axes[:2].flat, CURVES.items(), strict=True):
            means = {variant: [_smooth(run["curves"][name]) for run in own] for variant, own in runs.items()}
            at = np.arange(1, len(means["reference"][0]) + 1) + (min(WINDOW, settings.steps) - 1) / 2
            _draw(ax, label, at, means)
        at = np.array(sorted({*range(EVERY, settings.steps + 1, EVERY), settings.steps}), float)
        for ax, (name, label) in zip(axes[2], STATISTICS.items(), strict=True):
            values = {variant: [run["statistics"][name] for run in own] for variant, own in runs.items()}
            _draw(ax, label, at, values, marker="o", ms=3)
            ax.axhline(real["statistics"][name], color=CEILING, ls="--", lw=1.4, label="real digits")
        for ax, variant in zip(axes[3], ("reference", "fast"), strict=True):
            run = runs[variant][0]
            ax.axis("off")
            ax.imshow(_grid(run["samples"]), cmap="gray", vmin=0, vmax=255)
            ax.set_title(f"{variant}, seed {run['seed']}, after {settings.steps} steps", fontsize=9)
        for ax in (axes[0, 0], axes[2, 0]):
            ax.legend(frameon=False, fontsize=8)
        heading = f"Real digits · {settings.title} · curves: running means of {WINDOW} steps"
        axes[0, 0].figure.suptitle(heading, fontsize=11)


def _smooth(curve: list[float]) -> Any:
    window = min(WINDOW, len(curve))
    return np.convolve(curve, np.full(window, 1 / window), "valid")


def _draw(ax: Any, label: str, at: Any, lines: dict[str, list[Any]], **style: Any) -> None:
    """Draw the lines of all variants and seeds over the steps ``at``."""
    low, high = np.min(lines["reference"], 0), np.max(lines["reference"], 0)
    ax.fill_between(at, low, high, color=BASELINES[7], label="reference, range over seeds", lw=0)
    for values in lines["reference"]:
        ax.plot(at, values, color=BASELINES[4], lw=0.8)
    for i, values in enumerate(lines.get("channels_last", [])):
        legend = "reference in channels_last" if i == 0 else None
        ax.plot(at, values, color=BASELINES[2], lw=0.8, ls=":", label=legend)
    for i, values in enumerate(lines["fast"]):
        ax.plot(at, values, color=OURS[i % len(OURS)], lw=1.3, label="fast" if i == 0 else None, **style)
    ax.set_title(label, loc="left", fontsize=9)
    ax.set_xlim(0, None)
    plain(ax, grid="y")


def _grid(samples: dict[str, Any]) -> Any:
    """Return the images in a grid with ``COLUMNS`` columns, separated by one black pixel."""
    count, height, width = samples["shape"]
    images = np.frombuffer(base64.b64decode(samples["pixels"]), np.uint8).reshape(count, height, width)
    images = np.pad(images, ((0, -count % COLUMNS), (0, 1), (0, 1)))
    rows = images.reshape(-1, COLUMNS, height + 1, width + 1)
    return rows.transpose(0, 2, 1, 3).reshape(-1, COLUMNS * (width + 1))
