"""``python -m tests.gpu STAGE --out DIR``: run everything that needs an NVIDIA GPU within a time budget.

``check`` (three minutes) runs a smoke test, the most important tests and one row of each benchmark. ``test``
runs the remaining GPU tests. ``tune`` times the tiles of every layer and phase and writes the fastest to
``<GPU name>.json``, to be copied into ``kernels/gpu/configs``, and to this machine's cache, where later
stages find them. ``bench`` races generation and training steps against cuDNN and torch.compile. ``kernels``
races each layer against cuDNN. ``all`` (seven minutes) runs all of these without repetition. Three stages run
only when named: ``autotune`` (the providers that search for minutes), ``sanitize`` (compute-sanitizer) and
``native`` (the tests of the CPU kernels).

A stage starts no new work after its time is up, reports what it skipped, and leaves its results, its logs and
one archive of both in DIR. The exit status is 1 if a test failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import machine
from bench.options import positive
from tests.gpu.stages import plan


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    add = found.add_argument
    add("stage", choices=tuple(plan.STAGES), nargs="?", default="all", help="stage to run (all)")
    add("--out", type=Path, required=True, metavar="DIR", help="output directory")
    help_batch = "batch sizes of tune, bench and kernels (64 1024)"
    add("--batch", type=positive, nargs="+", default=[64, 1024], metavar="N", help=help_batch)
    help_dtype = "dtypes of bench and kernels (bfloat16)"
    add("--dtype", nargs="+", default=["bfloat16"], metavar="NAME", help=help_dtype)
    add("--providers", nargs="*", metavar="NAME", help="providers that bench races in generation")
    add("--variants", "--ways", nargs="*", metavar="NAME", help="training variants that bench races")
    help_processes = "parallel test processes (all cores)"
    add("--processes", type=positive, default=machine.cores(), metavar="N", help=help_processes)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage and return its exit status: 0, 1 if a test failed, 2 for a usage error."""
    command = parser()
    args = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("no GPU here")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    return plan.perform(args.stage, plan.STAGES[args.stage](args), args.out)


if __name__ == "__main__":
    sys.exit(main())
