"""From a traced forward to pipelines: the modules that follow one another in it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import layers, tracing
from .guards import Untraceable
from .introspection import CONTAINERS, is_leaf, plain_type
from .pipeline import Pipeline
from .programs import Attribute, Method, Program, Ref, Step, references

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
Gain = tuple[int, int]
"""The number of convolutions that the kernels run, and minus the number of runs that they form."""


class Fusion(NamedTuple):
    """A traced forward whose modules form pipelines."""

    program: Program
    pipelines: list[Pipeline]
    gain: Gain


def fusion_of(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], freeze: Callable[[], None]
) -> Fusion:
    """Trace a module's forward and let its modules form pipelines.

    A module inside that cannot be traced through is called. ``freeze`` is that of the pipelines.

    Raises:
        Untraceable: the module's own forward cannot be traced.
    """
    try:
        return _fusion(tracing.trace(module, args, kwargs, set()), freeze)
    except Untraceable:
        opaque: set[int] = set()
        for inner in reversed(list(module.modules())):
            if inner is not module and plain_type(inner) not in CONTAINERS and not is_leaf(inner):
                try:
                    tracing.trace(inner, examples(inner), {}, opaque)
                except Untraceable:
                    opaque.add(id(inner))
        if not opaque:
            raise
    return _fusion(tracing.trace(module, args, kwargs, opaque), freeze)


def examples(module: nn.Module) -> list[Tensor]:
    """Return what stands for the arguments of a forward without default: maps, as most are."""
    try:
        parameters = list(inspect.signature(plain_type(module).forward).parameters.values())[1:]
    except (AttributeError, TypeError, ValueError) as error:  # of a ScriptModule, for example
        raise Untraceable(str(error)) from None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return [torch.empty(1, 1, 1, 1, device="meta") for _ in needed]


def _fusion(program: Program, freeze: Callable[[], None]) -> Fusion:
    """Replace runs of modules that follow one another, convolutions among them, by pipelines."""
    uses: dict[int, int] = {}
    for refs in (*(step.refs() for step in program.steps), references(program.result)):
        for ref in refs:
            uses[ref] = uses.get(ref, 0) + 1
    steps: list[Step] = []
    pipelines: list[Pipeline] = []
    convolutions = i = 0
    while i < len(program.steps):
        run, between, end = _run_from(program.steps, i, uses)
        covered = sum(not layers.why_not_fused(found) for _, found in run if isinstance(found, _CONVOLUTIONS))
        if not covered:
            steps.append(program.steps[i])
            i += 1
            continue
        first, last = program.steps[i], program.steps[end - 1]
        pipelines.append(Pipeline(run, freeze))
        steps += [*between, Step(run[0][0], pipelines[-1], first.args, {}, last.out)]
        convolutions += covered
        i = end
    fused = Program(program.inputs, steps, program.result, program.guards)
    return Fusion(fused, pipelines, (convolutions, -len(pipelines)))


def _run_from(
    steps: Sequence[Step], start: int, uses: Mapping[int, int]
) -> tuple[list[tuple[str, nn.Module]], list[Step], int]:
    """Return the modules that follow one another from a step on, the steps among them, and the next step.

    Each but the first takes the result of the one before, which nothing else reads. Only steps without
    effects may lie among them.
    """
    first = _as_module(steps[start])
    if not isinstance(first, _CONVOLUTIONS):
        return [], [], start
    run: list[tuple[str, nn.Module]] = [(steps[start].name, first)]
    between: list[Step] = []
    waiting: list[Step] = []
    end, out = start + 1, steps[start].out
    for i in range(start + 1, len(steps)):
        step = steps[i]
        if uses.get(out, 0) != 1:
            break
        if out not in step.refs() and _has_no_effect(step):
            waiting.append(step)
            continue
        module = _as_module(step)
        if module is None or step.args[0] != out:
            break
        run.append((step.name, module))
        between += waiting
        waiting, end, out = [], i + 1, step.out
    return run, between, end


def _has_no_effect(step: Step) -> bool:
    """Return whether it does not matter when a step runs: it reads an attribute, or a tensor's sizes."""
    return isinstance(step.call, Attribute) or step.call in (getattr, operator.getitem, *_SIZES)


_SIZES = tuple(Method(name) for name in ("size", "dim", "numel"))


def _as_module(step: Step) -> nn.Module | None:
    """Return a step that is a module of PyTorch, or an activation function, as a module of one tensor."""
    if not step.args or not isinstance(step.args[0], Ref):
        return None
    if isinstance(step.call, nn.Module):
        single = len(step.args) == 1 and not step.kwargs
        return step.call if single and is_leaf(step.call) else None
    found = _FUNCTIONS.get(step.call)
    if found is None or any(isinstance(value, Ref) for value in (*step.args[1:], *step.kwargs.values())):
        return None
    try:
        arguments = inspect.signature(found.parameters).bind(*step.args[1:], **step.kwargs).arguments
    except TypeError:
        return None
    return found.module(**arguments)


class _Function(NamedTuple):
    """What makes the module that computes the same as a function, or None, and the function's parameters."""

    module: Callable[..., nn.Module | None]
    parameters: Callable[..., Any]


def _none() -> None: ...
def _inplace(inplace: bool = False) -> None: ...
def _leaky(negative_slope: float = 0.01, inplace: bool = False) -> None: ...
def _leaky_(negative_slope: float = 0.01) -> None: ...


def _relu_() -> nn.Module:
    return nn.ReLU(inplace=True)


def _leaky_relu_(negative_slope: float = 0.01) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace=True)


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module | None:
    return None if training else nn.Identity()


_FUNCTIONS: dict[Any, _Function] = {
    torch.relu: _Function(nn.ReLU, _none),
    **dict.fromkeys((torch.relu_, functional.relu_), _Function(_relu_, _none)),
    **dict.fromkeys((torch.tanh, functional.tanh), _Function(nn.Tanh, _none)),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid), _Function(nn.Sigmoid, _none)),
    **dict.fromkeys((functional.dropout, functional.dropout2d), _Function(_dropout, _dropout)),
    functional.relu: _Function(nn.ReLU, _inplace),
    functional.leaky_relu: _Function(nn.LeakyReLU, _leaky),
    functional.leaky_relu_: _Function(_leaky_relu_, _leaky_),
    Method("relu"): _Function(nn.ReLU, _none),
    Method("relu_"): _Function(_relu_, _none),
    Method("tanh"): _Function(nn.Tanh, _none),
    Method("sigmoid"): _Function(nn.Sigmoid, _none),
}
