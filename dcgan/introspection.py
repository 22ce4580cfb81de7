"""Detect whether calling a module runs only its class's own forward, so that a kernel may run instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _nn_module

from .batchnorm import SyncBatchNorm2d

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold the hooks which run when it is called or in its backward."""

# Methods that a call goes through. Setting one on an instance overrides the class's. Every call of a network
# checks them in each module, so that why_eager writes the loop over them out.
_METHODS = frozenset(
    ("forward", "_conv_forward", "_check_input_dim", "_call_impl", "_wrapped_call_impl", "_slow_forward")
)

LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Sequential, nn.Conv2d, nn.ConvTranspose2d),
    *(nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d),
    *(nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid),
)
"""Classes whose calls may be replaced by kernels."""

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {layer: layer.forward for layer in LAYERS}
_CALLS = nn.Module.__call__, nn.Module._call_impl


def why_eager(module: Any) -> str:
    """Return why ``module`` has to be called; '' if only its class's own forward would run.

    Its type has to be exactly one of LAYERS. Global hooks and changes to nn.Module itself are covered by
    :func:`why_all_eager`.
    """
    kind = type(module)
    own = _FORWARDS.get(kind)
    if own is None:
        return f"{kind.__name__} is not supported by the fused ops"
    attributes = module.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return "the module has hooks"
    if (
        "forward" in attributes
        or "_conv_forward" in attributes
        or "_check_input_dim" in attributes
        or "_call_impl" in attributes
        or "_wrapped_call_impl" in attributes
        or "_slow_forward" in attributes
    ):
        return f"the module's {min(_METHODS & attributes.keys())} has been replaced"
    if kind.forward is not own:
        return f"{kind.__name__}.forward has been replaced"
    if attributes.get("_compiled_call_impl") is not None:
        return "the module is compiled"
    return ""


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
    if (nn.Module.__call__, nn.Module._call_impl) != _CALLS:
        return "nn.Module.__call__ or _call_impl has been replaced"
    return ""


def tracing() -> str:
    """Return the name of the active tracer, whose program may hold only PyTorch's operators, or ''."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    return ""
