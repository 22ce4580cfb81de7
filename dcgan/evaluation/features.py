"""Image features in which two sets of images are compared.

* ``inception``: the 2,048 pooled features of the Inception network that defines FID, with its original
  weights as ported to PyTorch by torch-fidelity. Heusel et al., *GANs Trained by a Two Time-Scale Update Rule
  Converge to a Local Nash Equilibrium*, NeurIPS 2017.
* ``digits``: the 128 penultimate features of a small classifier of the dataset itself, trained here
  (:mod:`dcgan.evaluation.classifier`).
* ``pixels``: the images averaged to 8×8 pixels, C·64 numbers; needs no weights and ignores detail.
"""

from __future__ import annotations

import hashlib
import importlib.util
import socket
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dcgan import extras, generation
from dcgan.choices import FeaturesName as Name
from dcgan.errors import InputError, one_line
from dcgan.evaluation import classifier
from dcgan.evaluation.real import Part

PIXEL_GRID = 8
"""Height and width to which ``pixels`` averages images."""

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""File name used by torch-fidelity; it ends in the first digits of the SHA-256, as is usual for torch.hub."""

INCEPTION_SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"

TIMEOUT = 30.0
"""Seconds without a response after which the download fails; torch.hub would wait forever."""


@dataclass(frozen=True)
class Features:
    """A map from images to feature vectors, with the names of the distances between them.

    Args:
        name: name of the features.
        function: maps uint8 [N, C, H, W] on ``device`` to float [N, F].
        frechet, kernel: names of the two distances with these features.
        about: description of their origin.
        device: device on which they are computed.
        facts: the same description as plain values.
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
        """Return the features of all images, float64 [N, F], on the CPU.

        Args:
            batches: images [n, C, H, W], uint8 or float in [-1, 1]. Floats are first rounded to the 8-bit
                levels that an image file would hold, because real images have those too.

        Raises:
            RunError: an image contains a NaN.
        """
        return torch.cat(
            [self.function(to_8_bits(batch).to(self.device)).cpu().double() for batch in batches]
        )


def to_8_bits(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the levels that an image file would hold; return uint8 images unchanged.

    Raises:
        RunError: an image contains a NaN.
    """
    return images if images.dtype == torch.uint8 else generation.to_uint8(images)


def pixels(images: Tensor) -> Tensor:
    """Average uint8 images [N, C, H, W] over an 8×8 grid of areas: float32 [N, C·64] in [-1, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, PIXEL_GRID).flatten(1)


def choose(
    name: Name | Literal["auto"],
    train: Part,
    test: Part,
    device: torch.device,
    say: Callable[[str], None],
) -> Features:
    """Return the features with this name; ``auto`` selects the first of the three that is available.

    Inception's weights are downloaded if they are missing, but only if the name is 'inception'.

    Args:
        name: 'auto', 'inception', 'digits' or 'pixels'.
        train, test: two parts of the dataset: a classifier is trained on the first, and its accuracy is
            measured on the second.
        device: device on which the features are computed.
        say: receives messages about slow steps and about caching.

    Raises:
        InputError: an unknown name; Inception's weights are damaged, or are missing and cannot be downloaded;
            'digits' does not support the dataset.
    """
    if name not in ("auto", *get_args(Name)):
        raise InputError(f"features must be one of auto, {', '.join(get_args(Name))}, got {name!r}")
    if name == "auto":
        name = "digits" if train.dataset in classifier.DATASETS else "pixels"
        if inception_weights().is_file() and importlib.util.find_spec("torch_fidelity") is not None:
            name = "inception"
    if name == "inception":
        return _inception(device, say)
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
    """Return the path under which torch-fidelity and torch.hub store the Inception weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS


def _inception(device: torch.device, say: Callable[[str], None]) -> Features:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            f"features 'inception' needs torch-fidelity: run {extras.install('inception')}"
        ) from error
    path, url = inception_weights(), INCEPTION_SOURCE + INCEPTION_WEIGHTS
    expected = path.stem.rpartition("-")[2]
    if not path.exists():
        _download(url, path, expected, say)
    try:
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"features 'inception' needs the file {path}, which cannot be read ({error.strerror}); "
            f"download it from {url}, or choose digits or pixels"
        ) from error
    if not actual.startswith(expected):
        raise InputError(
            f"features 'inception': the file {path} is damaged or a different one: its SHA-256 must start "
            f"with {expected}, but is {actual}; download it again from {url}"
        )
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    network.to(device)
    return Features(
        name="inception",
        function=lambda images: network(images.expand(-1, 3, -1, -1))[0],
        frechet="FID (Inception)",
        kernel="KID (Inception)",
        about=f"Inception, weights of 2015-12-05 ({path.name})",
        device=device,
        facts={"weights": path.name},
    )


def _download(url: str, path: Path, digest: str, say: Callable[[str], None]) -> None:
    """Download a file; ``path`` never holds one whose SHA-256 does not start with ``digest``."""
    say(f"Downloading {url} into {path.parent}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash is wrong
        why = textwrap.shorten(one_line(error), 100, placeholder=" …")
        raise InputError(
            f"features 'inception': downloading {path.name} failed: {why}; copy that file into "
            f"{path.parent}, or choose digits or pixels"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _digits(train: Part, test: Part, device: torch.device, say: Callable[[str], None]) -> Features:
    trained = classifier.load_or_train(train, test, device, say)
    return Features(
        name="digits",
        function=trained.network.features,
        frechet=f"Fréchet distance, digits classifier features ({train.dataset})",
        kernel=f"Kernel distance, digits classifier features ({train.dataset})",
        about=(
            f"a small classifier of {train.dataset}, trained on {len(train):,} images, with an accuracy of "
            f"{trained.accuracy:.2%} on {len(test):,} others"
        ),
        device=device,
        facts={
            "classifier": trained.name,
            "classifier_accuracy": trained.accuracy,
            "classifier_test_images": len(test),
        },
    )
