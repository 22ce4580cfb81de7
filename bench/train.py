"""``python -m bench train``: full training steps by every implementation, and a profile of their time.

One call is one step as defined by :func:`dcgan.training.train_step`: D on real and on generated images, D's
optimizer, G through D, G's optimizer. Gradients and losses of every implementation are first compared with
the reference loop in float64, and its parameter updates with its optimizers' state. It is then timed in a
separate process, in bursts interleaved with those of the others. Finally, each of this project's eager
implementations is profiled: the time of every fprop, dgrad and wgrad by layer, next to the ceiling of a
direct convolution.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from bench import options, output
from bench.cases import Case
from bench.compare import compare
from bench.machine import Ceiling
from bench.options import SIZES
from bench.output import Row, percent, rate
from bench.providers import find_all
from bench.race import PREPARE_SECONDS, Process, WorkerFailed
from bench.training import VARIANTS, Batch, Loop, Training, TrainWorker
from dcgan.kernels.spec import Backward, Call
from dcgan.training_layers import layer_by_layer

HELP = "time training steps by every implementation and profile them by layer"
DTYPES = ("float32", "tf32", "bfloat16")
BATCHES = {"cpu": [64, 128], "cuda": [64, 256, 1024]}
CASE_DTYPES = {"cpu": ["float32"], "cuda": ["tf32", "bfloat16"]}
PROFILED = {"fast": ("cpu", "cuda"), "train-step": ("cpu",)}
"""Variants whose networks can run layer by layer and be profiled, and on which devices.

On a GPU, TrainStep is one CUDA graph.
"""
PROFILE_ROUNDS = 5
PHASES = ("G fprop", "D fprop", "D dgrad", "D wgrad", "G dgrad", "G wgrad")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add(parser, "device", *SIZES, "threads", "json")
    options.add_batches(parser, None, "64 128; on a GPU 64 256 1024")
    add = parser.add_argument
    text = "dtypes (default: float32; on a GPU tf32 bfloat16)"
    add("--dtype", nargs="+", choices=DTYPES, help=text)
    text = f"any of {', '.join(VARIANTS)} (default: all), or MODULE:FUNCTION for a custom build function"
    add("--providers", nargs="+", default=list(VARIANTS), metavar="NAME", help=text)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--profile", action="store_true", help="only profile, without the comparison")
    only.add_argument("--no-profile", action="store_true", help="only compare, without profiling")
    options.add_timing(parser, "each provider and case", 12.0, rounds=10)


def run(args: argparse.Namespace) -> int:
    """Run the command. Return 1 if a provider is wrong or one of this project's failed, else 0."""
    providers = find_all(args.providers, VARIANTS)
    cases, out = make_cases(args), output.console()
    failed = False

    def profiles(case: Case, ceiling: Ceiling) -> list[Row]:
        """Profile the providers whose operators can be timed one by one."""
        nonlocal failed
        rows = []
        for name in [p.name for p in providers if case.device in PROFILED.get(p.name, ())]:
            output.log(f"{name}: profiling")
            try:
                found = measure_profile(case, name, min(args.rounds, PROFILE_ROUNDS))
            except WorkerFailed as failure:
                failed = True
                out.print(f"{name}: profiling: FAILED: {failure}\n", markup=False, soft_wrap=True)
                continue
            out.print(profile_table(case, name, found, ceiling))
            out.print(
                f"ceiling: {ceiling.flops / 1e9:,.0f} GFLOP/s, {ceiling.measure}; GFLOP are counted as "
                "direct convolutions, so Winograd may exceed it\n",
                soft_wrap=True,
            )
            rows += profile_rows(case, name, found, ceiling)
        return rows

    then = (lambda *_: []) if args.no_profile else profiles
    return max(compare(args, cases, [] if args.profile else providers, then), int(failed))


def make_cases(args: argparse.Namespace) -> list[Training]:
    """Return a case for every dtype and batch size. Raises UsageError for an unsupported combination."""
    device = options.find_device(args.device, args.dtype or ())
    sizes = options.sizes(args, "generate")  # a Generator has all sizes that a Discriminator has
    return [
        Training("train", batch, dtype, device, args.threads, sizes)
        for dtype in dict.fromkeys(args.dtype or CASE_DTYPES[device])
        for batch in dict.fromkeys(args.batch or BATCHES[device])
    ]


# --- the profile --------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """All calls of one layer in one phase."""

    phase: str
    layer: str
    engine: str
    calls: int
    """Calls per step."""
    seconds: float
    """Total time of these calls."""
    flops: int
    """FLOPs of the direct convolutions, for the whole batch."""


class Profile(NamedTuple):
    """The time of a step, divided into parts."""

    parts: list[Part]
    """Ordered by phase as in PHASES, then in the order of execution."""
    optimizers: float
    step: float
    """Seconds of the whole step."""

    @property
    def other(self) -> float:
        """The remaining time; negative if the calls take longer while they are timed one by one."""
        return self.step - sum(part.seconds for part in self.parts) - self.optimizers


def measure_profile(case: Case, name: str, rounds: int) -> Profile:
    """Profile a provider in a separate process. Raises WorkerFailed."""
    with closing(Process(case.threads, "bench.train:Profiler")) as worker:
        found: Profile = worker.ask(PREPARE_SECONDS, "profile", case, name, rounds)
    return found


class Profiler(TrainWorker):
    """The process that profiles a variant."""

    def profile(self, case: Training, provider_name: str, rounds: int) -> Profile:
        """Profile a step of a variant by layer and phase."""
        loop = self.build(case, provider_name)
        return profile(loop, [batch.to(case.device) for batch in case.batches()], rounds, case.device)


class _Timer(TorchDispatchMode):
    """Dispatch mode that times the fused-operator calls made under it.

    A backward that computes dgrad and wgrad is one call; its time is divided in proportion to the times of
    the two computed separately.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self.parts: list[Part] = []
        """The products in the order of execution; a backward that computes two gradients is two."""
        self._now = now

    def _timed(self, func: Any, *args: Any, **kwargs: Any) -> tuple[Any, float]:
        start = self._now()
        result = func(*args, **kwargs)
        return result, self._now() - start

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from dcgan.kernels import ops

        kwargs = kwargs or {}
        operator = re.fullmatch(r"dcgan\.conv(_transpose)?2d_fused(_backward)?\.default", str(func))
        if operator is None:
            return func(*args, **kwargs)
        with ops.recording() as choices:
            result, seconds = self._timed(func, *args, **kwargs)
        transposed, backward = operator.groups()
        call: Any = (Backward if backward else Call)(*args, **kwargs)
        y = call.dy if backward else result[0]
        network = "G" if transposed else "D"  # only the Generator has transposed convolutions
        layer = f"{call.x.shape[1]}→{y.shape[1]} @{call.x.shape[2]}→{y.shape[2]}"
        flops = 2 * (call.x if transposed else y).numel() * call.weight[0].numel()
        engine = choices[-1].engine if choices else ""
        shares = self._gradients(func, call) if backward else {"fprop": 1.0}
        self.parts += [
            Part(f"{network} {phase}", layer, engine, 1, seconds * share / sum(shares.values()), flops)
            for phase, share in shares.items()
        ]
        return result

    def _gradients(self, func: Any, call: Backward) -> dict[str, float]:
        """Return the gradients that a call computes, with the seconds that each takes alone."""
        of_x, of_weight, *of_vectors = call.needs
        alone: dict[str, Any] = {}
        if of_x or any(of_vectors):
            alone["dgrad"] = (of_x, False, *of_vectors)
        if of_weight:
            alone["wgrad"] = (False, True, False, False, False)
        return {phase: self._timed(func, *call._replace(needs=needs))[1] for phase, needs in alone.items()}


def profile(loop: Loop, batches: Sequence[Batch], rounds: int, device: str) -> Profile:
    """Profile a step, from medians over ``rounds`` of one whole step and one whose calls are timed.

    In both, a network runs layer by layer rather than as one operator, whose products could not be timed. The
    optimizers are timed within the whole step. The remainder of the step is everything else: losses,
    BatchNorm's per-channel arithmetic, autograd and copies.

    Raises:
        ValueError: the step calls no fused operator.
    """

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    spent = 0.0

    def add_time(sign: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal spent
            spent += sign * now()

        return hook

    for adam in loop.adams:
        adam.register_step_pre_hook(add_time(-1))
        adam.register_step_post_hook(add_time(1))
    steps, optimizers, timed = [], [], []
    with layer_by_layer():
        for batch in batches:
            loop(batch)  # warm-up: the first steps allocate optimizer state and build caches
        for i in range(rounds):
            spent, batch, start = 0.0, batches[i % len(batches)], now()
            loop(batch)
            steps.append(now() - start)
            optimizers.append(spent)
            with (timer := _Timer(now)):
                loop(batch)
            timed.append(timer.parts)
    found: dict[tuple[str, str], list[Part]] = {}
    for calls in zip(*timed, strict=True):
        part = calls[0]._replace(seconds=statistics.median(call.seconds for call in calls))
        found.setdefault(part[:2], []).append(part)
    if not found:
        raise ValueError("no call of a fused operator was seen in the step")
    parts = [total(*own[0][:3], own) for own in found.values()]
    parts.sort(key=lambda part: PHASES.index(part.phase))
    return Profile(parts, statistics.median(optimizers), statistics.median(steps))


def total(phase: str, layer: str, engine: str, parts: Sequence[Part]) -> Part:
    """Return the sum of parts."""
    calls, seconds, flops = (sum(own) for own in zip(*(part[3:] for part in parts), strict=True))
    return Part(phase, layer, engine, calls, seconds, flops)


def profile_table(case: Case, name: str, profile: Profile, ceiling: Ceiling) -> Table:
    """Return one row per layer and phase, then the totals of the phases, the optimizers and the rest."""
    columns = ["calls", "ms", "share", "GFLOP", "GFLOP/s", "ceiling"]
    shown = output.table(f"{name} · {case.title}", ["phase", "layer", "engine"], columns)

    def add(part: Part) -> None:
        flops, seconds = part.flops, part.seconds
        work = [rate(flops / 1e9), rate(flops / seconds / 1e9), percent(flops / seconds / ceiling.flops)]
        shown.add_row(
            *(part.phase, part.layer, part.engine, str(part.calls or "")),
            *("-" * (seconds < 0) + rate(1e3 * abs(seconds)), percent(seconds / profile.step)),
            *(work if flops else []),
        )

    phases = [[part for part in profile.parts if part.phase == phase] for phase in PHASES]
    for parts in phases:
        for part in parts:
            add(part)
        shown.add_section()
    for parts in filter(None, phases):
        add(total(parts[0].phase, "", "", parts))
    add(Part("optimizers", "", "", 0, profile.optimizers, 0))
    add(Part("everything else", "", "", 0, profile.other, 0))
    shown.add_section()
    add(total("total", "", "", profile.parts)._replace(calls=0, seconds=profile.step))
    return shown


def profile_rows(case: Case, name: str, profile: Profile, ceiling: Ceiling) -> list[Row]:
    """Return the JSON objects: times in seconds, rates in FLOP/s of the direct convolution."""
    shared = {"case": asdict(case), "provider": name, "ceiling": asdict(ceiling), "step": profile.step}
    rows = [part._asdict() | {"flops_per_s": part.flops / part.seconds} for part in profile.parts]
    rows += [{"phase": "optimizers", "seconds": profile.optimizers}]
    rows += [{"phase": "other", "seconds": profile.other}]
    return [shared | row | {"share": row["seconds"] / profile.step} for row in rows]
