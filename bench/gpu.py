"""What ``make gpu`` does on a machine with an NVIDIA GPU besides its tests: tune tiles, benchmark generation.

Each stage stops starting new work when its time is up, says what it left out, and leaves its results in one
folder: ``<GPU name>.json``, tuned tiles to be copied into ``kernels/gpu/configs``, and ``generate.jsonl``
with its plot.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from pathlib import Path

import torch

from bench import forward, plot
from bench.cases import DTYPES
from bench.inspect import networks
from bench.layers import Layer, Network, layers, training
from bench.usage import UsageError, positive, seconds
from dcgan.kernels.gpu import tiles

HELP = "tune the tiles and benchmark on a GPU (make gpu)"
TUNED_BATCHES = (64, 1024, 1, 256, 4096, 8)
TUNED_DTYPES = ("bfloat16", "tf32", "float32")  # float16 has bfloat16's tiles
BENCH_BATCHES = (64, 1024, 1, 4096, 256, 8)
BENCH_DTYPES = ("bfloat16", "tf32", "float16", "float32")
MAX_AUTOTUNE_BATCHES = (1, 64, 1024)  # it takes a minute a network
PROVIDERS = ("eager", "channels_last", "compile", "cudagraph", "fast", "fast-compile", "fast-graph")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=("tune", "bench"))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=seconds, default=6.5, help="no new work after that many (6.5)")
    parser.add_argument("--batch", type=positive, nargs="+", help="instead of the stage's own list")


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UsageError("no GPU here")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    return (tune if args.stage == "tune" else bench)(args, deadline)


def _layers(network: Network, batch: int, dtype: torch.dtype) -> list[Layer]:
    shapes = network, batch, dtype, "cuda"
    return layers(*shapes) + training(*shapes, input_gradient=True)


def _run(layer: Layer, processors: int, tile: tiles.Tile) -> None:
    layer.launches(tile, processors)()


def tune(args: argparse.Namespace, deadline: float) -> int:
    """Times every candidate for every layer, and writes the winners as they are found."""
    path = args.out / tiles.gpu_file(torch.cuda.get_device_name())
    tuned = tiles.read(path)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    left: list[str] = []
    for batch, dtype in itertools.product(args.batch or TUNED_BATCHES, TUNED_DTYPES):
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        for channels in (1, 3):
            for layer in itertools.chain.from_iterable(
                _layers(n, batch, DTYPES[dtype]) for n in networks(channels)
            ):
                key = layer.problem.key()
                if key in tuned:
                    continue
                if time.monotonic() > deadline:
                    left.append(key)
                    continue
                run = functools.partial(_run, layer, multiprocessors)
                tuned[key] = tiles.tune(layer.problem, run)
                guess = tiles.estimate(
                    layer.problem, multiprocessors, 10 * torch.cuda.get_device_capability()[0]
                )
                print(
                    f"{layer.kernel:13} {layer.name:17} {key:60} {tuple(tuned[key])} guess {tuple(guess)}",
                    flush=True,
                )
                tiles.write(path, tuned)
    print(f"{len(tuned)} problems in {path}; not reached in time: {left or 'none'}")
    return 0


def bench(args: argparse.Namespace, deadline: float) -> int:
    """Races generation over batches and dtypes; the worst exit status of them."""
    results = args.out / "generate.jsonl"
    status, left = 0, []
    for batch, dtype in itertools.product(args.batch or BENCH_BATCHES, BENCH_DTYPES):
        if time.monotonic() > deadline:
            left.append(f"batch {batch} {dtype}")
            continue
        providers = [*PROVIDERS, *(["max-autotune"] if batch in MAX_AUTOTUNE_BATCHES else [])]
        parser = argparse.ArgumentParser()
        forward.add_arguments(parser, "generate")
        line = f"--device cuda --batch {batch} --dtype {dtype} --seconds 1 --rounds 3 --json {results}"
        status |= forward.run(parser.parse_args([*line.split(), "--providers", *providers]), "generate")
    print(f"not reached in time: {', '.join(left) or 'none'}")
    plot.run(argparse.Namespace(files=[results], out=args.out / "generate.png"))
    return status
