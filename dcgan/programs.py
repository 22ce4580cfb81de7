"""A traced forward as a list of calls: :class:`Program`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .guards import Guards


class Ref(int):
    """The index of a value of a program, among a step's arguments."""


class Step(NamedTuple):
    """One call of a program."""

    name: str
    """The module's name, or one that describes the function."""
    call: Callable[..., Any]
    """A module, a function of PyTorch, or what reads an attribute."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int

    def refs(self) -> list[int]:
        """Return the values that it reads, as often as it does."""
        return references((self.args, self.kwargs))


def references(value: Any) -> list[int]:
    """Return the values that are referred to in nested tuples, lists, dicts and slices."""
    if isinstance(value, Ref):
        return [int(value)]
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, slice):
        value = value.start, value.stop, value.step
    elif not isinstance(value, list | tuple):
        return []
    return [ref for item in value for ref in references(item)]


def resolved(value: Any, values: Sequence[Any]) -> Any:
    """Replace each Ref by the value that it stands for."""
    if isinstance(value, Ref):
        return values[value]
    if isinstance(value, list | tuple):
        items = [resolved(item, values) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: resolved(item, values) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(resolved(part, values) for part in (value.start, value.stop, value.step)))
    return value


class Program:
    """A traced forward: steps on values that are numbered from the input tensors on."""

    def __init__(self, inputs: int, steps: Sequence[Step], result: Any, guards: Guards) -> None:
        self.inputs, self.steps, self.result, self.guards = inputs, list(steps), result, guards
        last: dict[int, int] = {}
        for i, step in enumerate(steps):
            last |= dict.fromkeys((*step.refs(), step.out), i)
        kept = set(references(result))
        self._free = [[v for v, i in last.items() if i == at and v not in kept] for at in range(len(steps))]
        self._size = inputs + len(steps) if not steps else max(step.out for step in steps) + 1

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """Run the steps; each value is released after its last use."""
        values: list[Any] = [*inputs, *[None] * (self._size - len(inputs))]
        del inputs
        for step, free in zip(self.steps, self._free, strict=True):
            args = resolved(step.args, values)
            values[step.out] = step.call(*args, **resolved(step.kwargs, values))
            del args
            for index in free:
                values[index] = None
        return resolved(self.result, values)


class Attribute:
    """Reads a parameter or buffer of a module at every call: it may be replaced by another."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = weakref.ref(module), name

    def __call__(self) -> Any:
        return getattr(self._module(), self._name)


class Method:
    """Calls a method of its first argument."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and other._name == self._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __call__(self, of: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(of, self._name)(*args, **kwargs)
