"""Scores of generated images against real ones, in the space of their features.

A distance is meaningful only together with its features, so its name includes them: ``FID (Inception)`` is
the figure used in the literature, and the other distances are not comparable with it.
"""

from dcgan.evaluation.classifier import Classifier
from dcgan.evaluation.evaluator import Evaluator
from dcgan.evaluation.features import Features, choose
from dcgan.evaluation.real import Part, parts
from dcgan.evaluation.scores import PixelScore, Scores, compare, frechet, overlap

__all__ = [
    "Classifier",
    "Evaluator",
    "Features",
    "Part",
    "PixelScore",
    "Scores",
    "choose",
    "compare",
    "frechet",
    "overlap",
    "parts",
]
