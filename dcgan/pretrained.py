"""Loading of trained networks from any file that holds their weights.

The format is recognised by content, and nothing in a file is ever executed. Supported are:

* the folder of a run, or its ``checkpoints`` folder: the last or the best checkpoint;
* a folder of the Hugging Face Hub, as :mod:`dcgan.hub` writes it;
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

The same holds for networks that the user has written. Such a file names their class and its arguments, but
the class is imported only if the caller names it too (``module``), or passes the folder of a run whose
``config.yaml`` names the same class with the same arguments. That is a settings file, which one can read
before trusting it, and ``dcgan train --resume`` imports what it names too. For a checkpoint, or a folder of
checkpoints, nothing is imported that the caller does not name.
"""

from __future__ import annotations

import json
import shlex
import textwrap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dcgan import checkpoint, state_dicts
from dcgan.checkpoint import CheckpointError
from dcgan.choices import Engine, Network, Which
from dcgan.errors import InputError, check_choice, one_line
from dcgan.foreign import Foreign, Sampler, latent_shape
from dcgan.networks import Architecture

SAFETENSORS = ".safetensors"
HUB_FILE = "model.safetensors"
"""The weights in a folder of the Hugging Face Hub, as :mod:`dcgan.hub` writes it."""
MAX_HEADER_BYTES = 100_000_000  # defined by the safetensors format
CLASS = "class"
"""Key in a safetensors file's metadata for the class of a network that the user has written."""
_OPTIONS: dict[Network, str] = {"generator": "--netG", "discriminator": "--netD"}
_FIELDS: dict[Network, str] = {"generator": "foreign_g", "discriminator": "foreign_d"}
_SIZES = ("latent_dim", "channels", "image_size")


@dataclass(frozen=True)
class Pretrained:
    """The weights of one network, as read from a file.

    Args:
        file: the file that they were read from.
        network: which network they are for.
        architecture: architecture of that network; the ``features`` of the other one are meaningless.
        state: the state dict, on the CPU.
        averaged: whether they are the moving average.
        has_average: whether the checkpoint of a run holds a moving average, used or not.
        decay: decay of the moving average, if the checkpoint of a run says it.
        epoch, step: epoch in which the checkpoint of a run was written, counted from 1, and its number of
            steps; None for any other file.
        config: the run's ``config.yaml`` if the class of a foreign network is imported because that names it.
    """

    file: Path
    network: Network
    architecture: Architecture
    state: Mapping[str, Any]
    averaged: bool = False
    has_average: bool = False
    decay: float | None = None
    epoch: int | None = None
    step: int | None = None
    config: Path | None = None

    def module(self, engine: Engine = "auto", device: torch.device | str = "cpu") -> nn.Module:
        """Return the network with these weights on ``device``, float32, in eval mode.

        ``engine`` is as for :meth:`dcgan.networks.Architecture.generator`.

        Raises:
            CheckpointError: the weights do not match the network; the message names the file.
            InputError: the engine has no kernels for the network, or it is foreign and cannot be constructed.
        """
        check_choice("engine", engine, get_args(Engine))
        try:
            module: nn.Module = getattr(self.architecture, self.network)(engine)
        except InputError as error:
            if self.config is None:
                raise
            raise InputError(f"{self.config}: {error}") from error
        if self.foreign is not None:
            load_foreign(module, self.state, self.file, self.network, self.foreign)
            return module.to(device).eval()
        try:
            module.load_state_dict(self.state)
        except (RuntimeError, AttributeError) as error:  # AttributeError: a value is not a tensor
            whole = f"a complete {self.network.capitalize()}"
            raise CheckpointError(f"{self.file} does not hold {whole}: {one_line(error)}") from error
        return module.to(device).eval()

    def sampler(self, engine: Engine = "auto", device: torch.device | str = "cpu") -> nn.Module:
        """Return the Generator as :mod:`dcgan.generation` takes it: z [N, latent_dim] → images.

        That is :meth:`module`, or a module around it if the Generator is foreign.
        """
        module = self.module(engine, device)
        return module if self.foreign is None else Sampler(module, self.architecture.latent_dim)

    @property
    def foreign(self) -> Foreign | None:
        """The class that the user has given for this network; None for a network of this project."""
        found: Foreign | None = getattr(self.architecture, _FIELDS[self.network])
        return found

    def input_shape(self, module: nn.Module) -> tuple[int, ...] | None:
        """Return the shape of one input of a foreign network from :meth:`module`; None for any other."""
        if self.foreign is None:
            return None
        return latent_shape(module) if self.network == "generator" else self.architecture.image_shape

    def metadata(self) -> dict[str, str] | None:
        """Return what a safetensors file of a foreign network says about it; None for any other network."""
        if self.foreign is None:
            return None
        sizes = {name: str(getattr(self.architecture, name)) for name in _SIZES}
        names = {"network": self.network, CLASS: self.foreign.spec, "args": json.dumps(self.foreign.args)}
        return names | sizes


def generator(
    path: Path | str,
    *,
    ema: bool = True,
    engine: Engine = "auto",
    which: Which = "last",
    device: torch.device | str = "cpu",
    module: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a trained Generator, float32, in eval mode.

    Args:
        path: a run's folder or a file; see the module docstring.
        ema: use the moving average of the weights if there is one.
        engine: 'reference' returns a network of :mod:`dcgan.models`, any other value one of
            :mod:`dcgan.fast`; for 'triton' and 'native', run that under :func:`dcgan.kernels.ops.use_engine`.
        which: which checkpoint of a folder to use: the last, or the best if the run measured a score.
        device: device of the network.
        module: the class of a network that the user has written, 'pkg.module:Class' or
            'path/to/file.py:Class'; required if the file names one, unless ``path`` is the folder of a run.
        args: arguments of its constructor; None for those that the file records.

    Raises:
        CheckpointError: the file is missing, damaged, of another format or of a Discriminator; the message
            names it.
        InputError: an invalid or unsuitable ``engine`` or ``which``; ``module`` is missing, cannot be
            constructed, or is given for a file that does not record the sizes.
    """
    return read(path, "generator", ema=ema, which=which, module=module, args=args).module(engine, device)


def discriminator(
    path: Path | str,
    *,
    engine: Engine = "auto",
    which: Which = "last",
    device: torch.device | str = "cpu",
    module: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a trained Discriminator as :func:`generator` does a Generator; it has no moving average."""
    return read(path, "discriminator", which=which, module=module, args=args).module(engine, device)


def read(
    path: Path | str,
    network: Network,
    *,
    ema: bool = True,
    which: Which = "last",
    module: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Load only the weights; arguments and errors are those of :func:`generator`."""
    check_choice("network", network, get_args(Network))
    file, option = find(Path(path), which), _OPTIONS[network]
    if args is not None and module is None:
        raise InputError(f"{option}-args requires {option}-module")
    state, metadata = _read_safetensors(file) if _is_safetensors(file) else (None, {})
    content = checkpoint.load(file, whole=zipfile.is_zipfile(file)) if state is None else state
    if CLASS in metadata:
        found = _from_foreign_safetensors(content, metadata, network, file)
    elif isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        found = _from_checkpoint(checkpoint.parse(content, file), network, ema, file)
    elif module is not None:
        raise InputError(
            f"{option}-module applies to a run, its checkpoints and their exports to safetensors, which "
            f"record the images' sizes; {file} does not"
        )
    else:
        return _from_state(content, metadata, network, ema, file)
    recorded = found.foreign
    if module is None and recorded is not None:
        config = _config_naming(recorded, Path(path), file, network)
        if config is not None:
            return replace(found, config=config)
        raise InputError(
            f"{file} holds the weights of a network of your own, and a class that a file names is not "
            f"imported: pass {option}-module {shlex.quote(recorded.spec)}"
        )
    if module is None:
        return found
    if args is None:
        args = {} if recorded is None else recorded.args
    foreign: dict[str, Any] = {_FIELDS[network]: Foreign(module, dict(args))}
    return replace(found, architecture=replace(found.architecture, **foreign))


def _config_naming(recorded: Foreign, path: Path, file: Path, network: Network) -> Path | None:
    """Return ``config.yaml`` of the run whose folder is ``path``; None if it is not the folder of a run.

    Raises:
        InputError: it is invalid, does not name the class and the arguments that the checkpoint ``file``
            records, or the class's file does not exist.
    """
    from dcgan import settings  # here, because it needs packages that only the command line requires

    config, option = path / settings.CONFIG, _OPTIONS[network]
    if not config.is_file() or not (path / "checkpoints").is_dir():
        return None
    given = settings.Settings.of(settings.read_file(config), str(config))
    named = given.foreign_g if network == "generator" else given.foreign_d
    key, advice = option.removeprefix("--"), f"pass {option}-module"
    if named is None or named.spec != recorded.spec:
        value = None if named is None else named.spec
        raise InputError(
            f"{config} has {key}_module {value!r}, but {file} records {recorded.spec!r}: {advice}"
        )
    if named != recorded:
        raise InputError(
            f"{config} has {key}_args {named.args!r}, but {file} records {recorded.args!r}: {advice}"
        )
    where = Path(named.spec.rpartition(":")[0])
    if where.suffix == ".py" and not where.expanduser().is_file():
        raise InputError(
            f"{config} has {key}_module {named.spec!r}, and there is no such file as seen from {Path.cwd()}: "
            f"change to the folder in which the run was trained, or {advice}"
        )
    return config


def load_foreign(
    module: nn.Module, state: Mapping[str, Any], file: Path, network: Network, foreign: Foreign
) -> None:
    """Load a file's weights into a network of the user's. Raises CheckpointError if they do not fit."""
    try:
        module.load_state_dict(state)
    except Exception as error:  # the user's load_state_dict may raise anything
        why = textwrap.shorten(one_line(error), 300, placeholder=" …")
        raise CheckpointError(
            f"{file} does not fit {_OPTIONS[network]}-module {foreign.spec!r}: {why}"
        ) from error


def state_of_foreign(path: Path | str, network: Network) -> tuple[Mapping[str, Any], Path]:
    """Return the weights in a file for a network of the user's, and the file.

    The file is a plain state dict, a safetensors file, or a run or checkpoint as for :func:`read`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state dict at its top.
    """
    file = find(Path(path))
    if _is_safetensors(file):
        return _read_safetensors(file)[0], file
    content = checkpoint.load(file, whole=zipfile.is_zipfile(file))
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        return _from_checkpoint(checkpoint.parse(content, file), network, True, file).state, file
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} is not a state dict, in which every value is a tensor")
    return content, file


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
    if which == "last" and (path / HUB_FILE).is_file():
        return path / HUB_FILE
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".ckpt", SAFETENSORS))
    hint = f"; pass one of its files, for example {others[-1]}" if others else ""
    raise CheckpointError(f"{path} has no checkpoint of a run{hint}")


def _from_checkpoint(content: checkpoint.Checkpoint, network: Network, ema: bool, file: Path) -> Pretrained:
    average, decay = content.ema if network == "generator" else None, content.config.get("ema")
    return Pretrained(
        file,
        network,
        content.architecture,
        state=average if ema and average is not None else getattr(content, network),
        averaged=ema and average is not None,
        has_average=average is not None,
        decay=decay if average is not None and isinstance(decay, float) else None,
        epoch=content.epoch + bool(content.batch),  # it counts only complete ones
        step=content.step,
    )


def _from_foreign_safetensors(
    state: Mapping[str, Any], metadata: Mapping[str, str], network: Network, file: Path
) -> Pretrained:
    """Read what :meth:`Pretrained.metadata` has written."""
    try:
        held: Any = metadata["network"]
        check_choice("network", held, get_args(Network))
        sizes: dict[str, Any] = {name: int(metadata[name]) for name in _SIZES}
        sizes[_FIELDS[held]] = Foreign(metadata[CLASS], json.loads(metadata["args"]))
        architecture = Architecture(**sizes)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file} has damaged metadata: {one_line(error)}") from error
    if held != network:
        raise CheckpointError(
            f"{file} holds the weights of a {held.capitalize()}, not of a {network.capitalize()}"
        )
    return Pretrained(file, network, architecture, state)


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
