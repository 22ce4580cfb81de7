"""Training as the seed writes it: :func:`train_step`, and :func:`train`, the loop over it.

Plain on purpose: this is what every faster way of training is measured, and checked, against.
"""

from dcgan.training.config import Config, Loss
from dcgan.training.loop import Step, train
from dcgan.training.step import Result, optimizers, train_step

__all__ = ["Config", "Loss", "Result", "Step", "optimizers", "train", "train_step"]
