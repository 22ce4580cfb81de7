"""Networks that the user has written: import, construction and dry run of a class given by its name.

A class is imported only if the user has typed its name, or has it in a settings file: never because a
checkpoint or a safetensors file names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dcgan.errors import InputError, is_plain, one_line

ROWS = 2
"""Batch size of a dry run."""
_CONTRASTS = (1, -1, 100, -100)
_LATENT_SHAPE = "_dcgan_latent_shape"


@dataclass(frozen=True)
class Foreign:
    """A network's class and the arguments that it is constructed with.

    Args:
        spec: 'pkg.module:Class' or 'path/to/file.py:Class', as typed.
        args: keyword arguments of the constructor: numbers, strings, booleans, None, and lists and dicts of
            them, which are all that a checkpoint can hold.

    Raises:
        InputError: ``spec`` is not printable text, or ``args`` holds something else.
    """

    spec: str
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.spec, str) or not self.spec.isprintable():
            raise InputError(f"the class of a network must be printable text, got {self.spec!r}")
        if not isinstance(self.args, dict) or not is_plain(self.args):
            raise InputError(f"the arguments of {self.spec} must be plain values, got {self.args!r}")

    def load(self, option: str) -> type[nn.Module]:
        """Import the class. A file is looked up from the current folder, in which modules are found too.

        Args:
            option: the name of the option for messages, such as ``--netG-module``.

        Raises:
            InputError: ``spec`` has another form, cannot be imported, or is not a class of ``nn.Module``.
        """
        where, _, name = self.spec.rpartition(":")
        if not where or not name:
            raise InputError(f"{option} must be pkg.module:Class or path/to/file.py:Class, got {self.spec!r}")
        try:
            module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise InputError(f"{option}: cannot import {self.spec!r}: {_described(error)}") from error
        found = getattr(module, name, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            what = f"{name} is not a class derived from torch.nn.Module" if found else f"it has no {name}"
            own = [key for key, value in vars(module).items() if _is_defined_in(module, value)]
            hint = f"; {where} defines {', '.join(own)}" if own else ""
            raise InputError(f"{option}: cannot use {self.spec!r}: {what}{hint}")
        return found

    def build(self, option: str) -> nn.Module:
        """Construct the network. Raises InputError as :meth:`load`, or if the constructor raises."""
        kind = self.load(option)
        try:
            network = kind(**self.args)
        except (Exception, SystemExit) as error:
            args = ", ".join(f"{key}={value!r}" for key, value in self.args.items()) or "no arguments"
            raise InputError(
                f"{option}: {self.spec!r} cannot be constructed with {args} "
                f"({option.removesuffix('module')}args): {_described(error)}"
            ) from error
        if next(network.parameters(), None) is None:
            raise InputError(f"{option}: {self.spec!r} has no parameters to train")
        return network

    def generator(self, option: str, latent_dim: int, images: tuple[int, int, int]) -> nn.Module:
        """Construct a Generator and find out by a dry run which shape of z it takes; see :func:`shaped`.

        Args:
            option: the name of the option for messages.
            latent_dim: length of z.
            images: shape [channels, height, width] of an image.

        Raises:
            InputError: as :meth:`build`, or if neither z [N, latent_dim, 1, 1] nor z [N, latent_dim] gives
                images of this shape.
        """
        network, outcomes = self.build(option), []
        for shape in ((latent_dim, 1, 1), (latent_dim,)):
            with _dry(network):
                outcome = _outcome(network, _noise(network, shape))
            if isinstance(outcome, Tensor) and outcome.shape == (ROWS, *images):
                setattr(network, _LATENT_SHAPE, shape)
                return network
            outcomes.append(f"for z {[ROWS, *shape]} it {_words(outcome)}")
        raise InputError(
            f"{option}: {self.spec!r} must return images {[ROWS, *images]}, by the images' channels and "
            f"--image-size {images[-1]}, but {', and '.join(outcomes)}"
        )

    def discriminator(self, option: str, images: tuple[int, int, int]) -> nn.Module:
        """Construct a Discriminator and check by a dry run that it returns one probability per image.

        Arguments are as for :meth:`generator`.

        Raises:
            InputError: as :meth:`build`, or if it fails for such images, returns another shape than [N],
                [N, 1] or [N, 1, 1, 1], or values outside [0, 1].
        """
        network = self.build(option)
        with _dry(network):
            x = _noise(network, images).tanh()
            # Without a Sigmoid, a few outputs could be in [0, 1] by accident.
            outcomes = [_outcome(network, contrast * x) for contrast in _CONTRASTS]
        shapes = [(ROWS,), (ROWS, 1), (ROWS, 1, 1, 1)]
        for outcome in outcomes:
            if not isinstance(outcome, Tensor) or outcome.shape not in shapes:
                raise InputError(
                    f"{option}: {self.spec!r} must return {ROWS} probabilities, [{ROWS}], [{ROWS}, 1] or "
                    f"[{ROWS}, 1, 1, 1], for images {[ROWS, *images]}, but it {_words(outcome)}"
                )
            if bool(((outcome < 0) | (outcome > 1)).any()):
                raise self.not_probabilities(option)
        return network

    def not_probabilities(self, option: str) -> InputError:
        """Return the error about a Discriminator whose outputs are not in [0, 1]."""
        return InputError(
            f"{option}: {self.spec!r} must end in a Sigmoid: it returns values outside [0, 1], which are no "
            "probabilities"
        )


class Sampler(nn.Module):
    """A foreign Generator as :mod:`dcgan.generation` expects it: z [N, latent_dim] → images, in eval mode."""

    def __init__(self, network: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.network, self.latent_dim = network, latent_dim
        self.eval()

    def forward(self, z: Tensor) -> Tensor:
        return self.network(shaped(self.network, z))  # type: ignore[no-any-return]


def latent_shape(network: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of one z that a Generator of :meth:`Foreign.generator` takes; None for any other."""
    return getattr(network, _LATENT_SHAPE, None)


def shaped(network: nn.Module, z: Tensor) -> Tensor:
    """Return z, [N, latent_dim] or [N, latent_dim, 1, 1], in the shape that ``network`` takes."""
    shape = latent_shape(network)
    return z if shape is None else z.reshape(len(z), *shape)


# --- import -------------------------------------------------------------------------------------------------


def _import_module(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as for python -m
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """Import a file, with its folder on the path as for ``python path/to/file.py``; at most once."""
    path = path.expanduser().resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_defined_in(module: ModuleType, value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__


# --- dry run ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _dry(network: nn.Module) -> Iterator[None]:
    """Put the network into eval mode without gradients inside; restore it and the RNG state afterwards."""
    training = [module for module in network.modules() if module.training]
    lazy = nn.parameter.UninitializedBuffer  # cannot be cloned, and has no state yet
    buffers = {name: b.clone() for name, b in network.named_buffers() if not isinstance(b, lazy)}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for name, buffer in network.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def _noise(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(ROWS, *shape).to(next(network.parameters()).device)


def _outcome(network: nn.Module, x: Tensor) -> Any:
    """Return ``network(x)``, or the error that it raises."""
    try:
        return network(x)
    except Exception as error:  # the user's forward may raise anything
        return error


def _words(outcome: Any) -> str:
    if isinstance(outcome, Exception):
        return f"raises {_described(outcome)}"
    return f"returns {list(outcome.shape) if isinstance(outcome, Tensor) else type(outcome).__name__}"


def _described(error: BaseException) -> str:
    kind, message = type(error).__name__, one_line(error)
    return textwrap.shorten(message if message == kind else f"{kind}: {message}", 300, placeholder=" …")
