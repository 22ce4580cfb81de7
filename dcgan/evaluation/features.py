"""Features of images: what two sets of images are compared by.

* ``inception``: the 2,048 pooled features of the Inception network that FID is defined with, in the port of
  its original weights to PyTorch that torch-fidelity has. Heusel et al., *GANs Trained by a Two Time-Scale
  Update Rule Converge to a Local Nash Equilibrium*, NeurIPS 2017.
* ``digits``: the 128 penultimate features of a small classifier of the dataset itself, trained here
  (:mod:`dcgan.evaluation.classifier`).
* ``pixels``: the images averaged to 8×8 pixels, C·64 numbers; needs no weights, and sees no detail.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dcgan import generation
from dcgan.errors import InputError
from dcgan.evaluation import classifier
from dcgan.evaluation.real import Part

Name = Literal["inception", "digits", "pixels"]

SIDE = 8

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""As torch-fidelity names the file; ends in the first digits of its SHA-256, as torch.hub has it."""

INCEPTION_SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"


@dataclass(frozen=True)
class Features:
    """A map from images to vectors, and the names that distances between them go by.

    Args:
        name: of the set.
        function: uint8 [N, C, H, W] on ``device`` to float [N, F].
        frechet, kernel: what the two distances are called with these features.
        about: where they are from, in words.
        facts: likewise, as plain values.
    """

    name: Name
    function: Callable[[Tensor], Tensor]
    frechet: str
    kernel: str
    about: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    facts: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def of(self, batches: Iterable[Tensor]) -> Tensor:
        """The features of all images, float64 [N, F], on the CPU.

        Args:
            batches: of images, uint8 or float in [-1, 1], [n, C, H, W] each. Floats are first made the 8-bit
                images that a file of them would hold, since that is what real ones are.

        Raises:
            RunError: an image has a NaN.
        """
        return torch.cat(
            [self.function(eight_bits(batch).to(self.device)).cpu().double() for batch in batches]
        )


def eight_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a file of them would have them; uint8 images as they are.

    Raises:
        RunError: an image has a NaN.
    """
    return images if images.dtype == torch.uint8 else generation.to_uint8(images)


def pixels(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to float32 [N, C·64]: the means of 8×8 areas, in [-1, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, SIDE).flatten(1)


def choose(
    name: Name | Literal["auto"],
    train: Part,
    test: Part,
    device: torch.device,
    say: Callable[[str], None],
) -> Features:
    """The features by name; ``auto`` is the first of them that there is all for.

    Args:
        name: 'auto', 'inception', 'digits' or 'pixels'.
        train, test: two parts of the dataset: what a classifier is trained on, and what its accuracy is told
            on.
        device: where the features are computed.
        say: told what takes time, and what is kept for the next time.

    Raises:
        InputError: an unknown name; no weights of Inception, or others than they should be; 'digits' for a
            dataset that it is not for.
    """
    if name not in ("auto", *get_args(Name)):
        raise InputError(f"features must be one of auto, {', '.join(get_args(Name))}, got {name!r}")
    if name == "auto":
        if inception_weights().is_file() and importlib.util.find_spec("torch_fidelity") is not None:
            name = "inception"
        else:
            name = "digits" if train.dataset in classifier.DATASETS else "pixels"
    if name == "inception":
        return _inception(device)
    if name == "digits":
        return _digits(train, test, device, say)
    return Features(
        name="pixels",
        function=pixels,
        frechet="Fréchet distance, 8×8 pixel features",
        kernel="Kernel distance, 8×8 pixel features",
        about="images averaged to 8×8 pixels",
        device=device,
    )


def inception_weights() -> Path:
    """Where torch-fidelity and torch.hub keep the weights of Inception once they are there."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS


def _inception(device: torch.device) -> Features:
    path = inception_weights()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"features 'inception' need the file {path}, which cannot be read ({error.strerror}); "
            f"put there {INCEPTION_SOURCE}{INCEPTION_WEIGHTS}, or choose digits or pixels"
        ) from error
    expected = path.stem.rpartition("-")[2]
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(expected):
        raise InputError(
            f"features 'inception': the file {path} is damaged or another one; its SHA-256 must start with "
            f"{expected}, and is {found}"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            "features 'inception' need torch-fidelity: pip install 'dcgan-kernels[inception]'"
        ) from error
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    network.to(device)

    def function(images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        result: Tensor = network(images)[0]
        return result

    return Features(
        name="inception",
        function=function,
        frechet="FID (Inception)",
        kernel="KID (Inception)",
        about=f"Inception, weights of 2015-12-05 ({path.name})",
        device=device,
        facts={"weights": path.name},
    )


def _digits(train: Part, test: Part, device: torch.device, say: Callable[[str], None]) -> Features:
    trained = classifier.obtain(train, test, device, say)
    return Features(
        name="digits",
        function=trained.network.features,
        frechet=f"Fréchet distance, digits classifier features ({train.dataset})",
        kernel=f"Kernel distance, digits classifier features ({train.dataset})",
        about=(
            f"a small classifier of {train.dataset}, trained on {len(train):,} images, right about "
            f"{trained.accuracy:.2%} of {len(test):,} others"
        ),
        device=device,
        facts={
            "classifier": trained.name,
            "classifier_accuracy": trained.accuracy,
            "classifier_test_images": len(test),
        },
    )
