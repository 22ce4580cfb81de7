"""Launches of a network in eval on the Triton engine, recorded by a driver or in place of compilation.

Nothing is executed. Tests in tests/kernels/gpu use the ``recorder`` of its conftest.
"""

from __future__ import annotations

import contextlib
import gc
import math
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor, nn

from dcgan.kernels import chain, weight_cache
from dcgan.kernels.gpu import inference, launcher, packing
from dcgan.kernels.gpu.launcher import Launch
from dcgan.kernels.gpu.prepare import vectors_of
from dcgan.kernels.gpu.tools.simulated_gpu import Driver
from dcgan.kernels.spec import ConvSpec, Stage
from tests.support.chains import small_chain
from tests.support.inference import weights_of

PREPARE = "_prepare_kernel"
TENSORS = {
    *("weights", "vectors", "buffers", "folded_ptr", "copies", "state_ptr"),  # of prepare
    *("x", "w_ptr", "y", "partial_ptr"),  # of a product
}
NO_COMPILATION = pytest.mark.usefixtures("no_compilation")
"""Launches are recorded in place of their compilation."""
SOON = pytest.mark.usefixtures("soon")
"""The second call of each kind is captured."""


class Launched(NamedTuple):
    """What the GPU would have received."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    dependent: bool
    stream: int
    others: dict[str, Any]
    """Scalars and compile-time constants."""
    tensors: dict[str, Any]
    """The address of each tensor, or a tuple of them."""

    def without_tensors(self) -> Launched:
        return self._replace(tensors={})


launched: list[Launched] = []
hooks: list[Any] = []
"""The hooks that Triton's launcher would have called around each launch of compiled code."""


def addresses(value: Any) -> Any:
    """Return the address of a tensor, given it or its address; of each in a tuple."""
    if isinstance(value, tuple):
        return tuple(addresses(one) for one in value)
    return value.data_ptr() if isinstance(value, Tensor) else value


def record(kernel: Any, grid: tuple[int, ...], options: tuple[int, bool], stream: int, given: Any) -> None:
    """Append a launch, given its number of warps, whether it is dependent, and all arguments."""
    named = dict(zip(kernel.arg_names, given, strict=True))
    tensors = {name: addresses(value) for name, value in named.items() if name in TENSORS}
    others = {name: value for name, value in named.items() if name not in TENSORS}
    launched.append(Launched(kernel.__name__, grid, *options, stream, others, tensors))


@contextlib.contextmanager
def active(driver: Driver) -> Iterator[None]:
    """Let Triton launch through a driver, with no code compiled before and no plan made."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    launcher.kernel_for.cache_clear()
    launcher._plans.clear()
    try:
        yield
    finally:
        launcher._plans.clear()
        launcher.kernel_for.cache_clear()
        triton.runtime.driver._active = before


class Recorder(Driver):
    stream = 0
    """The current one."""

    def get_current_stream(self, device: int = 0) -> int:
        return self.stream

    class launcher_cls:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.kernel, self.options = source.fn, (metadata.num_warps, metadata.launch_pdl)

        def __call__(self, *arguments: Any) -> None:
            # The grid, then stream, handles, metadata and hooks, then the kernel's declared arguments.
            hooks.append(arguments[7:9])
            record(self.kernel, arguments[:3], self.options, arguments[3], arguments[9:])


class Recorded:
    """A launch in place of its compiled kernel: runs of it are recorded."""

    def __init__(self, launch: Launch) -> None:
        self.kernel, self.options = launch.kernel, (launch.num_warps, launch.dependent)
        self.function = self.packed_metadata = None

    def run(self, *arguments: Any) -> None:
        record(self.kernel, arguments[:3], self.options, arguments[3], arguments[9:])

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.run(*grid, Recorder.stream, *[None] * 5, *arguments)


def launch_without_compilation(launch: Launch) -> Recorded:
    recorded = Recorded(launch)
    given = (*launch.tensors.values(), *launch.scalars.values(), *launch.constants.values())
    recorded[launch.programs, 1, 1](*given)
    return recorded


def use_stream(patch: pytest.MonkeyPatch, stream: int) -> None:
    """Make a stream the current one."""
    patch.setattr(inference, "_stream", lambda x: stream)
    patch.setattr(Recorder, "stream", stream)


class Made(NamedTuple):
    """References to everything that has been prepared, in order."""

    prepared: list[weakref.ref[inference.Prepared]]
    weights: list[weakref.ref[inference.Weights]]

    def counts(self) -> tuple[int, int]:
        return len(self.prepared), len(self.weights)

    def alive(self) -> tuple[int, int]:
        """Count what has not been freed."""
        gc.collect()
        return sum(r() is not None for r in self.prepared), sum(r() is not None for r in self.weights)


def new() -> list[Launched]:
    """Return the launches since the last call."""
    found = list(launched)
    launched.clear()
    return found


class Case:
    """A chain whose weights are frozen, as a network's in eval mode are."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, batch: int = 3) -> None:
        self.x, self.stages = small_chain(kind, dtype, batch)
        self.owner = nn.Module()
        self.run = chain.Chain(self.stages)
        self.channels_last, self.precision = True, launcher.precision(torch.float32)

    def __call__(self, x: Tensor | None = None) -> Tensor:
        backends: Any = torch.backends
        setting = backends.cudnn.conv
        before, setting.fp32_precision = setting.fp32_precision, self.precision
        try:
            return self.run(self.x if x is None else x, self.channels_last, self.freeze)
        finally:
            setting.fp32_precision = before

    def freeze(self) -> None:
        weight_cache.freeze(self.owner, [stage.weight for stage in self.stages])

    @property
    def weights(self) -> inference.Weights:
        return weights_of(self.run)

    @property
    def prepared(self) -> inference.Prepared:
        (found,) = self.run._network._prepared.values()
        assert isinstance(found, inference.Prepared)
        return found


def unaligned(t: Tensor) -> Tensor:
    """Copy with the same values and strides, one element off a 16-byte address."""
    memory = torch.empty(1 + t.numel(), dtype=t.dtype)[1:]
    moved = memory.as_strided(t.shape, t.stride()).copy_(t)
    assert moved.data_ptr() % 16
    return moved


class SimulatedCuda:
    """A simulated CUDA graph: the launches of a capture are not made, and a replay makes them."""

    log: list[str]
    failure: str

    def __init__(self, device: torch.device) -> None:
        pass

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.log.append("capture")
        if self.failure == "before":
            raise RuntimeError("no")
        count = len(launched)
        result = step()
        graph = launched[count:]
        del launched[count:]
        if self.failure == "after":
            raise RuntimeError("no")

        def replay() -> None:
            self.log.append("replay")
            launched.extend(graph)

        return replay, result


captures = inference.captures


def captures_as_on_cuda(x: Tensor) -> bool:
    return captures(types.SimpleNamespace(is_cuda=True, shape=x.shape))  # type: ignore[arg-type]


def logged(backend: type[SimulatedCuda]) -> list[str]:
    """Return the events since the last call."""
    found = list(backend.log)
    backend.log.clear()
    return found


# --- changes that the host sees -----------------------------------------------------------------------------


def step_of(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[Case], None]:
    def step(case: Case) -> None:
        weights = [stage.weight.requires_grad_() for stage in case.stages]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer(weights).step()

    return step


REPORTED: dict[str, Callable[[Case], Any]] = {
    "in place": lambda case: case.stages[2].weight.mul_(2),
    "all in place": lambda case: [stage.weight.add_(1) for stage in case.stages],
    "copy_": lambda case: case.stages[-1].weight.copy_(torch.zeros(())),
    "SGD": step_of(lambda weights: torch.optim.SGD(weights, 0.1)),
    "fused Adam": step_of(lambda weights: torch.optim.Adam(weights, fused=True)),
    "invalidate": lambda case: weight_cache.invalidate([case.stages[1].weight]),
    "thaw": lambda case: weight_cache.thaw(case.owner),
}


# --- checks -------------------------------------------------------------------------------------------------


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two memory ranges (first, end) overlap."""
    return one[0] < other[1] and other[0] < one[1]


def span(t: Tensor) -> tuple[int, int]:
    """Return the range of a tensor's memory."""
    return t.data_ptr(), t.data_ptr() + (launcher.extent(t.shape, t.stride()) + 1) * t.element_size()


def check_call(
    launches: Sequence[Launched],
    x: Tensor,
    y: Tensor,
    stages: Sequence[Stage],
    x_read: int | None = None,
    precision: str | None = None,
) -> None:
    """Check a call's launches: their order, geometry, and what each reads and writes.

    Args:
        x: the input, in the dtype of the products.
        y: the result.
        x_read: the address of the tensor that is read, if not x's.
        precision: of the products, if it is not the present setting.
    """
    prepare, *products = launches
    assert {launch.stream for launch in launches} == {Recorder.stream}
    assert prepare.kernel == PREPARE
    assert PREPARE not in {product.kernel for product in products}
    assert len(products) == len(stages)

    cast = [stage._replace(weight=stage.weight.to(x.dtype)) for stage in stages]
    nhwc = (y.stride(1), y.stride(3)) == (1, y.shape[1])
    specs = inference.product_specs(chain.specs(x, cast, nhwc), stages)
    if precision is not None:
        specs = [spec._replace(precision=precision) for spec in specs]
    assert y.stride() == specs[-1].y.stride

    # prepare reads the present tensors, and writes one buffer of packed weights and one of vectors.
    read = prepare.tensors
    assert read["weights"] == tuple(stage.weight.data_ptr() for stage in stages)
    vectors = [vector for stage in stages for vector in vectors_of(stage)]
    for vector, address in zip(vectors, read["vectors"], strict=True):
        assert vector is None or address == vector.data_ptr()
    shapes = [(stage.weight.shape, layout) for stage, layout in zip(stages, layouts(specs), strict=True)]
    starts, size = packing.offsets(shapes)
    (buffer,), folded, folds = read["buffers"], read["folded_ptr"], prepare.others["FOLDS"]
    kept = [(buffer, buffer + size * x.element_size())]
    kept.append((folded, folded + 4 * (folds.start[-1] + 2 * stages[-1].c_out)))

    first, end = span(x)
    source = (first, end) if x_read is None else (x_read, x_read + end - first)
    for i, (product, spec, stage) in enumerate(zip(products, specs, stages, strict=True)):
        given, constants = product.tensors, product.others["SPEC"]
        assert constants.x == spec.x
        assert constants.y == spec.y
        assert constants.precision == ("tf32" if spec.precision == "tf32" else "ieee")
        assert given["x"][0] == source[0], "a product reads what the one before it wrote"
        assert given["w_ptr"] == buffer + starts[i] * x.element_size()
        scale, shift = given["y"][3:]
        assert not spec.y.scaled or scale == folded + 4 * folds.start[i]
        assert not spec.y.shifted or shift == folded + 4 * (folds.start[i] + stage.c_out)
        assert spec.y.scaled == (stage.scale is not None or stage.mean is not None)
        written = given["y"][0]
        target = written, written + spec.images * math.prod(spec.y.size) * x.element_size()
        assert written % 16 == 0
        assert not overlap(target, source), "a map must not be overwritten while it is read"
        assert not any(overlap(target, memory) for memory in kept)
        source = target
    assert source == span(y)


def layouts(specs: Sequence[ConvSpec]) -> tuple[packing.Layout, ...]:
    found = inference.layouts_of(specs)
    assert len(found) == len(specs)
    return found


def check_equal(one: Sequence[Launched], other: Sequence[Launched]) -> None:
    """Check that kernels, grids, constants and scalars are equal, and all that prepare reads and writes."""
    assert [launch.without_tensors() for launch in one] == [launch.without_tensors() for launch in other]
    assert one[0].tensors == other[0].tensors


def check_memory(prepared: inference.Prepared, launches: Sequence[Launched], y: Tensor) -> None:
    """Check that the maps lie in a workspace of the size that is allocated for them."""
    item, ends = y.element_size(), []
    starts = [launch.tensors["y"][0] for launch in launches[1:-1]]
    for start, spec in zip(starts, prepared._specs, strict=False):
        ends.append(start + spec.images * math.prod(spec.y.size) * item)
    workspace = prepared.bytes - y.numel() * item
    assert max(ends) - min(starts) <= workspace
    assert len(set(starts)) <= 2, "a map overwrites the last but one"
