"""A small classifier of a labelled dataset, trained once and cached, whose features describe its classes.

Inception's weights may be unavailable, and its features, trained on photographs, say little about digits. The
alternative is the penultimate features of a network that classifies the dataset itself. On a CPU the
classifier depends only on its training images, so distances from different runs are comparable.

Generated images are compared with the classifier's training images, whereas the other real images of the
floor are new to it; the floor includes the small effect of that difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcgan.checkpoint import load
from dcgan.errors import InputError
from dcgan.evaluation.real import Part
from dcgan.files import cache_folder, replacing

DATASETS = ("mnist", "fashion-mnist", "digits")

VERSION = 1
"""Version of the network and its training, part of the cached file's name; raise it when either changes."""

WIDTH = 128
SIZE = 32
SEED = 0
BATCH = 128
EPOCHS = 4
MIN_STEPS = 400
LR = 4e-3


class Classifier(nn.Module):
    """A classifier with three stride-2 convolutions and two linear layers.

    Args:
        channels: number of image channels.
        classes: number of classes.
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
        """Map uint8 [N, channels, H, W], averaged to 32×32, to non-negative float32 features [N, 128]."""
        small = F.adaptive_avg_pool2d(pixels.float() / 127.5 - 1, SIZE)
        result: Tensor = self.body(small)
        return result

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 [N, channels, H, W] to float32 logits [N, classes]."""
        result: Tensor = self.head(self.features(pixels))
        return result


@dataclass(frozen=True)
class Trained:
    """A trained classifier in eval mode.

    Args:
        name: consists of the dataset, the image size, the version and a hash of the training images.
        network: the classifier on the requested device.
        accuracy: accuracy on images that it was not trained on, 0 to 1.
    """

    name: str
    network: Classifier
    accuracy: float


def load_or_train(train: Part, test: Part, device: torch.device, say: Callable[[str], None]) -> Trained:
    """Return the classifier of a dataset from the cache, or train it and cache it.

    A damaged cache file is replaced. If no file can be written, the classifier is trained again next time.
    Both cases are reported to ``say``.

    Args:
        train: training images, with labels.
        test: images that the accuracy is measured on, with labels.
        device: device for training and for the result.
        say: receives progress messages.

    Raises:
        InputError: the dataset is not one of ``DATASETS`` or has no labels.
    """
    if train.dataset not in DATASETS or train.labels is None or test.labels is None:
        raise InputError(
            f"features 'digits' support the labelled datasets {', '.join(DATASETS)}, got {train.dataset!r}; "
            "choose pixels or inception"
        )
    name = f"{train.dataset}-{train.pixels.shape[-1]}-v{VERSION}-{_fingerprint(train)}"
    path = cache_folder("classifiers") / f"{name}.pt"
    network = _untrained(train)
    if path.exists():
        try:
            saved = load(path, whole=True)
            network.load_state_dict(saved["state"])
            return Trained(name, network.to(device).eval(), float(saved["accuracy"]))
        except (InputError, KeyError, TypeError, RuntimeError) as error:
            say(f"The cached classifier {path} cannot be used and is trained again: {error}")
            network = _untrained(train)
    say(f"Training the digits classifier on {len(train):,} images of {train.dataset}, once")
    fit(network.to(device), train)
    result = Trained(name, network.eval(), accuracy(network, test))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save({"state": network.state_dict(), "accuracy": result.accuracy}, file)
    except OSError as error:
        say(f"Cannot cache the classifier as {path}: {error.strerror}; it will be trained again next time")
    return result


def fit(network: Classifier, train: Part) -> None:
    """Train ``network`` in place with Adam, a one-cycle learning rate, cross-entropy and shuffled batches.

    Source of the one-cycle schedule: Smith and Topin, *Super-Convergence*, 2018.
    """
    device = next(network.parameters()).device
    labels = _labels(train)
    rng = torch.Generator().manual_seed(SEED)
    batches_per_epoch = -(-len(train) // BATCH)
    epochs = max(EPOCHS, -(-MIN_STEPS // batches_per_epoch))
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * batches_per_epoch)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(train), generator=rng).split(BATCH):
            logits = network(train.pixels[train.index[chosen]].to(device))
            loss = F.cross_entropy(logits, labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(network: Classifier, test: Part) -> float:
    """Return the fraction of images whose largest logit is their label's; ``network`` is in eval mode."""
    device = next(network.parameters()).device
    predicted = torch.cat([network(batch.to(device)).argmax(1).cpu() for batch in test.batches(500)])
    return float((predicted == _labels(test)).double().mean())


def _untrained(train: Part) -> Classifier:
    """Return a classifier with the same initial weights every time; the global RNG state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Classifier(train.pixels.shape[1], train.classes)


def _labels(part: Part) -> Tensor:
    assert part.labels is not None
    return part.labels[part.index]


def _fingerprint(train: Part) -> str:
    """Return the first digits of a SHA-256 of the images' shape, pixels and labels."""
    digest = hashlib.sha256(repr((len(train), *train.pixels.shape[1:], train.classes)).encode())
    for batch in train.batches(1000):
        digest.update(batch.contiguous().numpy())
    digest.update(_labels(train).numpy())
    return digest.hexdigest()[:12]
