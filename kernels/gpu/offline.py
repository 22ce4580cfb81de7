"""Compile a launch for a GPU that is not there, and read the machine code: what the compiler made of it.

Needs Triton alone: its wheel holds ptxas, cuobjdump and nvdisasm.
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
    """What one launch compiles to."""

    registers: int  # a thread
    spills: int  # local loads and stores in the code
    stack: int  # bytes a thread
    shared: int  # bytes a program
    matrix: str  # the matrix instruction: 'HGMMA', 'HMMA', or 'FFMA' for none
    async_copies: dict[int, int]  # asynchronous global → shared copies, by their bytes a thread
    loads_by_width: dict[int, int]  # global loads into registers, likewise
    stores_by_width: dict[int, int]

    @property
    def loads(self) -> int:
        """Global loads into registers."""
        return sum(self.loads_by_width.values())


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel for sm_<capability>, specialised on divisibility as the JIT would."""
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
    """(resource usage, SASS) of a compiled kernel."""
    with _cubin(compiled) as path:
        return _tool("cuobjdump", "--dump-resource-usage", path), _tool("nvdisasm", "-c", path)


def _usage(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def spills(launch: Launch, capability: int) -> bool:
    """What :meth:`.launch.Launch.spills` would say on a GPU of that capability."""
    compiled = compile_launch(launch, capability)
    if compiled.metadata.shared > SHARED_LIMIT[capability]:
        return True
    with _cubin(compiled) as path:
        return _usage(_tool("cuobjdump", "--dump-resource-usage", path))["STACK"] > 0


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _by_width(instruction: str, sass: str) -> dict[int, int]:
    """How often a memory instruction occurs, by its bytes a thread; without a modifier it is 4."""
    found = (modifiers.split(".") for modifiers in re.findall(rf"\b{instruction}\.([\w.]+)", sass))
    return dict(Counter(next((_WIDTHS[m] for m in each if m in _WIDTHS), 4) for each in found))


def inspect(launch: Launch, capability: int) -> Report:
    """Compile and read."""
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


def _vectorisable(tensor: Any, stride: tuple[int, ...]) -> bool:
    """Whether an operand's channels can be copied 16 bytes at a time."""
    channels = tensor.shape[1]
    return bool(channels >= 16 and channels * tensor.element_size() % 16 == 0 and stride[1] == 1)


def _narrow(launch: Launch, report: Report) -> list[str]:
    """Narrow accesses of a pass or of the sum of chunks.

    What tiles leave per channel is too little for 16 bytes a thread unless there are many tiles, and a dot
    product's reduction may lie in any order.
    """
    constants, arguments = launch.constants, launch.arguments
    loads = stores = False
    if "out_ptr" in arguments:
        operands = {name: arguments[f"{name}_ptr"] for name in ("x", "x_other", "out")}
        strides = {name: constants[f"{name.upper()}_STRIDE"] for name in operands}
        loads = stores = all(_vectorisable(t, strides[name]) for name, t in operands.items())
    elif "SPLITS" in constants:
        loads = constants["SIZE"][0] * constants["SIZE"][1] % 4 == 0
    found = []
    if loads and report.loads_by_width.keys() != {16}:
        found.append(f"loads of other than 16 bytes: {report.loads_by_width}")
    if stores and report.stores_by_width.keys() != {16}:
        found.append(f"stores of other than 16 bytes: {report.stores_by_width}")
    return found


def faults(launch: Launch, report: Report, capability: int) -> list[str]:
    """What is wrong with a launch's code.

    Operands whose channels lie together are to come by asynchronous 16-byte copies and nothing else but the
    4-byte ones of per-channel vectors; without prologue, epilogue vectors or a second tensor, all loads are.
    A pass over such tensors loads and stores 16 bytes at a time, and so does the sum of chunks load them.
    """
    constants = launch.constants
    found = []
    if report.spills or report.stack:
        found.append(f"spills: {report.spills} local accesses, {report.stack} bytes of stack")
    if report.shared > SHARED_LIMIT[capability]:
        found.append(f"{report.shared} bytes of shared memory, the chip has {SHARED_LIMIT[capability]}")
    if "PRECISION" not in constants or "BLOCK_M" not in constants:
        return found + _narrow(launch, report)  # no matrix instruction, nothing to stage
    operands = [name for name in ("x", "small", "large") if f"{name}_ptr" in launch.arguments]
    tensors = [launch.arguments[f"{name}_ptr"] for name in operands]
    if tensors[0].dtype != torch.float32 or constants["PRECISION"] == "tf32":
        # A warpgroup's instruction takes 64 rows.
        expected = "HGMMA" if capability >= 90 and launch.tile.block_m >= 64 else "HMMA"
        if report.matrix != expected:
            found.append(f"{report.matrix} where {expected} should be")
    strides = [constants[f"{name.upper()}_STRIDE"] for name in operands]
    if all(_vectorisable(t, stride) for t, stride in zip(tensors, strides, strict=True)):
        prologues = {constants[f"{name.upper()}_PROLOGUE"] for name in operands}
        # TF32's operands must lie along the reduction in shared memory: a weight gradient's, which lie along
        # the channels, are transposed on the way in by copies of 4 bytes.
        transposing = "small_ptr" in launch.arguments and constants["PRECISION"] == "tf32"
        allowed = {16} if prologues == {"none"} and not transposing else {16, 4}
        wide = report.async_copies.get(16) or transposing
        if not wide or report.async_copies.keys() - allowed:
            found.append(f"operands not by asynchronous 16-byte copies: {report.async_copies}")
        bare = constants.get("EPILOGUE") in ("affine", "statistics") and not (
            constants["HAS_SCALE"] or constants["HAS_SHIFT"]
        )
        if prologues == {"none"} and bare and report.loads:
            found.append(f"{report.loads} loads that are not asynchronous copies")
    return found
