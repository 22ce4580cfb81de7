"""torch.compile for an H100 that is not there: the code Inductor would run, and how many kernels are in it.

Dynamo, AOTAutograd and Inductor's code generation need no GPU, only answers to what they ask about one. The
answers are patched in here, and the generated module is kept as text instead of being loaded.
"""

from __future__ import annotations

import contextlib
import copy
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="sm_90",
)


class Launches(NamedTuple):
    """What one call of a compiled network launches."""

    graphs: int  # 1 if Dynamo found no break
    ops: int  # calls of dcgan:: ops
    kernels: int  # kernels that Inductor generated
    aten: int  # calls out of the graph: cuDNN, cuBLAS


def _refuse(*arguments: Any) -> None:
    raise RuntimeError("no GPU here to launch on")


class _Utilities:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 0, 0, 128, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """Triton's view of the GPU: enough to choose a target, never to launch."""

    utils = _Utilities()

    class launcher_cls:
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *arguments: Any) -> None:
            _refuse(*arguments)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    @staticmethod
    def is_active() -> bool:
        return True


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Inside, one H100 seems to be present to whoever only compiles."""
    from torch._dynamo.device_interface import CudaInterface

    answers: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: H100,
        "get_device_name": lambda device=None: H100.name,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "synchronize": lambda *args: None,
        "set_device": lambda device: None,
    }
    active: Any = triton.runtime.driver
    previous = active._active
    active.set_active(Driver())
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: setattr(active, "_active", previous))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("get_device_properties", "current_device", "is_bf16_supported"):
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answers[name])))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        yield


def generated_code(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, list[str]]:
    """(graphs that Dynamo made, source of each module that Inductor generated) for ``network`` on an H100.

    ``network`` is in its dtype on the CPU and stays so; a copy of it on fake CUDA tensors is compiled.
    """
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    graphs: list[Any] = []
    sources: list[str] = []

    def keep(self: Any, code: Any) -> types.ModuleType:
        sources.append(code.value)
        module: Any = types.ModuleType("generated")
        module.__file__, module.key = __file__, "generated"
        module.call = _refuse
        return module  # type: ignore[no-any-return]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        with (
            h100(),
            mock.patch.object(GraphLowering, "_compile_to_module_lines", keep),
            inductor.patch(fx_graph_cache=False, compile_threads=1),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            compile_fx(graph, inputs)
        return graph.forward  # goes on with the fake tensors

    torch._dynamo.reset()
    fake = copy.deepcopy(network)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in fake.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    moved = torch.empty_strided(
                        parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cuda"
                    )
                    module._parameters[name] = nn.Parameter(moved, requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        dtype = next(network.parameters()).dtype
        x = torch.empty(shape, dtype=dtype, device="cuda")
        torch.compile(fake, fullgraph=True, backend=backend)(x)
    torch._dynamo.reset()
    return len(graphs), sources


def launches(network: nn.Module, shape: tuple[int, ...]) -> Launches:
    """Counts of what the generated code calls."""
    graphs, sources = generated_code(network, shape)
    code = "\n".join(sources)
    return Launches(
        graphs=graphs,
        ops=len(re.findall(r"torch\.ops\.dcgan\.\w+\.default\(", code)),
        kernels=len(re.findall(r"^\s+triton_\w+\.run\(", code, re.MULTILINE)),
        aten=len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+\.\w+\(", code)),
    )
