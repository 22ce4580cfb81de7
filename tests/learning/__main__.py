"""Check on real digits that fast training learns what the reference learns: ``python -m tests.learning``.

Trains both variants from the same RNG seeds, compares their curves and the statistics of their samples by the
criterion of :mod:`tests.learning.criterion`, and prints PASS or FAIL; the exit status is 1 for FAIL. With
``--soak``, instead trains fast networks for 2,000 steps and checks for NaN, memory growth and a collapsed D
(:mod:`tests.learning.soak`).
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench import machine, options, output
from bench.cases import threads
from bench.options import positive
from dcgan.models import IMAGE_SIZES
from dcgan.training import Result
from tests.learning import criterion, plot, soak
from tests.learning.criterion import Finding, Run, Settings, compare, learn, statistics

SEEDS = (0, 1, 2)
MAX_SAMPLE_SIZE = 32
"""Maximum height and width of the recorded samples, in pixels."""
SCALARS = ("mean", "std", "diversity")


class Outcome(NamedTuple):
    """All runs, and how each variant compares with the reference."""

    settings: Settings
    runs: dict[str, list[Run]]
    findings: dict[str, list[Finding]]
    real: dict[str, Tensor]  # statistics of the same number of real digits, for comparison

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings["fast"])


def race(settings: Settings, seeds: Sequence[int] = SEEDS, channels_last: bool = False) -> Outcome:
    """Train every variant from every RNG seed and compare the variants with the reference."""
    variants = criterion.VARIANTS if channels_last else criterion.VARIANTS[:2]
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    for seed in seeds:
        for variant in variants:
            run = learn(variant, seed, settings)
            runs[variant].append(run)
            log(f"{variant}, seed {seed}: {settings.steps} steps in {run.seconds:.0f} s")
    findings = {variant: compare(runs["reference"], runs[variant]) for variant in variants[1:]}
    return Outcome(settings, runs, findings, statistics(settings.images()[: criterion.SAMPLES]))


def log(line: str) -> None:
    print(f"  {line}", file=sys.stderr)


# --- tables and records -------------------------------------------------------------------------------------


def ends_table(outcome: Outcome) -> Table:
    """Return the final figures of each run: the curves' last window and the last samples' statistics."""
    settings = outcome.settings
    where = settings.device if settings.device != "cpu" else f"cpu, {threads(torch.get_num_threads())}"
    heading = f"{settings.steps} steps on real digits · {settings.title} · {where}"
    names = (*Result._fields, *SCALARS)
    shown = output.table(heading, ["variant", "seed"], [*names, "seconds"])
    for run in (run for runs in outcome.runs.values() for run in runs):
        ends = run.ends()
        cells = (f"{ends[name]:.3f}" for name in names)
        shown.add_row(run.variant, str(run.seed), *cells, f"{run.seconds:.0f}")
    empty = [output.NOTHING] * len(Result._fields)
    shown.add_row("real digits", "", *empty, *(f"{float(outcome.real[name]):.3f}" for name in SCALARS), "")
    return shown


def findings_table(outcome: Outcome) -> Table:
    """Return one row per quantity. The verdict is about ``fast`` only, and uses the mean over the seeds."""
    others = [variant for variant in outcome.findings if variant != "fast"]
    right = ["fast", "allowed", "share", "by seed", *(c for other in others for c in (other, "by seed"))]
    shown = output.table("RMS distance from the reference", ["quantity"], [*right, "verdict"])
    for found, *compared in zip(*(outcome.findings[v] for v in ("fast", *others)), strict=True):
        share = f"{found.distance / found.allowed:.2f}" if found.allowed else output.NOTHING
        distance, by_seed = _cells(found)
        cells = [distance, f"{found.allowed:.2g}", share, by_seed, *(c for f in compared for c in _cells(f))]
        shown.add_row(found.quantity, *cells, "PASS" if found.ok else "FAIL")
    return shown


def _cells(finding: Finding) -> tuple[str, str]:
    return f"{finding.distance:.2g}", " ".join(f"{distance:.2g}" for distance in finding.seeds)


def soak_table(settings: Settings, found: Sequence[soak.Soak]) -> Table:
    shown = output.table(
        f"{settings.steps} steps of fast networks · {settings.title} · {settings.device}",
        ["batches"],
        ["finite", "RSS MB", "growth MB", "tensors", "objects", *Result._fields],
    )
    for o in found:
        shown.add_row(
            ", ".join(map(str, o.batches)),
            str(o.finite),
            output.rate(o.resident_bytes[1] / 1e6),
            f"{o.growth / 1e6:.2f}",
            *(f"{a} → {b}" for a, b in (o.tensors, o.objects)),
            *(f"{value:.3f}" for value in o.last.values()),
        )
    return shown


def rows(outcome: Outcome, load: float | None) -> list[dict[str, Any]]:
    """Return one row per run, one for the real digits (without curves) and one per verdict."""
    shared = output.common("learn", load)
    shared |= {"settings": asdict(outcome.settings), "threads": torch.get_num_threads()}
    found = []
    for run in (run for runs in outcome.runs.values() for run in runs):
        curves, start = (
            dict(zip(Result._fields, t.T.tolist(), strict=True)) for t in (run.curves, run.start)
        )
        about = {
            "way": run.variant,
            "seed": run.seed,
            "seconds": run.seconds,
            "curves": curves,
            "start": start,
        }
        found.append(shared | about | _record(run.statistics, run.samples))
    digits = outcome.settings.images()[: criterion.SHOWN]
    found.append(shared | {"way": "real digits"} | _record(outcome.real, digits))
    for variant, findings in outcome.findings.items():
        verdict = [finding._asdict() | {"ok": finding.ok} for finding in findings]
        found.append(shared | {"verdict": variant, "findings": verdict})
    # Five significant digits keep the file small.
    short = json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    return short  # type: ignore[no-any-return]


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


# --- the command --------------------------------------------------------------------------------------------


def run_soak(settings: Settings, folder: Path | None) -> int:
    """Run both soaks, print them and write soak.json. Return 1 if either has a problem, else 0."""
    found = []
    for sizes in soak.batches(settings):
        found.append(soak.soak(settings, sizes))
        log(f"batches {sizes}: {settings.steps} steps in {found[-1].seconds:.0f} s")
    output.console().print(soak_table(settings, found))
    problems = [problem for outcome in found for problem in outcome.problems]
    print("; ".join(problems) or "PASS")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        report = output.common("soak") | {"settings": asdict(settings)}
        report["runs"] = [outcome._asdict() | {"problems": outcome.problems} for outcome in found]
        (folder / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(problems))


def run_race(settings: Settings, seeds: Sequence[int], channels_last: bool, folder: Path | None) -> int:
    """Train all variants, print the comparison and write learn.jsonl and learn.png. Return 1 for FAIL."""
    load = machine.load()
    outcome = race(settings, seeds, channels_last)
    out = output.console()
    out.print(ends_table(outcome))
    out.print(findings_table(outcome))
    out.print("PASS" if outcome.ok else "FAIL", style="bold")
    if folder is not None:
        file = folder / "learn.jsonl"
        file.unlink(missing_ok=True)
        found = rows(outcome, load)
        output.append(file, found)
        plot.draw(found, file.with_suffix(".png"))
        print(f"{file}, {file.with_suffix('.png')}")
    return int(not outcome.ok)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for FAIL, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="python -m tests.learning", description=__doc__)
    add = parser.add_argument
    race_settings, soak_settings = Settings(), soak.SETTINGS
    for name in ("steps", "features", "image_size", "batch"):
        allowed = {"type": int, "choices": IMAGE_SIZES} if name == "image_size" else {"type": positive}
        text = f"default: {getattr(race_settings, name)}; with --soak {getattr(soak_settings, name)}"
        add(f"--{name.replace('_', '-')}", **allowed, help=text)
    add("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="at least two RNG seeds (0 1 2)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)")
    add(
        "--channels-last",
        action="store_true",
        help="also train the reference in channels_last, to show the effect of rounding alone",
    )
    add("--soak", action="store_true", help="run the soak test of fast networks instead")
    add("--out", type=Path, metavar="FOLDER", help="for learn.jsonl and learn.png, or soak.json with --soak")
    add("--draw", type=Path, metavar="FILE", help="only draw the results in FILE, a learn.jsonl")
    options.add(parser, "threads")
    args = parser.parse_args(arguments)
    if args.draw is not None:
        plot.draw(output.read(args.draw), args.draw.with_suffix(".png"))
        return 0
    if len(set(args.seeds)) < 2:
        parser.error("argument --seeds: the spread between seeds needs at least two distinct seeds")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was given, but there is no GPU")
    given = {name: getattr(args, name) for name in ("steps", "features", "image_size", "batch", "device")}
    settings = soak_settings if args.soak else race_settings
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    torch.set_num_threads(args.threads)
    if args.soak:
        return run_soak(settings, args.out)
    return run_race(settings, args.seeds, args.channels_last, args.out)


if __name__ == "__main__":
    sys.exit(main())
