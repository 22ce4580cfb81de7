"""``python -m bench discriminate``: race the Discriminator in eval mode across all providers."""

from __future__ import annotations

import argparse

from bench import forward

HELP = "race Discriminator inference (probabilities from images) across providers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forward.add_arguments(parser, "discriminate")


def run(args: argparse.Namespace) -> int:
    return forward.run(args, "discriminate")
