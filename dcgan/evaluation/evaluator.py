"""Scoring of any number of generators against the same real images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcgan import generation
from dcgan.choices import MIN_IMAGES, FeaturesName
from dcgan.errors import check_integers
from dcgan.evaluation import classifier
from dcgan.evaluation.features import Features, choose
from dcgan.evaluation.real import Part, parts
from dcgan.evaluation.scores import Scores, compare, radii


class Evaluator:
    """Scores images against real ones, whose features are computed only once.

    The same weights, arguments and device always give the same scores.

    Args:
        features: the features in which images are compared.
        train: the real images to compare with.
        test: other real images, for the floor.
        num: number of images that :meth:`of` generates, and maximum number of real images per set; at
            least 10.
        seed: RNG seed for the noise, for choosing real images and for the kernel distance.
        batch_size: images per batch.

    Attributes:
        real, held_out: the chosen images of ``train`` and ``test``.
        features, num, seed, batch_size: as given.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self, features: Features, train: Part, test: Part, num: int, seed: int = 0, batch_size: int = 64
    ) -> None:
        check_integers(MIN_IMAGES, num=num)
        check_integers(0, seed=seed)
        check_integers(1, batch_size=batch_size)
        self.features, self.num, self.seed, self.batch_size = features, num, seed, batch_size
        self.real, self.held_out = train.choose(num, seed), test.choose(num, seed)
        self._real = features.of(self.real.batches(batch_size))
        self._radii = radii(self._real)

    @classmethod
    def load(
        cls,
        dataset: str,
        dataroot: Path,
        *,
        image_size: int,
        channels: int,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        workers: int = 4,
        features: FeaturesName | Literal["auto"] = "auto",
        num: int = 10_000,
        seed: int = 0,
        batch_size: int = 64,
        device: torch.device,
        say: Callable[[str], None],
    ) -> Evaluator:
        """Load the real images and choose the features.

        The classifier of ``digits`` learns from the dataset's images of all classes, without ``limit``, so
        that runs on different selections of a dataset are scored by the same features.

        Args:
            dataset, dataroot, image_size, channels, classes, limit, workers, say: as for
                :func:`dcgan.evaluation.parts`.
            features, device: as for :func:`dcgan.evaluation.choose`.
            num, seed, batch_size: as for the constructor.

        Raises:
            InputError: as for these functions.
        """

        def load(**selection: Any) -> tuple[Part, Part]:
            sizes: dict[str, Any] = {"image_size": image_size, "channels": channels, "workers": workers}
            return parts(dataset, dataroot, **sizes, **selection, say=say)

        selected = whole = load(classes=classes, limit=limit)
        learned = features in ("auto", "digits") and dataset in classifier.DATASETS
        if learned and (classes is not None or limit is not None):
            whole = load()
        return cls(choose(features, *whole, device, say), *selected, num, seed, batch_size)

    def __call__(self, images: Iterable[Tensor]) -> Scores:
        """Score images against the real ones.

        Args:
            images: batches as for :meth:`Features.of`, at least 10 images.

        Raises:
            RunError: an image contains a NaN.
            InputError: there are fewer than 10 images, or they have another number of channels.
        """
        return compare(self._real, self.features.of(images), self.seed, self._radii)

    def of(self, generator: nn.Module) -> Scores:
        """Score images of a generator as :func:`dcgan.generation.images` takes it; raises as a call does."""
        return self(generation.images(generator, self.num, seed=self.seed, batch=self.batch_size))

    def floor(self) -> Scores:
        """Score the held-out real images.

        A generator cannot be expected to be closer to the real images if it generates as many as are in
        ``held_out``. If it generates more, the floor's Fréchet distance is biased higher than that of as many
        real images would be, and its coverage lower.
        """
        return self(self.held_out.batches(self.batch_size))

    def row(self, scores: Scores) -> dict[str, Any]:
        """Return the scores and the name of the features as plain values, for ``metrics.jsonl``."""
        names = ("frechet", "kernel", "kernel_std", "precision", "recall", "density", "coverage")
        values = {name: getattr(scores, name) for name in names}
        return {"features": self.features.name, **values, "images": scores.images[1]}
