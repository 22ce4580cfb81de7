"""The registry of inference providers: each builds a callable from the reference network.

A build function receives the reference network in eval mode, on the case's device and in its dtype, an
example input and the number of CPU threads, and returns a callable ``input → output``. It may compile lazily
at the first call, which belongs to the check and is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case, Network
from bench.options import NO_GPU, UsageError

Runner = Callable[[Tensor], Tensor]
Build = Callable[[Network, Tensor, int], Runner]


@dataclass(frozen=True)
class Provider:
    """An implementation to benchmark."""

    name: str
    build: Callable[..., Any]
    """A Build function, or its counterpart in another registry."""
    ours: bool = False
    """Whether it is this project's, as opposed to a baseline."""
    package: str | None = None
    """The package that it needs besides PyTorch."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "tf32", "float16", "bfloat16")
    replays: bool = False
    """Whether its calls already replay CUDA graphs (on CUDA) and must not be captured again."""
    searches: bool = False
    """Whether building it mostly times algorithms (cuDNN's, a compiler's templates) and so needs an otherwise
    idle machine. Not set for torch.compile around cuDNN convolutions, which compiles for half a minute and
    searches only briefly."""

    def unavailable(self, case: Case) -> str | None:
        """Return why it cannot run ``case`` on this machine, or None if it can."""
        if case.device not in self.devices:
            if case.device == "cuda":
                return "runs on CPUs only"
            return "needs a GPU" if torch.cuda.is_available() else NO_GPU
        if self.package is not None and not _installed(self.package):
            return "not installed"
        if case.dtype not in self.dtypes:
            return f"does not support {case.dtype}"
        return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


# --- PyTorch ------------------------------------------------------------------------------------------------


def nhwc(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def _compiled(
    model: nn.Module, mode: str | None = None, backend: str = "inductor", freeze: bool = False
) -> Runner:
    """Apply torch.compile with its fast settings: channels_last, and frozen weights on the CPU."""
    import torch._inductor.config as inductor

    if freeze or next(model.parameters()).device.type == "cpu":
        inductor.freezing = True
    return torch.compile(nhwc(model), mode=mode, backend=backend)


def _zentorch(model: Network, example: Tensor, threads: int) -> Runner:
    importlib.import_module("zentorch")  # registers the backend
    return _compiled(model, backend="zentorch")


def _cudnn_graph(model: Network, example: Tensor, threads: int) -> Runner:
    """Capture eager channels_last in a CUDA graph: eager without launch overhead."""
    # torch.cuda.make_graphed_callables would cost an autograd node per call, even without gradients.
    network, static = nhwc(model), example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # cuDNN selects algorithms and the allocator caches blocks
            network(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output: Tensor = network(static)

    def run(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return output

    return run


# --- other runtimes, which receive the network as ONNX ------------------------------------------------------


def _onnx(model: nn.Module, example: Tensor) -> bytes:
    """Export the network to ONNX; the exporter folds BatchNorm into the convolutions."""
    program = torch.onnx.export(model, (example,), dynamo=True, input_names=["x"], verbose=False)
    assert program is not None
    model_bytes: bytes = program.model_proto.SerializeToString()
    return model_bytes


def _onnxruntime(model: Network, example: Tensor, threads: int) -> Runner:
    """Build an ONNX Runtime session on the CPU with all graph optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graph is a chain
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(_onnx(model, example), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _openvino(model: Network, example: Tensor, threads: int) -> Runner:
    """Build an OpenVINO CPU model that serves one request at a time."""
    import openvino as ov

    core = ov.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",  # all threads serve the single request
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU supports it
    }
    compiled = core.compile_model(core.read_model(_onnx(model, example)), "CPU", settings)
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        # No copies: the output aliases the request's buffer, which is valid until the next call.
        result = request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return run


# --- this project -------------------------------------------------------------------------------------------


def drop_in(model: nn.Module) -> nn.Module:
    """Return the drop-in. It is imported here, since a baseline's memory must not include it."""
    from dcgan import fast

    return fast.fuse(model)


def _fast_graph(model: Network, example: Tensor, threads: int) -> Runner:
    from dcgan.fast import fuse, graphed

    return graphed(fuse(model), example.shape[0], example)


CPU: dict[str, Any] = {"devices": ("cpu",)}
CUDA: dict[str, Any] = {"devices": ("cuda",), "replays": True}
OURS: dict[str, Any] = {"ours": True, "package": "dcgan.fast"}

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", lambda model, *_: model, searches=True),
        Provider("channels_last", lambda model, *_: nhwc(model), searches=True),
        Provider("compile", lambda model, *_: _compiled(model)),
        Provider(
            "reduce-overhead", lambda model, *_: _compiled(model, "reduce-overhead", freeze=True), **CUDA
        ),
        Provider(
            "max-autotune", lambda model, *_: _compiled(model, "max-autotune"), replays=True, searches=True
        ),
        Provider("cudnn-graph", _cudnn_graph, searches=True, **CUDA),
        Provider("onnxruntime", _onnxruntime, package="onnxruntime", dtypes=("float32",), **CPU),
        Provider("openvino", _openvino, package="openvino", dtypes=("float32",), **CPU),
        Provider("zentorch", _zentorch, package="zentorch", **CPU),
        Provider("fast", lambda model, *_: drop_in(model), **OURS),
        Provider("fast-compile", lambda model, *_: torch.compile(drop_in(model)), **OURS),
        Provider("fast-graph", _fast_graph, **OURS, **CUDA),
    )
}


def find(name: str, registry: Mapping[str, Provider] = PROVIDERS) -> Provider:
    """Find a provider by name; ``module:function`` names a custom build function.

    Raises:
        UsageError: there is no such provider; the message lists the known ones.
    """
    if name in registry:
        return registry[name]
    reason = f"; choose from {', '.join(registry)}, or give MODULE:FUNCTION"
    if ":" in name:
        try:
            return Provider(name, pkgutil.resolve_name(name))
        except (ImportError, AttributeError, ValueError) as error:
            reason = f": {error}"
    raise UsageError(f"argument --providers: no provider {name!r}{reason}")


def find_all(names: Iterable[str], registry: Mapping[str, Provider] = PROVIDERS) -> list[Provider]:
    """Find providers by name, without duplicates, in the given order. Raises UsageError if one is unknown."""
    return [find(name, registry) for name in dict.fromkeys(names)]
