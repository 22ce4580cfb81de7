"""Trained networks from whatever file holds their weights.

Read are, by content and never by executing anything:

* a run's folder, or its ``checkpoints``: the checkpoint marked last, or best;
* a checkpoint of :mod:`dcgan.checkpoint`: the Generator's moving average where it has one;
* a bare state dict as ``torch.save`` wrote it: ``generator_epoch_N.pth`` and ``discriminator_epoch_N.pth``,
  and ``netG_epoch_N.pth`` and ``netD_epoch_N.pth`` of pytorch/examples, whose networks are these with 3
  channels. Keys may begin with the ``module.`` of DataParallel and DistributedDataParallel or the
  ``_orig_mod.`` of torch.compile, and lack BatchNorm's ``num_batches_tracked``, as before PyTorch 0.4.1;
* the same as safetensors, which :func:`dcgan.export.safetensors` writes.

Sizes are read off the state. Only the fully connected network's image cannot be: its state is read from a
checkpoint, or a safetensors file of ours, which say.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dcgan import checkpoint, models
from dcgan.checkpoint import CheckpointError
from dcgan.errors import InputError
from dcgan.networks import Architecture, Engine

Network = Literal["generator", "discriminator"]
Which = Literal["last", "best"]

SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Pretrained:
    """Weights as they were found.

    Args:
        file: that they were read from.
        network: what they are the weights of.
        architecture: of that network; the other's ``features`` are of no meaning.
        state: the state dict, on the CPU.
        averaged: whether they are the moving average.
    """

    file: Path
    network: Network
    architecture: Architecture
    state: Mapping[str, Any]
    averaged: bool = False

    def module(self, engine: Engine = "auto", device: torch.device | str = "cpu") -> nn.Module:
        """The network with these weights, in eval mode, float32, on ``device``.

        ``engine`` is as for :meth:`dcgan.networks.Architecture.generator`.

        Raises:
            CheckpointError: the weights are not those of such a network; names the file.
            InputError: an engine that the network has no kernels for.
        """
        build = getattr(self.architecture, self.network)
        module: nn.Module = build(engine)
        try:
            module.load_state_dict(self.state)
        except (RuntimeError, AttributeError) as error:  # torch expects a Tensor where there may be anything
            why = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.file} does not hold a whole {_TITLES[self.network]}: {why}"
            ) from error
        return module.to(device).eval()


_TITLES: dict[Network, str] = {"generator": "Generator", "discriminator": "Discriminator"}


def generator(
    path: Path | str,
    *,
    ema: bool = True,
    engine: Engine = "auto",
    which: Which = "last",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A trained Generator in eval mode, float32.

    Args:
        path: a run's folder or a file; see the module's head.
        ema: take the moving average of the weights where there is one.
        engine: 'reference' makes a network of :mod:`dcgan.models`, any other one of :mod:`dcgan.fast`, which
            for 'triton' and 'native' is to be run under :func:`dcgan.kernels.ops.use_engine`.
        which: of a folder's checkpoints, the last, or the best, where the run measured a score.
        device: to put it on.

    Raises:
        CheckpointError: the file is missing, damaged, of something else or of a Discriminator; names it.
        InputError: an ``engine`` or ``which`` that there is not, or that does not fit.
    """
    return read(path, "generator", ema=ema, which=which).module(engine, device)


def discriminator(
    path: Path | str,
    *,
    engine: Engine = "auto",
    which: Which = "last",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A trained Discriminator, as :func:`generator`; it has no moving average."""
    return read(path, "discriminator", which=which).module(engine, device)


def read(path: Path | str, network: Network, *, ema: bool = True, which: Which = "last") -> Pretrained:
    """The weights alone; arguments and errors are those of :func:`generator`."""
    if network not in get_args(Network):
        raise InputError(f"network must be one of {', '.join(get_args(Network))}, got {network!r}")
    file = find(Path(path), which)
    if file.suffix == SAFETENSORS:
        found = _from_state(*_read_safetensors(file), file)
    else:
        content = checkpoint.load(file, whole=zipfile.is_zipfile(file))
        if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
            return _from_checkpoint(checkpoint.parse(content, file), network, ema, file)
        found = _from_state(content, {}, file)
    if found.network != network:
        raise CheckpointError(
            f"{file} holds the weights of a {_TITLES[found.network]}, not of a {_TITLES[network]}"
        )
    return found


def find(path: Path, which: Which = "last") -> Path:
    """The file meant by ``path``: itself, or for a folder the checkpoint that is marked ``which``.

    Raises:
        CheckpointError: a folder without such a checkpoint.
        InputError: no such ``which``, or 'best' of a single file.
    """
    if which not in get_args(Which):
        raise InputError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}")
    if not path.is_dir():
        if which == "best" and path.exists():
            raise InputError(f"which must be last for a single file, got 'best' for {path}")
        return path
    inner = path / "checkpoints"
    folder = checkpoint.Folder(inner if inner.is_dir() else path)
    found = folder.best() if which == "best" else folder.last()
    if found is not None:
        return found
    if folder.last() is not None:
        raise CheckpointError(f"no checkpoint in {folder.path} is marked best: the run measured no score")
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", SAFETENSORS))
    hint = f"; give one of its files, such as {others[-1]}" if others else ""
    raise CheckpointError(f"{path} has no checkpoint of a run{hint}")


def _from_checkpoint(content: checkpoint.Checkpoint, network: Network, ema: bool, file: Path) -> Pretrained:
    if network == "discriminator":
        return Pretrained(file, network, content.architecture, content.discriminator)
    if ema and content.ema is not None:
        return Pretrained(file, network, content.architecture, content.ema, averaged=True)
    return Pretrained(file, network, content.architecture, content.generator)


def _from_state(content: Any, about: Mapping[str, str], file: Path) -> Pretrained:
    """A bare state dict; ``about`` is what a safetensors file says of itself."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{file} holds no network, but a {type(content).__name__}")
    state = dict(content)
    for prefix in ("module.", "_orig_mod."):
        consume_prefix_in_state_dict_if_present(state, prefix)
    try:
        network, architecture = _declared(about) if "network" in about else _recognised(state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{file} holds no network of this project: {error}") from error
    return Pretrained(file, network, architecture, state)


def _declared(about: Mapping[str, str]) -> tuple[Network, Architecture]:
    network: Any = about["network"]
    if network not in get_args(Network):
        raise ValueError(f"its network is {network!r}")
    model: Any = about["model"]
    sizes = {name: int(about[name]) for name in ("latent_dim", "channels", "image_size") if name in about}
    if "features" in about:
        sizes["features_g" if network == "generator" else "features_d"] = int(about["features"])
    return network, Architecture(model, **sizes)


def _recognised(state: Mapping[str, Any]) -> tuple[Network, Architecture]:
    """Raises ValueError for what is neither network's state."""
    first = state.get("main.0.weight")
    if not isinstance(first, Tensor):
        keys = ", ".join(list(state)[:4]) or "none"
        raise ValueError(
            f"it has no tensor main.0.weight; its keys are {keys}{', …' if len(state) > 4 else ''}"
        )
    if first.ndim == 2:
        raise ValueError(
            "main.0.weight is a fully connected layer's, and the size of its images can't be read off; "
            "give the run's checkpoint"
        )
    if "main.1.weight" in state:  # BatchNorm comes first in a Generator; in a Discriminator LeakyReLU does
        sizes: dict[str, Any] = dict(models.Generator.sizes_of(state))
        return "generator", Architecture(features_g=sizes.pop("features"), **sizes)
    sizes = dict(models.Discriminator.sizes_of(state))
    return "discriminator", Architecture(features_d=sizes.pop("features"), **sizes)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated, damaged or no safetensors file: {error}") from error
