"""The values that options of the command line and arguments of the library allow.

They have a module of their own because the command line has to know them before it imports PyTorch, which
takes longer than everything else that ``dcgan --help`` does.
"""

from __future__ import annotations

from typing import Literal

Network = Literal["generator", "discriminator"]
Model = Literal["dcgan", "mlp"]
Engine = Literal["auto", "reference", "triton", "native"]
Loss = Literal["non-saturating", "minimax"]
Which = Literal["last", "best"]
FeaturesName = Literal["inception", "digits", "pixels"]
AugmentationName = Literal["color", "translation", "cutout"]

IMAGE_SIZES = (32, 64, 128, 256)
"""Image heights, equal to the widths, that the reference networks support."""

DATASETS = ("mnist", "fashion-mnist", "cifar10", "celeba", "folder", "digits", "fake")
TEST_SPLITS = ("mnist", "fashion-mnist", "cifar10", "celeba", "fake")
"""Datasets that have a ``'test'`` split in addition to ``'train'``."""

MIN_IMAGES = 10
"""Minimum number of images in a set; with fewer, neither the covariance nor subsets are meaningful."""
