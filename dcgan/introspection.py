"""Whether calling a module runs its class's own forward and nothing else: then a kernel may run instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _nn_module

from .batchnorm import SyncBatchNorm2d

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold the hooks which run when it is called, or in its backward."""

# Methods that a call goes through. Set on an instance, they replace its class's.
_METHODS = (
    "forward",
    "_conv_forward",
    "_check_input_dim",
    "_call_impl",
    "_wrapped_call_impl",
    "_slow_forward",
)

LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Sequential, nn.Conv2d, nn.ConvTranspose2d),
    *(nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d),
    *(nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid),
)
"""Classes whose calls are understood, and may be replaced by kernels."""

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {layer: layer.forward for layer in LAYERS}
_CALLS = nn.Module.__call__, nn.Module._call_impl


def why_called(module: Any) -> str:
    """Why ``module`` has to be called: what else than its class's own forward would run. '' if nothing would.

    Its type has to be one of LAYERS exactly. Hooks that PyTorch runs on every module, and changes to
    nn.Module itself, are :func:`why_all_called`'s.
    """
    kind = type(module)
    own = _FORWARDS.get(kind)
    if own is None:
        return f"{kind.__name__} is not a layer that the ops express"
    about = module.__dict__
    if (
        about["_forward_hooks"]
        or about["_forward_pre_hooks"]
        or about["_backward_hooks"]
        or about["_backward_pre_hooks"]
    ):
        return "the module has hooks"
    for method in _METHODS:
        if method in about:
            return f"the module's {method} has been replaced"
    if kind.forward is not own:
        return f"{kind.__name__}.forward has been replaced"
    if about.get("_compiled_call_impl") is not None:
        return "the module is compiled"
    return ""


def why_all_called() -> str:
    """Why every module has to be called: something is set to run at each call of any. '' if nothing is."""
    if (
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    ):
        return "hooks are set on all modules"
    if torch.compiler.is_compiling():
        return ""
    if (nn.Module.__call__, nn.Module._call_impl) != _CALLS:
        return "nn.Module's call has been replaced"
    return ""


def tracing() -> str:
    """What is recording operators for a program that may know PyTorch's alone: its name, or ''."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    return ""
