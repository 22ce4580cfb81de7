"""Inference by replaying a CUDA graph, for batches so small that kernel launch overhead dominates."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from . import models
from .capturing import capturing
from .kernels import ops, weight_cache

Network = models.Generator | models.Discriminator


class Graphed:
    """Run ``model`` on up to ``batch`` rows by replaying one CUDA graph; constructed by :func:`graphed`.

    BatchNorm is folded inside the graph, from the live buffers. Weights are packed outside it: before each
    replay the graph is recaptured if the weights, or a setting that the graph depends on, have changed. As
    elsewhere on a GPU, call ``model.refresh()`` after an in-place edit of ``p.data``.
    """

    def __init__(self, model: Network, batch: int) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be a positive integer, got {batch!r}")
        if not isinstance(model, Network):
            raise TypeError(f"model must be a Generator or a Discriminator, got {type(model).__qualname__}")
        parameter = next(model.parameters())
        if not parameter.is_cuda:
            raise ValueError(f"model must be on a CUDA device, its parameters are on {parameter.device}")
        self.model, self.batch = model, batch
        shape: tuple[int, ...] = (
            (model.latent_dim,)
            if isinstance(model, models.Generator)
            else (model.channels, model.image_size, model.image_size)
        )
        self._input = torch.zeros(batch, *shape, dtype=parameter.dtype, device=parameter.device)
        self._stream = torch.cuda.Stream(parameter.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = self._input
        self._kept_alive: list[Tensor] = []
        self._fingerprint: Hashable = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``model(x)`` in newly allocated memory.

        Raises:
            ValueError: x has another shape or more than ``batch`` rows, or the model is in training mode.
            TypeError: x has another dtype or device.
        """
        flat = x.flatten(1) if isinstance(self.model, models.Generator) and x.ndim == 4 else x
        if flat.shape[1:] != self._input.shape[1:] or x.shape[0] > self.batch:
            allowed = ["≤ " + str(self.batch), *self._input.shape[1:]]
            raise ValueError(f"x must be [{', '.join(map(str, allowed))}], got {list(x.shape)}")
        if x.dtype != self._input.dtype or x.device != self._input.device:
            raise TypeError(
                f"x must be {self._input.dtype} on {self._input.device}, got {x.dtype} on {x.device}"
            )
        with torch.cuda.device(self._input.device):
            fingerprint = self._current_fingerprint()
            if self._graph is None or fingerprint != self._fingerprint:
                self._capture()
            assert self._graph is not None
            self._input[: x.shape[0]].copy_(flat)
            self._graph.replay()
            return self._output[: x.shape[0]].clone()

    def _current_fingerprint(self) -> Hashable:
        """Return everything that a captured graph depends on but its replay does not read."""
        from .kernels.gpu.launcher import precision  # deferred: imports Triton, which CPU machines may lack

        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.model.training:
            raise ValueError(
                "a graphed model must be in eval mode: a replay would not update the running statistics"
            )
        identities = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return identities, weight_cache.epoch(), autocast, precision(torch.float32), ops.engine()

    @torch.no_grad()
    def _capture(self) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), weight_cache.collecting():
            self.model(self._input)  # compiles kernels and packs weights, on the captured stream
        current.wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with weight_cache.collecting() as kept, capturing(graph, self._stream):
            self._output = self.model(self._input)
        self._graph, self._kept_alive = graph, list(kept)
        self._fingerprint = self._current_fingerprint()


def graphed(model: Network, batch: int) -> Graphed:
    """Return a callable that runs ``model``, in eval mode, on up to ``batch`` rows by replaying a CUDA graph.

    Raises:
        ValueError: ``batch`` is not a positive integer, or the model is not on a CUDA device.
        TypeError: ``model`` is not a Generator or a Discriminator.
    """
    return Graphed(model, batch)
