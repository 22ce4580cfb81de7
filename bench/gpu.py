"""``python -m bench gpu STAGE --out DIR``: everything that takes an NVIDIA GPU, in a time that is set.

``check``, three minutes: whether it works, the tests that matter most, a row of each benchmark. ``test``: the
other GPU tests. ``tune``: times the tiles of every layer and phase; the fastest go to ``<GPU name>.json``, to
be copied into ``kernels/gpu/configs``, and to this machine's cache, from where the stages after it take them.
``bench``: generation and training steps beside cuDNN and torch.compile. ``kernels``: each layer beside cuDNN.
``all``, seven minutes: all of these, and nothing twice. By themselves only: ``autotune``, the contestants
that search for minutes; ``sanitize``, compute-sanitizer; ``native``, the tests of the CPU's kernels.

Each begins no new work once its time is up, says what it left out, and leaves its results, logs and one
archive of them in DIR. The exit status is 1 if a test failed or a result was wrong. The work is that of
:mod:`bench.stages`, but for the tuning.
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
from dcgan.kernels.gpu import aten, model, tiles
from dcgan.kernels.gpu.launch import Product

HELP = "test, tune and benchmark on a GPU (make gpu)"
TUNED_BATCHES = (64, 1024, 256, 1, 4096, 8)
TUNED_DTYPES = ("bfloat16", "tf32", "float32")  # in turn; float16 has bfloat16's tiles
CHANNELS = (1, 3)
CALLS = 8  # of a layer in the graph that is timed, as a training step has its tensors: warm in L2
CALL_SECONDS = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("stage", choices=tuple(plan.STAGES), nargs="?", default="all", help="(all)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--batch", type=positive, nargs="+", metavar="N", help="of tune, bench and kernels (64 1024)")
    add("--dtype", nargs="+", metavar="NAME", help="of bench and kernels (bfloat16)")
    add("--providers", nargs="*", metavar="NAME", help="of bench: contestants of bench generate")
    add("--ways", nargs="*", metavar="NAME", help="of bench: contestants of bench train")
    add("--processes", type=positive, default=machine.cores(), metavar="N", help="of the tests (all cores)")


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Where the results go, and how long a piece takes on new work."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=minutes, default=6.5, help="no new work after that many (6.5)")


def need_gpu(out: Path) -> None:
    """Raises UsageError without one; makes the folder."""
    if not torch.cuda.is_available():
        raise UsageError("no GPU here")
    out.mkdir(parents=True, exist_ok=True)


def run(args: argparse.Namespace) -> int:
    need_gpu(args.out)
    return plan.run(args)


# --- tune --------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A problem whose tiles are to be timed."""

    where: warm.Where
    layer: Layer
    """Without data."""
    tiles: list[tiles.Tile]


def groups(batches: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(batch, dtype), what matters most first."""
    return ((batch, dtype) for dtype, batch in itertools.product(TUNED_DTYPES, batches))


def tasks(batch: int, dtype: str, tuned: dict[str, tiles.Tile], processors: int, shared: int) -> list[Task]:
    """The problems of both networks that have no tuned tile, training before eval."""
    found: dict[str, Task] = {}
    for channels, network in itertools.product(CHANNELS, warm.NETWORKS):
        for index, layer in enumerate(warm.listed(network, channels, batch, dtype, "meta")):
            key = layer.problem.key()
            if key not in tuned and key not in found:
                where = warm.Where(network, channels, batch, dtype, index)
                found[key] = Task(where, layer, shortlist.shortlist(layer, processors, shared))
    return sorted(found.values(), key=lambda task: task.layer.phase == "eval")


def time_tile(layer: Layer, tile: tiles.Tile, processors: int) -> float:
    """Seconds of a layer's launches on the GPU."""
    launches = layer.launches(tile, processors)
    return replay.measure([launches.__call__] * CALLS, cold=False, seconds=CALL_SECONDS).median


def tile_error(layer: Layer, tile: tiles.Tile, processors: int, expected: Sequence[torch.Tensor]) -> float:
    """‖error‖/‖result‖ of a layer's launches, of the output that is furthest off."""
    return aten.error(outputs(layer, tile, processors), expected)


class Found(NamedTuple):
    """What has been found of a problem's tiles."""

    best: tiles.Tile | None
    """The fastest of those that run and are right, if there is one."""
    seconds: float
    wrong: list[tiles.Tile]


def best_tile(
    layer: Layer, listed: Sequence[tiles.Tile], compiled: Sequence[Future[None]], processors: int
) -> Found:
    """Holds every tile's results against float64, and times those that are right.

    A tile that the GPU refuses, or that is wrong, is said and passed over.
    """
    key, allowed = layer.problem.key(), tiles.TOLERANCE[layer.problem.precision]
    # The forward's y is what the gradients' prologues read: what is tried here must not be left in it.
    y = layer.operation.y if isinstance(layer.operation, Product) else None
    kept = None if y is None else y.clone()
    expected = aten.exact(layer.operation)
    times: dict[tiles.Tile, float] = {}
    wrong: list[tiles.Tile] = []
    for tile, done in zip(listed, compiled, strict=True):
        done.exception()  # waits; what has failed there fails here again, by name
        try:
            error = tile_error(layer, tile, processors, expected)
            if error <= allowed:
                times[tile] = time_tile(layer, tile, processors)
            else:
                wrong.append(tile)
                print(f"{key} {tuple(tile)} WRONG: error {error:.1e}, {allowed:.1e} is allowed", flush=True)
        except TritonError as failure:
            print(f"{key} {tuple(tile)} refused: {str(failure).splitlines()[0]}", flush=True)
    if y is not None and kept is not None:
        y.copy_(kept)
    best = min(times, key=lambda tile: times[tile], default=None)
    return Found(best, math.inf if best is None else times[best], wrong)


def tune(args: argparse.Namespace, budget: Budget) -> int:
    """Times the tiles that should be fast for every layer, and writes the winners as they are found.

    Tiles whose results are wrong go to ``refused.json``, to be copied into ``kernels/gpu/configs``; 1 if
    there are any.
    """
    name = torch.cuda.get_device_name()
    path, cache = args.out / tiles.gpu_file(name), tiles.cache_file(name)
    tuned = tiles.read(path)
    wrong = 0
    properties: Any = torch.cuda.get_device_properties(0)
    processors, shared = (
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )
    with warm.Compilers() as compilers:
        for batch, dtype in groups(args.batch or TUNED_BATCHES):
            if not budget.allows(f"batch {batch} {dtype}"):
                continue
            todo = tasks(batch, dtype, tuned, processors, shared)
            compiled = [
                [compilers.submit(task.where, tile, processors) for tile in task.tiles] for task in todo
            ]
            real: dict[tuple[str, int], list[Layer]] = {}
            for task, futures in zip(todo, compiled, strict=True):
                where, key = task.where, task.layer.problem.key()
                if not budget.allows(key):
                    continue
                of = where.network, where.channels
                if of not in real:
                    real[of] = warm.listed(*where[:4], "cuda")
                tile, measured, bad = best_tile(real[of][where.position], task.tiles, futures, processors)
                if bad:
                    wrong += len(bad)
                    names = [tiles.refusal(task.layer.problem, one) for one in bad]
                    tiles.refuse(args.out / tiles.REFUSED, *names)
                if tile is None:
                    budget.left.append(f"{key} (no tile runs)")
                    continue
                tuned[key] = tile
                if not tile.fused:  # what the product after the passes is looked up by
                    tuned.setdefault(model.plain(task.layer.problem).key(), tile._replace(fused=True))
                print(
                    f"{task.layer.kernel:13} {task.layer.name:17} {key:60} {tuple(tile)} "
                    f"{1e6 * measured:.1f} µs; the model's choice {tuple(task.tiles[0])}",
                    flush=True,
                )
                tiles.write(path, tuned)
                tiles.write(cache, tiles.read(cache) | tuned)
    print(f"{len(tuned)} problems in {path}; {budget.report()}")
    return int(wrong > 0)
