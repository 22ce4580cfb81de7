"""``python -m bench learn``: check on real digits that fast training learns what the reference learns.

Trains both variants from the same RNG seeds, compares their curves and the statistics of their samples by the
criterion of :mod:`bench.learning`, and prints PASS or FAIL; the exit status is 1 for FAIL. With ``--soak``,
instead trains fast networks for 2,000 steps and checks for NaN, memory growth and a collapsed D
(:mod:`bench.soak`).
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

from bench import learning, machine, options, plot_learn, records, soak, table
from bench.cases import threads
from bench.learning import Finding, Run, Settings, compare, learn, statistics
from bench.usage import UsageError, positive
from dcgan.models import IMAGE_SIZES
from dcgan.training import Result

HELP = "check that fast training learns what the reference learns"
SEEDS = (0, 1, 2)
MAX_SAMPLE_SIZE = 32
"""Maximum height and width of the recorded samples, in pixels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    add = parser.add_argument
    add("--steps", type=positive, help=f"training steps (default: {default.steps}; with --soak {soak.STEPS})")
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=SEEDS,
        metavar="N",
        help="RNG seeds, at least two (default: 0 1 2)",
    )
    add(
        "--features",
        type=positive,
        help=f"base channel count (default: {default.features}; with --soak {soak.SETTINGS.features})",
    )
    add(
        "--image-size",
        type=int,
        choices=IMAGE_SIZES,
        help=f"image size in pixels (default: {default.image_size}; with --soak {soak.SETTINGS.image_size})",
    )
    add(
        "--batch",
        type=positive,
        help=f"batch size (default: {default.batch}; with --soak {soak.SETTINGS.batch})",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)")
    add(
        "--channels-last",
        action="store_true",
        help="also train the reference in channels_last, to show the effect of rounding alone",
    )
    add("--soak", action="store_true", help="run the soak test of fast networks instead")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder to write learn.jsonl and learn.png to (soak.json with --soak)",
    )
    options.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    if len(set(args.seeds)) < 2:
        raise UsageError("argument --seeds: the spread between seeds needs at least two distinct seeds")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("argument --device: cuda was given, but there is no GPU")
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
        file, plot = args.out / "learn.jsonl", args.out / "learn.png"
        file.unlink(missing_ok=True)
        found = rows(outcome, load)
        records.append(file, found)
        plot_learn.draw(plot_learn.arrange(found), plot)
        out.print(f"{file}, {plot}")
    return int(not outcome.ok)


@dataclass(frozen=True)
class Outcome:
    """All runs, and how each variant compares with the reference."""

    settings: Settings
    runs: dict[str, list[Run]]
    findings: dict[str, list[Finding]]
    real: dict[str, Tensor]
    """Statistics of the same number of real digits, for comparison."""

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings["fast"])


def race(
    settings: Settings,
    seeds: Sequence[int] = SEEDS,
    channels_last: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Train every variant from every RNG seed and compare the variants with the reference."""
    variants = ["reference", "fast", *(["channels_last"] if channels_last else [])]
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    for seed in seeds:
        for variant in variants:
            runs[variant].append(learn(variant, seed, settings))
            log(f"{variant}, seed {seed}: {settings.steps} steps in {runs[variant][-1].seconds:.0f} s")
    findings = {variant: compare(runs["reference"], runs[variant]) for variant in variants[1:]}
    return Outcome(settings, runs, findings, statistics(settings.images()[: learning.SAMPLES]))


def title(settings: Settings) -> str:
    where = settings.device if settings.device != "cpu" else f"cpu, {threads(torch.get_num_threads())}"
    return f"{settings.steps} steps on real digits · {settings.title} · {where}"


def ends_table(outcome: Outcome) -> Table:
    """Return the final figures of each run: the curves' last window and the last samples' statistics."""
    scalars = ("mean", "std", "diversity")
    shown = table.start(title(outcome.settings), ["variant", "seed"], [*Result._fields, *scalars, "seconds"])
    for run in (run for runs in outcome.runs.values() for run in runs):
        ends = {name: float(value[-1]) for name, value in run.quantities().items() if value.ndim == 1}
        figures = [f"{ends[name]:.3f}" for name in (*Result._fields, *scalars)]
        shown.add_row(run.variant, str(run.seed), *figures, f"{run.seconds:.0f}")
    empty = [table.NOTHING] * len(Result._fields)
    shown.add_row("real digits", "", *empty, *(f"{float(outcome.real[name]):.3f}" for name in scalars), "")
    return shown


def findings_table(outcome: Outcome) -> Table:
    """Return one row per quantity. The verdict is about ``fast`` only, and uses the mean over the seeds."""
    others = [variant for variant in outcome.findings if variant != "fast"]
    right = ["fast", "allowed", "share", "by seed", *(c for other in others for c in (other, "by seed"))]
    shown = table.start("RMS distance from the reference", ["quantity"], [*right, "verdict"])
    for i, finding in enumerate(outcome.findings["fast"]):
        shown.add_row(
            finding.quantity,
            f"{finding.distance:.2g}",
            f"{finding.allowed:.2g}",
            f"{finding.distance / finding.allowed:.2f}" if finding.allowed else table.NOTHING,
            _by_seed(finding),
            *(text for other in others for text in _cells(outcome.findings[other][i])),
            "PASS" if finding.ok else "FAIL",
        )
    return shown


def _by_seed(finding: Finding) -> str:
    return " ".join(f"{distance:.2g}" for distance in finding.seeds)


def _cells(finding: Finding) -> tuple[str, str]:
    return f"{finding.distance:.2g}", _by_seed(finding)


def rows(outcome: Outcome, load: float | None) -> list[dict[str, Any]]:
    """Return one row per run, one for the real digits (without curves) and one per verdict."""
    shared = records.common("learn", load) | {
        "settings": asdict(outcome.settings),
        "threads": torch.get_num_threads(),
    }
    found = [shared | _row(run) for runs in outcome.runs.values() for run in runs]
    real = outcome.settings.images()[: learning.SHOWN]
    found.append(shared | {"way": "real digits"} | _record(outcome.real, real))
    for variant, findings in outcome.findings.items():
        verdict = [asdict(finding) | {"ok": finding.ok} for finding in findings]
        found.append(shared | {"verdict": variant, "findings": verdict})
    return json.loads(json.dumps(found), parse_float=_short)  # type: ignore[no-any-return]


def _short(digits: str) -> float:
    """Round to five significant digits, which keeps the file small."""
    return float(f"{float(digits):.5g}")


def _row(run: Run) -> dict[str, Any]:
    curves = dict(zip(Result._fields, run.curves.T.tolist(), strict=True))
    start = dict(zip(Result._fields, run.start.T.tolist(), strict=True))
    about = {"way": run.variant, "seed": run.seed, "seconds": run.seconds, "curves": curves, "start": start}
    return about | _record(run.statistics, run.samples)


def _record(statistics: dict[str, Tensor], images: Tensor) -> dict[str, Any]:
    """Return the statistics except the per-pixel ones, and the images as 8-bit gray levels in base64."""
    size = min(MAX_SAMPLE_SIZE, images.shape[-1])
    small = F.interpolate(images.cpu().float(), size=(size, size), mode="area")
    gray = ((small + 1) * 127.5).round().clamp(0, 255).byte()
    pixels = base64.b64encode(gray.numpy().tobytes()).decode()
    return {
        "statistics": {name: value.tolist() for name, value in statistics.items() if "image" not in name},
        "samples": {"shape": [len(gray), size, size], "pixels": pixels},
    }
