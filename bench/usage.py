"""Errors of the command line, and the types of its numbers."""

from __future__ import annotations

import argparse


class UsageError(Exception):
    """The options make no sense together, or not on this machine: exit status 2."""


def positive(text: str) -> int:
    """An argument that must be a whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    """An argument that must be a positive time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def minutes(text: str) -> float:
    """An argument that must be a positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return value
