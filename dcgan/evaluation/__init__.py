"""Fréchet and kernel distances between the features of generated and real images.

A distance is meaningful only together with its features, so its name includes them: ``FID (Inception)`` is
the figure used in the literature, and the other distances are not comparable with it.
"""

from dcgan.evaluation.classifier import Classifier
from dcgan.evaluation.features import Features, choose
from dcgan.evaluation.real import Part, parts
from dcgan.evaluation.scores import PixelScore, Scores, compare, frechet

__all__ = [
    "Classifier",
    "Features",
    "Part",
    "PixelScore",
    "Scores",
    "choose",
    "compare",
    "frechet",
    "parts",
]
