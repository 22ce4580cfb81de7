"""``python -m bench plot FILE --out FILE.png``: plot the results written by ``--json``.

Races, including those of training steps, are drawn as grouped bars with the ceiling, and ``scale`` as curves.
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import output
from bench.cases import threads, title
from bench.options import UsageError
from bench.providers import PROVIDERS
from bench.training import VARIANTS

HELP = "plot results written by --json"

OURS = ("#c2410c", "#ea580c", "#fb923c")
BASELINES = ("#1e293b", "#334155", "#475569", "#64748b", "#7d8ca3", "#94a3b8", "#b4c0cf", "#cbd5e1")
CEILING = "#0f766e"

LABELS = {
    "eager": "eager",
    "channels_last": "eager, channels_last",
    "compile": "torch.compile",
    "compile-channels_last": "torch.compile, channels_last",
    "reduce-overhead": "torch.compile, reduce-overhead",
    "max-autotune": "torch.compile, max-autotune",
    "max-autotune-channels_last": "torch.compile, max-autotune, channels_last",
    "cudnn-graph": "cuDNN in one CUDA graph",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "zentorch": "zentorch",
    "fast": "dcgan.fast",
    "fast-compile": "dcgan.fast, torch.compile",
    "fast-graph": "dcgan.fast.graphed",
    "train-step": "dcgan.training.TrainStep",
}
"""Names of providers and training variants in plots and documentation."""

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON Lines files")
    text = "image file to write (default: bench.png)"
    parser.add_argument("--out", type=Path, default=Path("bench.png"), help=text)


def run(args: argparse.Namespace) -> int:
    try:
        rows = [row for file in args.files for row in output.read(file)]
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    # Rows without a kind are races, as the field was added later.
    kinds = {row.get("kind", "race") for row in rows} or {"race"}
    if len(kinds) > 1:
        raise UsageError(f"cannot plot the results of several commands together: {', '.join(sorted(kinds))}")
    if (kind := kinds.pop()) not in PLOTS:
        raise UsageError(f"cannot plot {kind} results, only those of {', '.join(PLOTS)}")
    pkgutil.resolve_name(PLOTS[kind])(rows, args.out)
    print(args.out)
    return 0


@contextmanager
def figure(out: Path, rows: int, height: float, columns: int = 1) -> Iterator[Any]:
    """Yield axes [rows, columns], each row ``height`` inches high, and save the figure to ``out`` on exit."""
    if not rows:
        raise UsageError("no timed results to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (10, height * rows)
    drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        yield axes
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(out, dpi=150)
    finally:
        plt.close(drawn)


def plain(ax: Any, grid: str) -> None:
    """Remove the top and right spines and draw a faint grid; ``grid`` is ``x``, ``y`` or ``both``."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#e2e8f0", lw=0.8)
    ax.set_axisbelow(True)


def _timed(rows: list[Row]) -> list[Row]:
    """Leave out providers that were not timed, and the profiles of training steps."""
    return [row for row in rows if row.get("status") == "ok"]


# --- races --------------------------------------------------------------------------------------------------


def arrange(rows: list[Row]) -> dict[tuple[str, str, str], dict[int, dict[str, Row]]]:
    """Group timed rows by network, device and dtype, which select the axes, then by batch and provider.

    Of several measurements the last is kept.
    """
    panels: dict[tuple[str, str, str], dict[int, dict[str, Row]]] = {}
    for row in _timed(rows):
        case, hardware = row["case"], row["hardware"]
        cpu = f"{hardware['cpu']}, {case['threads']} threads"
        device = hardware["gpu"] if case["device"] == "cuda" else cpu
        batches = panels.setdefault((title(case["command"], case["sizes"]), device, case["dtype"]), {})
        batches.setdefault(case["batch"], {})[row["provider"]] = row
    return panels


def draw(rows: list[Row], out: Path) -> None:
    """Draw one set of axes per network, device and dtype: bars by batch and provider, dashed ceilings."""
    panels = arrange(rows)
    with figure(out, len(panels), 4.2) as axes:
        for ((network, device, dtype), batches), ax in zip(panels.items(), axes[:, 0], strict=True):
            _bars(ax, dict(sorted(batches.items())))
            ax.set_title(f"{network} · {dtype} · {device}", loc="left", fontsize=11)
            plain(ax, grid="y")
            ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _bars(ax: Any, batches: dict[int, dict[str, Row]]) -> None:
    names = _order(batches)
    width = 0.84 / len(names)
    for index, (name, color) in enumerate(names.items()):
        offset = (index - (len(names) - 1) / 2) * width
        for group, rows in enumerate(batches.values()):
            if name not in rows:
                continue
            low, rate, high = (
                rows[name]["case"]["batch"] / rows[name]["times"]["warm"][q] for q in ("q3", "median", "q1")
            )
            ax.bar(
                group + offset, rate, width * 0.94, color=color,
                yerr=[[rate - low], [high - rate]], error_kw={"lw": 0.8, "ecolor": "#0f172a"},
            )  # fmt: skip
        # A legend entry, even if the provider lacks some batch sizes.
        ax.bar(0, 0, color=color, label=LABELS.get(name, name))
    for group, rows in enumerate(batches.values()):
        ceiling = next(iter(rows.values()))["ceiling"]
        label = f"direct convolution at {ceiling['measure']}" if group == 0 else None
        ends = group - 0.46, group + 0.46
        ax.hlines(ceiling["images_per_s"], *ends, color=CEILING, ls="--", lw=1.4, label=label)
    ax.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    ax.set_ylabel("images/s")


def _order(batches: dict[int, dict[str, Row]]) -> dict[str, str]:
    """Map providers to colors in the registries' order: baselines in grays, then this project's."""
    found = {name: row["ours"] for rows in batches.values() for name, row in rows.items()}
    names = sorted(found, key=[*VARIANTS, *PROVIDERS, *found].index)
    colors: dict[str, str] = {}
    for ours, palette in ((False, BASELINES), (True, OURS)):
        own = [name for name in names if found[name] == ours]
        colors |= {name: palette[i % len(palette)] for i, name in enumerate(own)}
    return colors


# --- scale --------------------------------------------------------------------------------------------------


def draw_scale(rows: list[Row], out: Path) -> None:
    """Draw rates with the ceiling of each thread count on the left, memory on the right.

    Networks and CPUs have separate axes. Of several measurements of a point the last is drawn.
    """
    panels: dict[tuple[str, str], dict[int, dict[int, Row]]] = {}
    for row in _timed(rows):
        case = row["case"]
        curves = panels.setdefault((title(case["command"], case["sizes"]), row["hardware"]["cpu"]), {})
        curves.setdefault(case["threads"], {})[case["batch"]] = row
    with figure(out, len(panels), 4.2, columns=2) as axes:
        for ((network, cpu), curves), (rates, memory) in zip(panels.items(), axes, strict=True):
            for i, (count, points) in enumerate(sorted(curves.items())):
                _rates(rates, i, count, sorted(points.items()))
            rates.set_ylim(bottom=0)
            rates.set_ylabel("images/s")
            rates.set_title(f"{network} · float32 · {cpu}", loc="left", fontsize=11)
            _memory(memory, max(curves), sorted(curves[max(curves)].items()))  # most threads use most memory
            for ax in (rates, memory):
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_formatter("{x:g}")
                ax.set_xlabel("batch size")
                plain(ax, grid="both")
                ax.legend(frameon=False, fontsize=8)


def _rates(ax: Any, i: int, count: int, points: list[tuple[int, Row]]) -> None:
    rates = [(batch, row["images_per_s"]) for batch, row in points]
    roof = max(row["ceiling"]["images_per_s"] for _, row in points)
    ends = points[0][0], points[-1][0]
    color = OURS[i % len(OURS)]
    ax.plot(*zip(*rates, strict=True), color=color, marker="o", ms=4, label=f"dcgan.fast, {threads(count)}")
    label = "ceiling: direct convolution at FMA peak" if i == 0 else None
    ax.plot(ends, [roof, roof], color=CEILING, ls="--", lw=1.4, label=label)
    ax.annotate(threads(count), (ends[0], roof), (0, 3), textcoords="offset points", fontsize=8)


def _memory(ax: Any, count: int, points: list[tuple[int, Row]]) -> None:
    lines = (
        ("peak_bytes", f"peak growth of the process, {threads(count)}", OURS[0], "-"),
        ("workspace_bytes", "engine workspace", OURS[2], "-"),
        ("packed_bytes", "prepacked weights", BASELINES[3], "-"),
        ("maps_bytes", "layer by layer: two largest adjacent activations", BASELINES[5], ":"),
    )
    batches = [batch for batch, _ in points]
    for key, label, color, style in lines:
        sizes = [row[key] for _, row in points]
        if None not in sizes:
            megabytes = [size / 1e6 for size in sizes]
            ax.plot(batches, megabytes, color=color, ls=style, marker="o", ms=3, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("MB")


PLOTS = {
    "race": "bench.plot:draw",
    "scale": "bench.plot:draw_scale",
    "train": "bench.plot:draw",
    "ladder": "examples.ladder:draw",
    "learn": "tests.learning.plot:draw",
}
"""For each kind of result, the function that draws rows to a file."""
