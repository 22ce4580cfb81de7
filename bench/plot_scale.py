"""Plot of ``python -m bench scale``: images/s and memory over the batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases import threads, title
from bench.plot_style import BASELINES, CEILING, OURS, figure, plain

Row = dict[str, Any]
Panel = tuple[str, str]
"""Network with its sizes, and CPU."""
Curves = dict[int, dict[int, Row]]
"""Rows by thread count and batch size."""


def arrange(rows: list[Row]) -> dict[Panel, Curves]:
    """Group timed rows, keeping the last of several measurements."""
    panels: dict[Panel, Curves] = {}
    for row in rows:
        if row["status"] == "ok":
            case = row["case"]
            curves = panels.setdefault((title(case["command"], case["sizes"]), row["hardware"]["cpu"]), {})
            curves.setdefault(case["threads"], {})[case["batch"]] = row
    return panels


def draw(panels: dict[Panel, Curves], out: Path) -> None:
    """Draw rates with the ceiling of each thread count on the left, memory on the right."""
    with figure(out, len(panels), 4.2, columns=2) as axes:
        for ((network, cpu), curves), (rates, memory) in zip(panels.items(), axes, strict=True):
            _rates(rates, curves)
            rates.set_title(f"{network} · float32 · {cpu}", loc="left", fontsize=11)
            _memory(memory, curves)
            for ax in (rates, memory):
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_formatter("{x:g}")
                ax.set_xlabel("batch size")
                plain(ax, grid="both")
                ax.legend(frameon=False, fontsize=8)


def _rates(ax: Any, curves: Curves) -> None:
    for i, (count, points) in enumerate(sorted(curves.items())):
        batches = sorted(points)
        rates = [points[n]["images_per_s"] for n in batches]
        roof = max(point["ceiling"]["images_per_s"] for point in points.values())
        color = OURS[i % len(OURS)]
        ax.plot(batches, rates, color=color, marker="o", ms=4, label=f"dcgan.fast, {threads(count)}")
        label = "ceiling: direct convolution at FMA peak" if i == 0 else None
        ax.plot([batches[0], batches[-1]], [roof, roof], color=CEILING, ls="--", lw=1.4, label=label)
        ax.annotate(threads(count), (batches[0], roof), (0, 3), textcoords="offset points", fontsize=8)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("images/s")


def _memory(ax: Any, curves: Curves) -> None:
    """Draw the memory at the largest thread count, which uses the most."""
    count = max(curves)
    points = curves[count]
    batches = sorted(points)
    lines = (
        ("peak_bytes", f"peak growth of the process, {threads(count)}", OURS[0], "-"),
        ("workspace_bytes", "engine workspace", OURS[2], "-"),
        ("packed_bytes", "prepacked weights", BASELINES[3], "-"),
        ("maps_bytes", "layer by layer: two largest adjacent activations", BASELINES[5], ":"),
    )
    for key, label, color, style in lines:
        sizes = [points[n][key] for n in batches]
        if None not in sizes:
            ax.plot(
                batches, [size / 1e6 for size in sizes], color=color, ls=style, marker="o", ms=3, label=label
            )
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("MB")
