"""A small classifier of a labelled dataset, trained once and kept: its features know what a digit is.

Where Inception's weights cannot be had, or its features, made for photographs, say little about digits, the
penultimate features of a network that tells the dataset's own classes apart are what one compares by. The
classifier is a function of its training images alone (on a CPU), so distances of different runs compare.

What it was trained on is also what generated images are compared with, while the floor's other real images
are new to it: the floor includes what little that makes of a difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcgan.checkpoint import load
from dcgan.errors import InputError
from dcgan.evaluation.real import Part
from dcgan.files import cache_folder, replacing

DATASETS = ("mnist", "fashion-mnist", "digits")

VERSION = 1
"""Of the network and its training: part of a kept file's name, to be raised with any change of either."""

WIDTH = 128
SIZE = 32
SEED = 0
BATCH = 128
EPOCHS = 4
MINIMUM_STEPS = 400
LR = 4e-3


class Classifier(nn.Module):
    """Three convolutions of stride 2, two linear layers.

    Args:
        channels: of an image.
        classes: to tell apart.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *self._block(channels, 32, 5),
            *self._block(32, 64, 3),
            *self._block(64, 128, 3),
            nn.Flatten(),
            nn.Linear(128 * (SIZE // 8) ** 2, WIDTH),
            nn.ReLU(),
        )
        self.head = nn.Linear(WIDTH, classes)

    @staticmethod
    def _block(inputs: int, outputs: int, kernel: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 [N, channels, H, W] to float32 [N, 128], none negative; averages images to 32×32."""
        small = F.adaptive_avg_pool2d(pixels.float() / 127.5 - 1, SIZE)
        result: Tensor = self.body(small)
        return result

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, channels, H, W] to logits, float32 [N, classes]."""
        result: Tensor = self.head(self.features(pixels))
        return result


@dataclass(frozen=True)
class Trained:
    """A classifier in eval mode.

    Args:
        name: has the dataset, the image size, the version, and a hash of what it was trained on.
        network: on the device that was asked for.
        accuracy: on images that it was not trained on, 0 to 1.
    """

    name: str
    network: Classifier
    accuracy: float


def folder() -> Path:
    """Where classifiers are kept: ``$DCGAN_CACHE/classifiers``, by default below ``~/.cache``."""
    return cache_folder("classifiers")


def obtain(train: Part, test: Part, device: torch.device, say: Callable[[str], None]) -> Trained:
    """The classifier of a dataset: read where it was kept, else trained, then kept.

    A file that is damaged is replaced; where none can be written, training is all that is lost; ``say`` is
    told of either.

    Args:
        train: what it is trained on; has labels.
        test: what its accuracy is of; has labels.
        device: where it is trained, and stays.
        say: told what is going on.

    Raises:
        InputError: a dataset that is not one of ``DATASETS``, or that comes without labels.
    """
    if train.dataset not in DATASETS or train.labels is None or test.labels is None:
        raise InputError(
            f"features 'digits' are for the labelled datasets {', '.join(DATASETS)}, got {train.dataset!r}; "
            "choose pixels or inception"
        )
    name = f"{train.dataset}-{train.pixels.shape[-1]}-v{VERSION}-{_fingerprint(train)}"
    path = folder() / f"{name}.pt"
    network = _new(train)
    if path.exists():
        try:
            kept = load(path, whole=True)
            network.load_state_dict(kept["state"])
            return Trained(name, network.to(device).eval(), float(kept["accuracy"]))
        except (InputError, KeyError, TypeError, RuntimeError) as error:
            say(f"The classifier kept as {path} can't be used, a new one is trained: {error}")
            network = _new(train)
    say(f"Training the digits classifier on {len(train):,} images of {train.dataset}, once")
    fit(network.to(device), train)
    result = Trained(name, network.eval(), accuracy(network, test))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save({"state": network.state_dict(), "accuracy": result.accuracy}, file)
    except OSError as error:
        say(f"The classifier can't be kept as {path}: {error.strerror}; next time it is trained again")
    return result


def fit(network: Classifier, train: Part) -> None:
    """Train in place: Adam with one cycle of its step size, cross-entropy, shuffled batches.

    Source: Smith and Topin, *Super-Convergence*, 2018, of the cycle.
    """
    device = next(network.parameters()).device
    labels = _labels(train)
    random = torch.Generator().manual_seed(SEED)
    batches_an_epoch = -(-len(train) // BATCH)
    epochs = max(EPOCHS, -(-MINIMUM_STEPS // batches_an_epoch))
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * batches_an_epoch)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(train), generator=random).split(BATCH):
            logits = network(train.pixels[train.index[chosen]].to(device))
            loss = F.cross_entropy(logits, labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()


@torch.no_grad()
def accuracy(network: Classifier, test: Part) -> float:
    """The share of images whose largest logit is that of their label; the network is in eval mode."""
    device = next(network.parameters()).device
    guesses = torch.cat([network(batch.to(device)).argmax(1).cpu() for batch in test.batches(500)])
    return float((guesses == _labels(test)).double().mean())


def _new(train: Part) -> Classifier:
    """Untrained, always from the same weights; the global random generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Classifier(train.pixels.shape[1], train.classes)


def _labels(part: Part) -> Tensor:
    assert part.labels is not None
    return part.labels[part.index]


def _fingerprint(train: Part) -> str:
    """The first digits of a SHA-256 of the images' shape, pixels and labels."""
    digest = hashlib.sha256(repr((len(train), *train.pixels.shape[1:], train.classes)).encode())
    for batch in train.batches(1000):
        digest.update(batch.contiguous().numpy())
    digest.update(_labels(train).numpy())
    return digest.hexdigest()[:12]
