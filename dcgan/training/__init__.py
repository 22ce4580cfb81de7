"""DCGAN training: the reference recipe, and a faster step with the same mathematics.

:func:`train_step` and :func:`train`, the loop over it, are plain PyTorch on purpose: they are the baseline
that faster implementations are benchmarked and checked against. :class:`TrainStep` is the fast one; on a GPU
it runs each step as one CUDA graph.
"""

from dcgan.training.config import Config, Loss
from dcgan.training.fast_step import TrainStep
from dcgan.training.loop import Step, train
from dcgan.training.reference_step import Result, optimizers, train_step

__all__ = ["Config", "Loss", "Result", "Step", "TrainStep", "optimizers", "train", "train_step"]
