"""The picture of ``python -m bench scale``: images/s and memory over the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases import threads, title
from bench.plot_style import CEILING, OURS, RIVALS, figure, plain

Row = dict[str, Any]
Panel = tuple[str, str]
"""Network with its sizes, CPU."""
Curves = dict[int, dict[int, Row]]
"""By threads and batch."""


def arrange(rows: list[Row]) -> dict[Panel, Curves]:
    """Timed rows; the last of several measurements counts."""
    panels: dict[Panel, Curves] = {}
    for row in rows:
        if row["status"] == "ok":
            case = row["case"]
            curves = panels.setdefault((title(case["command"], case["sizes"]), row["hardware"]["cpu"]), {})
            curves.setdefault(case["threads"], {})[case["batch"]] = row
    return panels


def draw(panels: dict[Panel, Curves], out: Path) -> None:
    """Rates on the left, with the ceiling of each count of threads; memory on the right."""
    with figure(out, len(panels), 4.2, columns=2) as axes:
        for ((network, cpu), curves), (rates, memory) in zip(panels.items(), axes, strict=True):
            _rates(rates, curves)
            rates.set_title(f"{network} · float32 · {cpu}", loc="left", fontsize=11)
            _memory(memory, curves)
            for ax in (rates, memory):
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_formatter("{x:g}")
                ax.set_xlabel("batch")
                plain(ax, grid="both")
                ax.legend(frameon=False, fontsize=8)


def _rates(ax: Any, curves: Curves) -> None:
    for i, (count, points) in enumerate(sorted(curves.items())):
        batches = sorted(points)
        rates = [points[n]["images_per_s"] for n in batches]
        roof = max(point["ceiling"]["images_per_s"] for point in points.values())
        color = OURS[i % len(OURS)]
        ax.plot(batches, rates, color=color, marker="o", ms=4, label=f"dcgan.fast, {threads(count)}")
        label = "direct convolution at FMA peak" if i == 0 else None
        ax.plot([batches[0], batches[-1]], [roof, roof], color=CEILING, ls="--", lw=1.4, label=label)
        ax.annotate(threads(count), (batches[0], roof), (0, 3), textcoords="offset points", fontsize=8)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("images/s")


def _memory(ax: Any, curves: Curves) -> None:
    """Of the most threads, which take most."""
    count = max(curves)
    points = curves[count]
    batches = sorted(points)
    lines = (
        ("peak_bytes", f"all that the process grew by, {threads(count)}", OURS[0], "-"),
        ("workspace_bytes", "the engine's workspace", OURS[2], "-"),
        ("packed_bytes", "weights as its algorithms read them", RIVALS[3], "-"),
        ("maps_bytes", "two largest maps of the batch, had they to be held", RIVALS[5], ":"),
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
