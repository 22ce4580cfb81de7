"""Real images to train on: :func:`load` makes any dataset one tensor of uint8, whose order an epoch has from
:func:`dcgan.data.order.permutation`; :func:`digits` and :class:`Batches` are the small way.
"""

from dcgan.data.batches import Batches
from dcgan.data.loading import Images, Split, load
from dcgan.data.pictures import normalise
from dcgan.data.sources import DATASETS, TEST_SPLITS, digits

__all__ = ["DATASETS", "TEST_SPLITS", "Batches", "Images", "Split", "digits", "load", "normalise"]
