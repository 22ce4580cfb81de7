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

from .call import Backward, Call, output_shape
from .chain import arguments
from .ops import NAMES


def _forward(*args: Any, transposed: bool, out_val: Any, **kwargs: Any) -> int:
    return _call_flops(Call(*args, **kwargs), transposed)


def _call_flops(call: Call, transposed: bool) -> int:
    y = output_shape(call, transposed)
    return conv_flop_count(call.x.shape, call.weight.shape, y, transposed)  # type: ignore[arg-type]


def _backward(*args: Any, transposed: bool, out_val: Any, **kwargs: Any) -> int:
    """Count dgrad and wgrad, each with as many multiply-adds as fprop."""
    call = Backward(*args, **kwargs)
    need_x, need_weight, need_prologue, need_out_scale, _ = call.needs
    products = (need_x or need_prologue) + (need_weight or need_out_scale)
    forward = Call(call.x, call.weight, stride=call.stride, padding=call.padding)
    return products * _call_flops(forward, transposed)


def _chain(x: Tensor, *columns: Any, out_val: Any, **kwargs: Any) -> int:
    total = 0
    for stage in arguments(columns)[0]:
        call = Call(x, stage.weight, stride=stage.stride, padding=stage.padding)
        total += _call_flops(call, stage.transposed)
        x = x.new_empty(1).expand(output_shape(call, stage.transposed))
    return total


def register() -> None:
    """Register the formulas with FlopCounterMode; repeated calls are no-ops."""
    if torch.ops.dcgan.conv_chain in flop_registry:
        return
    for transposed, name in NAMES.items():
        for formula, op in ((_forward, name), (_backward, f"{name}_backward")):
            op_formula = functools.partial(formula, transposed=transposed)
            register_flop_formula(getattr(torch.ops.dcgan, op), get_raw=True)(op_formula)
    register_flop_formula(torch.ops.dcgan.conv_chain, get_raw=True)(_chain)
