"""Search for the state dicts of networks within the content of a file.

A network is recognised by its layers, not by its name: it is anything with a ``main.0.weight``, and
everything before that in the key is a prefix (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile,
``generator.``, …, in any order and number).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from dcgan import models
from dcgan.choices import Network
from dcgan.networks import Architecture

NAMES: dict[Network, frozenset[str]] = {
    "generator": frozenset(("generator", "gen", "netg", "g")),
    "discriminator": frozenset(("discriminator", "disc", "netd", "d", "critic")),
}
"""Words in a file's keys that name a network."""
AVERAGES = frozenset(("ema", "swa", "average", "averaged", "avg", "shadow"))
"""Words in a file's keys that name a moving average."""
AVERAGE_COUNT = "n_averaged"
"""The key that ``torch.optim.swa_utils.AveragedModel`` adds to the network's keys."""
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Components of a key that wrappers insert, even between those of the network."""


@dataclass(frozen=True)
class Candidate:
    """A possible state dict of a network within the content of a file.

    Args:
        place: Python expression for its dict, to be appended to the content's name: ``["state_dict"]``.
        prefix: prefix of its keys in that dict; ``state`` is without it.
        state: the state dict.
        averaged: whether it is a moving average.
        network, architecture: None if it is not a network of this project.
        defect: why it is not.
    """

    place: str
    prefix: str
    state: Mapping[str, Any]
    averaged: bool = False
    network: Network | None = None
    architecture: Architecture | None = None
    defect: str = ""

    @property
    def words(self) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", f"{self.place} {self.prefix}".lower()))

    def expression(self, content: str) -> str:
        """Return a Python expression for this state dict, given one for the content of the file."""
        state = f"{content}{self.place}"
        if self.prefix:
            prefix = json.dumps(self.prefix)
            return f"{{k.removeprefix({prefix}): v for k, v in {state}.items() if k.startswith({prefix})}}"
        return state


def state_dicts(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every dict of named tensors within dicts, lists and tuples with its place, outer ones first."""
    queue, seen = [("", content)], set()
    for place, value in queue:
        if id(value) in seen or not isinstance(value, Mapping | list | tuple):
            continue
        seen.add(id(value))
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        queue += [(f"{place}[{json.dumps(key)}]", v) for key, v in pairs if isinstance(key, str | int)]
        if isinstance(value, Mapping):
            state = {key: inner for key, inner in value.items() if isinstance(key, str)}
            if any(isinstance(inner, Tensor) for inner in state.values()):
                yield place, state


def candidates(place: str, state: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[Candidate]:
    """Yield the possible networks in a dict of named tensors, one for each prefix.

    Args:
        place: place of the dict.
        state: the dict.
        metadata: metadata of a safetensors file; empty for other files.
    """
    prefixes = dict.fromkeys(prefix for key in state if (prefix := _prefix(key)) is not None)
    averages = tuple(key.removesuffix(AVERAGE_COUNT) for key in state if key.split(".")[-1] == AVERAGE_COUNT)
    owned: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for key, value in state.items():
        inner = {prefix: key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)}
        if inner:  # the longest prefix wins, but main.0.weight has the prefix '' and not 'main.'
            prefix = max(inner, key=lambda one: (_unwrapped(inner[one]).startswith("main."), len(one)))
            owned[prefix][inner[prefix]] = value
    for prefix, own in owned.items():
        own.pop(AVERAGE_COUNT, None)
        plain = {_unwrapped(key): value for key, value in own.items()}
        found = Candidate(place, prefix, plain if len(plain) == len(own) else own)
        averaged = bool(found.words & AVERAGES) or prefix.startswith(averages)
        try:
            network, architecture = _declared(metadata) if "network" in metadata else _inferred(found.state)
            yield replace(found, averaged=averaged, network=network, architecture=architecture)
        except (ValueError, KeyError) as error:
            yield replace(found, defect=str(error))


def _prefix(key: str) -> str | None:
    """Return what precedes ``main`` in the key of a network's first weight, wrapped or not; else None."""
    if not f".{_unwrapped(key)}".endswith(".main.0.weight"):
        return None
    return key[: f".{key}".rindex(".main.")]


def _unwrapped(key: str) -> str:
    return ".".join(word for word in key.split(".") if word not in WRAPPERS)


def select(found: list[Candidate], network: Network, ema: bool) -> list[Candidate]:
    """Return the preferred candidates of ``found``, all of ``network``; several if the choice is ambiguous.

    Moving averages (with ``ema`` False, the others) are preferred, then those named after the network.
    """
    found = [one for one in found if one.averaged == ema] or found
    found = [one for one in found if one.words & NAMES[network]] or found
    different: list[Candidate] = []
    for one in found:
        if not any(_same(one.state, other.state) for other in different):
            different.append(one)
    return different


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(a, Tensor)
        and isinstance(b := other[key], Tensor)
        and (a.dtype, a.shape) == (b.dtype, b.shape)
        and torch.equal(a, b)
        for key, a in one.items()
    )


def describe_missing(dicts: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Explain why the result of :func:`state_dicts` contains no network."""
    place, state = max(dicts, key=lambda pair: len(pair[1]), default=("", {}))
    keys = ", ".join(list(state)[:4]) or "none"
    return (
        f"{place or 'it'} has no tensor main.0.weight; its keys are {keys}{', …' if len(state) > 4 else ''}"
    )


def _declared(metadata: Mapping[str, str]) -> tuple[Network, Architecture]:
    """Read the architecture from metadata. Raises ValueError or KeyError if it is invalid or incomplete."""
    network: Any = metadata["network"]
    if network not in get_args(Network):
        raise ValueError(f"its metadata names the network {network!r}")
    model: Any = metadata["model"]
    names = ("latent_dim", "channels", "image_size")
    sizes: dict[str, Any] = {name: int(metadata[name]) for name in names if name in metadata}
    if "features" in metadata:
        sizes["features_g" if network == "generator" else "features_d"] = int(metadata["features"])
    return network, Architecture(model, **sizes)


def _inferred(state: Mapping[str, Any]) -> tuple[Network, Architecture]:
    """Infer the architecture from shapes. Raises ValueError if the state is that of neither network."""
    first = state.get("main.0.weight")
    if not isinstance(first, Tensor):
        raise ValueError("its main.0.weight is not a tensor")
    if first.ndim == 2:
        raise ValueError(
            "main.0.weight belongs to a fully connected layer, from which the image size cannot be inferred; "
            "pass the run's checkpoint"
        )
    if "main.1.weight" in state:  # the second layer is BatchNorm in a Generator, LeakyReLU in a Discriminator
        sizes: dict[str, Any] = dict(models.Generator.sizes_of(state))
        return "generator", Architecture(features_g=sizes.pop("features"), **sizes)
    sizes = dict(models.Discriminator.sizes_of(state))
    return "discriminator", Architecture(features_d=sizes.pop("features"), **sizes)
