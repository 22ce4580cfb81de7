"""``python -m bench gpu STAGE --out DIR``: run everything that needs an NVIDIA GPU within a time budget.

``check`` (three minutes) runs a smoke test, the most important tests and one row of each benchmark. ``test``
runs the remaining GPU tests. ``tune`` times the tiles of every layer and phase and writes the fastest to
``<GPU name>.json``, to be copied into ``kernels/gpu/configs``, and to this machine's cache, where later
stages find them. ``bench`` races generation and training steps against cuDNN and torch.compile. ``kernels``
races each layer against cuDNN. ``all`` (seven minutes) runs all of these without repetition. Three stages run
only when named: ``autotune`` (the providers that search for minutes), ``sanitize`` (compute-sanitizer) and
``native`` (the tests of the CPU kernels).

A stage starts no new work after its time is up, reports what it skipped, and leaves its results, its logs and
one archive of both in DIR. The exit status is 1 if a test failed or a result was wrong. Tuning is implemented
here, all other stages in :mod:`bench.stages`.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from bench import machine, replay, shortlist, warm
from bench.budget import Budget
from bench.layers import Layer, outputs
from bench.stages import plan
from bench.usage import UsageError, minutes, positive
from dcgan.kernels.gpu import aten, cost_model, tiles
from dcgan.kernels.gpu.launch import Product

HELP = "test, tune and benchmark on a GPU (make gpu)"
TUNED_BATCHES = (64, 1024, 256, 1, 4096, 8)
TUNED_DTYPES = ("bfloat16", "tf32", "float32")  # in this order; float16 shares the tiles of bfloat16
CHANNELS = (1, 3)
CALLS = 8  # of a layer per timed graph; their tensors stay in L2, as in a training step
CALL_SECONDS = 0.01  # of replays per tile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("stage", choices=tuple(plan.STAGES), nargs="?", default="all", help="stage to run (all)")
    add("--out", type=Path, required=True, metavar="DIR", help="output directory")
    add(
        "--batch",
        type=positive,
        nargs="+",
        metavar="N",
        help="batch sizes of tune, bench and kernels (64 1024)",
    )
    add("--dtype", nargs="+", metavar="NAME", help="dtypes of bench and kernels (bfloat16)")
    add("--providers", nargs="*", metavar="NAME", help="providers that bench races in generation")
    add("--variants", "--ways", nargs="*", metavar="NAME", help="training variants that bench races")
    add(
        "--processes",
        type=positive,
        default=machine.cores(),
        metavar="N",
        help="parallel test processes (all cores)",
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the options for the output directory and the time budget."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output directory")
    parser.add_argument(
        "--minutes", type=minutes, default=6.5, help="start no new work after this many minutes (6.5)"
    )


def need_gpu(out: Path) -> None:
    """Create the output directory. Raises UsageError if there is no GPU."""
    if not torch.cuda.is_available():
        raise UsageError("no GPU here")
    out.mkdir(parents=True, exist_ok=True)


def run(args: argparse.Namespace) -> int:
    need_gpu(args.out)
    return plan.run(args)


# --- tune --------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A problem and the tiles to time for it."""

    spec: warm.LayerSpec
    layer: Layer
    """On the meta device."""
    tiles: list[tiles.Tile]


def tuning_order(batches: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield (batch, dtype) pairs, most important first."""
    return ((batch, dtype) for dtype, batch in itertools.product(TUNED_DTYPES, batches))


def tasks(batch: int, dtype: str, tuned: dict[str, tiles.Tile], sms: int, shared: int) -> list[Task]:
    """Return the untuned problems of both networks, training before eval."""
    found: dict[str, Task] = {}
    for channels, network in itertools.product(CHANNELS, warm.NETWORKS):
        for index, layer in enumerate(warm.all_layers(network, channels, batch, dtype, "meta")):
            key = layer.problem.key()
            if key not in tuned and key not in found:
                spec = warm.LayerSpec(network, channels, batch, dtype, index)
                found[key] = Task(spec, layer, shortlist.shortlist(layer, sms, shared))
    return sorted(found.values(), key=lambda task: task.layer.phase == "eval")


def time_tile(layer: Layer, tile: tiles.Tile, sms: int) -> float:
    """Return the seconds that a layer's launches take on the GPU."""
    launches = layer.launches(tile, sms)
    return replay.measure([launches.__call__] * CALLS, cold=False, seconds=CALL_SECONDS).median


def tile_error(layer: Layer, tile: tiles.Tile, sms: int, expected: Sequence[torch.Tensor]) -> float:
    """Return ‖error‖/‖result‖ of a layer's launches, the maximum over its outputs."""
    return aten.error(outputs(layer, tile, sms), expected)


class TuningResult(NamedTuple):
    """The result of timing the tiles of one problem."""

    best: tiles.Tile | None
    """The fastest tile that runs and is correct; None if there is none."""
    seconds: float
    wrong: list[tiles.Tile]


def best_tile(
    layer: Layer, listed: Sequence[tiles.Tile], compiled: Sequence[Future[None]], sms: int
) -> TuningResult:
    """Check every tile against float64 and time the correct ones.

    Tiles that the GPU refuses and tiles that give wrong results are reported and skipped.
    """
    key, allowed = layer.problem.key(), tiles.TOLERANCE[layer.problem.precision]
    # The prologues of the backward pass read the forward's y, so the outputs of trial launches must not stay.
    y = layer.operation.y if isinstance(layer.operation, Product) else None
    saved_y = None if y is None else y.clone()
    expected = aten.exact(layer.operation)
    times: dict[tiles.Tile, float] = {}
    wrong: list[tiles.Tile] = []
    for tile, done in zip(listed, compiled, strict=True):
        done.exception()  # waits; a compilation that failed there fails again here and is reported
        try:
            error = tile_error(layer, tile, sms, expected)
            if error <= allowed:
                times[tile] = time_tile(layer, tile, sms)
            else:
                wrong.append(tile)
                print(f"{key} {tuple(tile)} WRONG: error {error:.1e}, {allowed:.1e} is allowed", flush=True)
        except TritonError as failure:
            print(f"{key} {tuple(tile)} refused: {str(failure).splitlines()[0]}", flush=True)
    if y is not None and saved_y is not None:
        y.copy_(saved_y)
    best = min(times, key=lambda tile: times[tile], default=None)
    return TuningResult(best, math.inf if best is None else times[best], wrong)


def tune(args: argparse.Namespace, budget: Budget) -> int:
    """Time the most promising tiles of every layer and write each winner as soon as it is found.

    Tiles that give wrong results are added to ``refused.json``, to be copied into ``kernels/gpu/configs``.
    Returns 1 if there are any, else 0.
    """
    name = torch.cuda.get_device_name()
    path, cache = args.out / tiles.gpu_file(name), tiles.cache_file(name)
    tuned = tiles.read(path)
    wrong = 0
    properties: Any = torch.cuda.get_device_properties(0)
    sms, shared = (
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )
    with warm.Compilers() as compilers:
        for batch, dtype in tuning_order(args.batch or TUNED_BATCHES):
            if not budget.allows(f"batch {batch} {dtype}"):
                continue
            todo = tasks(batch, dtype, tuned, sms, shared)
            compiled = [[compilers.submit(task.spec, tile, sms) for tile in task.tiles] for task in todo]
            on_gpu: dict[tuple[str, int], list[Layer]] = {}
            for task, futures in zip(todo, compiled, strict=True):
                spec, key = task.spec, task.layer.problem.key()
                if not budget.allows(key):
                    continue
                network = spec.network, spec.channels
                if network not in on_gpu:
                    on_gpu[network] = warm.all_layers(*spec[:4], "cuda")
                tile, measured, incorrect = best_tile(
                    on_gpu[network][spec.position], task.tiles, futures, sms
                )
                if incorrect:
                    wrong += len(incorrect)
                    names = [tiles.refused_name(task.layer.problem, one) for one in incorrect]
                    tiles.refuse(args.out / tiles.REFUSED, *names)
                if tile is None:
                    budget.left.append(f"{key} (no tile runs)")
                    continue
                tuned[key] = tile
                if not tile.fused:  # the key of the product that follows the standalone prologues
                    tuned.setdefault(
                        cost_model.without_prologue(task.layer.problem).key(), tile._replace(fused=True)
                    )
                print(
                    f"{task.layer.kernel:13} {task.layer.name:17} {key:60} {tuple(tile)} "
                    f"{1e6 * measured:.1f} µs; the cost model chose {tuple(task.tiles[0])}",
                    flush=True,
                )
                tiles.write(path, tuned)
                tiles.write(cache, tiles.read(cache) | tuned)
    print(f"{len(tuned)} problems in {path}; {budget.report()}")
    return int(wrong > 0)
