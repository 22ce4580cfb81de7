"""The forward of a module as a list of steps, and the state that they were derived from.

``torch.fx`` runs a forward once with symbolic tensors and records what is called. Whatever is not a tensor is
then a constant of the record: attributes, globals, random numbers. :func:`trace` therefore accepts only code
whose record is the same at every call, and returns what the code has read (:class:`Guards`), so that a
:class:`Program` is discarded when any of it changes. Everything else raises :class:`Untraceable`:

* control flow on tensors, on their sizes, or on types (a symbolic tensor is no ``Tensor``);
* attributes that are set, and lists or dicts that are changed, while the forward runs;
* ``with`` and ``try``: a context such as ``torch.no_grad()`` would not be part of the record, and an
  ``except`` could catch an error of the tracer;
* calls of anything but PyTorch's functions and modules, a few of Python's own functions, and Python functions
  for which the same holds: random numbers, printing, other libraries;
* tensors that are made without an input, such as ``torch.randn(1)``.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .guards import CONSTANTS, Guards, Untraceable
from .introspection import CONTAINERS, HOOKS, is_leaf, plain_type, tracing_threads, why_called
from .programs import Attribute, Method, Program, Ref, Step, resolved
from .watching import ENTRANCES, Watch, is_of_forward

_IN_PLACE = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
)
"""Operators that Python would otherwise turn into others, which leave the tensor as it was."""


class _Value(fx.Proxy):
    """A symbolic tensor that also records operators such as ``+=``."""


class _Input(_Value):
    """An input of the forward: a trace holds for one number of dimensions, dtype and device."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, known: Mapping[str, Any]) -> None:
        super().__init__(node, tracer)
        vars(self).update(known)


def _known(tensor: Tensor) -> dict[str, Any]:
    """Return what a trace takes as constant of an input."""
    names = ("ndim", "dtype", "device", "is_cuda", "is_cpu")
    methods = ("dim", "ndimension", "is_floating_point")
    return {name: getattr(tensor, name) for name in names} | {
        name: functools.partial(_constantly, getattr(tensor, name)()) for name in methods
    }


def _constantly(value: Any) -> Any:
    return value


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in _IN_PLACE:
    setattr(_Value, f"__{_name}__", _in_place(_name))

_local = threading.local()
_lock = threading.Lock()  # torch.fx replaces nn.Module.__call__ while it traces


class _Shadow(nn.Module):
    """Stands in for a module that is traced through, with its class's methods; notes what they read."""

    def __init_subclass__(cls) -> None:
        """Keep the user's class from noticing that it is derived from."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return _local.watch.seen(self, name, value) if is_of_forward(sys._getframe(1)) else value

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return _local.watch.seen(self, name, value) if is_of_forward(sys._getframe(1)) else value

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"it sets the attribute {name}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"it deletes the attribute {name}")

    def _traced(self, *inputs: Any) -> Any:
        args, kwargs = resolved(_local.arguments, inputs)
        return self.forward(*args, **kwargs)


ENTRANCES |= {f.__code__ for f in (_Shadow._traced, _Shadow.__getattribute__, _Shadow.__getattr__)}

_MAX_INPUTS = 8
# torch.fx counts a function's arguments by its code.
_ENTRIES = [eval(f"lambda self, {names}: self._traced({names})") for names in (
    ", ".join(f"x{i}" for i in range(n)) for n in range(1, _MAX_INPUTS + 1)
)]  # fmt: skip


class _Tracer(fx.Tracer):
    traced_func_name = "_entry"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in _local.watch.through

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = [_known(tensor) for tensor in inputs]

    # torch.fx replaces these of nn.Module for all threads.

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() not in tracing_threads:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() not in tracing_threads:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Input(node, self, self._known.pop(0)) if node.op == "placeholder" else _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        own = (*self.root.parameters(), *self.root.buffers())
        if isinstance(a, Tensor) and not any(a is tensor for tensor in own):
            raise Untraceable("it uses a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)


def trace(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], opaque: set[int]) -> Program:
    """Trace ``module(*args, **kwargs)``, whose tensors are symbolic; everything else is constant.

    Of a tensor that it is given, the number of dimensions, the dtype and the device are constant too.

    Args:
        opaque: ids of the modules that are called rather than traced through.

    Raises:
        Untraceable: the record would not be the same at every call, or there is none.
    """
    inputs: list[Tensor] = []

    def symbolic(value: Any) -> Any:
        if isinstance(value, Tensor):
            inputs.append(value)
            return Ref(len(inputs) - 1)
        if not isinstance(value, CONSTANTS):
            raise Untraceable(f"it is given a {type(value).__qualname__}")
        return value

    template = tuple(map(symbolic, args)), {key: symbolic(value) for key, value in kwargs.items()}
    if not 1 <= len(inputs) <= _MAX_INPUTS:
        raise Untraceable(f"it takes {len(inputs)} tensors")
    guards = Guards()
    watch = Watch(guards)
    with _lock:
        _local.watch, _local.arguments = watch, template
        tracing_threads.add(threading.get_ident())
        try:
            root: nn.Module = _Shadows(module, opaque, watch, len(inputs)).of(module)
            tracer = _Tracer(inputs)
            try:
                with watch:
                    graph = tracer.trace(root)
            finally:
                vars(tracer).clear()  # what torch.fx has patched refers to itself, and to the tracer
        except Untraceable:
            raise
        except Exception as error:  # the forward's own code may raise anything when it meets symbolic tensors
            raise Untraceable(watch.reason or f"{type(error).__name__}: {error}") from error
        finally:
            del _local.watch, _local.arguments
            tracing_threads.clear()
            changed = watch.restore()
    if watch.reason:
        raise Untraceable(watch.reason)
    if changed or not guards.hold():
        raise Untraceable("it changes its own attributes")
    return _program(graph, root, watch, guards)


class _Shadows:
    """Makes shadows for a module and all those inside; ``watch`` learns what they stand for."""

    def __init__(self, root: nn.Module, opaque: set[int], watch: Watch, inputs: int) -> None:
        self._root, self._opaque, self._watch, self._inputs = root, opaque, watch, inputs
        self._made: dict[int, Any] = {}

    def of(self, own: nn.Module) -> Any:
        if id(own) in self._made or isinstance(own, torch.jit.ScriptModule):
            return self._made.get(id(own), own)
        watch, is_root, plain = self._watch, own is self._root, plain_type(own)
        bases = (_Shadow, plain) if plain is not nn.Module else (_Shadow,)
        kind = type(plain.__name__, bases, {"_entry": _ENTRIES[self._inputs - 1]})
        shadow: Any = object.__new__(kind)
        self._made[id(own)] = shadow
        watch.originals[id(shadow)] = own
        state = dict(own.__dict__)
        if is_root or not (is_leaf(own) or id(own) in self._opaque or why_called(own)):
            forward: Any = plain.forward
            if not issubclass(plain, CONTAINERS) and forward.__globals__["__name__"].startswith("torch."):
                raise Untraceable(f"the forward of {plain.__name__} is decorated")
            watch.guards.container(own, is_root)
            watch.know(forward)
            watch.through.add(id(shadow))
            state["_modules"] = {k: m if m is None else self.of(m) for k, m in own._modules.items()}
            state |= {hooks: type(state[hooks])() for hooks in HOOKS}  # of the root
        shadow.__dict__.update(state)
        return shadow


# --- from a graph to a program -----------------------------------------------------------------------------


def _program(graph: fx.Graph, root: nn.Module, watch: Watch, guards: Guards) -> Program:
    values: dict[fx.Node, Ref] = {}
    steps: list[Step] = []
    inputs, result = 0, None
    for node in graph.nodes:
        if node.op == "output":
            result = _referring(node.args[0], values)
            continue
        index = Ref(len(values))
        if node.op == "placeholder":
            inputs += 1
        else:
            name, call = _called(node, root, watch)
            args, kwargs = _referring(node.args, values), _referring(node.kwargs, values)
            steps.append(Step(name, call, args, kwargs, index))
        values[node] = index
    return Program(inputs, steps, result, guards)


def _referring(value: Any, values: Mapping[fx.Node, Ref]) -> Any:
    """Replace nodes in nested tuples, lists, dicts and slices by the values that they stand for."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, list):
        return [_referring(item, values) for item in value]
    if isinstance(value, tuple):
        items = [_referring(item, values) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {key: _referring(item, values) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_referring(part, values) for part in (value.start, value.stop, value.step)))
    if not isinstance(value, CONSTANTS):
        raise Untraceable(f"it uses a {type(value).__qualname__}")
    return value


def _called(node: fx.Node, root: nn.Module, watch: Watch) -> tuple[str, Callable[..., Any]]:
    if node.op == "call_module":
        found = root.get_submodule(str(node.target))
        return str(node.target), watch.originals.get(id(found), found)
    if node.op == "get_attr":
        *path, attribute = str(node.target).split(".")
        owner = root.get_submodule(".".join(path))
        return str(node.target), Attribute(watch.originals.get(id(owner), owner), attribute)
    if node.op == "call_method":
        return str(node.target), Method(str(node.target))
    assert callable(node.target)
    return node.name, node.target
