"""Inference by replaying a CUDA graph, for batches so small that kernel launch overhead dominates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import layers, models
from .introspection import HOOKS
from .kernels import weight_cache
from .kernels.capturing import Cuda, Replay

Network = models.Generator | models.Discriminator


class Graphed:
    """Run ``model`` on up to ``batch`` rows by replaying one CUDA graph; constructed by :func:`graphed`.

    The graph keeps its packed weights and folded BatchNorms up to date itself, as
    :mod:`.kernels.gpu.prepare` describes. It is captured again if the network or a setting that it depends
    on has changed, and, where the network's layers do not run as one operator, if weights have.
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
        self._example = torch.zeros(batch, *shape, dtype=parameter.dtype, device=parameter.device)
        self._backend: Any = Cuda(parameter.device)
        self._replay: Replay | None = None
        self._networks: dict[Any, Any] = {}  # packed weights, see weight_cache.collecting
        self._kept_alive: list[Tensor] = []
        self._settings: Any = None
        self._tensors: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``model(x)`` in newly allocated memory.

        Raises:
            ValueError: x has another shape or more than ``batch`` rows, or the model is in training mode.
            TypeError: x has another dtype or device.
        """
        example = self._example
        flat = x.flatten(1) if isinstance(self.model, models.Generator) and x.ndim == 4 else x
        if flat.shape[1:] != example.shape[1:] or x.shape[0] > self.batch:
            allowed = ["≤ " + str(self.batch), *example.shape[1:]]
            raise ValueError(f"x must be [{', '.join(map(str, allowed))}], got {list(x.shape)}")
        if x.dtype != example.dtype or x.device != example.device:
            raise TypeError(f"x must be {example.dtype} on {example.device}, got {x.dtype} on {x.device}")
        if self.model.training:
            raise ValueError(
                "a graphed model must be in eval mode: a replay would not update the running statistics"
            )
        with self._backend.device_context():
            if self._replay is None or self._changed() or not self._followed():
                self._capture()
            assert self._replay is not None
            return self._replay(flat)

    def _freeze(self) -> None:
        freeze = getattr(self.model, "_freeze", None)  # a reference network has none
        if freeze is not None:
            freeze()

    def _followed(self) -> bool:
        """Report changed weights to the device; return False if the graph cannot follow them."""
        return all(network.follow(self._freeze) for network in self._networks.values())

    def _changed(self) -> bool:
        """Return whether anything has changed that the graph depends on but its replay does not read."""
        if self._settings != self._current_settings():
            return True
        if self._networks and not self._kept_alive and self._runs_main_alone():
            return any(network.moved() for network in self._networks.values())
        return bool(self._tensors != self._current_tensors())

    def _runs_main_alone(self) -> bool:
        """Return whether the model reads no other tensors than those of ``main``."""
        from . import fast  # deferred: imports this module

        known = type(self.model) in (fast.Generator, fast.Discriminator)
        return known and "forward" not in self.model.__dict__

    def _current_settings(self) -> Any:
        from .kernels.gpu.launcher import precision  # deferred: imports Triton, which CPU machines may lack

        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        # In a network that runs as one operator the fingerprint shows that no inner module has hooks.
        modules = (self.model,) if self._networks else self.model.modules()
        hooks = [tuple(module.__dict__[name]) for module in modules for name in HOOKS]
        return autocast, precision(torch.float32), hooks, layers.fingerprint(self.model.main)

    def _current_tensors(self) -> Any:
        """Return where all tensors lie, and if the graph reads results computed from them, their versions."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        memory = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        if not self._kept_alive:
            return memory, None
        return memory, (weight_cache.epoch(), [0 if t.is_inference() else t._version for t in tensors])

    @torch.no_grad()
    def _capture(self) -> None:
        self._replay = None  # frees the old graph's memory first
        self._networks.clear()
        with weight_cache.collecting(self._networks):
            # Compiles kernels and packs weights, on the stream that will be captured.
            self._backend.run(lambda: self.model(self._example))
        torch.cuda.synchronize()
        with weight_cache.collecting(self._networks) as kept:
            self._replay = Replay(self.model, self._example, self._backend)
        self._kept_alive = list(kept)
        self._settings, self._tensors = self._current_settings(), self._current_tensors()


def graphed(model: Network, batch: int) -> Graphed:
    """Return a callable that runs ``model``, in eval mode, on up to ``batch`` rows by replaying a CUDA graph.

    Raises:
        ValueError: ``batch`` is not a positive integer, or the model is not on a CUDA device.
        TypeError: ``model`` is not a Generator or a Discriminator.
    """
    return Graphed(model, batch)
