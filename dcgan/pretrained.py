"""Loading of trained networks from any file that holds their weights.

The format is recognised by content, and nothing in a file is ever executed. Supported are:

* the folder of a run, or its ``checkpoints`` folder: the last or the best checkpoint;
* a checkpoint of :mod:`dcgan.checkpoint`: the Generator's moving average if there is one;
* a state dict written by ``torch.save``, as a zip archive or in the older format: ``generator_epoch_N.pth``
  and ``discriminator_epoch_N.pth``, and ``netG_epoch_N.pth`` and ``netD_epoch_N.pth`` of pytorch/examples,
  whose networks are identical for 3 channels. BatchNorm's ``num_batches_tracked`` may be missing, as it was
  before PyTorch 0.4.1;
* one or more state dicts nested in dicts and lists (``{"state_dict": …}``, ``{"netG": …, "netD": …}``,
  Lightning's ``.ckpt`` and others), with any prefixes on the keys; see :mod:`dcgan.state_dicts`. Among
  several Generators or Discriminators, the moving average is preferred (with ``ema=False``, the others), then
  the one named after the network; if several different ones remain, an error lists them;
* the same as safetensors, as written by :func:`dcgan.export.safetensors`, with any suffix.

Sizes are inferred from the state dict. The exception is the image size of the fully connected network, which
can be loaded only from a checkpoint or from a safetensors file of this project, since these record it.
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

from dcgan import checkpoint, state_dicts
from dcgan.checkpoint import CheckpointError
from dcgan.errors import InputError, check_choice, one_line
from dcgan.networks import Architecture, Engine
from dcgan.state_dicts import Network

Which = Literal["last", "best"]

SAFETENSORS = ".safetensors"
MAX_HEADER_BYTES = 100_000_000  # defined by the safetensors format


@dataclass(frozen=True)
class Pretrained:
    """The weights of one network, as read from a file.

    Args:
        file: the file that they were read from.
        network: which network they are for.
        architecture: architecture of that network; the ``features`` of the other one are meaningless.
        state: the state dict, on the CPU.
        averaged: whether they are the moving average.
    """

    file: Path
    network: Network
    architecture: Architecture
    state: Mapping[str, Any]
    averaged: bool = False

    def module(self, engine: Engine = "auto", device: torch.device | str = "cpu") -> nn.Module:
        """Return the network with these weights on ``device``, float32, in eval mode.

        ``engine`` is as for :meth:`dcgan.networks.Architecture.generator`.

        Raises:
            CheckpointError: the weights do not match the network; the message names the file.
            InputError: the engine has no kernels for the network.
        """
        module: nn.Module = getattr(self.architecture, self.network)(engine)
        try:
            module.load_state_dict(self.state)
        except (RuntimeError, AttributeError) as error:  # AttributeError: a value is not a tensor
            whole = f"a complete {self.network.capitalize()}"
            raise CheckpointError(f"{self.file} does not hold {whole}: {one_line(error)}") from error
        return module.to(device).eval()


def generator(
    path: Path | str,
    *,
    ema: bool = True,
    engine: Engine = "auto",
    which: Which = "last",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a trained Generator, float32, in eval mode.

    Args:
        path: a run's folder or a file; see the module docstring.
        ema: use the moving average of the weights if there is one.
        engine: 'reference' returns a network of :mod:`dcgan.models`, any other value one of
            :mod:`dcgan.fast`; for 'triton' and 'native', run that under :func:`dcgan.kernels.ops.use_engine`.
        which: which checkpoint of a folder to use: the last, or the best if the run measured a score.
        device: device of the network.

    Raises:
        CheckpointError: the file is missing, damaged, of another format or of a Discriminator; the message
            names it.
        InputError: an invalid or unsuitable ``engine`` or ``which``.
    """
    return read(path, "generator", ema=ema, which=which).module(engine, device)


def discriminator(
    path: Path | str,
    *,
    engine: Engine = "auto",
    which: Which = "last",
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a trained Discriminator as :func:`generator` does a Generator; it has no moving average."""
    return read(path, "discriminator", which=which).module(engine, device)


def read(path: Path | str, network: Network, *, ema: bool = True, which: Which = "last") -> Pretrained:
    """Load only the weights; arguments and errors are those of :func:`generator`."""
    check_choice("network", network, get_args(Network))
    file = find(Path(path), which)
    if _is_safetensors(file):
        return _from_state(*_read_safetensors(file), network, ema, file)
    content = checkpoint.load(file, whole=zipfile.is_zipfile(file))
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        return _from_checkpoint(checkpoint.parse(content, file), network, ema, file)
    return _from_state(content, {}, network, ema, file)


def find(path: Path, which: Which = "last") -> Path:
    """Resolve ``path`` to a file: itself, a pointer file's target, or a folder's last or best checkpoint.

    Raises:
        CheckpointError: the folder has no such checkpoint.
        InputError: ``which`` is invalid, or 'best' for a single file.
    """
    check_choice("which", which, get_args(Which))
    if not path.is_dir():
        if which == "best" and path.exists():
            raise InputError(f"which must be last for a single file, got 'best' for {path}")
        return checkpoint.resolve_pointer(path)
    inner = path / "checkpoints"
    folder = checkpoint.Folder(inner if inner.is_dir() else path)
    found = folder.best() if which == "best" else folder.last()
    if found is not None:
        return found
    if folder.last() is not None:
        raise CheckpointError(f"{folder.path} has no best checkpoint because the run measured no score")
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".ckpt", SAFETENSORS))
    hint = f"; pass one of its files, for example {others[-1]}" if others else ""
    raise CheckpointError(f"{path} has no checkpoint of a run{hint}")


def _from_checkpoint(content: checkpoint.Checkpoint, network: Network, ema: bool, file: Path) -> Pretrained:
    if network == "generator" and ema and content.ema is not None:
        return Pretrained(file, network, content.architecture, content.ema, averaged=True)
    return Pretrained(file, network, content.architecture, getattr(content, network))


def _from_state(
    content: Any, metadata: Mapping[str, str], network: Network, ema: bool, file: Path
) -> Pretrained:
    """Find a state dict of the network in ``content``; ``metadata`` is that of a safetensors file."""
    dicts = list(state_dicts.state_dicts(content))
    if not dicts and not (isinstance(content, Mapping) and all(isinstance(key, str) for key in content)):
        raise CheckpointError(f"{file} holds no network, but a {type(content).__name__}")
    found = [one for place, state in dicts for one in state_dicts.candidates(place, state, metadata)]
    selected = state_dicts.select([one for one in found if one.network == network], network, ema)
    if not selected:
        other = next((one.network for one in found if one.network is not None), None)
        if other is not None:
            raise CheckpointError(
                f"{file} holds the weights of a {other.capitalize()}, not of a {network.capitalize()}"
            )
        why = found[0].defect if found else state_dicts.describe_missing(dicts)
        raise CheckpointError(f"{file} holds no network of this project: {why}")
    if len(selected) > 1:
        load = "torch.load({}, weights_only=True)"
        if _is_safetensors(file):
            load = "safetensors.torch.load_file({})"
        load = load.format(json.dumps(file.name))
        lines = [f'torch.save({one.expression(load)}, "{network}.pth")' for one in selected]
        raise CheckpointError(
            f"{file} holds {len(selected)} different {network.capitalize()}s, and it is unclear which is "
            f"meant; save one of them to its own file: {'; or '.join(lines)}"
        )
    one = selected[0]
    assert one.architecture is not None
    return Pretrained(file, network, one.architecture, one.state, one.averaged)


def _is_safetensors(file: Path) -> bool:
    """Check for the header: the length of a JSON text in 8 bytes, then the text. False if missing."""
    try:
        with file.open("rb") as content:
            head = content.read(9)
    except OSError:
        return False
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated, damaged or not a safetensors file: {error}") from error
