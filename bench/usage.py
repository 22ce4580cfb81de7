"""Usage errors and numeric argument types of the command line."""

from __future__ import annotations

import argparse


class UsageError(Exception):
    """The options are invalid, contradict each other or cannot work on this machine: exit status 2."""


def positive(text: str) -> int:
    """Parse an argument that must be a whole number from 1 upward."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 upward, got {text!r}")
    return value


def seconds(text: str) -> float:
    """Parse an argument that must be a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def minutes(text: str) -> float:
    """Parse an argument that must be a positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return value
