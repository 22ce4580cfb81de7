"""``python -m bench generate``: the Generator in eval mode, beside all that could replace it."""

from __future__ import annotations

import argparse

from bench import forward

HELP = "images from noise: the Generator in eval mode, by every provider"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forward.add_arguments(parser, "generate")


def run(args: argparse.Namespace) -> int:
    return forward.run(args, "generate")
