"""``python -m bench discriminate``: the Discriminator in eval mode, beside all that could replace it."""

from __future__ import annotations

import argparse

from bench import forward

HELP = "probabilities from images: the Discriminator in eval mode, by every provider"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forward.add_arguments(parser, "discriminate")


def run(args: argparse.Namespace) -> int:
    return forward.run(args, "discriminate")
