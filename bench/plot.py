"""``python -m bench plot FILE --out FILE.png``: plot the results written by ``--json``.

Races, including those of training steps, are drawn as grouped bars with the ceiling; ``scale`` as curves
(:mod:`bench.plot_scale`), ``ladder`` as horizontal bars (:mod:`bench.plot_ladder`) and ``learn`` as curves
with samples (:mod:`bench.plot_learn`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import plot_ladder, plot_learn, plot_scale, records
from bench.cases import title
from bench.plot_style import BASELINES, CEILING, LABELS, OURS, figure, plain
from bench.providers import PROVIDERS
from bench.training_variants import VARIANTS
from bench.usage import UsageError

HELP = "plot results written by --json"

Row = dict[str, Any]
Panel = tuple[str, str, str]
"""Network with its sizes, device name and dtype: the key of one set of axes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON Lines files")
    parser.add_argument(
        "--out", type=Path, default=Path("bench.png"), help="image file to write (default: bench.png)"
    )


def run(args: argparse.Namespace) -> int:
    try:
        rows = [row for file in args.files for row in records.read(file)]
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    kinds = {records.kind(row) for row in rows}
    if len(kinds) > 1:
        raise UsageError(f"cannot plot the results of several commands together: {', '.join(sorted(kinds))}")
    for kind in kinds:
        if kind not in PLOTS:
            raise UsageError(f"cannot plot {kind} results, only those of {', '.join(PLOTS)}")
        to_panels, draw_panels = PLOTS[kind]
        if panels := to_panels(rows):
            draw_panels(panels, args.out)
            print(args.out)
            return 0
    raise UsageError("no timed results in " + ", ".join(map(str, args.files)))


def arrange(rows: list[Row]) -> dict[Panel, dict[int, dict[str, Row]]]:
    """Group timed rows by panel, batch and provider, keeping the last of several measurements."""
    panels: dict[Panel, dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row.get("status") != "ok":  # not timed, or a profile row of a training step
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
    """Draw one set of axes per panel: grouped bars by batch and provider, ceilings as dashed lines."""
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
            low, high = (images_per_s(row, warm[q]) for q in ("q3", "q1"))
            ax.bar(
                group + offset, rate, width * 0.94, color=color,
                yerr=[[rate - low], [high - rate]], error_kw={"lw": 0.8, "ecolor": "#0f172a"},
            )  # fmt: skip
        # A legend entry, even if the provider lacks some batch sizes.
        ax.bar(0, 0, color=color, label=LABELS.get(name, name))
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


def images_per_s(row: Row, seconds_per_call: float) -> float:
    """Convert the time of one call of a row's case to images/s."""
    return float(row["case"]["batch"] / seconds_per_call)


def _order(batches: dict[int, dict[str, Row]]) -> dict[str, str]:
    """Map providers to colors in the registries' order: baselines in grays, then this project's."""
    found = {name: row["ours"] for rows in batches.values() for name, row in rows.items()}
    names = sorted(found, key=[*VARIANTS, *PROVIDERS, *found].index)
    baselines = [name for name in names if not found[name]]
    ours = [name for name in names if found[name]]
    colors = {name: BASELINES[i % len(BASELINES)] for i, name in enumerate(baselines)}
    return colors | {name: OURS[i % len(OURS)] for i, name in enumerate(ours)}


PLOTS: dict[str, tuple[Callable[[list[Row]], Any], Callable[[Any, Path], None]]] = {
    "race": (arrange, draw),
    "scale": (plot_scale.arrange, plot_scale.draw),
    "ladder": (plot_ladder.arrange, plot_ladder.draw),
    "learn": (plot_learn.arrange, plot_learn.draw),
    "train": (arrange, draw),
}
"""For each kind of result: a function that groups rows into panels, and one that draws panels to a file."""
