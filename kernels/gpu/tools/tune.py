"""``python -m dcgan.kernels.gpu.tools.tune --out DIR``: time the tiles of every layer and phase on a GPU.

The fastest are written to ``<GPU name>.json``, to be copied into ``kernels/gpu/configs``, and to this
machine's cache, each as soon as it is found. Tiles that give wrong results are added to ``refused.json``, to
be copied there too; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from .. import aten, tiles, tuning
from ..launcher import Product
from ..tiles import Tile
from .compilers import Compilers
from .layers import Layer, all_layers, launches, networks, outputs, pass_layers, positive, step_passes
from .predict import shortlist

BATCHES = (64, 1024, 256, 1, 4096, 8)
DTYPES = ("bfloat16", "tf32", "float32")  # in this order; float16 shares the tiles of bfloat16
CHANNELS = (1, 3)
CALLS = 8  # of a layer per timed graph; their tensors stay in L2, as in a training step
GRAPH_MS = 1  # of calls in the graph, which is replayed ten times; at least CALLS
MAX_NAMED = 8  # skipped problems that the report names


def tuning_order(batches: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield (batch, dtype) pairs, most important first."""
    return ((batch, dtype) for dtype, batch in itertools.product(DTYPES, batches))


def untuned(batch: int, dtype: str, tuned: dict[str, Tile]) -> list[Layer]:
    """Return a layer for each untuned problem of both networks, training before eval.

    A training step comes first: it may run D on twice the batch.
    """
    found: dict[str, Layer] = {}
    for channels in CHANNELS:
        shapes = networks(channels)
        layers = [layer for of in step_passes(batch) for layer in pass_layers(shapes, of, dtype)]
        layers += [layer for each in shapes.values() for layer in all_layers(each, batch, dtype)]
        for layer in layers:
            found.setdefault(layer.problem.key(), layer)
    todo = [layer for key, layer in found.items() if key not in tuned]
    return sorted(todo, key=lambda layer: layer.phase == "eval")


def time_tile(it: Product, tile: Tile, sms: int) -> float:
    """Return the seconds that a product's launches take on the GPU."""
    made = launches(it, tile, sms)

    def calls() -> None:
        for _ in range(CALLS):
            made()

    torch.cuda.synchronize()  # the benchmark's stream does not wait for this one
    milliseconds: float = triton.testing.do_bench_cudagraph(calls, rep=GRAPH_MS, return_mode="median")
    return milliseconds / 1e3 / CALLS


def tile_error(it: Product, tile: Tile, sms: int, expected: Sequence[Tensor]) -> float:
    """Return ‖error‖/‖result‖ of a product's launches, the maximum over its outputs."""
    return aten.error(outputs(it, tile, sms), expected)


class TuningResult(NamedTuple):
    """The result of timing the tiles of one problem."""

    best: Tile | None
    """The fastest tile that runs and is correct; None if there is none."""
    seconds: float
    wrong: list[Tile]


def best_tile(
    layer: Layer, listed: Sequence[Tile], compiled: Sequence[Future[None]], sms: int
) -> TuningResult:
    """Check every tile against float64 and time the correct ones.

    Tiles that the GPU refuses and tiles that give wrong results are reported and skipped.
    """
    key, allowed = layer.problem.key(), tuning.TOLERANCE[layer.problem.precision]
    it = layer.product("cuda" if torch.cuda.is_available() else "cpu")
    expected = aten.exact(it)
    times: dict[Tile, float] = {}
    wrong: list[Tile] = []
    for tile, done in zip(listed, compiled, strict=True):
        done.exception()  # waits; a compilation that failed there fails again here and is reported
        try:
            error = tile_error(it, tile, sms, expected)
            if error <= allowed:
                times[tile] = time_tile(it, tile, sms)
            else:
                wrong.append(tile)
                print(f"{key} {tile} WRONG: error {error:.1e}, {allowed:.1e} is allowed", flush=True)
        except TritonError as failure:
            print(f"{key} {tile} refused: {str(failure).splitlines()[0]}", flush=True)
    best = min(times, key=lambda tile: times[tile], default=None)
    return TuningResult(best, math.inf if best is None else times[best], wrong)


def tune(
    out: Path, batches: Sequence[int], minutes: float, clock: Callable[[], float] = time.monotonic
) -> int:
    """Tune until the time is up, and write each winner as soon as it is found; returns the exit status."""
    end = clock() + 60 * minutes
    left: list[str] = []

    def allows(what: str) -> bool:
        if clock() < end:
            return True
        left.append(what)
        return False

    name = torch.cuda.get_device_name()
    path, cache = out / tiles.gpu_file(name), tiles.cache_file(name)
    tuned = tiles.read(path)
    properties: Any = torch.cuda.get_device_properties(0)
    sms, shared = properties.multi_processor_count, properties.shared_memory_per_block_optin
    wrong: list[str] = []
    with Compilers() as compilers:
        for batch, dtype in tuning_order(batches):
            if not allows(f"batch {batch} {dtype}"):
                continue
            todo = [(layer, shortlist(layer, sms, shared)) for layer in untuned(batch, dtype, tuned)]
            compiled = [[compilers.submit(layer, tile, sms) for tile in listed] for layer, listed in todo]
            for (layer, listed), futures in zip(todo, compiled, strict=True):
                problem = layer.problem
                key = problem.key()
                if not allows(key):
                    continue
                tile, seconds, incorrect = best_tile(layer, listed, futures, sms)
                if incorrect:
                    wrong += [tiles.refused_name(problem, one) for one in incorrect]
                    tiles.refuse(out / tiles.REFUSED, *wrong)
                if tile is None:
                    left.append(f"{key} (no tile runs)")
                    continue
                tuned[key] = tile
                if not tile.fused:  # the key of the product that follows the standalone prologues
                    tuned.setdefault(problem.without_prologue().key(), replace(tile, fused=True))
                print(
                    f"{layer.kernel_name:13} {layer.name:17} {key:60} {tile} {1e6 * seconds:.1f} µs; "
                    f"the cost model chose {listed[0]}",
                    flush=True,
                )
                tiles.write(path, tuned)
                tiles.write(cache, tiles.read(cache) | tuned)
    more = f" and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
    skipped = f"not reached in time: {', '.join(left[:MAX_NAMED]) or 'nothing'}{more}"
    print(f"{len(tuned)} problems in {path}; {skipped}")
    return int(bool(wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dcgan.kernels.gpu.tools.tune", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="output directory")
    add("--minutes", type=float, default=6.5, help="start no new work after this many minutes (6.5)")
    add("--batch", type=positive, nargs="+", default=BATCHES, help="batch sizes (64 1024 256 1 4096 8)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    args.out.mkdir(parents=True, exist_ok=True)
    return tune(args.out, args.batch, args.minutes)


if __name__ == "__main__":
    sys.exit(main())
