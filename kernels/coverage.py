"""Where a network's own PyTorch modules are faster: no engine covers it, or the work is too small."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import cpu, ops

# Batch size from which bfloat16 convolutions on AMX (oneDNN) are faster than the native engine's in float32:
# their measured time is 1.2 to 1.4 times the native engine's at 8 images, 0.9 to 1.1 times at 64.
AMX_MIN_IMAGES = 32
# Multiply-adds per forward and thread below which the ops' overhead in training (half a millisecond for
# forward and backward) exceeds what the kernels save: on two threads, fast networks ran at 0.6 to 1.1 times
# eager's speed below twice this number, and at 1.03 times or more above.
MIN_TRAINING_MACS = 128e6
MIN_LAYER_MACS = 4 * MIN_TRAINING_MACS  # of one or two layers, which gain little from being fused
# Batch size up to which a training step on a GPU runs D on real and generated images in one pass of twice the
# batch. Beyond, the kernels fill the GPU anyway, and the pass holds the activations of both halves at once.
MAX_IMAGES_TOGETHER = 256


def why_eager(x: Tensor, training: bool) -> str:
    """Return the reason why no engine's kernels should run on x; '' if one's should.

    Only the device and the dtype (under autocast, autocast's) are considered, not the layers. A forced engine
    always runs.

    Args:
        x: the network's input, [N, ...].
        training: whether batch statistics or derivatives are needed, which only the training kernels support.
    """
    if ops.engine() != "auto":
        return ""
    device, dtype = x.device, ops.autocast_dtype(x) or x.dtype
    compiling = torch.compiler.is_compiling()
    if device.type == "cuda" and not compiling:
        from . import gpu

        missing = gpu.why_not_here(device, dtype)
        return "" if missing is None else f"triton: {missing}"
    why: str = _why_eager(device.type, dtype, training)
    if why or device.type != "cpu" or dtype == torch.float32 or compiling:
        return why
    if x.shape[0] >= AMX_MIN_IMAGES and _on_amx(dtype):
        return f"native: {_name(dtype)} is faster on AMX, which its kernels do not use"
    return ""


def why_small(x: Tensor, macs: Callable[[], float], layers: int, what: str) -> str:
    """Return the reason why a forward is too small for x's engine; '' if it is large enough.

    Args:
        x: the input.
        macs: returns the multiply-adds of a forward.
        layers: the number of layers.
        what: the work that has to pay, in words.
    """
    if x.device.type != "cpu" or ops.engine() != "auto" or torch.compiler.is_compiling():
        return ""
    found, enough = macs(), (MIN_TRAINING_MACS if layers > 2 else MIN_LAYER_MACS) * torch.get_num_threads()
    if found >= enough:
        return ""
    return (
        f"native: {what} with {found / 1e6:.0f} million multiply-adds per forward is faster with PyTorch; "
        f"the kernels are faster from {enough / 1e6:.0f} million on"
    )


def _why_eager(device: str, dtype: torch.dtype, training: bool) -> str:
    """Return the part of the reason that does not depend on x's values or shape: a compile-time constant."""
    if device not in ("cpu", "cuda"):
        return f"no engine for {device} tensors"
    engine = "native" if device == "cpu" else "triton"
    half = dtype in (torch.float16, torch.bfloat16)
    if not (dtype == torch.float32 or (half and not (device == "cpu" and training))):
        return f"{engine}: the {'training ' if training else ''}kernels do not support {_name(dtype)}"
    missing = cpu.problem() if device == "cpu" else None
    return "" if missing is None else f"native: {missing.splitlines()[0]}"


# torch.compiler.assume_constant_result sets this too, but imports Dynamo, which would add a second to every
# `import dcgan.fast`.
_why_eager._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _on_amx(dtype: torch.dtype) -> bool:
    supported = {
        torch.bfloat16: torch.cpu._is_amx_tile_supported,
        torch.float16: torch.cpu._is_amx_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())
