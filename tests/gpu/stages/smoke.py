"""``python -m tests.gpu.stages.smoke``: the GPU, PyTorch, one convolution and one training step.

This is the smoke test before all other steps.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from bench.cases import relative_error
from dcgan import fast, models
from dcgan.kernels import ops
from dcgan.kernels.spec import Call
from dcgan.training import Config, TrainStep, optimizers
from dcgan.training.captured_step import WARM_UP
from tests.gpu.stages.plan import MACHINE_BROKEN

PRODUCT = 2**-8  # maximum ‖error‖/‖result‖ of a bfloat16 product, which is rounded once
# The sizes of tests/gpu/test_gpu_train_step.py, whose kernels are thereby compiled in advance.
LATENT, FEATURES, SIZE, BATCH = 16, 16, 32, 8


def run(device: str = "cuda") -> int:
    """Return 0, 1 if a result of ours is wrong, or MACHINE_BROKEN if the GPU or PyTorch does not work."""
    try:
        print(describe(device), flush=True)
        torch.mm(*torch.ones(2, 64, 64, device=device)).sum().item()
    except Exception as error:
        print(f"the machine does not work: {type(error).__name__}: {error}")
        return MACHINE_BROKEN
    status = 0
    for part in (product, step):
        begun = time.monotonic()
        try:
            wrong = part(device)
        except Exception as error:  # the other part is tried in any case
            wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        print(f"{part.__name__}: {wrong or 'ok'} ({time.monotonic() - begun:.0f} s)", flush=True)
        status |= int(bool(wrong))
    return status


def describe(device: str) -> str:
    """Describe the machine in one line and its software in a second one."""
    hardware, versions = machine.hardware(), machine.versions()
    gpu = "no GPU"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        query = "timeout 10 nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        status, driver = subprocess.getstatusoutput(query)
        gpu = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
            f"SMs, {free:.0f} of {total:.0f} GiB free, driver {'unknown' if status else driver.split()[0]}"
        )
    return (
        f"{gpu}; {hardware['cores']} cores, {hardware['cpu']}\nPython {platform.python_version()}, "
        f"torch {versions['torch']}, triton {versions['triton']}, cuda {versions['cuda']}; "
        f"commit {machine.commit()}"
    )


def product(device: str) -> str:
    """Compare a transposed convolution with float64; return '' if it is correct, else what is wrong."""
    x = torch.randn(8, 128, 8, 8, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    weight = (torch.randn(128, 64, 4, 4, device=device) * 0.02).bfloat16()
    with ops.recording() as choices:
        y: Tensor = ops.conv_transpose2d_fused(*Call(x, weight))[0]
    exact = F.conv_transpose2d(x.double(), weight.double(), None, 2, 1).cpu()
    error = relative_error(y, exact)
    if device == "cuda" and [choice.engine for choice in choices] != ["triton"]:
        return f"run by {choices[0].engine}: {choices[0].reason}"
    return "" if error <= PRODUCT else f"error {error:.1e} > {PRODUCT:.1e}"


def step(device: str) -> str:
    """Run a few training steps, on a GPU until one is captured; return '' if the losses are finite."""
    torch.manual_seed(0)
    made = models.Generator(LATENT, 1, FEATURES, SIZE), models.Discriminator(1, FEATURES, SIZE)
    for network in made:
        network.apply(models.weights_init).to(device)
    pair = fast.convert(made[0]), fast.convert(made[1])
    train = TrainStep(*pair, *optimizers(*pair, Config(), fused=True))
    if device == "cuda" and train.why_not_captured:
        return f"not captured: {train.why_not_captured}"
    real = torch.randn(BATCH, 1, SIZE, SIZE, device=device).tanh()
    noise = torch.randn(BATCH, LATENT, 1, 1, device=device)
    for _ in range(WARM_UP + 2):
        result = train(real, noise)
    values = torch.stack(list(result))
    return "" if values.isfinite().all() else f"losses and probabilities are {values.tolist()}"


if __name__ == "__main__":
    sys.exit(run())
