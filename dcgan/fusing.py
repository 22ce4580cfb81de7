"""Make a network of any class run its convolutional layers by the kernels: :func:`fuse`.

A fused module is the module it was made from, with another class: a subclass of its own that overrides
``forward``, and the methods through which weights change, so that prepacked weights are never stale. Two
kinds of modules are replaced:

* an ``nn.Sequential`` that contains convolutions: its modules are a :class:`.pipeline.Pipeline`;
* a module whose own ``forward`` can be traced (:mod:`.tracing`), if its modules then form longer runs than
  its parts would on their own: the steps between these runs are what the forward does there.

Where a trace does not hold (other arguments, state that has changed and cannot be traced again), the module's
own ``forward`` runs, with whatever inside it has been fused.
"""

from __future__ import annotations

import collections
import contextlib
import copyreg
import functools
import itertools
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from . import layers
from .guards import CONSTANTS, Untraceable, constant
from .introspection import is_leaf, why_all_eager
from .introspection import tracing as tracer_name
from .kernels import weight_cache
from .pipeline import Pipeline, Verdicts
from .programs import Program
from .runs import Fusion, Gain, examples, fusion_of

M = TypeVar("M", bound=nn.Module)


class Fused(nn.Module):
    """Base of all fused modules: keeps prepacked weights consistent with every change of the parameters.

    Its attributes' names are unlikely to be those of the class that it is mixed into.
    """

    _fused_from: ClassVar[type[nn.Module]]
    """The class of the module that this one was made from."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        if "_fused_from" not in vars(cls):  # else the user's class would register one that is not his
            super().__init_subclass__(**arguments)

    def _fused_state(self) -> State:
        """Return what is prepared for the module; copies and pickles of the module have their own."""
        found = self.__dict__.get("_fused_prepared")
        if found is None or found.module is not self:
            found = self.__dict__["_fused_prepared"] = State(self)
        return found

    def _fused_freeze(self) -> None:
        if not self.training:
            weight_cache.freeze(self, self._fused_state().constant_weights())

    def train(self: F, mode: bool = True) -> F:
        self._fused_discard()
        super().train(mode)
        self._fused_freeze()  # a compiled forward runs no Python and would not
        return self

    def _apply(self: F, fn: Callable[..., Any], recurse: bool = True) -> F:
        self._fused_discard()
        super()._apply(fn, recurse)
        self._fused_freeze()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._fused_discard()
        self._fused_freeze()  # the weights of the layers are loaded afterwards, which is detected
        super()._load_from_state_dict(*args, **kwargs)

    def _fused_discard(self) -> None:
        weight_cache.thaw(self)
        weight_cache.invalidate(self.parameters())

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or not isinstance(reduced[2], dict):  # type: ignore[attr-defined]
            return reduced
        state = {key: value for key, value in reduced[2].items() if key != "_fused_prepared"}
        plain = vars(type(self)).get("_fused_from")
        if plain is None:  # a class of the user's, derived from a fused one
            return (*reduced[:2], state, *reduced[3:])
        return (_restore, (plain,), state, *reduced[3:])


F = TypeVar("F", bound=Fused)


def _restore(plain: type[nn.Module]) -> nn.Module:
    """Return a fused module without attributes, to unpickle or copy one into."""
    return object.__new__(fused_class(plain))


_FORWARD = nn.Sequential.forward


class Sequential(Fused, nn.Sequential):
    """An ``nn.Sequential`` whose convolutional layers run by the kernels."""

    _fused_from = nn.Sequential

    def forward(self, input: Any) -> Any:
        if nn.Sequential.forward is not _FORWARD:  # replaced, for example by a profiler
            return super().forward(input)
        if torch.compiler.is_compiling() or not isinstance(input, Tensor):
            return self._fused_run(input)
        return self._fused_state().verdicts.run(
            input, self.training, lambda: _FORWARD(self, input), lambda: self._fused_run(input)
        )

    def _fused_run(self, x: Any, logits: bool = False, groups: int = 1) -> Any:
        """Return ``self(x)`` without hooks; with ``logits``, without its last module.

        With ``groups``, the result is that of one call for each of as many equal parts of x, in order.
        """
        pipeline = self._fused_pipeline(logits)
        if not (pipeline.is_flat or logits or groups > 1) and isinstance(x, Tensor):
            program = self._fused_state().program((x,), {})
            if program is not None:
                return program((x,))
        return pipeline(x, groups)

    def _fused_pipeline(self, logits: bool = False) -> Pipeline:
        """Return the modules as a pipeline; with ``logits``, without the last."""
        # Unlike in named_children(), repeated modules are repeated.
        modules: Any = list(self._modules.items())[: -1 if logits else None]
        if torch.compiler.is_compiling():
            return Pipeline(modules, lambda: None)
        return self._fused_state().pipeline(modules, logits)


class _Traced(Fused):
    """A module whose traced forward runs by the kernels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        plain = functools.partial(super().forward, *args, **kwargs)
        if torch.compiler.is_compiling() or not tensors:
            return plain()
        state = self._fused_state()

        def fused() -> Any:
            program = state.program(args, kwargs)
            return plain() if program is None else program(tensors)

        return state.verdicts.run(tensors[0], self.training, plain, fused)


_REGISTERED: dict[type[nn.Module], type[Fused]] = {nn.Sequential: Sequential}
_MADE: weakref.WeakKeyDictionary[type[nn.Module], weakref.ref[type[Fused]]] = weakref.WeakKeyDictionary()


def register(plain: type[nn.Module], fused: type[Fused]) -> None:
    """Let modules of class ``plain`` become ``fused``, whether or not they can be traced."""
    _REGISTERED[plain] = fused


def fused_class(plain: type[nn.Module]) -> type[Fused]:
    """Return the class of the modules that are made from those of class ``plain``."""
    if plain in _REGISTERED:
        return _REGISTERED[plain]
    made = _MADE.get(plain)
    found = None if made is None else made()
    if found is None:

        @functools.wraps(plain.forward)  # tools read its signature
        def forward(self: _Traced, *args: Any, **kwargs: Any) -> Any:
            return _Traced.forward(self, *args, **kwargs)

        own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
        found = type(plain.__name__, (_Traced, plain), {**own, "_fused_from": plain, "forward": forward})
        _MADE[plain] = weakref.ref(found)
    return found


# --- what is prepared for a module -------------------------------------------------------------------------

MAX_PROGRAMS = 4
"""Traces that a module keeps, for different arguments and states."""
MAX_TRACES = 16
"""Traces after which a module that keeps changing is not traced any more."""


class State:
    """The pipelines and programs of one fused module."""

    def __init__(self, module: Fused) -> None:
        self._module = weakref.ref(module)  # which holds the state
        self.freeze = functools.partial(_freeze, self._module)
        self.verdicts = Verdicts()
        self.why_not_traced = ""
        self._pipelines: dict[bool, Pipeline] = {}
        self._programs: list[tuple[Any, Fusion | None]] = []
        self._traces = 0

    @property
    def module(self) -> Fused | None:
        return self._module()

    def pipeline(self, modules: list[tuple[str, nn.Module]], logits: bool) -> Pipeline:
        """Return the pipeline of a Sequential's modules, with what it has prepared for these."""
        found = self._pipelines.get(logits)
        if found is None or found.modules != modules:
            found = self._pipelines[logits] = Pipeline(modules, self.freeze)
        return found

    def program(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program | None:
        """Return what runs instead of the module's forward, or None if that itself has to run."""
        module = self.module
        assert module is not None
        if tracer_name() or why_all_eager() or "_is_replica" in module.__dict__:  # DataParallel's, in threads
            return None
        if not all(isinstance(value, (Tensor, *CONSTANTS)) for value in (*args, *kwargs.values())):
            self.why_not_traced = "it is given other things than tensors and constants"
            return None
        key = tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items())
        for known, fusion in reversed(self._programs):
            if known == key and (fusion is None or fusion.program.guards.hold()):
                return None if fusion is None else fusion.program
        if self._traces >= MAX_TRACES:
            self.why_not_traced = f"its forward has been traced {MAX_TRACES} times"
            return None
        self._traces += 1
        fusion = None
        try:
            fusion = fusion_of(module, args, kwargs, self.freeze)
            self.why_not_traced = ""
            if isinstance(module, Sequential) and fusion.gain <= _gain_of_layers(module):
                fusion = None
        except Untraceable as error:
            self.why_not_traced = f"the forward of {type(module).__name__} cannot be traced: {error}"
        self._programs = [
            (known, one) for known, one in self._programs if one is None or one.program.guards.modules_hold()
        ]
        if len(self._programs) >= MAX_PROGRAMS:
            del self._programs[0]
        self._programs.append((key, fusion))
        return None if fusion is None else fusion.program

    def holding(self) -> list[bool]:
        """Return which of the programs still hold."""
        return [fusion is not None and fusion.program.guards.hold() for _, fusion in self._programs]

    def constant_weights(self) -> list[Tensor]:
        """Return the weights that may be frozen."""
        module = self.module
        found = [module._fused_pipeline()] if isinstance(module, Sequential) else []
        for _, fusion in self._programs:
            found += fusion.pipelines if fusion is not None else []
        return [weight for pipeline in found for weight in pipeline.constant_weights()]


def _freeze(module: weakref.ref[Fused]) -> None:
    """Freeze a module's weights, before they are packed."""
    found = module()
    if found is not None:
        found._fused_freeze()


def _kind(value: Any) -> Any:
    """Return what distinguishes an argument for which another trace is needed."""
    if isinstance(value, Tensor):
        return Tensor, value.ndim, value.dtype, value.device
    return constant(value)


# --- fuse --------------------------------------------------------------------------------------------------


def fuse(module: M, inplace: bool = False) -> M:
    """Return ``module`` with its convolutional layers run by the kernels.

    These are convolutions with a 4×4 kernel, stride 2 and padding 1, and those on or to a 1×1 map, of any
    width and with or without bias, each with the BatchNorm and the activation that follow it. They are found
    in every ``nn.Sequential``, and in every ``forward`` that calls modules and functions of PyTorch one after
    the other (:mod:`dcgan.tracing` says what it may contain). Everything else runs as it is, so that any
    network is accepted; :func:`dcgan.fast.explain` says for each layer what runs it, and why.

    The result has the same parameters, buffers, names, ``state_dict`` keys, hooks and results, can be copied,
    pickled, edited, moved, compiled and wrapped as before, and follows later changes of the modules inside.
    A pickle of it is read where this package is installed; its ``state_dict`` is read anywhere. For
    ``torch.jit.script`` take the plain network.

    Args:
        module: a network, or a part of one.
        inplace: fuse ``module`` itself. Otherwise it is left as it is, and the result is a network around its
            layers, which are shared: parameters, buffers, and the mode that ``train()`` and ``eval()`` set.

    Returns:
        The fused network: ``module`` itself if ``inplace``, or if there is nothing to fuse.

    Raises:
        TypeError: ``module`` is not a module, or wraps the one to be fused (DistributedDataParallel,
            DataParallel, the result of ``torch.compile``).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__qualname__}")
    if isinstance(module, DataParallel | DistributedDataParallel):
        raise TypeError(
            f"module must be the network in the {type(module).__name__}: "
            "fuse module.module, and wrap the result"
        )
    if "_orig_mod" in module._modules:
        raise TypeError("module must be the network that was compiled: fuse module._orig_mod, and compile it")
    chosen = to_be_fused(module)
    if not inplace:
        module, chosen = _copied(module, chosen)
    for found in chosen:
        with contextlib.suppress(TypeError):  # a class that cannot be derived from
            object.__setattr__(found, "__class__", fused_class(type(found)))
    for found in chosen:
        if isinstance(found, Fused):
            found._fused_state()
            found._fused_freeze()
    return module


def refresh(module: nn.Module) -> None:
    """Discard everything cached for the weights of ``module``, by this or any other network that shares them.

    This is needed only after an in-place edit that bypasses the tensor's version counter (``p.data``, a NumPy
    view, another process, a CUDA graph other than a TrainStep's) and changes so few elements that the sampled
    weights miss it; :mod:`dcgan.kernels.weight_cache` gives the probability. On a GPU in eval mode it is also
    needed after any such edit of a network whose layers run one by one, because of hooks, foreign layers or
    gradients.
    """
    for inner in module.modules():
        if isinstance(inner, Fused):
            inner._fused_discard()


def fingerprint(module: nn.Module) -> list[Any]:
    """Return what decides how a network runs, except tensors' values and memory and what hooks do."""
    modules = list(module.named_modules())
    found: list[Any] = [*layers.fingerprint(modules), [inner.training for _, inner in modules]]
    for _, inner in modules:
        found.append(list(map(id, inner._modules.values())))
        if isinstance(inner, Fused):
            found.append(inner._fused_state().holding())
    return found


def to_be_fused(module: nn.Module) -> list[Any]:
    """Return the modules inside, or itself, that :func:`fuse` would replace."""
    chosen: list[nn.Module] = []
    _choose(module, chosen, set())
    return chosen


def _choose(module: nn.Module, chosen: list[nn.Module], seen: set[int]) -> Gain:
    """Append what is to be fused of a module to ``chosen``, and return the gain."""
    if id(module) in seen or isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        return 0, 0
    seen.add(id(module))
    inner = _sum([_choose(child, chosen, seen) for child in module.children()])
    kind = type(module)
    if isinstance(module, Fused) or is_leaf(module) or kind in (nn.ModuleList, nn.ModuleDict):
        return inner
    own = _sum([_gain_of_layers(module), inner]) if isinstance(module, nn.Sequential) else inner
    with contextlib.suppress(Untraceable):
        own = max(own, fusion_of(module, examples(module), {}, lambda: None).gain)
    if own > inner or (kind in _REGISTERED and kind is not nn.Sequential):
        chosen.append(module)
    return own


def _sum(gains: Iterable[Gain]) -> Gain:
    convolutions, runs = zip((0, 0), *gains, strict=True)
    return sum(convolutions), sum(runs)


def _gain_of_layers(sequence: nn.Sequential) -> Gain:
    """Return the gain of a Sequential's own modules."""
    modules: Any = list(sequence._modules.items())
    fused = [layer.conv is not None for layer in layers.group(modules)]
    return sum(fused), -sum(now and not before for before, now in itertools.pairwise([False, *fused]))


def _copied(module: M, chosen: Sequence[nn.Module]) -> tuple[M, list[Any]]:
    """Copy the chosen modules and all around them, but no tensor and no other module.

    Returns:
        The copy of ``module``, and those of the chosen modules.
    """
    copies: dict[int, Any] = {}
    found: M = _copy_around(module, {id(one) for one in chosen}, copies)
    for own in [own for key, own in copies.items() if id(own) != key]:
        for name, value in vars(own).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                vars(own)[name] = _with_copies(value, copies)
    return found, [copies[id(one)] for one in chosen]


_REGISTRIES = (dict, collections.OrderedDict, set)


def _with_copies(value: Any, copies: Mapping[int, Any]) -> Any:
    """Replace modules that have been copied, in an attribute that lists them, or a method bound to one."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) in (list, tuple):
        found = type(value)(_with_copies(item, copies) for item in value)
    elif type(value) in (dict, collections.OrderedDict):
        found = type(value)((key, _with_copies(item, copies)) for key, item in value.items())
    else:
        return value
    before, after = (list(c.values()) if isinstance(c, dict) else c for c in (value, found))
    return value if all(map(operator.is_, before, after)) else found


def _copy_around(module: Any, chosen: set[int], copies: dict[int, Any]) -> Any:
    if id(module) in copies or not isinstance(module, nn.Module):
        return copies.get(id(module), module)
    children = {name: _copy_around(child, chosen, copies) for name, child in module._modules.items()}
    if id(module) not in chosen and all(child is module._modules[name] for name, child in children.items()):
        copies[id(module)] = module
        return module
    copies[id(module)] = own = object.__new__(type(module))
    for name, value in vars(module).items():
        # Copy nn.Module's containers, so that what is registered on one does not appear in the other.
        vars(own)[name] = value.copy() if name.startswith("_") and type(value) in _REGISTRIES else value
    for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]
        if hasattr(module, name):
            object.__setattr__(own, name, getattr(module, name))
    vars(own).pop("_fused_prepared", None)
    if vars(own).pop("_compiled_call_impl", None) is not None:
        warnings.warn(
            f"module is compiled, but the fused {type(module).__name__} is not: call compile() on it",
            stacklevel=4,
        )
    vars(own)["_modules"] = children
    return own
