"""Run every kernel on small tensors under compute-sanitizer, if it is installed."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.budget import Budget
from bench.stages import jobs

SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 240.0
FOUND = 9  # exit status of compute-sanitizer if it found an error


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, from PATH or a CUDA toolkit; None if there is none."""
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(root) / "bin") for root in toolkits if root)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(args: argparse.Namespace, budget: Budget) -> int:
    """Run all tools, each with its output in a separate file. Return 1 if one finds an error."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("sanitize: compute-sanitizer is not installed here (it comes with the CUDA toolkit): skipped")
        return 0
    root = str(jobs.ROOT)
    # Without PyTorch's caching allocator every tensor is a separate allocation, whose bounds memcheck checks.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    plain = [sys.executable, "-m", "bench.sanitized"]
    commands = {"plain": plain} | {  # first without a tool, to compile everything and check that it runs
        tool: [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *plain] for tool in SANITIZERS
    }
    status = 0
    for name, command in commands.items():
        if not budget.allows(name):
            continue
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished in {SANITIZER_SECONDS:.0f} s", flush=True)
            continue
        text = done.stdout + done.stderr
        (args.out / f"sanitize-{name}.txt").write_text(text)
        last = text.strip().splitlines()[-1:] or ["no output"]
        verdict = {0: "clean", FOUND: "ERRORS FOUND"}.get(done.returncode, f"FAILED ({done.returncode})")
        print(f"{name}: {verdict}: {last[0]}", flush=True)
        status |= int(done.returncode != 0)
        if name == "plain" and done.returncode:
            break
    print(budget.report())
    return status
