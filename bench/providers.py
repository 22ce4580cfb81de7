"""Who computes it: one entry a provider, each a function from the reference network to a callable.

A build function gets the reference network in eval mode, on the case's device and in its dtype, an example
input and the number of CPU threads, and returns ``input → output``. What it compiles it may compile at the
first call: that is part of the check, and not timed.
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
    """One contestant."""

    name: str
    build: B
    """Build, or another registry's kind of function."""
    ours: bool = False
    """This project's: not a baseline."""
    package: str | None = None
    """The package it needs, where that is not PyTorch."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "tf32", "float16", "bfloat16")
    replays: bool = False
    """Its calls replay CUDA graphs already (on CUDA), so they are not captured once more."""
    searches: bool = False
    """Building it is little but timing algorithms (cuDNN's, a compiler's templates), which nothing is to
    disturb. torch.compile around cuDNN's convolutions compiles for half a minute and searches for moments."""

    def unavailable(self, case: Case) -> str | None:
        """Why it cannot run ``case`` here, or None."""
        if case.device not in self.devices:
            if case.device == "cpu":
                return "a GPU's" if torch.cuda.is_available() else "no GPU here"
            return "a CPU's"
        if self.package is not None and not _installed(self.package):
            return "not installed"
        if case.dtype not in self.dtypes:
            return f"no {case.dtype}"
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
    """torch.compile as a user who wants speed would set it: channels_last, and weights frozen on the CPU."""
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
    """Eager channels_last, captured: what is left of eager once launches cost nothing."""
    network = _nhwc(model)
    static = example.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # cuDNN picks its algorithms, the allocator its blocks
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
    """A provider by its name, or ``module:function`` for a build function of one's own.

    Raises:
        ValueError: there is no such provider; the message lists those there are.
    """
    if name in registry:
        return registry[name]
    module, colon, function = name.partition(":")
    if colon:
        try:
            return Provider(name, getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no provider {name!r}: {error}") from error
    raise ValueError(f"no provider {name!r}; there are {', '.join(registry)}, or MODULE:FUNCTION")


def find_all(names: Iterable[str], registry: Mapping[str, Provider[Any]] = PROVIDERS) -> list[Provider[Any]]:
    """Providers by name, each once, in the order given."""
    return [find(name, registry) for name in dict.fromkeys(names)]
