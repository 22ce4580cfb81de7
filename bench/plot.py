"""``python -m bench plot FILE --out FILE.png``: results of ``--json`` as grouped bars under the ceiling."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import results
from bench.providers import PROVIDERS
from bench.usage import UsageError

HELP = "draw results written by --json"

Row = dict[str, Any]
Panel = tuple[str, str, str]
"""Command, device's name, dtype: what shares one set of axes."""

OURS = ("#c2410c", "#ea580c", "#fb923c")
RIVALS = ("#1e293b", "#334155", "#475569", "#64748b", "#7d8ca3", "#94a3b8", "#b4c0cf", "#cbd5e1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--out", type=Path, default=Path("bench.png"), help="the picture (bench.png)")


def run(args: argparse.Namespace) -> int:
    try:
        rows = [row for file in args.files for row in results.read(file)]
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    panels = arrange(rows)
    if not panels:
        raise UsageError("no timed result in " + ", ".join(map(str, args.files)))
    draw(panels, args.out)
    print(args.out)
    return 0


def arrange(rows: list[Row]) -> dict[Panel, dict[int, dict[str, Row]]]:
    """Timed rows by panel, batch and provider; the last of several measurements counts."""
    panels: dict[Panel, dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row["status"] != "ok":
            continue
        case, hardware = row["case"], row["hardware"]
        device = (
            hardware["gpu"] if case["device"] == "cuda" else f"{hardware['cpu']}, {case['threads']} threads"
        )
        batches = panels.setdefault((case["command"], device, case["dtype"]), {})
        batches.setdefault(case["batch"], {})[row["provider"]] = row
    return panels


def draw(panels: dict[Panel, dict[int, dict[str, Row]]], out: Path) -> None:
    """One set of axes a panel: a group of bars a batch, a bar a provider, ceilings as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 4.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for (panel, batches), ax in zip(panels.items(), axes[:, 0], strict=True):
        _draw_panel(ax, panel, batches)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _draw_panel(ax: Any, panel: Panel, batches: dict[int, dict[str, Row]]) -> None:
    command, device, dtype = panel
    names = _order(batches)
    width = 0.84 / len(names)
    for index, (name, color) in enumerate(names.items()):
        offset = (index - (len(names) - 1) / 2) * width
        for group, batch in enumerate(sorted(batches)):
            row = batches[batch].get(name)
            if row is None:
                continue
            warm = row["times"]["warm"]
            rate = warm["images_per_s"]
            low, high = (case_rate(row, warm[q]) for q in ("q3", "q1"))
            ax.bar(
                group + offset, rate, width * 0.94, color=color,
                yerr=[[rate - low], [high - rate]], error_kw={"lw": 0.8, "ecolor": "#0f172a"},
            )  # fmt: skip
        ax.bar(0, 0, color=color, label=name)  # the legend's, whatever batches it has
    for group, batch in enumerate(sorted(batches)):
        ceiling = next(iter(batches[batch].values()))["ceiling"]
        label = f"direct convolution at {ceiling['measure']}" if group == 0 else None
        ax.hlines(
            ceiling["images_per_s"], group - 0.46, group + 0.46, color="#0f766e", ls="--", lw=1.4, label=label
        )
    ax.set_xticks(range(len(batches)), [f"batch {batch}" for batch in sorted(batches)])
    ax.set_ylabel("images/s")
    ax.set_title(f"{command} · {dtype} · {device}", loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e2e8f0", lw=0.8)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def case_rate(row: Row, seconds_a_call: float) -> float:
    """images/s of a row's case at a time of one call."""
    return float(row["case"]["batch"] / seconds_a_call)


def _order(batches: dict[int, dict[str, Row]]) -> dict[str, str]:
    """Providers with their colours, in the registry's order: rivals in greys, then this project's."""
    found = {name: row["ours"] for rows in batches.values() for name, row in rows.items()}
    names = sorted(found, key=[*PROVIDERS, *found].index)
    rivals = [name for name in names if not found[name]]
    ours = [name for name in names if found[name]]
    colors = {name: RIVALS[i % len(RIVALS)] for i, name in enumerate(rivals)}
    return colors | {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}
