"""Offline compilation: compile a launch without a GPU and inspect its machine code.

Only Triton is needed: its wheel contains ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import INT32_MAX, Launch
from .tiles import SHARED_LIMIT

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


class Report(NamedTuple):
    """Properties of a launch's machine code."""

    registers: int  # per thread
    spills: int  # local loads and stores in the code
    stack: int  # bytes per thread
    shared: int  # bytes per program
    matrix: str  # 'HGMMA' (wgmma), 'HMMA' (mma.sync), or 'FFMA' without tensor cores
    async_copies: dict[int, int]  # asynchronous global → shared copies, by bytes per thread
    loads_by_width: dict[int, int]  # global loads into registers, by bytes per thread
    stores_by_width: dict[int, int]

    @property
    def loads(self) -> int:
        """Number of global loads into registers."""
        return sum(self.loads_by_width.values())


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile for sm_<capability>, specialized on divisibility as the JIT does."""
    names = launch.kernel.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        divisible = True
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if value <= INT32_MAX else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, launch.constants, attributes)
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def _cubin(compiled: Any) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        yield f.name


def machine_code(compiled: Any) -> tuple[str, str]:
    """Return (resource usage, SASS) of a compiled kernel."""
    with _cubin(compiled) as path:
        return _tool("cuobjdump", "--dump-resource-usage", path), _tool("nvdisasm", "-c", path)


def _usage(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def spills(launch: Launch, capability: int) -> bool:
    """Return what :meth:`.launch.Launch.spills` would on a GPU of that capability."""
    compiled = compile_launch(launch, capability)
    if compiled.metadata.shared > SHARED_LIMIT[capability]:
        return True
    with _cubin(compiled) as path:
        return _usage(_tool("cuobjdump", "--dump-resource-usage", path))["STACK"] > 0


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _by_width(instruction: str, sass: str) -> dict[int, int]:
    """Count a memory instruction by its bytes per thread, which are 4 without a width modifier."""
    found = (modifiers.split(".") for modifiers in re.findall(rf"\b{instruction}\.([\w.]+)", sass))
    return dict(Counter(next((_WIDTHS[m] for m in each if m in _WIDTHS), 4) for each in found))


def inspect(launch: Launch, capability: int) -> Report:
    """Compile a launch for sm_<capability> and report on its machine code."""
    compiled = compile_launch(launch, capability)
    usage, sass = machine_code(compiled)
    numbers = _usage(usage)
    return Report(
        registers=numbers["REG"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        stack=numbers["STACK"],
        shared=compiled.metadata.shared,
        matrix="HGMMA" if "HGMMA" in sass else "HMMA" if "HMMA" in sass else "FFMA",
        async_copies=_by_width("LDGSTS", sass),
        loads_by_width=_by_width("LDG", sass),
        stores_by_width=_by_width("STG", sass),
    )


def _vectorizable(tensor: Any, stride: tuple[int, ...]) -> bool:
    """Return whether an operand's channels can be accessed 16 bytes at a time."""
    channels = tensor.shape[1]
    return bool(channels >= 16 and channels * tensor.element_size() % 16 == 0 and stride[1] == 1)


def _narrow_accesses(launch: Launch, report: Report) -> list[str]:
    """Return faults about accesses that are not 16 bytes wide, in a prologue or split-K reduction kernel.

    The other reductions are exempt: per-channel partials offer too little data for 16 bytes per thread unless
    there are many tiles, and a dot product's operands may have any layout.
    """
    constants, arguments = launch.constants, launch.arguments
    loads = stores = False
    if "out_ptr" in arguments:
        operands = {name: arguments[f"{name}_ptr"] for name in ("x", "x_other", "out")}
        strides = {name: constants[f"{name.upper()}_STRIDE"] for name in operands}
        loads = stores = all(_vectorizable(t, strides[name]) for name, t in operands.items())
    elif "SPLITS" in constants:
        loads = constants["SIZE"][0] * constants["SIZE"][1] % 4 == 0
    found = []
    if loads and report.loads_by_width.keys() != {16}:
        found.append(f"loads not 16 bytes wide, counts by width: {report.loads_by_width}")
    if stores and report.stores_by_width.keys() != {16}:
        found.append(f"stores not 16 bytes wide, counts by width: {report.stores_by_width}")
    return found


def faults(launch: Launch, report: Report, capability: int) -> list[str]:
    """Return what is wrong with a launch's machine code; empty if nothing is.

    No launch may spill or exceed the shared memory limit. Operands with contiguous channels must be loaded by
    asynchronous 16-byte copies, besides 4-byte copies of per-channel vectors; without a prologue, epilogue
    vectors or a second tensor there must be no other loads at all. Standalone prologue kernels must load and
    store such tensors 16 bytes at a time, and the split-K reduction must load its partials so.
    """
    constants = launch.constants
    found = []
    if report.spills or report.stack:
        found.append(
            f"spills: {report.spills} local memory accesses, {report.stack} bytes of stack per thread"
        )
    if report.shared > SHARED_LIMIT[capability]:
        found.append(f"{report.shared} bytes of shared memory exceed the limit of {SHARED_LIMIT[capability]}")
    if "PRECISION" not in constants or "BLOCK_M" not in constants:
        return found + _narrow_accesses(launch, report)  # no matrix instruction, no staged operands
    operands = [name for name in ("x", "small", "large") if f"{name}_ptr" in launch.arguments]
    tensors = [launch.arguments[f"{name}_ptr"] for name in operands]
    if tensors[0].dtype != torch.float32 or constants["PRECISION"] == "tf32":
        # wgmma needs 64 rows.
        expected = "HGMMA" if capability >= 90 and launch.tile.block_m >= 64 else "HMMA"
        if report.matrix != expected:
            found.append(f"matrix instruction {report.matrix} instead of {expected}")
    strides = [constants[f"{name.upper()}_STRIDE"] for name in operands]
    if all(_vectorizable(t, stride) for t, stride in zip(tensors, strides, strict=True)):
        prologues = {constants[f"{name.upper()}_PROLOGUE"] for name in operands}
        # TF32 operands must be K-contiguous in shared memory. A weight gradient's are channel-contiguous and
        # are transposed on the way in, by 4-byte copies.
        transposing = "small_ptr" in launch.arguments and constants["PRECISION"] == "tf32"
        allowed = {16} if prologues == {"none"} and not transposing else {16, 4}
        vectorized = report.async_copies.get(16) or transposing
        if not vectorized or report.async_copies.keys() - allowed:
            found.append(
                f"operands not loaded by asynchronous 16-byte copies, counts by width: {report.async_copies}"
            )
        plain_epilogue = constants.get("EPILOGUE") in ("affine", "statistics") and not (
            constants["HAS_SCALE"] or constants["HAS_SHIFT"]
        )
        if prologues == {"none"} and plain_epilogue and report.loads:
            found.append(f"{report.loads} loads that are not asynchronous copies")
    return found
