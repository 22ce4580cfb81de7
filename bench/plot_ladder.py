"""The plot of ``python -m bench ladder``: one bar per step, with the ceiling as a dashed line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import table
from bench.cases import threads, title
from bench.plot_style import BASELINES, CEILING, OURS, figure, plain

Row = dict[str, Any]
Panel = tuple[str, str, int, str]
"""Layer, network and its sizes, batch, CPU and its instruction set."""
Bars = dict[tuple[str, int], Row]
"""Rows by step and threads, in the order of the steps."""


def arrange(rows: list[Row]) -> dict[Panel, Bars]:
    """Group rows by panel and bar; of repeated measurements, the last is kept."""
    panels: dict[Panel, Bars] = {}
    for row in rows:
        case = row["case"]
        network = title(case["command"], case["sizes"])
        cpu = f"{row['hardware']['cpu']}, {row['isa']}"
        panel = (row["layer"], network, case["batch"], cpu)
        panels.setdefault(panel, {})[row["step"], row["threads"]] = row
    return panels


def draw(panels: dict[Panel, Bars], out: Path) -> None:
    """Draw steps above baselines; each bar shows GFLOP/s and percent of the ceiling for its threads."""
    longest = max(map(len, panels.values()))
    with figure(out, len(panels), 1.2 + 0.36 * longest) as axes:
        for (panel, bars), ax in zip(panels.items(), axes[:, 0], strict=True):
            _draw(ax, panel, list(bars.values()))


def _draw(ax: Any, panel: Panel, rows: list[Row]) -> None:
    layer, network, batch, cpu = panel
    names = []
    for at, row in enumerate(rows):
        rate, peak = row["flops_per_s"] / 1e9, row["ceiling"]["flops"] / 1e9
        ax.barh(at, rate, height=0.72, color=BASELINES[5] if row["mark"] else OURS[1])
        ax.vlines(
            peak, at - 0.46, at + 0.46, color=CEILING, ls="--", lw=1.4,
            label=row["ceiling"]["measure"] if at == 0 else None,
        )  # fmt: skip
        end = peak if 0.6 * peak < rate < peak else rate  # otherwise the text would overlap the line
        text = f"{table.rate(rate)} GFLOP/s · {rate / peak:.0%}"
        ax.annotate(text, (end, at), (5, 0), textcoords="offset points", va="center", fontsize=8)
        number = "" if row["mark"] else f"{at + 1}  "
        names.append(f"{number}{row['step']}, {threads(row['threads'])}")
    ax.set_yticks(range(len(rows)), names, fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.2)
    ax.set_xlabel("GFLOP/s of the direct convolution")
    ax.set_title(f"{layer} of {network} · batch {batch} · float32 · {cpu}", loc="left", fontsize=11)
    plain(ax, grid="x")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
