"""``python -m bench.stages PIECE --out DIR``: run a piece of a stage in this process."""

from __future__ import annotations

import argparse
import importlib
import sys

from bench import gpu
from bench.budget import Budget
from bench.stages import races
from bench.usage import UsageError, positive

PIECES = {
    "smoke": "bench.stages.smoke:run",
    "tune": "bench.gpu:tune",
    "races": "bench.stages.races:run",
    "sanitize": "bench.stages.sanitize:run",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    parser.add_argument("piece", choices=tuple(PIECES))
    gpu.add_budget(parser)
    parser.add_argument("--batch", type=positive, nargs="+", help="batch sizes (those of the piece)")
    parser.add_argument("--dtype", nargs="+", help="dtypes (those of the piece)")
    races.add_arguments(parser)
    args = parser.parse_args(arguments)
    module, _, function = PIECES[args.piece].partition(":")
    try:
        gpu.need_gpu(args.out)
        status: int = getattr(importlib.import_module(module), function)(args, Budget(args.minutes))
    except UsageError as error:
        parser.error(str(error))
    return status


if __name__ == "__main__":
    sys.exit(main())
