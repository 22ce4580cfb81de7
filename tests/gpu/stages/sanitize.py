"""``python -m tests.gpu.stages.sanitize --out DIR``: compute-sanitizer, if it is installed.

Its tools watch ``python -m tests.gpu.stages.sanitize``, without options, which runs every kernel once on
tensors of a few kilobytes: each layer of two small networks in every phase, with fused prologues and with
standalone prologue kernels, in D with statistics per image, followed by a whole training step of each
network, and the loss.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.timing import Budget
from dcgan import fast
from dcgan.kernels import ops
from dcgan.kernels.gpu import tuning
from dcgan.kernels.gpu.tools.layers import discriminator, evaluation, generator, launches, training
from dcgan.kernels.loss import grouped_bce_with_logits
from tests.gpu.stages import jobs

SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 240.0
FOUND = 9  # exit status of compute-sanitizer if it found an error
BATCH = 3
SMS = 4  # few enough that weight gradients still use split-K


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, from PATH or a CUDA toolkit; None if there is none."""
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(root) / "bin") for root in toolkits if root)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(out: Path, budget: Budget) -> int:
    """Run all tools, each with its output in a separate file. Return 1 if one finds an error."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("sanitize: compute-sanitizer is not installed here (it comes with the CUDA toolkit): skipped")
        return 0
    # Without PyTorch's caching allocator every tensor is a separate allocation, whose bounds memcheck checks.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    plain = [sys.executable, "-m", "tests.gpu.stages.sanitize"]
    commands = {"plain": plain} | {  # first without a tool, to compile everything and check that it runs
        tool: [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *plain] for tool in SANITIZERS
    }
    status = 0
    for name, command in commands.items():
        if not budget.allows(name):
            continue
        try:
            done = subprocess.run(
                command, cwd=jobs.ROOT, env=env, capture_output=True, text=True, timeout=SANITIZER_SECONDS
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished in {SANITIZER_SECONDS:.0f} s", flush=True)
            continue
        text = done.stdout + done.stderr
        (out / f"sanitize-{name}.txt").write_text(text)
        last = text.strip().splitlines()[-1:] or ["no output"]
        verdict = {0: "clean", FOUND: "ERRORS FOUND"}.get(done.returncode, f"FAILED ({done.returncode})")
        print(f"{name}: {verdict}: {last[0]}", flush=True)
        status |= int(done.returncode != 0)
        if name == "plain" and done.returncode:
            break
    print(budget.report())
    return status


def launch_all(device: str = "cuda", dtypes: Sequence[str] = ("bfloat16", "float32")) -> int:
    """Run every kernel and return how many single-layer launches there were."""
    count = 0
    shapes_of = {1: generator(3, 12, 8, 32), BATCH: discriminator(1, 8, 32)}
    for dtype, (groups, shapes) in itertools.product(dtypes, shapes_of.items()):
        layers = training(shapes, BATCH, dtype, input_gradient=True, groups=groups)
        for layer in layers + evaluation(shapes, BATCH, dtype):
            for fused in (True, False) if layer.problem.has_prologue else (True,):
                tile = replace(tuning.estimate(layer.problem, SMS), fused=fused)
                launches(layer.product(device), tile, SMS)()
                count += 1
    networks = (fast.Generator(12, 3, 8, 32), (12,)), (fast.Discriminator(1, 8, 32), (1, 32, 32))
    with ops.use_engine("triton"):
        for network, shape in networks:
            x = torch.randn(BATCH, *shape, device=device, requires_grad=True)
            network.to(device).train()(x).square().sum().backward()
        logits = torch.randn(2 * BATCH, device=device, requires_grad=True)
        grouped_bce_with_logits(logits, (0.9, 0.0))[0].sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no new work after them (6.5)")
    args = parser.parse_args()
    if args.out is not None:
        sys.exit(run(args.out, Budget(args.minutes)))
    print(f"{launch_all()} single-layer launches, two training steps and the loss")
