"""Options shared by several commands."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bench import machine
from bench.cases import NETWORKS, load_state
from bench.usage import UsageError, positive, seconds

SIZES = ("latent_dim", "channels", "features", "image_size")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the network, for a command that supports both."""
    parser.add_argument("--network", choices=NETWORKS, default="generate", help="network (default: generate)")


def add_sizes(parser: argparse.ArgumentParser, latent_dim: bool = True) -> None:
    add = parser.add_argument
    add("--channels", type=positive, help="image channels (default: 1)")
    add("--features", type=positive, help="channels of the feature map next to the image (default: 64)")
    add("--image-size", type=positive, help="image height and width: 32, 64, 128 or 256 (default: 64)")
    if latent_dim:
        add("--latent-dim", type=positive, help="length of z (default: 100)")


def add_timing(parser: argparse.ArgumentParser, of: str, each: float, rounds: int = 6) -> None:
    """Add the measuring time; ``of`` names what is measured for that long, in words."""
    add = parser.add_argument
    add("--seconds", type=seconds, default=each, help=f"seconds to measure {of} (default: {each:g})")
    add(
        "--rounds",
        type=positive,
        default=rounds,
        help=f"bursts that the time is divided into (default: {rounds})",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=positive, default=machine.cores(), help="CPU threads (default: all cores)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file to append the results to, one JSON object per line"
    )


def sizes(
    args: argparse.Namespace,
    command: str,
    checkpoint: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Return the constructor arguments that were given, or all those of a checkpoint.

    ``state`` is the checkpoint's state dict, if it has been loaded already.

    Raises:
        UsageError: a size is not supported or differs from the checkpoint's, or the file is not a state dict
            of the network.
    """
    network = NETWORKS[command]
    names = [name for name in SIZES if name in inspect.signature(network).parameters]
    given = {name: vars(args)[name] for name in names if vars(args).get(name) is not None}
    try:
        if checkpoint is None:
            network(**given)  # raises ValueError for unsupported sizes
            return given
        found = network.sizes_of(load_state(checkpoint) if state is None else state)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    wrong = [f"{name} {found[name]}, not {value}" for name, value in given.items() if found[name] != value]
    if wrong:
        raise UsageError(f"argument --checkpoint: {checkpoint} has {', '.join(wrong)}")
    return found
