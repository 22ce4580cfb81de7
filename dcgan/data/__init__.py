"""Datasets of real images.

:func:`load` returns any dataset as one uint8 tensor; :func:`dcgan.data.order.permutation` gives the order of
an epoch. :func:`digits` and :class:`Batches` suffice for small experiments.
"""

from dcgan.choices import DATASETS, TEST_SPLITS
from dcgan.data.decoding import normalise
from dcgan.data.loading import Images, Split, load
from dcgan.data.order import Batches
from dcgan.data.sources import digits

__all__ = ["DATASETS", "TEST_SPLITS", "Batches", "Images", "Split", "digits", "load", "normalise"]
