"""Observe the code of a forward while it is traced, and refuse what its record would get wrong."""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import operator
import sys
import types
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .guards import PACKAGES, Guards, Untraceable, containers, defaults_of
from .guards import own as own_attribute
from .introspection import plain_type

ENTRANCES: set[types.CodeType] = {nn.Module._call_impl.__code__}
"""What calls a forward's own code: a module, and what :mod:`.tracing` adds."""
_OWN = {f"{__package__}.{name}" for name in ("guards", "programs", "tracing", "watching")}


def _is_own(frame: types.FrameType) -> bool:
    """Return whether a frame is one of PyTorch, or of what traces."""
    name = frame.f_globals.get("__name__", "")
    return name in _OWN or bool(name.split(".")[0] == "torch")


def is_of_forward(frame: types.FrameType | None) -> bool:
    """Return whether a frame belongs to a forward, or to what that calls outside of PyTorch."""
    if frame is None or _is_own(frame):
        return False
    while frame is not None and not _is_own(frame):
        frame = frame.f_back
    return frame is not None and frame.f_code in ENTRANCES


# Functions of Python that compute the same at every call. Not isinstance, type and hasattr, which see that a
# symbolic tensor is no tensor.
_BUILTINS = {
    *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "getattr", "int", "len"),
    *("list", "map", "max", "min", "pow", "range", "reversed", "round", "set", "slice", "sorted", "str"),
    *("sum", "super", "tuple", "zip", "True", "False", "None", "Ellipsis", "NotImplementedError"),
    *("AssertionError", "Exception", "KeyError", "RuntimeError", "TypeError", "ValueError"),
}
_OPCODES = {
    **dict.fromkeys(("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"), "a with statement"),
    **dict.fromkeys(("SETUP_FINALLY", "PUSH_EXC_INFO"), "a try statement"),
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), "an assignment to an attribute"),
    **dict.fromkeys(("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"), "an assignment to an item"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "an assignment to a global variable"),
    **dict.fromkeys(("BEFORE_ASYNC_WITH", "GET_AWAITABLE"), "an asynchronous call"),
}


@functools.cache
def _overridable() -> set[Any]:
    """Return PyTorch's functions of tensors."""
    functions = torch.overrides.get_overridable_functions().values()
    return {function for found in functions for function in found if isinstance(function, Hashable)}


_READING = ("copy", "count", "get", "index", "items", "keys", "values")
"""Methods of lists and dicts that leave them as they are."""
_OWNERS = (list, tuple, dict, set, str, int, float, range, type, Tensor, fx.Proxy, nn.Module)
"""Types whose methods in C compute the same at every call, or change what nothing else sees."""
# Modules of PyTorch with functions in Python that a forward may call.
_FUNCTIONAL = (
    *("torch.nn.functional", "torch.functional", "torch.nn.modules", "torch._tensor", "torch._VF"),
    *("torch.fx", "torch._jit_internal", "torch.overrides", "torch.nn.utils.parametrize"),
)


class Watch(TorchFunctionMode):
    """Observes the code of a forward while it is traced, and notes why its record may not be kept.

    It sees each function that is called from the forward's own code (``sys.setprofile``), each function of
    PyTorch that gets no symbolic tensor (a torch function mode), and each attribute that is read
    (by the shadows of :mod:`.tracing`).
    """

    def __init__(self, guards: Guards) -> None:
        super().__init__()
        self.guards, self.reason = guards, ""
        self.originals: dict[int, nn.Module] = {}
        self.through: set[int] = set()  # the shadows whose modules are traced through
        self._functions: dict[types.CodeType, set[types.FunctionType]] = {}
        self._inner: set[types.CodeType] = set()  # of functions made by the forward, whose variables are its
        self._seen: set[types.CodeType] = set()
        self._shared: dict[int, tuple[Any, Any]] = {}  # lists and dicts that outlive the call, and copies

    def __enter__(self) -> Watch:
        profile: Any = sys.getprofile()
        self._before = profile, gc.isenabled()
        if hasattr(profile, "disable"):  # one in C, which only it can enable again
            profile.disable()
        gc.disable()  # a collection may run code that has nothing to do with the forward
        super().__enter__()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        super().__exit__(*error)
        profile, collects = self._before
        if collects:
            gc.enable()
        if hasattr(profile, "enable"):
            profile.enable()
        else:
            sys.setprofile(profile)

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(issubclass(kind, fx.Proxy) for kind in kinds) and not _is_getter(func):
            self._reject(f"it calls {getattr(func, '__name__', func)} without an input")
            raise Untraceable(self.reason)
        return func(*args, **kwargs)

    def seen(self, shadow: nn.Module, name: str, value: Any) -> Any:
        """Note an attribute that the forward reads, and return what it gets."""
        own = self.originals.get(id(shadow))
        if own is None or (name.startswith("__") and name != "__dict__"):
            return value
        try:
            self.guards.read(own, name)
        except Untraceable as found:
            self._reject(str(found))
            raise
        static = own_attribute(own, name)
        for function in (static, getattr(static, "fget", None), getattr(static, "__func__", None)):
            self.know(function)
        self._share(value)
        return value

    def know(self, function: Any) -> None:
        """Note a function that the forward may call: of its frames, only the code is seen."""
        if isinstance(function, types.FunctionType):
            self._functions.setdefault(function.__code__, set()).add(function)
            if function.__code__ in self._seen:
                self._depend_on(function)

    def _depend_on(self, function: types.FunctionType) -> None:
        """Depend on the variables that a function has from enclosing ones, and on its defaults."""
        self._share(defaults_of(function))
        self.guards.defaults(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self.guards.cell(cell, name)
                self._share(cell.cell_contents)

    def _share(self, value: Any) -> None:
        for container in containers(value):
            self._shared.setdefault(id(container), (container, container.copy()))

    def restore(self) -> bool:
        """Undo changes of lists and dicts that outlive the call; return whether there were any."""
        changed = False
        for container, was in self._shared.values():
            items, before = (list(c.items()) if isinstance(c, dict) else c for c in (container, was))
            if len(items) != len(before) or not all(map(operator.is_, _flat(items), _flat(before))):
                changed = True
                container.clear()
                container.update(was) if isinstance(container, dict) else container.extend(was)
        return changed

    def _reject(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if self.reason or frame.f_code is _EXIT:
            return
        try:
            if event == "call":
                if is_of_forward(frame):
                    self._check_frame(frame)
                elif _is_own(frame) and is_of_forward(frame.f_back):
                    self._check_torch(frame)
            elif event == "c_call" and is_of_forward(frame):
                self._check_builtin(arg)
        except Untraceable as found:
            self._reject(str(found))
            raise  # before the function runs

    def _check_torch(self, frame: types.FrameType) -> None:
        """Check a function of PyTorch, in Python, that the forward calls."""
        name = frame.f_globals.get("__name__", "")
        if name not in _OWN and not f"{name}.".startswith(tuple(f"{m}." for m in _FUNCTIONAL)):
            raise Untraceable(f"it calls {name}.{frame.f_code.co_name}")

    def _check_builtin(self, function: Any) -> None:
        """Check a function in C that the forward calls."""
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", str(function))
        if owner is None or isinstance(owner, types.ModuleType):
            package = str(getattr(function, "__module__", None) or getattr(owner, "__name__", "")).lstrip("_")
            if package.split(".")[0] == "torch":  # others tell of modes and settings, or change them
                accepted = function in _overridable()
            else:
                accepted = package in PACKAGES or (package == "builtins" and name in _BUILTINS)
        else:
            package = getattr(type(owner), "__module__", "").split(".")[0]
            accepted = isinstance(owner, _OWNERS) or package == "torch"
            if id(owner) in self._shared and name not in _READING:
                raise Untraceable(f"it calls {name} of a {type(owner).__name__} that outlives the call")
        if not accepted:
            raise Untraceable(f"it calls {name}")

    def _check_frame(self, frame: types.FrameType) -> None:
        """Check a function of the forward's own code, and note the variables that it reads."""
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        own = self.originals.get(id(first))
        if own is not None:  # a method, perhaps found by super()
            bases = plain_type(own).__mro__
            for base in bases:
                for name, value in list(vars(base).items()):
                    if isinstance(value, types.FunctionType) and value.__code__ is code:
                        for earlier in bases[: bases.index(base) + 1]:  # which may come to override it
                            self.guards.variable(earlier, name)
                        self.know(value)
        if code in self._seen:
            return
        self._seen.add(code)
        self._inner.update(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        self._check_variables(frame)
        functions = self._functions.get(code, set())
        free = [name for name in code.co_freevars if name != "__class__"]
        if not functions and code not in self._inner and free:
            raise Untraceable(f"it reads {free[0]}, a variable of an enclosing function")
        for function in functions:
            self._depend_on(function)

    def _check_variables(self, frame: types.FrameType) -> None:
        code, variables, enclosing = frame.f_code, frame.f_globals, frame.f_locals
        value: Any = None  # of the variable that the last instruction has read
        for instruction in dis.get_instructions(code):
            opname, name = instruction.opname, instruction.argval
            if opname in _OPCODES:
                raise Untraceable(f"it has {_OPCODES[opname]}")
            if opname in ("STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars:
                raise Untraceable(f"it assigns to {name}, a variable of an enclosing function")
            if opname == "IMPORT_NAME" and name.split(".")[0] not in PACKAGES:
                raise Untraceable(f"it imports {name}")
            if opname in ("LOAD_ATTR", "LOAD_METHOD"):
                value = self._check_attribute(value, name)
                continue
            value = enclosing.get(name) if opname == "LOAD_DEREF" and name in code.co_freevars else None
            if opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
                continue
            if name in variables:
                self.guards.variable(variables, name)
                value = variables[name]
                self._share(value)
                self.know(value)
            elif name not in _BUILTINS and hasattr(builtins, name):
                raise Untraceable(f"it calls {name}")

    def _check_attribute(self, of: Any, name: str) -> Any:
        """Check what is read of a variable that outlives the call, and return it; None if it is not one."""
        if name in ("__class__", "__dict__"):
            raise Untraceable(f"it reads {name}")
        if isinstance(of, types.ModuleType):
            self.guards.variable(of, name)
            return vars(of).get(name)
        if isinstance(of, type | types.FunctionType) and not of.__module__.startswith("torch"):
            raise Untraceable(f"it reads {name} of {of.__name__}")
        return None


_EXIT = Watch.__exit__.__code__


def _flat(items: Sequence[Any]) -> list[Any]:
    """Return the keys and values of a dict's items, or a list itself."""
    return [part for item in items for part in (item if isinstance(item, tuple) else (item,))]


def _is_getter(func: Any) -> bool:
    """Return whether a function only reads what a trace depends on, such as a parameter's shape."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name in ("shape", "dtype", "device", "ndim")
    return name in ("size", "dim", "numel", "ndimension")
