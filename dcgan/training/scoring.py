"""Scores of a run's Generator at the end of an epoch, which select its best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dcgan import evaluation, generation
from dcgan.checkpoint import Checkpoint
from dcgan.data import Images
from dcgan.errors import InputError, RunError
from dcgan.settings import Settings
from dcgan.training.run import Run, Score, Scored

PIXEL_SAMPLES = 2048
"""Maximum number of generated images that the pixel score is computed from."""


def score_of(
    settings: Settings, images: Images, device: torch.device, say: Callable[[str], None]
) -> Score | None:
    """Return the score that the settings ask for: ``eval_every``, else ``score``; None for no score.

    Raises:
        InputError: the dataset has too few images for it.
    """
    if settings.eval_every:
        return Evaluation(settings, images, device, say)
    if settings.score == "none":
        return None
    if len(images) < 2:
        raise InputError("score pixels needs at least 2 images, got 1; choose none")
    return PixelScore(images)


class PixelScore:
    """The distance of :class:`dcgan.evaluation.PixelScore`, after every epoch."""

    def __init__(self, images: Images) -> None:
        self._distance = evaluation.PixelScore(images.pixels)
        self._num = min(PIXEL_SAMPLES, len(images))

    def __call__(self, run: Run) -> Scored:
        with run.sampler() as generator:
            distance = self._distance(generation.images(generator, self._num, seed=run.settings.seed))
        return Scored(Checkpoint.score_name, distance, {Checkpoint.score_name: distance})


class Evaluation:
    """What ``dcgan eval`` measures, every ``eval_every`` epochs and at the end of the run.

    The generated and the real images are those of ``dcgan eval --num N`` with N = ``eval_num``, so that both
    give the same scores for a checkpoint. With dtype tf32 they are close but not equal, as that setting holds
    for the features too.
    """

    def __init__(
        self, settings: Settings, images: Images, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._evaluator = evaluation.Evaluator.load(
            settings.dataset,
            Path(settings.dataroot),
            image_size=settings.image_size,
            channels=images.channels,
            classes=settings.classes,
            limit=settings.limit,
            workers=settings.workers,
            num=settings.eval_num,
            device=device,
            say=say,
        )
        self._name = f"{self._evaluator.features.frechet}, {settings.eval_num} images"
        self._say = say

    def __call__(self, run: Run) -> Scored | None:
        if run.position.epoch % run.settings.eval_every and not run.done:
            return None
        try:
            with run.sampler() as generator:
                scores = self._evaluator.of(generator)
        except RunError as error:
            self._say(f"Epoch {run.position.epoch} is not evaluated: {error}")
            return None
        return Scored(self._name, scores.frechet, self._evaluator.row(scores))
