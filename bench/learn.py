"""``python -m bench learn``: whether fast training learns what the reference learns, on real digits.

Trains both ways from the same seeds, compares the curves and samples' statistics (the criterion is
:mod:`bench.learning`'s) and prints PASS or FAIL; the exit status is 1 for FAIL. ``--soak`` instead trains
fast networks for 2,000 steps and looks for NaN, growing memory and a collapsed D (:mod:`bench.soak`).
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench import learning, machine, options, plot_learn, results, soak, table
from bench.cases import threads
from bench.learning import Finding, Run, Settings, compare, learn, statistics
from bench.usage import UsageError, positive
from dcgan.models import IMAGE_SIZES
from dcgan.training import Result

HELP = "does fast training learn what the reference learns?"
SEEDS = (0, 1, 2)
PICTURE = 32
"""Side of the samples that are recorded, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    add = parser.add_argument
    add("--steps", type=positive, help=f"({default.steps}; with --soak {soak.STEPS})")
    add("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="at least two (0 1 2)")
    add("--features", type=positive, help=f"({default.features}; with --soak {soak.SETTINGS.features})")
    add(
        "--image-size",
        type=int,
        choices=IMAGE_SIZES,
        help=f"({default.image_size}; with --soak {soak.SETTINGS.image_size})",
    )
    add("--batch", type=positive, help=f"({default.batch}; with --soak {soak.SETTINGS.batch})")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--channels-last",
        action="store_true",
        help="the reference in channels_last too, as what rounding does",
    )
    add("--soak", action="store_true", help="train fast networks for long instead")
    add("--out", type=Path, metavar="FOLDER", help="write learn.jsonl and learn.png (soak.json) there")
    options.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    if len(set(args.seeds)) < 2:
        raise UsageError("argument --seeds: a spread takes at least two")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("argument --device: no GPU here")
    given = {name: getattr(args, name) for name in ("steps", "features", "image_size", "batch")}
    changes = {name: value for name, value in given.items() if value is not None} | {"device": args.device}
    torch.set_num_threads(args.threads)
    out, progress = table.console(), table.console(stderr=True)

    def log(line: str) -> None:
        progress.print(f"  {line}", style="dim", markup=False)

    if args.soak:
        return soak.run(changes, args.out, out, log)
    settings = Settings(**changes)
    load = machine.load()
    outcome = race(settings, args.seeds, args.channels_last, log)
    out.print(ends_table(outcome))
    out.print(findings_table(outcome))
    out.print("PASS" if outcome.ok else "FAIL", style="bold")
    if args.out is not None:
        file, picture = args.out / "learn.jsonl", args.out / "learn.png"
        file.unlink(missing_ok=True)
        found = rows(outcome, load)
        results.append(file, found)
        plot_learn.draw(plot_learn.arrange(found), picture)
        out.print(f"{file}, {picture}")
    return int(not outcome.ok)


@dataclass(frozen=True)
class Outcome:
    """All runs, and how each way compares with the reference."""

    settings: Settings
    runs: dict[str, list[Run]]
    findings: dict[str, list[Finding]]
    real: dict[str, Tensor]
    """Statistics of as many real digits: a yardstick."""

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings["fast"])


def race(
    settings: Settings,
    seeds: Sequence[int] = SEEDS,
    channels_last: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Every way from every seed."""
    ways = ["reference", "fast", *(["channels_last"] if channels_last else [])]
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for seed in seeds:
        for way in ways:
            runs[way].append(learn(way, seed, settings))
            log(f"{way}, seed {seed}: {settings.steps} steps in {runs[way][-1].seconds:.0f} s")
    findings = {way: compare(runs["reference"], runs[way]) for way in ways[1:]}
    return Outcome(settings, runs, findings, statistics(settings.images()[: learning.SAMPLES]))


def title(settings: Settings) -> str:
    where = settings.device if settings.device != "cpu" else f"cpu, {threads(torch.get_num_threads())}"
    return f"{settings.steps} steps on real digits · {settings.title} · {where}"


def ends_table(outcome: Outcome) -> Table:
    """Where each run ended: curves' last window, samples' last moment."""
    scalars = ("mean", "std", "diversity")
    shown = table.start(title(outcome.settings), ["way", "seed"], [*Result._fields, *scalars, "seconds"])
    for run in (run for runs in outcome.runs.values() for run in runs):
        ends = {name: float(value[-1]) for name, value in run.quantities().items() if value.ndim == 1}
        figures = [f"{ends[name]:.3f}" for name in (*Result._fields, *scalars)]
        shown.add_row(run.way, str(run.seed), *figures, f"{run.seconds:.0f}")
    empty = [table.NOTHING] * len(Result._fields)
    shown.add_row("real digits", "", *empty, *(f"{float(outcome.real[name]):.3f}" for name in scalars), "")
    return shown


def findings_table(outcome: Outcome) -> Table:
    """A row a quantity; only fast is judged, and only by the seeds' mean."""
    others = [way for way in outcome.findings if way != "fast"]
    right = ["fast", "allowed", "share", "by seed", *(c for way in others for c in (way, "by seed"))]
    shown = table.start("apart from the reference", ["quantity"], [*right, "verdict"])
    for i, finding in enumerate(outcome.findings["fast"]):
        shown.add_row(
            finding.quantity,
            f"{finding.distance:.2g}",
            f"{finding.allowed:.2g}",
            f"{finding.distance / finding.allowed:.2f}" if finding.allowed else table.NOTHING,
            _each(finding),
            *(text for way in others for text in _both(outcome.findings[way][i])),
            "PASS" if finding.ok else "FAIL",
        )
    return shown


def _each(finding: Finding) -> str:
    return " ".join(f"{distance:.2g}" for distance in finding.seeds)


def _both(finding: Finding) -> tuple[str, str]:
    return f"{finding.distance:.2g}", _each(finding)


def rows(outcome: Outcome, load: float | None) -> list[dict[str, Any]]:
    """A row a run, the real digits' (without curves), and the verdicts."""
    shared = results.common("learn", load) | {
        "settings": asdict(outcome.settings),
        "threads": torch.get_num_threads(),
    }
    found = [shared | _row(run) for runs in outcome.runs.values() for run in runs]
    real = outcome.settings.images()[: learning.SHOWN]
    found.append(shared | {"way": "real digits"} | _record(outcome.real, real))
    for way, findings in outcome.findings.items():
        verdict = [asdict(finding) | {"ok": finding.ok} for finding in findings]
        found.append(shared | {"verdict": way, "findings": verdict})
    return json.loads(json.dumps(found), parse_float=_short)  # type: ignore[no-any-return]


def _short(digits: str) -> float:
    """Five significant digits are enough."""
    return float(f"{float(digits):.5g}")


def _row(run: Run) -> dict[str, Any]:
    curves = dict(zip(Result._fields, run.curves.T.tolist(), strict=True))
    start = dict(zip(Result._fields, run.start.T.tolist(), strict=True))
    about = {"way": run.way, "seed": run.seed, "seconds": run.seconds, "curves": curves, "start": start}
    return about | _record(run.statistics, run.samples)


def _record(statistics: dict[str, Tensor], images: Tensor) -> dict[str, Any]:
    """Statistics but those of each pixel, and pictures as bytes of grey levels."""
    size = min(PICTURE, images.shape[-1])
    small = F.interpolate(images.cpu().float(), size=(size, size), mode="area")
    grey = ((small + 1) * 127.5).round().clamp(0, 255).byte()
    pixels = base64.b64encode(grey.numpy().tobytes()).decode()
    return {
        "statistics": {name: value.tolist() for name, value in statistics.items() if "image" not in name},
        "samples": {"shape": [len(grey), size, size], "pixels": pixels},
    }
