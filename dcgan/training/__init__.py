"""Training as the seed writes it: :func:`train_step`, and :func:`train`, the loop over it.

Plain on purpose: this is what every faster way of training is measured, and checked, against. The faster way
is :class:`TrainStep`: the same step, on a GPU as one CUDA graph.
"""

from dcgan.training.config import Config, Loss
from dcgan.training.fused import TrainStep
from dcgan.training.loop import Step, train
from dcgan.training.step import Result, optimizers, train_step

__all__ = ["Config", "Loss", "Result", "Step", "TrainStep", "optimizers", "train", "train_step"]
