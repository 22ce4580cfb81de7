"""A chain of layers through the native engine's C ABI, each layer by an algorithm of one's choice.

:class:`dcgan.kernels.cpu.Prepared` lets the engine choose; here every candidate can be checked and timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.usage import UsageError
from dcgan.kernels.call import Stage
from dcgan.kernels.cpu import Geometry, library, select
from dcgan.kernels.cpu.run import geometry, pack


def required() -> None:
    """Raises UsageError where the engine was not built."""
    if (problem := library.problem()) is not None:
        raise UsageError(f"the native engine is missing: {problem}")


def picked(g: Geometry, images: int, threads: int) -> str:
    """The algorithm that the engine takes for a layer whose weights stand still."""
    return select.algorithm(g, images, threads, library.isa(), True)


def geometries(stages: Sequence[Stage], height: int, width: int) -> list[Geometry]:
    """The layers' shapes; height and width are those of the first one's input."""
    found = []
    for stage in stages:
        g = geometry(stage.transposed, stage.weight.shape, height, width, stage.stride, stage.padding)
        height, width = g.output
        found.append(g)
    return found


class Chain:
    """Stages in float32 on images of one shape. Weights are packed when they are first needed, and kept."""

    def __init__(
        self,
        stages: Sequence[Stage],
        shape: Sequence[int],
        algorithms: Sequence[str] | None = None,
        threads: int = 1,
    ) -> None:
        """``shape`` [N, C, H, W] is x's. Without ``algorithms`` those that the engine picks."""
        self._images, self._threads = shape[0], threads
        self._stages = list(stages)
        self._geometries = geometries(stages, shape[2], shape[3])
        if algorithms is None:
            algorithms = [picked(g, self._images, threads) for g in self._geometries]
        self.algorithms = tuple(algorithms)
        self._packed: list[Tensor] = []
        self._layers = (library.Layer * len(self._stages))()
        for layer, stage, g, algorithm in zip(
            self._layers, self._stages, self._geometries, self.algorithms, strict=True
        ):
            layer.transposed, layer.algorithm = g.transposed, library.ALGORITHMS.index(algorithm)
            layer.c_in, layer.c_out, layer.height, layer.width = g.c_in, g.c_out, g.height, g.width
            layer.kernel, layer.stride, layer.padding = g.kernel, g.stride, g.padding
            layer.act, layer.slope = library.ACTIVATIONS.index(stage.act), stage.slope
            layer.epsilon = stage.eps

    @property
    def workspace(self) -> int:
        """Bytes of memory that the engine takes for itself in a call."""
        size = library.library().dcgan_workspace(
            ctypes.addressof(self._layers), len(self._layers), self._images, self._threads
        )
        return library.checked(size)

    @property
    def packed_bytes(self) -> int:
        """Of the weights, as the algorithms read them."""
        start, step = ctypes.addressof(self._layers), ctypes.sizeof(library.Layer)
        size = library.library().dcgan_packed_size
        return sum(4 * library.checked(size(start + step * i)) for i in range(len(self._layers)))

    def pack(self) -> None:
        """Packs the weights as they are now."""
        self._packed = [
            pack(stage.weight, g, algorithm)
            for stage, g, algorithm in zip(self._stages, self._geometries, self.algorithms, strict=True)
        ]
        for layer, stage, packed in zip(self._layers, self._stages, self._packed, strict=True):
            layer.weights = packed.data_ptr()
            vectors = (stage.scale, stage.shift, stage.mean, stage.var)
            layer.scale, layer.shift, layer.mean, layer.variance = map(_address, vectors)

    def __call__(self, x: Tensor) -> Tensor:
        """The result for x, NHWC in memory but where the last layer writes an image."""
        if not self._packed:
            self.pack()
        first, last = self._stages[0], self._stages[-1]
        if self.algorithms[0] != "narrow" or first.transposed:
            x = x.contiguous(memory_format=torch.channels_last)
        image = self.algorithms[-1] == "narrow" and last.transposed
        y = torch.empty(
            self._images,
            last.c_out,
            *self._geometries[-1].output,
            memory_format=torch.contiguous_format if image else torch.channels_last,
        )
        views = library.View.of(x), library.View.of(y)
        library.checked(
            library.library().dcgan_run(
                ctypes.addressof(self._layers),
                len(self._layers),
                self._images,
                ctypes.addressof(views[0]),
                ctypes.addressof(views[1]),
                self._threads,
            )
        )
        return y


def _address(vector: Tensor | None) -> int | None:
    if vector is None:
        return None
    assert vector.dtype == torch.float32
    assert vector.is_contiguous()
    return vector.data_ptr()
