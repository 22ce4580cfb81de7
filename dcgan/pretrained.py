"""Trained networks from whatever file holds their weights.

Read are, by content and never by executing anything:

* a run's folder, or its ``checkpoints``: the checkpoint marked last, or best;
* a checkpoint of :mod:`dcgan.checkpoint`: the Generator's moving average where it has one;
* a state dict as ``torch.save`` wrote it, in archives or before them: ``generator_epoch_N.pth`` and
  ``discriminator_epoch_N.pth``, and ``netG_epoch_N.pth`` and ``netD_epoch_N.pth`` of pytorch/examples, whose
  networks are these with 3 channels. It may lack BatchNorm's ``num_batches_tracked``, as before PyTorch
  0.4.1;
* one or several of them within dicts and lists, ``{"state_dict": …}``, ``{"netG": …, "netD": …}``,
  Lightning's ``.ckpt`` and the like, with any prefixes before the keys; see :mod:`dcgan.states`. Of several
  Generators, or Discriminators, the moving average is taken, or with ``ema=False`` the other, then the one
  that is named after the network; where that leaves several that differ, an error lists them;
* the same as safetensors, which :func:`dcgan.export.safetensors` writes, under any suffix.

Sizes are read off the state. Only the fully connected network's image cannot be: its state is read from a
checkpoint, or a safetensors file of ours, which say.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dcgan import checkpoint, states
from dcgan.checkpoint import CheckpointError
from dcgan.errors import InputError
from dcgan.networks import Architecture, Engine
from dcgan.states import Network

Which = Literal["last", "best"]

SAFETENSORS = ".safetensors"
LONGEST_HEADER = 100_000_000  # bytes, by the format's definition


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
    if _is_safetensors(file):
        return _from_state(*_read_safetensors(file), network, ema, file)
    content = checkpoint.load(file, whole=zipfile.is_zipfile(file))
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        return _from_checkpoint(checkpoint.parse(content, file), network, ema, file)
    return _from_state(content, {}, network, ema, file)


def find(path: Path, which: Which = "last") -> Path:
    """The file meant by ``path``: itself, or what it marks, or the checkpoint that a folder marks ``which``.

    Raises:
        CheckpointError: a folder without such a checkpoint.
        InputError: no such ``which``, or 'best' of a single file.
    """
    if which not in get_args(Which):
        raise InputError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}")
    if not path.is_dir():
        if which == "best" and path.exists():
            raise InputError(f"which must be last for a single file, got 'best' for {path}")
        return checkpoint.followed(path)
    inner = path / "checkpoints"
    folder = checkpoint.Folder(inner if inner.is_dir() else path)
    found = folder.best() if which == "best" else folder.last()
    if found is not None:
        return found
    if folder.last() is not None:
        raise CheckpointError(f"no checkpoint in {folder.path} is marked best: the run measured no score")
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".ckpt", SAFETENSORS))
    hint = f"; give one of its files, such as {others[-1]}" if others else ""
    raise CheckpointError(f"{path} has no checkpoint of a run{hint}")


def _from_checkpoint(content: checkpoint.Checkpoint, network: Network, ema: bool, file: Path) -> Pretrained:
    if network == "discriminator":
        return Pretrained(file, network, content.architecture, content.discriminator)
    if ema and content.ema is not None:
        return Pretrained(file, network, content.architecture, content.ema, averaged=True)
    return Pretrained(file, network, content.architecture, content.generator)


def _from_state(
    content: Any, about: Mapping[str, str], network: Network, ema: bool, file: Path
) -> Pretrained:
    """A state dict of the network in ``content``; ``about`` is what a safetensors file says of itself."""
    dicts = list(states.state_dicts(content))
    if not dicts and not (isinstance(content, Mapping) and all(isinstance(key, str) for key in content)):
        raise CheckpointError(f"{file} holds no network, but a {type(content).__name__}")
    found = [one for place, state in dicts for one in states.networks(place, state, about)]
    chosen = states.chosen([one for one in found if one.network == network], network, ema)
    if not chosen:
        other = next((one.network for one in found if one.network is not None), None)
        if other is not None:
            raise CheckpointError(
                f"{file} holds the weights of a {_TITLES[other]}, not of a {_TITLES[network]}"
            )
        why = found[0].why_not if found else states.no_network(dicts)
        raise CheckpointError(f"{file} holds no network of this project: {why}")
    if len(chosen) > 1:
        name = json.dumps(file.name)
        content_of = (
            f"safetensors.torch.load_file({name})"
            if _is_safetensors(file)
            else f"torch.load({name}, weights_only=True)"
        )
        lines = [f'torch.save({one.taken_from(content_of)}, "{network}.pth")' for one in chosen]
        raise CheckpointError(
            f"{file} holds {len(chosen)} {_TITLES[network]}s that differ, and nothing tells which is meant; "
            f"make a file of one: {'; or '.join(lines)}"
        )
    one = chosen[0]
    assert one.architecture is not None
    return Pretrained(file, network, one.architecture, one.state, one.averaged)


def _is_safetensors(file: Path) -> bool:
    """By its beginning: the length of a JSON text, 8 bytes, and that text. A file that is missing is none."""
    try:
        with file.open("rb") as content:
            head = content.read(9)
    except OSError:
        return False
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated, damaged or no safetensors file: {error}") from error
