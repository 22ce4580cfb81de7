"""Inference through a captured CUDA graph, for batches so small that launching the kernels takes longest."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from . import models
from .capturing import capturing
from .kernels import ops, weights

Network = models.Generator | models.Discriminator


class Graphed:
    """``model`` on inputs of at most ``batch`` rows as the replay of one CUDA graph; made by :func:`graphed`.

    BatchNorm is folded inside the graph, from the live buffers. Weights are packed outside it; before each
    replay the graph is captured anew if they, or a setting it depends on, have changed. As elsewhere on a
    GPU, an in-place edit of ``p.data`` needs ``model.refresh()``.
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
        self._kept: list[Tensor] = []
        self._stamp: Hashable = None

    def __call__(self, x: Tensor) -> Tensor:
        """``model(x)``, in memory of its own. ValueError or TypeError for an x the graph was not made for."""
        flat = x.flatten(1) if isinstance(self.model, models.Generator) and x.ndim == 4 else x
        if flat.shape[1:] != self._input.shape[1:] or x.shape[0] > self.batch:
            allowed = ["≤ " + str(self.batch), *self._input.shape[1:]]
            raise ValueError(f"x must be [{', '.join(map(str, allowed))}], got {list(x.shape)}")
        if x.dtype != self._input.dtype or x.device != self._input.device:
            raise TypeError(
                f"x must be {self._input.dtype} on {self._input.device}, got {x.dtype} on {x.device}"
            )
        with torch.cuda.device(self._input.device):
            stamp = self._state()
            if self._graph is None or stamp != self._stamp:
                self._capture()
            assert self._graph is not None
            self._input[: x.shape[0]].copy_(flat)
            self._graph.replay()
            return self._output[: x.shape[0]].clone()

    def _state(self) -> Hashable:
        """What a captured graph depends on and its replay does not look at."""
        from .kernels.gpu.launch import precision  # imports Triton, which not every CPU machine has

        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.model.training:
            raise ValueError("a graphed model must be in eval mode: its replay would update no statistics")
        identities = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return identities, weights.epoch(), autocast, precision(torch.float32), ops.engine()

    @torch.no_grad()
    def _capture(self) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), weights.keeping():
            self.model(self._input)  # compiles kernels and packs weights, on the stream that is captured
        current.wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with weights.keeping() as kept, capturing(graph, self._stream):
            self._output = self.model(self._input)
        self._graph, self._kept = graph, list(kept)
        self._stamp = self._state()


def graphed(model: Network, batch: int) -> Graphed:
    """``model`` in eval mode as a callable that replays a CUDA graph for up to ``batch`` rows.

    Raises:
        ValueError: ``batch`` is not positive, or the model is not on a CUDA device.
        TypeError: ``model`` is not a Generator or Discriminator.
    """
    return Graphed(model, batch)
