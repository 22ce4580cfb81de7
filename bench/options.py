"""Argument types and options that several commands share, and their usage errors."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench import machine
from bench.cases import NETWORKS, load_state

T = TypeVar("T")

NO_GPU = "no GPU here"
SIZES = {
    "channels": "image channels (default: 1)",
    "features": "channels of the feature map next to the image (default: 64)",
    "image_size": "image height and width: 32, 64, 128 or 256 (default: 64)",
    "latent_dim": "length of z (default: 100)",
}


class UsageError(Exception):
    """The options are invalid, contradict each other or cannot work on this machine: exit status 2."""


def _number(convert: Callable[[str], T], allows: Callable[[T], bool], expected: str) -> Callable[[str], T]:
    """Return the parser of an argument; ``expected`` says what it must be."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if allows(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return parse


positive = _number(int, lambda value: value >= 1, "a whole number from 1 upward")
seconds = _number(float, lambda value: 0 < value < math.inf, "a positive number of seconds")
minutes = _number(float, lambda value: 0 < value < math.inf, "a positive number of minutes")

COMMON: dict[str, dict[str, Any]] = {
    "network": {"choices": NETWORKS, "default": "generate", "help": "network (default: generate)"},
    **{name: {"type": positive, "help": text} for name, text in SIZES.items()},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "auto: a GPU if there is one"},
    "threads": {"type": positive, "default": machine.cores(), "help": "CPU threads (default: all cores)"},
    "json": {"type": Path, "metavar": "FILE", "help": "file to append the results to, in JSON Lines"},
    # For the commands of ``make gpu``.
    "out": {"type": Path, "required": True, "metavar": "DIR", "help": "output directory"},
    "minutes": {"type": minutes, "default": 6.5, "help": "start no new work after this many minutes (6.5)"},
}
"""Options that mean the same in every command, by name."""


def add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options of COMMON."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **COMMON[name])


def add_batches(
    parser: argparse.ArgumentParser, default: Sequence[int] | None, listed: str | None = None
) -> None:
    """Add the batch sizes; ``listed`` describes the default, if it is not just its numbers."""
    text = f"batch sizes (default: {listed or ' '.join(map(str, default or []))})"
    parser.add_argument("--batch", nargs="+", type=positive, default=default, metavar="N", help=text)


def add_timing(parser: argparse.ArgumentParser, of: str, each: float, rounds: int = 6) -> None:
    """Add the measuring time; ``of`` names what is measured for that long, in words."""
    text = f"seconds to measure {of} (default: {each:g})"
    parser.add_argument("--seconds", type=seconds, default=each, help=text)
    text = f"bursts that the time is divided into (default: {rounds})"
    parser.add_argument("--rounds", type=positive, default=rounds, help=text)


def need_gpu(out: Path) -> None:
    """Create the output directory. Raises UsageError if there is no GPU."""
    if not torch.cuda.is_available():
        raise UsageError(NO_GPU)
    out.mkdir(parents=True, exist_ok=True)


def find_device(requested: str, dtypes: Collection[str]) -> str:
    """Resolve ``requested``; ``auto`` prefers CUDA.

    Raises:
        UsageError: the device is absent, or a dtype is not available on it.
    """
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if requested == "auto" else requested
    if device == "cuda" and not cuda:
        raise UsageError(f"argument --device: cuda: {NO_GPU}")
    if device == "cpu" and "tf32" in dtypes:
        raise UsageError("argument --dtype: tf32 is a setting of CUDA devices")
    return device


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
    names = [name for name in inspect.signature(network).parameters if name in SIZES]
    given = {name: vars(args)[name] for name in names if vars(args).get(name) is not None}
    try:
        if checkpoint is None:
            network(**given)  # raises ValueError for unsupported sizes
            return given
        found = network.sizes_of(load_state(checkpoint) if state is None else state)
    except ValueError as error:
        raise UsageError(str(error)) from error
    wrong = [f"{name} {found[name]}, not {value}" for name, value in given.items() if found[name] != value]
    if wrong:
        raise UsageError(f"argument --checkpoint: {checkpoint} has {', '.join(wrong)}")
    return found
