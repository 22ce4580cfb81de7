"""``python -m bench COMMAND``.

A command is a module of this package with ``HELP``, ``add_arguments(parser)`` and ``run(args)``, which
returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from bench.usage import UsageError

COMMANDS = (
    *("generate", "discriminate", "train", "accuracy", "scale", "ladder", "profile"),
    *("inspect", "predict", "gpu", "kernels", "learn", "loop", "mnist", "plot", "situations"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns its exit status: 0, 1 for a wrong result, 2 for wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks, each checked first.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    # Only the command that is asked for is imported: some need what others must not load.
    for name in [name for name in arguments[:1] if name in COMMANDS] or COMMANDS:
        module = importlib.import_module(f"bench.{name}")
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
