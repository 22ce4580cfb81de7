"""Command line of the benchmarks: ``python -m bench COMMAND``.

A command is a module of this package that defines ``HELP``, ``add_arguments(parser)`` and ``run(args)``;
``run`` returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from bench.usage import UsageError

COMMANDS = (
    *("generate", "discriminate", "train", "accuracy", "scale", "ladder", "profile"),
    *("inspect", "predict", "gpu", "kernels", "learn", "loop", "mnist", "plot", "situations", "docs"),
)
# Commands whose module is named differently, because the command's name is that of a standard-library module.
MODULES = {"inspect": "machine_code", "profile": "layer_times"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 1 for a wrong result, 2 for a usage error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks. Implementations are checked against float64 before they are timed.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    # Import only the requested command: some load packages that would distort the others' measurements.
    for name in [name for name in arguments[:1] if name in COMMANDS] or COMMANDS:
        module = importlib.import_module(f"bench.{MODULES.get(name, name)}")
        command = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except UsageError as error:
        args.parser.error(str(error))
    return status


if __name__ == "__main__":
    sys.exit(main())
