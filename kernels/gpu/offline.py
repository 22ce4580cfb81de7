"""Offline compilation: compile a launch without a GPU and inspect its machine code.

Only Triton is needed: its wheel contains ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..spec import Operand
from .launcher import INT32_MAX, Constants, Launch, Pointers
from .tiles import SHARED_LIMIT

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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
    epilogue: int  # instructions after the last matrix instruction
    early: int | None  # memory accesses before the wait for the previous kernel; None if it does not wait

    @property
    def loads(self) -> int:
        """Number of global loads into registers."""
        return sum(self.loads_by_width.values())


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile for sm_<capability>, specialized on divisibility as the JIT does."""
    signature: dict[str, Any] = {}
    attributes = {}

    def specialize(path: tuple[int, ...], value: Tensor | int | float) -> str:
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return _POINTERS[value.dtype]
        return "i32" if value <= INT32_MAX else "i64"

    arguments: dict[str, Any] = launch.tensors | launch.scalars
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif isinstance(value := arguments[name], tuple):
            kinds = [specialize((i, j), t) for j, t in enumerate(value)]
            signature[name] = Pointers(*kinds) if isinstance(value, Pointers) else tuple(kinds)
        else:
            signature[name] = specialize((i,), value)
    source = ASTSource(launch.kernel, signature, launch.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options())


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
    """Return what :meth:`.launcher.Launch.spills` would on a GPU of that capability."""
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
    wait = sass.find("ACQBULK")  # griddepcontrol.wait
    last_matrix = max(sass.rfind("HGMMA"), sass.rfind("HMMA"), 0)
    return Report(
        registers=numbers["REG"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        stack=numbers["STACK"],
        shared=compiled.metadata.shared,
        matrix="HGMMA" if "HGMMA" in sass else "HMMA" if "HMMA" in sass else "FFMA",
        async_copies=_by_width("LDGSTS", sass),
        loads_by_width=_by_width("LDG", sass),
        stores_by_width=_by_width("STG", sass),
        epilogue=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass[last_matrix:], re.MULTILINE)),
        early=None if wait < 0 else len(re.findall(r"\b(?:LDG|LDGSTS|STG|RED|ATOMG?)\.", sass[:wait])),
    )


def _operands(launch: Launch) -> list[tuple[Operand, Tensor]]:
    """Return the tensors that a product or a standalone prologue kernel loads, as operands."""
    constants, tensors = launch.constants, launch.tensors
    spec: Constants | None = constants.get("SPEC")
    if spec is None:
        operands = {"x": constants["X"]}
    else:
        operands = {"x": spec.x} if "x" in tensors else {"small": spec.x, "large": spec.y}
    return [(operand, tensors[name].ptr) for name, operand in operands.items()]  # type: ignore[union-attr]


def _vectorizable(t: Tensor, channels: int, stride: Sequence[int]) -> bool:
    """Return whether an operand's channels can be accessed 16 bytes at a time."""
    return channels >= 16 and channels * t.element_size() % 16 == 0 and stride[1] == 1


def _narrow_accesses(launch: Launch, report: Report) -> list[str]:
    """Return faults about accesses that are not 16 bytes wide, in a prologue or split-K reduction kernel.

    The other reductions are exempt: per-channel partials offer too little data for 16 bytes per thread unless
    there are many tiles, and a dot product's operands may have any layout.
    """
    constants = launch.constants
    loads = stores = False
    if "out_ptr" in launch.tensors:
        ((operand, x),) = _operands(launch)
        strides = (operand.stride, operand.other_stride or operand.stride, constants["OUT_STRIDE"])
        loads = stores = all(_vectorizable(x, operand.size[0], stride) for stride in strides)
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

    No launch may spill or exceed the shared memory limit. A dependent launch must wait for the previous
    kernel before it accesses memory. Operands with contiguous channels must be loaded by
    asynchronous 16-byte copies, besides narrower ones of per-channel vectors; without a prologue, epilogue
    vectors or a second tensor there must be no other loads at all. Outputs with contiguous channels must be
    stored at least 8 bytes at a time, besides 4-byte partial sums. Standalone prologue kernels must load and
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
    if launch.dependent and report.early != 0:
        found.append("a dependent launch accesses memory before it waits for the previous kernel")
    spec: Constants | None = constants.get("SPEC")
    if spec is None or spec.block_m == 1:
        return found + _narrow_accesses(launch, report)  # no matrix instruction, no staged operands
    name = launch.kernel.__name__
    y = launch.tensors["y"].ptr if "y" in launch.tensors else None  # type: ignore[union-attr]
    # Columns of a dense layer that span pixels have no contiguous channels.
    spans_pixels = name.startswith("_dense") and spec.y.size[0] % (spec.block_n // spec.slices)
    if y is not None and not spans_pixels and _vectorizable(y, spec.y.size[0], spec.y.stride):
        narrow = {width for width in report.stores_by_width if width < 8} - ({4} if spec.y.sums else set())
        if narrow:
            found.append(f"stores of {sorted(narrow)} bytes, counts by width: {report.stores_by_width}")
    operands = _operands(launch)
    if name == "_dense_outer_kernel":
        return found  # no matrix instruction, no staged operands
    if operands[0][1].dtype != torch.float32 or spec.precision == "tf32":
        # wgmma needs 64 elements of the accumulator's first axis; the narrow weight gradient avoids it.
        wgmma = (spec.block_n if spec.swapped else spec.block_m) >= 64 and name != "_wgrad_narrow_kernel"
        expected = "HGMMA" if capability >= 90 and wgmma else "HMMA"
        if report.matrix != expected:
            found.append(f"matrix instruction {report.matrix} instead of {expected}")
    if all(_vectorizable(t, operand.size[0], operand.stride) for operand, t in operands):
        plain = all(operand.function == "none" for operand, _ in operands)
        # TF32 operands must be K-contiguous in shared memory. A weight gradient's are channel-contiguous and
        # are transposed on the way in, by 4-byte copies.
        transposing = "small" in launch.tensors and spec.precision == "tf32"
        allowed = {16} if plain and not transposing else {16, 8, 4}
        vectorized = report.async_copies.get(16) or transposing
        if not vectorized or report.async_copies.keys() - allowed:
            found.append(
                f"operands not loaded by asynchronous 16-byte copies, counts by width: {report.async_copies}"
            )
        simple = spec.y.function in ("affine", "statistics") and not (spec.y.scaled or spec.y.shifted)
        if plain and simple and report.loads:
            found.append(f"{report.loads} loads that are not asynchronous copies")
    return found
