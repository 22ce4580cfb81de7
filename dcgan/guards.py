"""What a traced forward has read: values that are compared, and :class:`Guards` that hold them."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .introspection import plain_type, why_called


class Untraceable(Exception):
    """The forward may do something else at its next call; the message says what."""


CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, type(Ellipsis)),
    *(torch.dtype, torch.device, torch.Size, torch.memory_format),
)
PACKAGES = ("torch", "math", "operator", "functools", "itertools")
"""Packages whose functions compute the same at every call, apart from what Watch rejects."""


class _Same:
    """Compares equal to the same object; keeps it alive, so that its address is not reused."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    __hash__ = object.__hash__


def is_package(value: Any) -> bool:
    """Return whether a value is one of PACKAGES, or a module inside."""
    return isinstance(value, types.ModuleType) and value.__name__.split(".")[0] in PACKAGES


def constant(value: Any) -> Any:
    """Return what equals the same of another constant if a forward cannot tell the two apart."""
    return type(value), repr(value) if isinstance(value, float | complex) else value  # 0.0 equals -0.0


def frozen(value: Any, name: str) -> Any:
    """Return what equals the same of another value if a forward cannot tell the two apart.

    Raises:
        Untraceable: the value is of a type that may change without notice.
    """
    if isinstance(value, CONSTANTS):
        return constant(value)
    if isinstance(value, list | tuple):
        return type(value), [frozen(item, name) for item in value]
    if isinstance(value, dict):
        return type(value), [(frozen(k, name), frozen(v, name)) for k, v in value.items()]
    if isinstance(value, types.FunctionType):
        return _Same(value), frozen(vars(value), name)
    if isinstance(value, type) and not _is_fixed(value):
        raise Untraceable(f"it reads the class {value.__qualname__}")
    if isinstance(value, nn.Module | Tensor | types.BuiltinFunctionType | type | property | staticmethod):
        return _Same(value)
    if is_package(value):
        return _Same(value)
    raise Untraceable(f"it reads {name}, a {type(value).__qualname__}")


def _is_fixed(kind: type) -> bool:
    """Return whether a class is one whose attributes a forward does not read, or that do not change."""
    fixed = kind.__module__.split(".")[0] in ("torch", "builtins") or hasattr(kind, "_fields")
    return fixed or issubclass(kind, nn.Module | BaseException)


def containers(value: Any) -> Iterator[Any]:
    """Yield a list or dict and those inside, in a function's attributes too."""
    if isinstance(value, types.FunctionType):
        value = vars(value)
    if isinstance(value, list | dict):
        yield value
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


_ABSENT = object()


def _state_of(module: Any, name: str) -> Any:
    """Return what a forward can tell of an attribute while it is traced. Raises Untraceable as frozen."""
    value = own(module, name)
    if isinstance(value, Tensor) and name not in module.__dict__:
        # A parameter or buffer, which the program's steps read at every call.
        return type(value), value.shape, value.dtype, value.device
    return frozen(value, f"{type(module).__name__}.{name}")


def own(module: Any, name: str) -> Any:
    """Look up an attribute as nn.Module does, without running a property; return _ABSENT if there is none."""
    state = module.__dict__
    if name in state:
        return state[name]
    for kind in ("_parameters", "_buffers", "_modules"):
        if name in state[kind]:
            return state[kind][name]
    for base in type(module).__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return _ABSENT


ModuleRef = weakref.ref[nn.Module]


def _namespace(of: Any) -> Mapping[str, Any]:
    return of if isinstance(of, dict) else vars(of)


def defaults_of(function: types.FunctionType) -> Any:
    return function.__defaults__, function.__kwdefaults__


class Guards:
    """The state that a trace has read, and whether it is still the same."""

    def __init__(self) -> None:
        # Weak references to modules, as those that hold the guards are among them; their children are held.
        self._containers: list[tuple[ModuleRef, list[Any], Any, bool]] = []
        self._reads: dict[tuple[int, str], tuple[ModuleRef, str, Any]] = {}
        self._globals: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._defaults: dict[int, tuple[types.FunctionType, Any]] = {}
        self._cells: list[tuple[types.CellType, Any]] = []

    def container(self, module: nn.Module, is_root: bool) -> None:
        """Depend on a module that is traced through: its children, its forward, and that it has no hooks.

        The root's hooks run around its forward, whatever they are.
        """
        children = list(module._modules.values())
        self._containers.append((weakref.ref(module), children, plain_type(module).forward, is_root))

    def read(self, module: nn.Module, name: str) -> None:
        """Depend on an attribute. Raises Untraceable as :func:`frozen`."""
        self._reads[id(module), name] = weakref.ref(module), name, _state_of(module, name)

    def variable(self, of: Any, name: str) -> None:
        """Depend on a global variable, or one of a module's or a class's own attributes.

        ``of`` is the globals, the module or the class. Raises Untraceable as :func:`frozen`.
        """
        self._globals[id(of), name] = of, name, frozen(_namespace(of).get(name), name)

    def defaults(self, function: types.FunctionType) -> None:
        """Depend on the defaults of a function's parameters. Raises Untraceable as :func:`frozen`."""
        self._defaults[id(function)] = function, frozen(defaults_of(function), function.__name__)

    def cell(self, cell: types.CellType, name: str) -> None:
        """Depend on a variable of an enclosing function. Raises Untraceable as :func:`frozen`."""
        self._cells.append((cell, frozen(cell.cell_contents, name)))

    def modules_hold(self) -> bool:
        """Return whether the modules that were traced through have the same children, and no hooks."""
        for ref, children, forward, is_root in self._containers:
            module = ref()
            if module is None or list(module._modules.values()) != children:
                return False
            if plain_type(module).forward is not forward or (not is_root and why_called(module)):
                return False
        return True

    def hold(self) -> bool:
        """Return whether nothing has changed."""
        if not self.modules_hold():
            return False
        with suppress(Untraceable):
            return (
                all(_state_of(ref(), name) == was for ref, name, was in self._reads.values())
                and all(
                    frozen(_namespace(of).get(name), name) == was for of, name, was in self._globals.values()
                )
                and all(frozen(defaults_of(function), "") == was for function, was in self._defaults.values())
                and all(frozen(cell.cell_contents, "") == was for cell, was in self._cells)
            )
        return False
