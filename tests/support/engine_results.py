"""Outputs and gradients of a call, by name: those of an engine, with its strides checked, and in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.reference import empty_gradient
from tests.support.float64_reference import GRADIENTS, expected_outputs, gradients, leaves, op
from tests.support.tolerance import Cotangents


def requiring_grad(call: ops.Call, wanted: tuple[str, ...] = GRADIENTS) -> ops.Call:
    return call._replace(
        **{name: t.detach().requires_grad_(name in wanted) for name, t in leaves(call).items()}
    )


def named_results(
    call: ops.Call, outputs: tuple[Tensor, Tensor, Tensor], given: Cotangents
) -> dict[str, Tensor]:
    """Name outputs, and the gradients of the arguments that require one."""
    inputs = {name: t for name, t in leaves(call).items() if t.requires_grad}
    names = ("y", "mean", "var") if call.stats else ("y",)
    found = {name: t.detach() for name, t in zip(names, outputs, strict=False)}
    return found | {f"d{name}": t for name, t in gradients(outputs, given, inputs).items()}


def results(
    call: ops.Call, transposed: bool, given: Cotangents, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Return outputs and the wanted gradients, from the current engine."""
    fresh = requiring_grad(call, wanted)
    return named_results(fresh, op(transposed)(*fresh), given)


def exact_results(call: ops.Call, transposed: bool, given: Cotangents) -> dict[str, Tensor]:
    """Return outputs and all gradients in float64, by autograd."""
    wide = requiring_grad(call._replace(**{name: t.double() for name, t in leaves(call).items()}))
    return named_results(wide, expected_outputs(wide, transposed), given)


def engine_results(
    engine: str, call: ops.Call, transposed: bool, given: Cotangents, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """Return one engine's outputs and wanted gradients; check that it ran, and shapes, dtypes and strides."""
    with ops.use_engine(engine), ops.recording() as choices:
        found = results(call, transposed, given, wanted)
    name = ops.NAMES[transposed]
    assert choices == [ops.Choice(name, engine, ""), ops.Choice(f"{name}_backward", engine, "")]
    assert found["y"].stride() == ops.empty(ops.check(call, transposed))[0].stride()
    for name, gradient in found.items():
        if name in ("y", "mean", "var"):
            continue
        argument = getattr(call, name[1:])
        assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype), name
        if name == "dx":
            assert gradient.stride() == empty_gradient(call.x).stride()
        elif name == "dweight":
            assert gradient.stride() == torch.empty_like(call.weight).stride()
    return found
