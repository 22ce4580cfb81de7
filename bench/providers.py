"""The registry of inference providers: each builds a callable from the reference network.

A build function receives the reference network in eval mode, on the case's device and in its dtype, an
example input and the number of CPU threads, and returns a callable ``input → output``. It may compile lazily
at the first call, which belongs to the check and is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from bench import runtimes
from bench.cases import Case, Network

Runner = Callable[[Tensor], Tensor]
Build = Callable[[Network, Tensor, int], Runner]
B = TypeVar("B", covariant=True)


@dataclass(frozen=True)
class Provider(Generic[B]):
    """An implementation to benchmark."""

    name: str
    build: B
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
            if case.device == "cpu":
                return "needs a GPU" if torch.cuda.is_available() else "no GPU here"
            return "runs on CPUs only"
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


def _eager(model: Network, example: Tensor, threads: int) -> Runner:
    return model


def _nhwc(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def _channels_last(model: Network, example: Tensor, threads: int) -> Runner:
    return _nhwc(model)


def _compiled(
    model: nn.Module, mode: str | None = None, backend: str = "inductor", freeze: bool = False
) -> Runner:
    """Apply torch.compile with its fast settings: channels_last, and frozen weights on the CPU."""
    import torch._inductor.config as inductor

    if freeze or next(model.parameters()).device.type == "cpu":
        inductor.freezing = True
    return torch.compile(_nhwc(model), mode=mode, backend=backend)


def _compile(model: Network, example: Tensor, threads: int) -> Runner:
    return _compiled(model)


def _reduce_overhead(model: Network, example: Tensor, threads: int) -> Runner:
    return _compiled(model, mode="reduce-overhead", freeze=True)


def _max_autotune(model: Network, example: Tensor, threads: int) -> Runner:
    return _compiled(model, mode="max-autotune")


def _zentorch(model: Network, example: Tensor, threads: int) -> Runner:
    importlib.import_module("zentorch")  # registers the backend
    return _compiled(model, backend="zentorch")


def _cudnn_graph(model: Network, example: Tensor, threads: int) -> Runner:
    """Capture eager channels_last in a CUDA graph: eager without launch overhead."""
    network = _nhwc(model)
    static = example.clone()
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


def _fast(model: Network, example: Tensor, threads: int) -> Runner:
    from dcgan import fast

    return fast.convert(model)


def _fast_compile(model: Network, example: Tensor, threads: int) -> Runner:
    from dcgan import fast

    return torch.compile(fast.convert(model))


def _fast_graph(model: Network, example: Tensor, threads: int) -> Runner:
    from dcgan import fast

    return fast.graphed(fast.convert(model), example.shape[0])


PROVIDERS: dict[str, Provider[Build]] = {
    provider.name: provider
    for provider in (
        Provider("eager", _eager, searches=True),
        Provider("channels_last", _channels_last, searches=True),
        Provider("compile", _compile),
        Provider("reduce-overhead", _reduce_overhead, devices=("cuda",), replays=True),
        Provider("max-autotune", _max_autotune, replays=True, searches=True),
        Provider("cudnn-graph", _cudnn_graph, devices=("cuda",), replays=True, searches=True),
        Provider(
            "onnxruntime",
            runtimes.onnxruntime,
            package="onnxruntime",
            devices=("cpu",),
            dtypes=("float32",),
        ),
        Provider("openvino", runtimes.openvino, package="openvino", devices=("cpu",), dtypes=("float32",)),
        Provider("zentorch", _zentorch, package="zentorch", devices=("cpu",)),
        Provider("fast", _fast, ours=True, package="dcgan.fast"),
        Provider("fast-compile", _fast_compile, ours=True, package="dcgan.fast"),
        Provider("fast-graph", _fast_graph, ours=True, package="dcgan.fast", devices=("cuda",), replays=True),
    )
}


def find(name: str, registry: Mapping[str, Provider[Any]] = PROVIDERS) -> Provider[Any]:
    """Find a provider by name; ``module:function`` names a custom build function.

    Raises:
        ValueError: there is no such provider; the message lists the known ones.
    """
    if name in registry:
        return registry[name]
    module, colon, function = name.partition(":")
    if colon:
        try:
            return Provider(name, getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no provider {name!r}: {error}") from error
    raise ValueError(f"no provider {name!r}; choose from {', '.join(registry)}, or give MODULE:FUNCTION")


def find_all(names: Iterable[str], registry: Mapping[str, Provider[Any]] = PROVIDERS) -> list[Provider[Any]]:
    """Find providers by name, without duplicates, in the given order."""
    return [find(name, registry) for name in dict.fromkeys(names)]
