"""How far generated images are from real ones: Fréchet and kernel distances between features of both.

A distance means nothing without its features, so each goes by a name that has them: ``FID (Inception)`` is
the literature's figure, and the others are not to be compared with it.
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
