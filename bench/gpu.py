"""What ``make gpu`` does on a machine with an NVIDIA GPU besides its tests and ``python -m bench kernels``.

``tune``: times the tiles of every layer and phase; the fastest go to ``<GPU name>.json``, to be copied into
``kernels/gpu/configs``, and to this machine's cache, from where the stages after it take them. ``bench``:
races generation, into ``generate.jsonl`` and its plot. ``sanitize``: runs every kernel on small tensors under
compute-sanitizer.

Each stage starts no new work once its time is up, and says what it left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from bench import forward, plot, replay, shortlist, warm
from bench.budget import Budget
from bench.layers import Layer
from bench.usage import UsageError, minutes, positive
from dcgan.kernels.gpu import model, tiles

HELP = "tune the tiles, benchmark generation, sanitize, on a GPU (make gpu)"
TUNED_BATCHES = (64, 1024, 256, 1, 4096, 8)
TUNED_DTYPES = (("bfloat16", "tf32"), ("float32",))  # in turn; float16 has bfloat16's tiles
CHANNELS = (1, 3)
CALLS = 8  # of a layer in the graph that is timed, as a training step has its tensors: warm in L2
CALL_SECONDS = 0.01
BENCH_BATCHES = (64, 1024, 1, 4096, 256, 8)
BENCH_DTYPES = ("bfloat16", "tf32", "float16", "float32")
MAX_AUTOTUNE_BATCHES = (1, 64, 1024)  # it takes a minute a network
PROVIDERS = ("eager", "channels_last", "compile", "cudagraph", "fast", "fast-compile", "fast-graph")
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 240.0
FOUND = 9  # compute-sanitizer's exit status where it found an error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=tuple(STAGES))
    add_budget(parser)
    parser.add_argument("--batch", type=positive, nargs="+", help="instead of the stage's own list")


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Where the results go, and how long a stage takes on new work."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=minutes, default=6.5, help="no new work after that many (6.5)")


def need_gpu(out: Path) -> None:
    """Raises UsageError without one; makes the folder."""
    if not torch.cuda.is_available():
        raise UsageError("no GPU here")
    out.mkdir(parents=True, exist_ok=True)


def run(args: argparse.Namespace) -> int:
    need_gpu(args.out)
    return STAGES[args.stage](args, Budget(args.minutes))


# --- tune --------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A problem whose tiles are to be timed."""

    where: warm.Where
    layer: Layer
    """Without data."""
    tiles: list[tiles.Tile]


def groups(batches: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(batch, dtype), what matters most first."""
    for dtypes in TUNED_DTYPES:
        yield from itertools.product(batches, dtypes)


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


def best_tile(
    layer: Layer, listed: Sequence[tiles.Tile], compiled: Sequence[Future[None]], processors: int
) -> tuple[tiles.Tile, float] | None:
    """The fastest and its seconds; None if none runs. A tile that the GPU refuses is said and passed over."""
    times: dict[tiles.Tile, float] = {}
    for tile, done in zip(listed, compiled, strict=True):
        done.exception()  # waits; what has failed there fails here again, by name
        try:
            times[tile] = time_tile(layer, tile, processors)
        except TritonError as error:
            print(f"{layer.problem.key()} {tuple(tile)} refused: {str(error).splitlines()[0]}", flush=True)
    best = min(times, key=lambda tile: times[tile], default=None)
    return None if best is None else (best, times[best])


def tune(args: argparse.Namespace, budget: Budget) -> int:
    """Times the tiles that should be fast for every layer, and writes the winners as they are found."""
    name = torch.cuda.get_device_name()
    path, cache = args.out / tiles.gpu_file(name), tiles.cache_file(name)
    tuned = tiles.read(path)
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
                found = best_tile(real[of][where.position], task.tiles, futures, processors)
                if found is None:
                    budget.left.append(f"{key} (no tile runs)")
                    continue
                tile, measured = found
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
    return 0


# --- bench -------------------------------------------------------------------------------------------------


def bench(args: argparse.Namespace, budget: Budget) -> int:
    """Races generation over batches and dtypes; the worst exit status of them."""
    results = args.out / "generate.jsonl"
    status = 0
    for batch, dtype in itertools.product(args.batch or BENCH_BATCHES, BENCH_DTYPES):
        if not budget.allows(f"batch {batch} {dtype}"):
            continue
        providers = [*PROVIDERS, *(["max-autotune"] if batch in MAX_AUTOTUNE_BATCHES else [])]
        parser = argparse.ArgumentParser()
        forward.add_arguments(parser, "generate")
        line = f"--device cuda --batch {batch} --dtype {dtype} --seconds 1 --rounds 3 --json {results}"
        status |= forward.run(parser.parse_args([*line.split(), "--providers", *providers]), "generate")
    print(budget.report())
    plot.run(argparse.Namespace(files=[results], out=args.out / "generate.png"))
    return status


# --- sanitize ----------------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH or in a CUDA toolkit."""
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(root) / "bin") for root in toolkits if root)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitize(args: argparse.Namespace, budget: Budget) -> int:
    """1 if a tool finds an error. Each tool's output goes to a file of its own."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("sanitize: compute-sanitizer is not installed here (it comes with the CUDA toolkit): skipped")
        return 0
    root = str(Path(__file__).resolve().parent.parent)
    # Without PyTorch's pool every tensor is an allocation of its own, whose ends memcheck sees.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    plain = [sys.executable, "-m", "bench.sanitized"]
    commands = {"plain": plain} | {  # first without a tool: compiles everything, and shows that it runs
        tool: [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *plain] for tool in SANITIZERS
    }
    status = 0
    for name, command in commands.items():
        if not budget.allows(name):
            continue
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished in {SANITIZER_SECONDS:.0f} s", flush=True)
            continue
        text = done.stdout + done.stderr
        (args.out / f"sanitize-{name}.txt").write_text(text)
        last = text.strip().splitlines()[-1:] or ["no output"]
        verdict = {0: "clean", FOUND: "ERRORS FOUND"}.get(done.returncode, f"FAILED ({done.returncode})")
        print(f"{name}: {verdict}: {last[0]}", flush=True)
        status |= int(done.returncode != 0)
        if name == "plain" and done.returncode:
            break
    print(budget.report())
    return status


STAGES = {"tune": tune, "bench": bench, "sanitize": sanitize}
