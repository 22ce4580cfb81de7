"""``python -m bench docs``: write the tables of README.md and docs/ from bench/results.

A table is delimited by ``<!-- bench docs: NAME -->`` and ``<!-- end -->``; NAME is a key of :data:`TABLES`.
Only rows from the machine of the last row count, and of several measurements of a case the last one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import output
from bench.options import UsageError
from bench.plot import LABELS

HELP = "write the tables of README.md and docs/ from bench/results"

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/benchmarks.md", "docs/full-run.md", "docs/training.md")
MARKED = re.compile(r"(<!-- bench docs: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

OURS = ("fast", "train-step")
RUNS = {"dcgan": "dcgan-kernels", "reference": "reference engine"}
"""The runs of examples/full_run.py, by the name in their rows."""
VERSIONS = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "zentorch": "zentorch"}

Row = dict[str, Any]
Rows = dict[tuple[str, int], Row]
"""Timed rows by provider and batch size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "change nothing; exit 1 if a page is out of date"
    parser.add_argument("--check", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    status = 0
    for name in PAGES:
        text = (ROOT / name).read_text()
        written = filled(text)
        if written != text:
            status |= args.check
            print(f"{name}: {'out of date' if args.check else 'written'}")
            if not args.check:
                (ROOT / name).write_text(written)
    return status


def filled(text: str) -> str:
    """Return a page with its tables made from the results."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return MARKED.sub(fill, text)


def latest(file: str) -> list[Row]:
    """Return the rows of a file that were measured on the machine of its last row."""
    rows = output.read(ROOT / "bench/results" / file)
    return [row for row in rows if row["hardware"] == rows[-1]["hardware"]]


def timed(file: str) -> Rows:
    """Return the timed rows of a file of races."""
    return {(row["provider"], row["case"]["batch"]): row for row in latest(file) if row.get("status") == "ok"}


def machine(rows: Sequence[Row]) -> str:
    """Describe the machine and the versions; raise UsageError if the rows come from several machines."""
    machines = {(row["hardware"]["cpu"], row["hardware"]["isa"], row["hardware"]["cores"]) for row in rows}
    if len(machines) != 1:
        raise UsageError(f"one table must come from one machine, not from {sorted(machines)}")
    ((cpu, isa, cores),) = machines
    versions = rows[-1]["versions"]
    listed = ", ".join(f"{name} {versions[key]}" for key, name in VERSIONS.items() if versions.get(key))
    return f"{cores} cores of an {cpu.removesuffix(' Processor')} ({isa}); {listed}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(row: Row | None) -> str:
    return "" if row is None else f"{row['images_per_s']:,.0f}"


def bold(text: str) -> str:
    return f"**{text}**" if text else ""


def fastest(rows: Rows, batch: int, ours: bool) -> float:
    """Return the highest rate of a batch size among this project's providers, or among the baselines."""
    own = [row["images_per_s"] for (_, size), row in rows.items() if (size, row["ours"]) == (batch, ours)]
    return float(max(own))


def race(file: str) -> str:
    """Return one line per provider, with images/s by batch size."""
    rows, peak = timed(file), ["peak MB"] if "train" in file else []
    batches = sorted({batch for _, batch in rows})
    lines = []
    for name, label in LABELS.items():
        found = [rows.get((name, batch)) for batch in batches]
        if any(found):
            line = [label, *map(figure, found)]
            peaks = ", ".join(f"{row['peak_bytes'] / 1e6:,.0f}" for row in found if row)
            lines.append([*(map(bold, line) if name in OURS else line), *(peaks for _ in peak)])
    ratios = [f"*{fastest(rows, b, True) / fastest(rows, b, False):.1f}×*" for b in batches]
    lines.append(["*ours relative to the fastest other*", *ratios, *("" for _ in peak)])
    heading = ["images/s at batch", *map(str, batches), *peak]
    return f"{machine(list(rows.values()))}.\n\n{table(heading, lines)}"


def summary() -> str:
    """Return the README's table: generation and training, by the fastest mode of each library."""
    inference, training = timed("cpu.jsonl"), timed("train.jsonl")
    columns = [(inference, "generate", "fast", batch) for batch in (1, 64, 256)]
    columns += [(training, "train", "train-step", batch) for batch in (64, 128)]
    groups = {
        "eager": ["eager"],
        "eager, channels_last": ["channels_last"],
        "torch.compile, best mode": [name for name in LABELS if name.startswith(("compile", "max-"))],
        "ONNX Runtime": ["onnxruntime"],
        "OpenVINO": ["openvino"],
        "zentorch": ["zentorch"],
    }
    lines = []
    for label, names in groups.items():
        found = [[rows[n, batch] for n in names if (n, batch) in rows] for rows, _, _, batch in columns]
        best = [max(column, key=lambda row: row["images_per_s"], default=None) for column in found]
        lines.append([label, *map(figure, best)])
    ours = [(rows[name, batch], fastest(rows, batch, ours=False)) for rows, _, name, batch in columns]
    cells = (f"{bold(figure(row))} ({row['images_per_s'] / other:.1f}×)" for row, other in ours)
    lines.append(["**dcgan-kernels**", *cells])
    heading = ["images/s", *(f"{command} {batch}" for _, command, _, batch in columns)]
    return f"{machine([*inference.values(), *training.values()])}.\n\n{table(heading, lines)}"


def situations() -> str:
    """Return the drop-in's speed relative to eager, by dtype, edit and mode."""
    rows = latest("situations.jsonl")
    modes = {
        "inference": "inference",
        "training": "training",
        "eval, gradients": "eval, all gradients",
        "eval, the input's gradient": "eval, dx only",
    }
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        label = ", ".join(filter(None, [row["dtype"], row["edit"]]))
        if (row["features"], row["image_size"]) != (64, 64):
            label += f", features {row['features']}, {row['image_size']}×{row['image_size']}"
        label += ", next to a busy process" if row["busy"] else ""
        found.setdefault(label, {})[row["network"], row["mode"]] = row["ratio"]
    columns = [(network, mode) for network in "GD" for mode in modes]
    heading = [f"batch {rows[-1]['batch']}", *(f"{network}, {modes[mode]}" for network, mode in columns)]
    lines = [
        [label, *(f"{ratios[c]:.1f}×" if c in ratios else "" for c in columns)]
        for label, ratios in found.items()
    ]
    return f"{machine(rows)}.\n\n{table(heading, lines)}"


def fused() -> str:
    """Return the speed and memory of fused networks relative to their baselines."""
    found: dict[str, dict[tuple[str, int, str], Row]] = {}
    for row in latest("any.jsonl"):
        found.setdefault(row["network"], {})[row["mode"], row["batch"], row["baseline"]] = row
    lines = []
    for network, rows in found.items():
        for (mode, batch, baseline), row in rows.items():
            if baseline != "eager":
                continue
            others = {
                b: r["ratio"] for (m, n, b), r in rows.items() if (m, n) == (mode, batch) and b != baseline
            }
            nearest = min(others, key=others.__getitem__, default="")
            other = f"{others[nearest]:.2f}× {LABELS.get(nearest, nearest)}" if nearest else ""
            memory = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}×"
            line = [network, mode, str(batch), f"{row['ratio']:.2f}×", other, memory, row["engines"]]
            lines.append(line)
    heading = ["network", "mode", "batch", "eager", "fastest other", "memory", "convolutions"]
    return f"{machine(latest('any.jsonl'))}.\n\n{table(heading, lines)}"


def epochs(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and lines of examples/full_run.py's rows: a line per run and epoch, then a floor."""
    header, *found = rows
    floor = header["floor"] or {}
    lines = []
    for row in found:
        times = (cell(row, key, ",.0f") for key in ("seconds", "images_per_second"))
        lines.append([RUNS[row["run"]], str(row["epoch"]), *times, *scores(row)])
    if floor:
        lines.append(["real images", "", "", "", *scores(floor)])
    heading = ["", "epoch", "seconds", "images/s", "Fréchet", "kernel", "precision", "recall", "density"]
    return [*heading, "coverage"], lines


def scores(row: Row) -> list[str]:
    deviation = cell(row, "kernel_std", ".2g")
    kernel = cell(row, "kernel", ".3g") + (f" ± {deviation}" if deviation else "")
    shares = (cell(row, key, ".3f") for key in ("precision", "recall", "density", "coverage"))
    return [cell(row, "frechet", ".3g"), kernel, *shares]


def cell(row: Row, key: str, form: str) -> str:
    return "" if row.get(key) is None else format(row[key], form)


def rates(rows: Sequence[Row]) -> str:
    """Say how many epochs of examples/full_run.py's rows each run trained for how long, and at which rate."""
    header, *found = rows
    sentences = []
    for name, title in RUNS.items():
        own = [row for row in found if row["run"] == name]
        timed = [row for row in own if row["seconds"] is not None]
        if own:
            text = f"{title}: {own[-1]['epoch']} of {header['runs'][name]['epochs']} epochs"
            if timed:
                seconds = sum(row["seconds"] for row in timed)
                images = sum(row["seconds"] * row["images_per_second"] for row in timed)
                missing = "" if len(timed) == own[-1]["epoch"] else f" for {len(timed)} of them"
                text += f", {minutes(seconds)} of training{missing} at {images / seconds:,.0f} images/s"
            sentences.append(text)
    return "; ".join(sentences)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:,.0f} minutes"


def full() -> str:
    """Return the scores of a full training run by epoch."""
    rows = output.read(ROOT / "bench/results/full-run.jsonl")
    gpu = rows[0]["hardware"]["gpu"]
    where = f"{gpu}; {machine(rows[:1])}" if gpu else machine(rows[:1])
    return f"{where}. {rates(rows)}.\n\n{table(*epochs(rows))}"


def few() -> str:
    """Return the scores of training on few images, with and without DiffAugment, by epoch."""
    header, *found = output.read(ROOT / "bench/results/few-images.jsonl")
    names = {"plain": "no augmentation", "diffaugment": "DiffAugment"}
    lines = []
    for row in found:
        first = [names[row["run"]], str(row["epoch"]), cell(row["training"], "frechet", ".3g")]
        lines.append([*first, *scores(row["held_out"])])
    lines.append(["other real images", "", "", *scores(header["floor"])])
    heading = ["", "epoch", "Fréchet, training images", "Fréchet", "kernel", "precision", "recall"]
    return f"{machine([header])}.\n\n{table([*heading, 'density', 'coverage'], lines)}"


def section(file: str, heading: str) -> str:
    """Return a section of a Markdown file, without its heading."""
    _, _, rest = (ROOT / "bench/results" / file).read_text().partition(f"## {heading}\n\n")
    return rest.partition("\n\n")[0].strip()


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "generate": lambda: race("cpu.jsonl"),
    "discriminate": lambda: race("cpu-discriminate.jsonl"),
    "train": lambda: race("train.jsonl"),
    "situations": situations,
    "any": fused,
    "full": full,
    "few": few,
    "predict": lambda: section("predict-h200.md", "Steps"),
    "predict_inference": lambda: section("predict-h200-inference.md", "Replays"),
}
