"""Networks' state dicts within whatever a file holds.

A network is known by its layers and not by its name: it is whatever has a ``main.0.weight``, and all before
that is a prefix (``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, ``generator.``, …, in any
order and number).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dcgan import models
from dcgan.networks import Architecture

Network = Literal["generator", "discriminator"]

NAMES: dict[Network, frozenset[str]] = {
    "generator": frozenset(("generator", "gen", "netg", "g")),
    "discriminator": frozenset(("discriminator", "disc", "netd", "d", "critic")),
}
"""Words that name a network, in the keys of a file."""
AVERAGES = frozenset(("ema", "swa", "average", "averaged", "avg", "shadow"))
"""Words that name a moving average."""
COUNT = "n_averaged"
"""The key that ``torch.optim.swa_utils.AveragedModel`` has beside the network's."""
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Parts of a key that wrappers put in, even between a network's own."""


@dataclass(frozen=True)
class Found:
    """What may be a network's state, within what a file holds.

    Args:
        place: of its dict, as Python writes it after the content's name: ``["state_dict"]``.
        prefix: of its keys there, which ``state`` has no more.
        averaged: whether it is a moving average.
        network, architecture: None where it is no network of this project.
        why_not: what is wrong with it then.
    """

    place: str
    prefix: str
    state: Mapping[str, Any]
    averaged: bool = False
    network: Network | None = None
    architecture: Architecture | None = None
    why_not: str = ""

    @property
    def words(self) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", f"{self.place} {self.prefix}".lower()))

    def taken_from(self, content: str) -> str:
        """Python for this state dict alone, of Python for all that the file holds."""
        state = f"{content}{self.place}"
        if self.prefix:
            prefix = json.dumps(self.prefix)
            return f"{{k.removeprefix({prefix}): v for k, v in {state}.items() if k.startswith({prefix})}}"
        return state


def state_dicts(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict of named tensors within dicts, lists and tuples, with its place; the outer ones first."""
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


def networks(place: str, state: Mapping[str, Any], about: Mapping[str, str]) -> Iterator[Found]:
    """What in a dict of named tensors may be networks, a prefix each.

    Args:
        place: of the dict.
        state: the dict.
        about: what a safetensors file says of itself; whatever else has it empty.
    """
    prefixes = dict.fromkeys(prefix for key in state if (prefix := _prefix(key)) is not None)
    averages = tuple(key.removesuffix(COUNT) for key in state if key.split(".")[-1] == COUNT)
    owned: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for key, value in state.items():
        inner = {prefix: key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)}
        if inner:  # the longest, but main.0.weight is of the prefix '' and not of 'main.'
            prefix = max(inner, key=lambda one: (_unwrapped(inner[one]).startswith("main."), len(one)))
            owned[prefix][inner[prefix]] = value
    for prefix, own in owned.items():
        own.pop(COUNT, None)
        plain = {_unwrapped(key): value for key, value in own.items()}
        found = Found(place, prefix, plain if len(plain) == len(own) else own)
        averaged = bool(found.words & AVERAGES) or prefix.startswith(averages)
        try:
            network, architecture = _declared(about) if "network" in about else _recognised(found.state)
        except (ValueError, KeyError) as error:
            yield replace(found, why_not=str(error))
        else:
            yield replace(found, averaged=averaged, network=network, architecture=architecture)


def _prefix(key: str) -> str | None:
    """What precedes ``main`` in the key of a network's first weight, wrapped or not; None for other keys."""
    if not f".{_unwrapped(key)}".endswith(".main.0.weight"):
        return None
    return key[: f".{key}".rindex(".main.")]


def _unwrapped(key: str) -> str:
    return ".".join(word for word in key.split(".") if word not in WRAPPERS)


def chosen(found: list[Found], network: Network, ema: bool) -> list[Found]:
    """Those of ``found``, which are all of ``network``, that may be meant: several where nothing decides.

    The moving average, or with ``ema`` False what is none, goes first; then what is named after the network.
    """
    found = [one for one in found if one.averaged == ema] or found
    found = [one for one in found if one.words & NAMES[network]] or found
    different: list[Found] = []
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


def no_network(dicts: list[tuple[str, Mapping[str, Any]]]) -> str:
    """What is to be said of :func:`state_dicts` where none has a network."""
    place, state = max(dicts, key=lambda pair: len(pair[1]), default=("", {}))
    keys = ", ".join(list(state)[:4]) or "none"
    return (
        f"{place or 'it'} has no tensor main.0.weight; its keys are {keys}{', …' if len(state) > 4 else ''}"
    )


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
        raise ValueError("its main.0.weight is no tensor")
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
