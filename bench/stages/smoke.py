"""Smoke test before all other steps: the GPU, PyTorch, one convolution and one training step."""

from __future__ import annotations

import argparse
import platform
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from bench.budget import Budget
from bench.cases import relative_error
from bench.stages.plan import MACHINE_BROKEN
from dcgan import fast, models
from dcgan.kernels import ops
from dcgan.kernels.call import Call
from dcgan.training import Config, TrainStep, optimizers
from dcgan.training.captured_step import WARM_UP

PRODUCT = 2**-8  # maximum ‖error‖/‖result‖ of a bfloat16 product, which is rounded once
# The sizes of tests/gpu/test_gpu_train_step.py, whose kernels are thereby compiled in advance.
LATENT, FEATURES, SIZE, BATCH = 16, 16, 32, 8


def run(args: argparse.Namespace, budget: Budget, device: str = "cuda") -> int:
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
        free, total = torch.cuda.mem_get_info()
        gpu = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
            f"SMs, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, driver {_driver()}"
        )
    return (
        f"{gpu}; {hardware['cores']} cores, {hardware['cpu']}\nPython {platform.python_version()}, "
        f"torch {versions['torch']}, triton {versions['triton']}, cuda {versions['cuda']}; "
        f"commit {machine.commit()}"
    )


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


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
    generator = fast.convert(
        models.Generator(LATENT, 1, FEATURES, SIZE).apply(models.weights_init).to(device)
    )
    discriminator = fast.convert(
        models.Discriminator(1, FEATURES, SIZE).apply(models.weights_init).to(device)
    )
    pair = optimizers(generator, discriminator, Config(), fused=True)
    train = TrainStep(generator, discriminator, *pair)
    if device == "cuda" and train.why_not_captured:
        return f"not captured: {train.why_not_captured}"
    real = torch.randn(BATCH, 1, SIZE, SIZE, device=device).tanh()
    noise = torch.randn(BATCH, LATENT, 1, 1, device=device)
    for _ in range(WARM_UP + 2):
        result = train(real, noise)
    values = torch.stack(list(result)).tolist()
    return "" if torch.tensor(values).isfinite().all() else f"losses and probabilities are {values}"
