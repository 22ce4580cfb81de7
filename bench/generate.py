"""``python -m bench generate``: race the Generator in eval mode across all providers."""

from __future__ import annotations

import argparse

from bench import forward

HELP = "race Generator inference (images from noise) across providers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forward.add_arguments(parser, "generate")


def run(args: argparse.Namespace) -> int:
    return forward.run(args, "generate")
