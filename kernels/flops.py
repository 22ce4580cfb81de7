"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

They follow aten's formula for convolutions: two FLOPs per multiply-add of the direct algorithm, even where a
faster one does fewer, and none for a prologue or an epilogue.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from .chain import arguments, specs
from .ops import NAMES
from .spec import Backward, Call, ConvSpec, specify


def _spec_flops(spec: ConvSpec) -> int:
    x = spec.images, *spec.x.size
    return conv_flop_count(x, spec.weight, spec.shape, spec.transposed)  # type: ignore[arg-type]


def _forward(*args: Any, transposed: bool, out_val: Any, **kwargs: Any) -> int:
    return _spec_flops(specify(Call(*args, **kwargs), transposed))


def _backward(*args: Any, transposed: bool, out_val: Any, **kwargs: Any) -> int:
    """Count dgrad and wgrad, each with as many multiply-adds as fprop."""
    call = Backward(*args, **kwargs)
    need_x, need_weight, need_prologue, need_out_scale, _ = call.needs
    products = (need_x or need_prologue) + (need_weight or need_out_scale)
    return products * _spec_flops(specify(call, transposed))


def _chain(x: Tensor, *columns: Any, out_val: Any, **kwargs: Any) -> int:
    return sum(map(_spec_flops, specs(x, *arguments(columns))))


def register() -> None:
    """Register the formulas with FlopCounterMode; repeated calls are no-ops."""
    if torch.ops.dcgan.conv_chain in flop_registry:
        return
    for transposed, name in NAMES.items():
        for formula, op in ((_forward, name), (_backward, f"{name}_backward")):
            op_formula = functools.partial(formula, transposed=transposed)
            register_flop_formula(getattr(torch.ops.dcgan, op), get_raw=True)(op_formula)
    register_flop_formula(torch.ops.dcgan.conv_chain, get_raw=True)(_chain)
