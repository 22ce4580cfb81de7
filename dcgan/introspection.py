"""Detect whether calling a module runs only its class's own forward, so that a kernel may run instead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _nn_module
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .batchnorm import SyncBatchNorm2d

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold the hooks which run when it is called or in its backward."""

# Methods that a call goes through. Setting one on an instance overrides the class's. Every call of a network
# checks them in each module, so that why_eager writes the loop over them out.
_METHODS = frozenset(
    ("forward", "_conv_forward", "_check_input_dim", "_call_impl", "_wrapped_call_impl", "_slow_forward")
)

LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Conv2d, nn.ConvTranspose2d),
    *(nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d),
    *(nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid),
    *(nn.Identity, nn.Dropout, nn.Dropout2d),
)
"""Classes whose calls may be replaced by kernels."""

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {layer: layer.forward for layer in LAYERS}
_CALLS = nn.Module.__call__, nn.Module._call_impl


def why_eager(module: Any) -> str:
    """Return why ``module`` has to be called; '' if only its class's own forward would run.

    Its type has to be exactly one of LAYERS, or one of these with tensors that PyTorch computes from others
    (:func:`computes_weight`). Global hooks and changes to nn.Module itself are covered by
    :func:`why_all_eager`.
    """
    kind = type(module)
    own = _FORWARDS.get(kind)
    if own is None:
        kind = _parametrized_type(module)
        own = _FORWARDS.get(kind)
        if own is None:
            return f"{kind.__name__} is not supported by the fused ops"
    why = why_called(module)
    if why and not (why == _HAS_HOOKS and _computes_weight_by_hook(module)):
        return why
    if type(module).forward is not own:
        return f"{kind.__name__}.forward has been replaced"
    return ""


_HAS_HOOKS = "the module has hooks"


def why_called(module: nn.Module) -> str:
    """Return why calling ``module`` would run more than its class's own forward, or another; else ''."""
    attributes = module.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return _HAS_HOOKS
    if (
        "forward" in attributes
        or "_conv_forward" in attributes
        or "_check_input_dim" in attributes
        or "_call_impl" in attributes
        or "_wrapped_call_impl" in attributes
        or "_slow_forward" in attributes
    ):
        return f"the module's {min(_METHODS & attributes.keys())} has been replaced"
    if attributes.get("_compiled_call_impl") is not None:
        return "the module is compiled"
    return ""


# --- weights that are computed ------------------------------------------------------------------------------

_WEIGHT_HOOKS = (SpectralNorm, WeightNorm)


def _parametrized_type(module: nn.Module) -> type[nn.Module]:
    """Return the class that torch.nn.utils.parametrize has derived the module's from; else its class."""
    kind = type(module)
    if "parametrizations" in module._modules and kind.__name__.startswith("Parametrized"):
        return kind.__base__  # type: ignore[return-value]
    return kind


def _computes_weight_by_hook(module: nn.Module) -> bool:
    """Return whether the module's only hooks are those of torch.nn.utils.spectral_norm or weight_norm."""
    state = module.__dict__
    return (
        all(type(hook) in _WEIGHT_HOOKS for hook in state["_forward_pre_hooks"].values())
        and not any(state[hooks] for hooks in HOOKS if hooks != "_forward_pre_hooks")
        and not state["_forward_pre_hooks_with_kwargs"]
    )


def computes_weight(module: nn.Module) -> bool:
    """Return whether a layer's weight is computed at each call, as spectral and weight norm do."""
    return bool(module.__dict__["_forward_pre_hooks"]) or type(module) not in _FORWARDS


def compute_weight(module: nn.Module) -> None:
    """Run the hooks that compute the module's weight, where it has them; they ignore its input."""
    for hook in module.__dict__["_forward_pre_hooks"].values():
        hook(module, ())


tracing_threads: set[int] = set()
"""The thread that runs :mod:`.tracing`, for which alone torch.fx then means to replace nn.Module.__call__."""


def why_all_eager() -> str:
    """Return why every module has to be called, for example a global hook; '' if there is no such reason."""
    if (
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    ):
        return "hooks are registered on all modules"
    if torch.compiler.is_compiling():
        return ""
    if (nn.Module.__call__, nn.Module._call_impl) != _CALLS and tracing_threads <= {threading.get_ident()}:
        return "nn.Module.__call__ or _call_impl has been replaced"
    return ""


def tracing() -> str:
    """Return the name of the active tracer, whose program may hold only PyTorch's operators, or ''."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    return ""


# --- what a module is -------------------------------------------------------------------------------------

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""PyTorch's modules that only contain others."""


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, of a fused one that which it was made from."""
    found: type[nn.Module] = vars(type(module)).get("_fused_from", type(module))  # not that of a base class
    return found


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one of PyTorch's that compute, or derived from one.

    The forward of PyTorch's modules reads their attributes, and so may one that is derived from it.
    """
    for kind in plain_type(module).__mro__:
        if kind.__module__.startswith("torch.nn."):
            return kind not in (*CONTAINERS, nn.Module)
    return False
