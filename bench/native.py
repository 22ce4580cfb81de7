"""A chain of layers through the native engine's C ABI, each layer by an algorithm of one's choice.

The drop-in lets the engine choose; here every candidate can be checked and timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from bench.usage import UsageError
from dcgan.kernels.call import Stage
from dcgan.kernels.cpu import Geometry, Prepared, library, select
from dcgan.kernels.cpu.run import geometry, plan


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
        if algorithms is None:
            algorithms = [picked(g, shape[0], threads) for g in geometries(stages, shape[2], shape[3])]
        self.algorithms = tuple(algorithms)
        self._stages, self._shape, self._threads = list(stages), tuple(shape), threads
        self._prepared: Prepared | None = None

    def _layers(self) -> ctypes.Array[library.Layer]:
        planned = plan(self._shape, self._stages, self._threads, self.algorithms)
        return (library.Layer * len(self._stages)).from_buffer_copy(planned.layers)

    @property
    def workspace(self) -> int:
        """Bytes of memory that the engine takes for itself in a call."""
        layers = self._layers()
        size = library.library().dcgan_workspace(
            ctypes.addressof(layers), len(layers), self._shape[0], self._threads
        )
        return library.checked(size)

    @property
    def packed_bytes(self) -> int:
        """Of the weights, as the algorithms read them."""
        size = library.library().dcgan_packed_size
        return sum(4 * library.checked(size(ctypes.addressof(layer))) for layer in self._layers())

    def __call__(self, x: Tensor) -> Tensor:
        """The result for x, NHWC in memory but where the last layer writes an image."""
        if self._prepared is None:
            self._prepared = Prepared(self._shape, self._stages, self._threads, self.algorithms)
        image = self.algorithms[-1] == "narrow" and self._stages[-1].transposed
        return self._prepared(x, not image)
