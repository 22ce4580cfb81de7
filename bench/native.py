"""Run a chain of layers through the native engine's C ABI, with a chosen algorithm for each layer.

The drop-in lets the engine choose; here every candidate can be checked and timed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from bench.usage import UsageError
from dcgan.kernels.call import Stage
from dcgan.kernels.cpu import Geometry, Prepared, algorithm_selection, library
from dcgan.kernels.cpu.inference import geometry, plan


def required() -> None:
    """Raise UsageError if the engine was not built."""
    if (problem := library.problem()) is not None:
        raise UsageError(f"the native engine is missing: {problem}")


def chosen_algorithm(g: Geometry, images: int, threads: int) -> str:
    """Return the algorithm that the engine chooses for a layer with prepacked weights."""
    return algorithm_selection.algorithm(g, images, threads, library.isa(), True)


def geometries(stages: Sequence[Stage], height: int, width: int) -> list[Geometry]:
    """Return the geometry of each layer; height and width are those of the first layer's input."""
    found = []
    for stage in stages:
        g = geometry(stage.transposed, stage.weight.shape, height, width, stage.stride, stage.padding)
        height, width = g.output
        found.append(g)
    return found


class Chain:
    """Float32 stages on images of one shape. Weights are packed at the first call and kept."""

    def __init__(
        self,
        stages: Sequence[Stage],
        shape: Sequence[int],
        algorithms: Sequence[str] | None = None,
        threads: int = 1,
    ) -> None:
        """``shape`` is that of x, [N, C, H, W]. ``algorithms`` defaults to those that the engine chooses."""
        if algorithms is None:
            algorithms = [
                chosen_algorithm(g, shape[0], threads) for g in geometries(stages, shape[2], shape[3])
            ]
        self.algorithms = tuple(algorithms)
        self._stages, self._shape, self._threads = list(stages), tuple(shape), threads
        self._prepared: Prepared | None = None

    def _layers(self) -> ctypes.Array[library.Layer]:
        planned = plan(self._shape, self._stages, self._threads, self.algorithms)
        return (library.Layer * len(self._stages)).from_buffer_copy(planned.layers)

    @property
    def workspace(self) -> int:
        """Bytes of workspace that the engine needs for a call."""
        layers = self._layers()
        size = library.library().dcgan_workspace(
            ctypes.addressof(layers), len(layers), self._shape[0], self._threads
        )
        return library.checked(size)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        size = library.library().dcgan_packed_size
        return sum(4 * library.checked(size(ctypes.addressof(layer))) for layer in self._layers())

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result for x, channels_last unless the last layer is a narrow transposed convolution."""
        if self._prepared is None:
            self._prepared = Prepared(self._shape, self._stages, self._threads, self.algorithms)
        image = self.algorithms[-1] == "narrow" and self._stages[-1].transposed
        return self._prepared(x, not image)
