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

from . import train_chain
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


def _train(x: Tensor, *columns: Any, out_val: Any, **kwargs: Any) -> int:
    return sum(map(_spec_flops, train_chain.specs(train_chain.call_of(x, *columns, **kwargs))))


def _train_backward(*args: Any, out_val: Any, **kwargs: Any) -> int:
    """Count the wgrads that are needed, and the dgrads down to the first layer that needs one."""
    call = train_chain.backward_call(*args, **kwargs)
    products, below = 0, call.need_x
    for i, spec in enumerate(train_chain.specs(call.forward)):
        products += (below + call.need_weight[i]) * _spec_flops(spec)
        below = below or call.need_weight[i] or call.need_gamma[i] or call.need_beta[i]
    return products


def register() -> None:
    """Register the formulas with FlopCounterMode; repeated calls are no-ops."""
    if torch.ops.dcgan.conv_chain in flop_registry:
        return
    for transposed, name in NAMES.items():
        for formula, op in ((_forward, name), (_backward, f"{name}_backward")):
            op_formula = functools.partial(formula, transposed=transposed)
            register_flop_formula(getattr(torch.ops.dcgan, op), get_raw=True)(op_formula)
    register_flop_formula(torch.ops.dcgan.conv_chain, get_raw=True)(_chain)
    register_flop_formula(torch.ops.dcgan.train_chain, get_raw=True)(_train)
    register_flop_formula(torch.ops.dcgan.train_chain_backward, get_raw=True)(_train_backward)
