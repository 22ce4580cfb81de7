"""Options that several commands have, and what is made of them."""

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
    """Which network, for a command that takes either."""
    parser.add_argument("--network", choices=NETWORKS, default="generate", help="generate or discriminate")


def add_sizes(parser: argparse.ArgumentParser, latent_dim: bool = True) -> None:
    add = parser.add_argument
    add("--channels", type=positive, help="channels of the image (1)")
    add("--features", type=positive, help="channels of the map next to the image (64)")
    add("--image-size", type=positive, help="32, 64, 128 or 256 (64)")
    if latent_dim:
        add("--latent-dim", type=positive, help="length of z (100)")


def add_timing(parser: argparse.ArgumentParser, of: str, each: float, rounds: int = 6) -> None:
    """How long to measure; ``of`` says what."""
    add = parser.add_argument
    add("--seconds", type=seconds, default=each, help=f"measuring time of {of} ({each:g})")
    add("--rounds", type=positive, default=rounds, help=f"bursts that time is divided into ({rounds})")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, default=machine.cores(), help="CPU threads (all cores)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the results, one JSON object a line"
    )


def sizes(
    args: argparse.Namespace,
    command: str,
    checkpoint: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """The constructor's arguments that were given, or all of the checkpoint's; ``state`` is what it holds.

    Raises:
        UsageError: sizes that are not allowed, or not the checkpoint's; a file that is no such checkpoint.
    """
    network = NETWORKS[command]
    names = [name for name in SIZES if name in inspect.signature(network).parameters]
    given = {name: vars(args)[name] for name in names if vars(args).get(name) is not None}
    try:
        if checkpoint is None:
            network(**given)  # refuses sizes that are not allowed
            return given
        found = network.sizes_of(load_state(checkpoint) if state is None else state)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    wrong = [f"{name} {found[name]}, not {value}" for name, value in given.items() if found[name] != value]
    if wrong:
        raise UsageError(f"argument --checkpoint: {checkpoint} has {', '.join(wrong)}")
    return found
