"""Plot of ``python -m bench learn``: curves and sample statistics of every RNG seed, and samples."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.learning import EVERY, WINDOW, Settings
from bench.plot_style import BASELINES, CEILING, OURS, figure, plain

Row = dict[str, Any]
Runs = dict[str, list[Row]]
"""Rows by variant, including the row of the real digits."""

CURVES = {"loss_d": "D loss", "loss_g": "G loss", "d_x": "D(x)", "d_g_z": "D(G(z))"}
STATISTICS = {"std": "samples: std of all pixels", "diversity": "samples: mean pairwise RMS distance"}
COLUMNS = 6


def arrange(rows: list[Row]) -> Runs:
    """Group the rows of the last comparison by variant."""
    runs: Runs = {}
    for row in rows:
        if "way" in row and row["date"] == rows[-1]["date"]:
            runs.setdefault(row["way"], []).append(row)
    return runs


def draw(runs: Runs, out: Path) -> None:
    """Draw the reference's seeds as a band, fast's as lines on it, and samples of the first seed below."""
    settings = runs["reference"][0]["settings"]
    with figure(out, 4, 2.5, columns=2) as axes:
        for ax, (name, label) in zip(axes[:2].flat, CURVES.items(), strict=True):
            lines = {
                variant: [_smooth(run["curves"][name]) for run in own] for variant, own in _trained(runs)
            }
            _draw(ax, label, lines)
        for ax, (name, label) in zip(axes[2], STATISTICS.items(), strict=True):
            lines = {
                variant: [_snapshots(run["statistics"][name], settings["steps"]) for run in own]
                for variant, own in _trained(runs)
            }
            _draw(ax, label, lines, marker="o", ms=3)
            real = runs["real digits"][0]["statistics"][name]
            ax.axhline(real, color=CEILING, ls="--", lw=1.4, label="real digits")
        for ax in axes[3]:
            ax.axis("off")
        for ax, variant in zip(axes[3], ("reference", "fast"), strict=True):
            ax.imshow(_grid(runs[variant][0]["samples"]), cmap="gray", vmin=0, vmax=255)
            ax.set_title(
                f"{variant}, seed {runs[variant][0]['seed']}, after {settings['steps']} steps", fontsize=9
            )
        axes[0, 0].legend(frameon=False, fontsize=8)
        axes[2, 0].legend(frameon=False, fontsize=8)
        axes[0, 0].figure.suptitle(
            f"Real digits · {Settings(**settings).title} · curves: running means of {WINDOW} steps",
            fontsize=11,
        )


def _trained(runs: Runs) -> Iterator[tuple[str, list[Row]]]:
    return ((variant, own) for variant, own in runs.items() if "curves" in own[0])


Line = tuple[Any, Any]
"""Arrays of steps and values."""


def _smooth(curve: list[float]) -> Line:
    window = min(WINDOW, len(curve))
    means = np.convolve(curve, np.full(window, 1 / window), "valid")
    return np.arange(len(means)) + (window + 1) / 2, means


def _snapshots(values: list[float], steps: int) -> Line:
    at = [*range(EVERY, steps + 1, EVERY)]
    return np.array(at if len(at) == len(values) else [*at, steps], float), np.array(values)


def _draw(ax: Any, label: str, lines: dict[str, list[Line]], **style: Any) -> None:
    at = lines["reference"][0][0]
    band = np.stack([values for _, values in lines["reference"]])
    ax.fill_between(
        at, band.min(0), band.max(0), color=BASELINES[7], label="reference, range over seeds", lw=0
    )
    for _, values in lines["reference"]:
        ax.plot(at, values, color=BASELINES[4], lw=0.8)
    for i, (_, values) in enumerate(lines.get("channels_last", [])):
        legend = "reference in channels_last" if i == 0 else None
        ax.plot(at, values, color=BASELINES[2], lw=0.8, ls=":", label=legend)
    for i, (_, values) in enumerate(lines["fast"]):
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
