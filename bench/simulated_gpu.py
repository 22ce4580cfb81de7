"""Run torch.compile for a simulated H100: generate Inductor's code and count its kernels, without a GPU.

Dynamo, AOTAutograd and Inductor's code generation need no GPU, only its properties. These are patched in
here, and generated modules are kept as text instead of being loaded.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from dcgan.kernels import ops

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
    """The launches of one call of a compiled network."""

    graphs: int  # 1 if there was no graph break
    ops: int  # calls of dcgan:: operators
    kernels: int  # kernels that Inductor generated
    aten: int  # calls of external kernels: cuDNN, cuBLAS
    largest: int  # elements processed by the largest of Inductor's kernels


def _refuse(*arguments: Any) -> None:
    raise RuntimeError("cannot launch on the simulated GPU: it only compiles")


class _Utilities:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 0, 0, 128, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """A Triton driver that provides a compilation target but cannot launch."""

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
    """Simulate one H100 for code that only compiles."""
    from torch._dynamo.device_interface import CudaInterface

    properties: dict[str, Any] = {
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
        for name, value in properties.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in ("get_device_properties", "current_device", "is_bf16_supported"):
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(properties[name])))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        yield


@contextlib.contextmanager
def _generating() -> Iterator[list[str]]:
    """Have Inductor generate code for an H100; collects the sources of its modules and loads none."""
    import torch._inductor.config as inductor
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    def keep(self: Any, code: Any) -> types.ModuleType:
        sources.append(code.value)
        module: Any = types.ModuleType("generated")
        module.__file__, module.key = __file__, "generated"
        module.call = _refuse
        return module  # type: ignore[no-any-return]

    with (
        h100(),
        mock.patch.object(GraphLowering, "_compile_to_module_lines", keep),
        inductor.patch(fx_graph_cache=False, compile_threads=1),
    ):
        yield sources


def _empty_on(t: Tensor, device: str) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


def _make_fake(network: nn.Module, device: str) -> None:
    """Replace its tensors by fake ones on ``device``, under the caller's fake mode."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                moved = _empty_on(parameter, device)
                module._parameters[name] = nn.Parameter(moved, requires_grad=network.training)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _empty_on(buffer, device)


def eval_code(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, list[str]]:
    """Compile ``network`` in eval mode for an H100.

    Returns (number of graphs captured by Dynamo, source of each module generated by Inductor). ``network``
    stays unchanged on the CPU; a copy of it on fake CUDA tensors is compiled.
    """
    from torch._inductor.compile_fx import compile_fx

    graphs: list[Any] = []
    found: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        with _generating() as sources, torch._functorch.config.patch(enable_autograd_cache=False):
            compile_fx(graph, inputs)
        found.extend(sources)
        return graph.forward  # runs on the fake tensors

    torch._dynamo.reset()
    fake = copy.deepcopy(network).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _make_fake(fake, "cuda")
        x = torch.empty(shape, dtype=next(network.parameters()).dtype, device="cuda")
        torch.compile(fake, fullgraph=True, backend=backend)(x)
    torch._dynamo.reset()
    return len(graphs), found


class _Generated(Exception):
    """Raised instead of running the generated code."""


@ops.use_engine("triton")  # the graph must call its ops although the tensors are on the CPU
def training_code(
    network: nn.Module, shape: tuple[int, ...], *, input_gradient: bool = False
) -> tuple[int, dict[str, str]]:
    """Compile ``network`` in training mode for an H100.

    Returns (number of graphs captured by Dynamo, source by phase: 'forward' and 'backward'). Gradients are
    computed for the parameters, and for the input if ``input_gradient``. Autograd refuses CUDA tensors
    without a GPU, so Dynamo, AOTAutograd and the partitioner run on fake CPU tensors, and both resulting
    graphs are retraced on fake CUDA tensors for Inductor.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graphs: list[Any] = []
    found: dict[str, str] = {}

    def compiler(phase: str) -> Any:
        def compile_graph(graph: Any, inputs: list[Any]) -> Any:
            for node in graph.graph.nodes:
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            graph.recompile()
            mode = torch._guards.detect_fake_mode(inputs)
            assert mode is not None
            with mode, _generating() as sources:
                moved = [_empty_on(t, "cuda") if isinstance(t, Tensor) else t for t in inputs]
                traced = make_fx(graph, tracing_mode="real")(*moved)
                compile_fx_inner(traced, moved, is_backward=phase == "backward")
            (found[phase],) = sources

            def stop(arguments: Any) -> None:
                raise _Generated

            stop._boxed_call = True  # type: ignore[attr-defined]
            return stop

        return compile_graph

    compile_both = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return compile_both(graph, inputs)

    settings = {"enable_autograd_cache": False, "force_non_lazy_backward_lowering": True}
    torch._dynamo.reset()
    fake = copy.deepcopy(network).train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch._functorch.config.patch(settings):
        _make_fake(fake, "cpu")
        dtype = next(network.parameters()).dtype
        x = torch.empty(shape, dtype=dtype, requires_grad=input_gradient)
        with contextlib.suppress(_Generated):
            torch.compile(fake, fullgraph=True, backend=backend)(x)
    torch._dynamo.reset()
    return len(graphs), found


def count(code: str, graphs: int = 1) -> Launches:
    """Count the launches in a module of generated code."""
    runs = re.findall(r"^\s+triton_\w+\.run\(.*?((?:, \d+)+), stream=", code, re.MULTILINE)
    return Launches(
        graphs=graphs,
        ops=len(re.findall(r"torch\.ops\.dcgan\.\w+\.default\(", code)),
        kernels=len(re.findall(r"^\s+triton_\w+\.run\(", code, re.MULTILINE)),
        largest=max((math.prod(map(int, sizes.split(", ")[1:])) for sizes in runs), default=0),
        aten=len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+\.\w+\(", code)),
    )


def launches(network: nn.Module, shape: tuple[int, ...]) -> Launches:
    """Count the launches of a network in eval mode."""
    graphs, sources = eval_code(network, shape)
    return count("\n".join(sources), graphs)


def training_launches(
    network: nn.Module, shape: tuple[int, ...], *, input_gradient: bool = False
) -> dict[str, Launches]:
    """Count the launches of a network's forward and backward in training, by phase."""
    graphs, sources = training_code(network, shape, input_gradient=input_gradient)
    return {phase: count(code, graphs) for phase, code in sources.items()}
