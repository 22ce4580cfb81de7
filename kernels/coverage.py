"""Where a network's own modules are faster: no engine has kernels, or they have too little to do."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import cpu, ops

# Images from which a library's bfloat16 convolutions on AMX are faster than the native engine's in float32:
# 1.2 to 1.4 times slower at 8, 0.9 to 1.1 at 64.
AMX_IMAGES = 32
# Multiply-adds of a forward, for each thread, below which an op's overhead in training (half a millisecond
# forward and backward) is more than its kernels save: on two threads, fast networks were 0.6 to 1.1 times as
# fast as eager below twice that, and 1.03 times or more above.
SMALL_MACS = 128e6


def why_plain(x: Tensor, training: bool) -> str:
    """Why no engine's kernels are for x, under autocast for what x becomes; '' if one's are.

    It looks at the device and the dtype, not at the layers. Where an engine is forced, that one is to run.

    Args:
        x: the network's input, [N, ...].
        training: whether there are batch statistics, or derivatives, which only the training kernels have.
    """
    if ops.engine() != "auto":
        return ""
    device, dtype = x.device, x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    compiling = torch.compiler.is_compiling()
    if device.type == "cuda" and not compiling:
        from . import gpu

        missing = gpu.why_not_here(device, dtype)
        return "" if missing is None else f"triton: {missing}"
    why: str = _why_plain(device.type, dtype, training)
    if why or device.type != "cpu" or dtype == torch.float32 or compiling:
        return why
    if x.shape[0] >= AMX_IMAGES and _on_amx(dtype):
        return f"native: {_name(dtype)} is faster on AMX, which its kernels do not use"
    return ""


def why_small(x: Tensor, macs: Callable[[], float]) -> str:
    """Why the multiply-adds of a forward are too few for the training kernels of x's device; '' if not."""
    if x.device.type != "cpu" or ops.engine() != "auto" or torch.compiler.is_compiling():
        return ""
    found, enough = macs(), SMALL_MACS * torch.get_num_threads()
    if found >= enough:
        return ""
    return (
        f"native: training with {found / 1e6:.0f} million multiply-adds a forward is faster by PyTorch, "
        f"from {enough / 1e6:.0f} million on by the kernels"
    )


@torch.compiler.assume_constant_result
def _why_plain(device: str, dtype: torch.dtype, training: bool) -> str:
    """What does not depend on the input, of which a compiled program looks at no more."""
    if device not in ("cpu", "cuda"):
        return f"no engine for {device} tensors"
    engine = "native" if device == "cpu" else "triton"
    half = dtype in (torch.float16, torch.bfloat16)
    if not (dtype == torch.float32 or (half and not (device == "cpu" and training))):
        return f"{engine}: the {'training ' if training else ''}kernels have no {_name(dtype)}"
    missing = cpu.problem() if device == "cpu" else None
    return "" if missing is None else f"native: {missing.splitlines()[0]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _on_amx(dtype: torch.dtype) -> bool:
    supported = {
        torch.bfloat16: torch.cpu._is_amx_tile_supported,
        torch.float16: torch.cpu._is_amx_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())
