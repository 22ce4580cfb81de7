"""Command line of the benchmarks: ``python -m bench COMMAND``.

A command is a module, or an object in a module, that defines ``HELP``, ``add_arguments(parser)`` and
``run(args)``; ``run`` returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from bench.options import UsageError

COMMANDS = {
    "generate": "bench.compare:GENERATE",
    "discriminate": "bench.compare:DISCRIMINATE",
    "train": "bench.train",
    "scale": "bench.scale",
    "profile": "bench.blocks",
    "kernels": "bench.kernels",
    "races": "bench.compare:RACES",
    "loop": "bench.loop",
    "plot": "bench.plot",
    "situations": "bench.situations",
    "any": "bench.any",
    "docs": "bench.docs",
}
MOVED = {
    "accuracy": "tests.accuracy",
    "gpu": "tests.gpu",
    "inspect": "dcgan.kernels.gpu.tools.inspect",
    "ladder": "examples.ladder",
    "learn": "tests.learning",
    "mnist": "examples.mnist",
    "predict": "dcgan.kernels.gpu.tools.predict",
}
"""Deprecated commands, and the modules that are now run instead: ``python -m MODULE``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 1 for a wrong result, 2 for a usage error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in MOVED:
        return _run_moved(*arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks. Implementations are checked against float64 before they are timed.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    # Import only the requested command: some load packages that would distort the others' measurements.
    for name in [name for name in arguments[:1] if name in COMMANDS] or COMMANDS:
        module, _, member = COMMANDS[name].partition(":")
        found: Any = importlib.import_module(module)
        found = getattr(found, member) if member else found
        command = subparsers.add_parser(name, help=found.HELP, description=found.__doc__)
        found.add_arguments(command)
        command.set_defaults(run=found.run, parser=command)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except UsageError as error:
        args.parser.error(str(error))
    return status


def _run_moved(name: str, *arguments: str) -> int:
    """Run the module that has replaced a command; its exit leaves as the SystemExit that it raises."""
    print(f"python -m bench {name} is now python -m {MOVED[name]}", file=sys.stderr)
    sys.argv[1:] = arguments
    runpy.run_module(MOVED[name], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
