"""``python -m bench plot FILE --out FILE.png``: results of ``--json`` as a picture.

Races, training's too, as grouped bars under the ceiling; ``scale`` as curves (:mod:`bench.plot_scale`),
``ladder`` as one bar below the other (:mod:`bench.plot_ladder`), ``learn`` as curves with samples
(:mod:`bench.plot_learn`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plot_ladder, plot_learn, plot_scale, results
from bench.cases import title
from bench.plot_style import CEILING, OURS, RIVALS, figure, plain
from bench.providers import PROVIDERS
from bench.usage import UsageError
from bench.ways import WAYS

HELP = "draw results written by --json"

Row = dict[str, Any]
Panel = tuple[str, str, str]
"""Network with its sizes, device's name, dtype: what shares one set of axes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--out", type=Path, default=Path("bench.png"), help="the picture (bench.png)")


def run(args: argparse.Namespace) -> int:
    try:
        rows = [row for file in args.files for row in results.read(file)]
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    kinds = {results.kind(row) for row in rows}
    if len(kinds) > 1:
        raise UsageError(f"results of one command at a time, not of {', '.join(sorted(kinds))}")
    for kind in kinds:
        if kind not in DRAWN:
            raise UsageError(f"there is no picture of {kind} results, only of {', '.join(DRAWN)}")
        arranged, drawn = DRAWN[kind]
        if panels := arranged(rows):
            drawn(panels, args.out)
            print(args.out)
            return 0
    raise UsageError("no timed result in " + ", ".join(map(str, args.files)))


def arrange(rows: list[Row]) -> dict[Panel, dict[int, dict[str, Row]]]:
    """Timed rows by panel, batch and provider; the last of several measurements counts."""
    panels: dict[Panel, dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row.get("status") != "ok":  # or a part of a training step
            continue
        case, hardware = row["case"], row["hardware"]
        device = (
            hardware["gpu"] if case["device"] == "cuda" else f"{hardware['cpu']}, {case['threads']} threads"
        )
        network = title(case["command"], case["sizes"])
        batches = panels.setdefault((network, device, case["dtype"]), {})
        batches.setdefault(case["batch"], {})[row["provider"]] = row
    return panels


def draw(panels: dict[Panel, dict[int, dict[str, Row]]], out: Path) -> None:
    """One set of axes a panel: a group of bars a batch, a bar a provider, ceilings as dashed lines."""
    with figure(out, len(panels), 4.2) as axes:
        for (panel, batches), ax in zip(panels.items(), axes[:, 0], strict=True):
            _draw_panel(ax, panel, batches)


def _draw_panel(ax: Any, panel: Panel, batches: dict[int, dict[str, Row]]) -> None:
    network, device, dtype = panel
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
            ceiling["images_per_s"], group - 0.46, group + 0.46, color=CEILING, ls="--", lw=1.4, label=label
        )
    ax.set_xticks(range(len(batches)), [f"batch {batch}" for batch in sorted(batches)])
    ax.set_ylabel("images/s")
    ax.set_title(f"{network} · {dtype} · {device}", loc="left", fontsize=11)
    plain(ax, grid="y")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def case_rate(row: Row, seconds_a_call: float) -> float:
    """images/s of a row's case at a time of one call."""
    return float(row["case"]["batch"] / seconds_a_call)


def _order(batches: dict[int, dict[str, Row]]) -> dict[str, str]:
    """Providers with their colours, in the registries' order: rivals in greys, then this project's."""
    found = {name: row["ours"] for rows in batches.values() for name, row in rows.items()}
    names = sorted(found, key=[*WAYS, *PROVIDERS, *found].index)
    rivals = [name for name in names if not found[name]]
    ours = [name for name in names if found[name]]
    colors = {name: RIVALS[i % len(RIVALS)] for i, name in enumerate(rivals)}
    return colors | {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}


DRAWN: dict[str, tuple[Callable[[list[Row]], Any], Callable[[Any, Path], None]]] = {
    "race": (arrange, draw),
    "scale": (plot_scale.arrange, plot_scale.draw),
    "ladder": (plot_ladder.arrange, plot_ladder.draw),
    "learn": (plot_learn.arrange, plot_learn.draw),
    "train": (arrange, draw),
}
"""By the kind of result: rows into panels, panels into a file."""
